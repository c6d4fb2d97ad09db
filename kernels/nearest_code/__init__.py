"""This operation finds the nearest codebook row; `op` is its contract."""

from mars.kernels.nearest_code.op import PackedCodebook as PackedCodebook
from mars.kernels.nearest_code.op import nearest_code as nearest_code
from mars.kernels.nearest_code.op import pack_codebook as pack_codebook
