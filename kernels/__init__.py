"""Operations."""

from mars.kernels._backend import use as use
from mars.kernels.cmx import cmx as cmx
from mars.kernels.cmx import inverse_cmx as inverse_cmx
from mars.kernels.cmx import inverse_spectrogram_cmx as inverse_spectrogram_cmx
from mars.kernels.cmx import spectrogram_cmx as spectrogram_cmx
from mars.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from mars.kernels.linear_cross_entropy import token_scores as token_scores
from mars.kernels.multiscale_quantize import area_downsample as area_downsample
from mars.kernels.multiscale_quantize import dequantize_scale as dequantize_scale
from mars.kernels.multiscale_quantize import multiscale_quantize as multiscale_quantize
from mars.kernels.nearest_code import nearest_code as nearest_code
from mars.kernels.nearest_code import pack_codebook as pack_codebook
from mars.kernels.scale_causal_attention import attention as attention
from mars.kernels.scale_causal_attention import cached_attention as cached_attention
from mars.kernels.scale_causal_attention import scale_causal_attention as scale_causal_attention
