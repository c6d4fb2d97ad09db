"""Index of the nearest codebook row."""

from mars.kernels.nearest_code.op import nearest_code as nearest_code
