"""Channel multiplexing; see `mars.kernels.cmx.op`."""

from mars.kernels.cmx.op import cmx as cmx
from mars.kernels.cmx.op import inverse_cmx as inverse_cmx
