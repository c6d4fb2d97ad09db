"""This operation is attention that is bidirectional inside a scale and causal across scales; `op` is its contract."""

from mars.kernels.scale_causal_attention.op import attention as attention
from mars.kernels.scale_causal_attention.op import availability as availability
from mars.kernels.scale_causal_attention.op import cached_attention as cached_attention
from mars.kernels.scale_causal_attention.op import scale_causal_attention as scale_causal_attention
