"""Index of the nearest codebook row."""

from mars.kernels.nearest_code.op import PackedCodebook as PackedCodebook
from mars.kernels.nearest_code.op import nearest_code as nearest_code
from mars.kernels.nearest_code.op import pack_codebook as pack_codebook
