"""This operation is channel multiplexing; `mars.kernels.cmx.op` is its contract."""

from mars.kernels.cmx.op import cmx as cmx
from mars.kernels.cmx.op import inverse_cmx as inverse_cmx
from mars.kernels.cmx.op import inverse_spectrogram_cmx as inverse_spectrogram_cmx
from mars.kernels.cmx.op import spectrogram_cmx as spectrogram_cmx
