"""The operations that take most of the time of MARS; each also works alone, in a model of your own.

Letters: B samples, N rows, V codes, D values of a code or of a head, L tokens over all scales, F bins, T frames.

- `nearest_code`: for each row x_n the v of the smallest |x_n - c_v|, or of the largest cosine. x (..., D) and a
  codebook c (V, D) give int64 (...). `pack_codebook` prepares a codebook once for many searches.
- `multiscale_quantize`: the residual quantiser of VAR. It starts with r = f and for each scale, coarse to fine, takes
  the codes nearest to the means of r, up-samples them to h, and subtracts (1 - ratio) h + ratio phi(h) from r. f
  (B, D, H, W) gives tokens (B, L) and the running sums (scales, B, D, H, W). `area_downsample` is its first step and
  `dequantize_scale` what one scale adds.
- `cmx`: y[i_f r_t + i_t, f, t] = x[f r_f + i_f, t r_t + i_t], so that x (..., F, T) becomes (..., r_f r_t, F / r_f,
  T / r_t) without a loss. `inverse_cmx` undoes it.
- `spectrogram_cmx`: `cmx` of min(scale log(1 + |z| / epsilon) - 1, 1) for a complex spectrum z (..., F, T).
  `inverse_spectrogram_cmx` gives the magnitudes back.
- `scale_causal_attention`: softmax(scale q k^T) v, where a token sees the tokens of its own and of all coarser scales.
  q, k, v (batch, heads, L, D) give the same shape; scale is 1 / sqrt(D) unless given. `attention` is that of a single
  scale, and `cached_attention` adds one scale to a cache, for generation.
- `linear_cross_entropy`: the mean over rows of log sum_j exp(z_nj) - z_n[target_n] for z = x W^T + b, without ever
  holding all of z. x (N, width), W (V, width), b (V,) and target (N,) give a number. `token_scores` gives one a row.

Each has a definition in plain PyTorch, and faster kernels in C++ for a CPU ("native") and in Triton for CUDA. The
fastest that the machine has is taken by default. MARS_KERNELS=reference, native or triton asks for one, as does
`use` for a block of Python; one that cannot run here is then an error. MARS_ATTENTION does the same for the attention,
which has more of them; both are read once, when mars is imported. `python -m mars.kernels` lists what this machine has,
and says why not the rest.

A vector quantiser with the straight-through gradient, for example, is:

    import torch
    from mars import kernels

    x, codebook = torch.randn(1000, 32, requires_grad=True), torch.randn(512, 32)
    with kernels.use("auto"):  # or "reference", to compare
        z = codebook[kernels.nearest_code(x, codebook)]
    (x + (z - x).detach()).square().sum().backward()

`MultiScaleVQ` and `ScaleCausalAttention` are modules with weights of their own, made of these operations.

The contract of an operation (shapes, types, order of the arithmetic, ties, errors) is the docstring of its function and
of the module `op` in its folder.
"""

from mars.kernels._backend import use as use
from mars.kernels.cmx import cmx as cmx
from mars.kernels.cmx import inverse_cmx as inverse_cmx
from mars.kernels.cmx import inverse_spectrogram_cmx as inverse_spectrogram_cmx
from mars.kernels.cmx import spectrogram_cmx as spectrogram_cmx
from mars.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from mars.kernels.linear_cross_entropy import token_scores as token_scores
from mars.kernels.modules import MultiScaleVQ as MultiScaleVQ
from mars.kernels.modules import ScaleCausalAttention as ScaleCausalAttention
from mars.kernels.multiscale_quantize import area_downsample as area_downsample
from mars.kernels.multiscale_quantize import dequantize_scale as dequantize_scale
from mars.kernels.multiscale_quantize import multiscale_quantize as multiscale_quantize
from mars.kernels.nearest_code import nearest_code as nearest_code
from mars.kernels.nearest_code import pack_codebook as pack_codebook
from mars.kernels.scale_causal_attention import attention as attention
from mars.kernels.scale_causal_attention import cached_attention as cached_attention
from mars.kernels.scale_causal_attention import scale_causal_attention as scale_causal_attention
