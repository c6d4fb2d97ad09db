"""This operation is VAR's multi-scale residual vector quantisation; `op` is its contract."""

from mars.kernels.multiscale_quantize.op import area_downsample as area_downsample
from mars.kernels.multiscale_quantize.op import dequantize_scale as dequantize_scale
from mars.kernels.multiscale_quantize.op import multiscale_quantize as multiscale_quantize
