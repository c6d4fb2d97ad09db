"""This is the contract of `multiscale_quantize`, the coarse-to-fine residual quantiser of VAR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels import _backend, _native
from mars.kernels._direct import direct
from mars.kernels.multiscale_quantize import native, reference
from mars.kernels.multiscale_quantize.problem import Problem
from mars.kernels.multiscale_quantize.reference import area_downsample as area_downsample
from mars.kernels.multiscale_quantize.reference import dequantize_scale as dequantize_scale
from mars.kernels.multiscale_quantize.resampling import pairs, shifted_matrices
from mars.kernels.nearest_code.op import Metric


def multiscale_quantize(
    f: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    phi_index: Sequence[int],
    scales: Sequence[tuple[int, int]],
    *,
    metric: Metric = "l2",
    ratio: float = 0.5,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise a latent map coarse to fine (Tian et al. 2024, Algorithm 1).

    For each scale: area down-sampling of the residual, nearest code, bicubic up-sampling, (1 - ratio) h + ratio phi(h),
    and subtraction. The search sees no gradient; the running sums are differentiable in codebook, weight and bias.
    The kernels give a sample the same numbers in any batch and on any number of threads. Their sums are as accurate as
    plain PyTorch's without being the same bits, so tokens can differ where two codes are within rounding of each other.
    float64 is computed in plain PyTorch, but for the search, which is in float32. Autocast does not lower anything.

    Args:
        f: (B, D, H, W) float32 or float64, any strides; only its values are used. A cell that is not finite makes
            every search row that it touches index 0.
        codebook: (V, D).
        weight, bias: (Q, D, D, 3, 3), (Q, D): the convolutions phi.
        phi_index: for each scale, which of them it uses.
        scales: N grids (h, w), coarse to fine, the last (H, W).
        metric: how the nearest code is chosen; the raw row is what is added either way.
        keep: (B,) int in 0..N, samples b add only scales k < keep[b] to their sums (quantiser dropout); None: all.
            Its values are checked on a CPU only: elsewhere that would make the host wait.

    Returns:
        ids: int64 (B, L), scale after scale, each row-major.
        totals: (N, B, D, H, W), the sum of the first 1..N scales.

    Raises:
        ValueError: shapes, dtypes, devices, scales or keep do not fit, or the metric is unknown.
    """
    flat = [size for h, w in scales for size in (h, w)]
    f = f.detach()
    run = _compute if direct(f, codebook, weight, bias, keep) else _quantize
    totals, ids = run(f, codebook, weight, bias, list(phi_index), flat, metric, ratio, keep)
    return ids, totals


_IMPLEMENTATIONS: dict[str, Callable[[Problem], tuple[Tensor, Tensor]]] = {
    "reference": reference.multiscale_quantize,
    "native": native.multiscale_quantize,
    "triton": _backend.deferred("mars.kernels.multiscale_quantize.triton", "multiscale_quantize"),
}


def _compute(
    f: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    phi_index: Sequence[int],
    scales: Sequence[int],
    metric: str,
    ratio: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    problem = Problem(f, codebook, weight, bias, phi_index, pairs(scales), metric, ratio, keep)  # type: ignore[arg-type]
    problem.check()  # the type of the metric, too
    _native.check_memory("multiscale_quantize", f, codebook, weight, bias, keep)
    most = len(problem.scales)
    if keep is not None and keep.device.type == "cpu" and ((keep < 0) | (keep > most)).any():
        raise ValueError(f"multiscale_quantize: want keep in 0..{most}, got {keep.tolist()}")
    backend = _backend.backend(f.device.type) if f.dtype == torch.float32 else "reference"
    with torch.autocast(f.device.type, enabled=False):
        ids, totals = _backend.select("multiscale_quantize", _IMPLEMENTATIONS, backend)(problem)
    return totals, ids  # the differentiable one first, as `torch.library.opcheck` needs it


_quantize = torch.library.custom_op("mars::multiscale_quantize", _compute, mutates_args=())


@_quantize.register_fake
def _fake(
    f: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    phi_index: Sequence[int],
    scales: Sequence[int],
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    problem = Problem(f, codebook, weight, bias, phi_index, pairs(scales), *rest)
    problem.check()
    ids, totals = problem.outputs()
    return totals, ids


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codebook, weight, _, ctx.phi_index, scales, _, ctx.ratio, keep = inputs
    ctx.scales = pairs(scales)
    ctx.save_for_backward(codebook, weight, output[1], keep)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute all scales' gradients: a contribution, whose tokens are known, is part of its own and all later sums.

    A contribution is bias + sum_{s,t} R_s z C_t^T taps[s, t], where R_s and C_t up-sample and shift. So its gradient is
    brought to the grid of the scale first, once per tap, and the rest are products over tokens.
    """
    codebook, weight, ids, keep = ctx.saved_tensors
    scales, (batch, dim, height, width) = ctx.scales, grad.shape[1:]
    matrices = _shifted(grad.new_empty(0), [size for scale in scales for size in scale]).split(
        [3 * size * out for scale in scales for size, out in zip(scale, scales[-1], strict=True)]
    )
    codes = F.embedding(ids, codebook).split([h * w for h, w in scales], dim=1)
    taps = reference.fold(weight, ctx.ratio)
    g_codes: list[Tensor] = []
    g_taps, g_bias = ([torch.zeros_like(t[0])] * len(weight) for t in (taps, weight[..., 0, 0, 0]))
    later = torch.zeros_like(grad[0])
    for k, (h, w) in reversed(list(enumerate(scales))):
        later = later + grad[k]
        g = later if keep is None else later.where((keep > k).view(-1, 1, 1, 1), 0)
        q = ctx.phi_index[k]
        g_bias[q] = g_bias[q] + g.sum((0, 2, 3))
        rows, columns = matrices[2 * k].view(height, 3 * h), matrices[2 * k + 1].view(width, 3 * w)
        g = rows.T @ g.permute(0, 2, 3, 1).reshape(batch, height, width * dim)
        g = columns.T @ g.view(batch, 3 * h, width, dim)
        g = g.view(batch, 3, h, 3, w, dim).permute(0, 2, 4, 1, 3, 5).reshape(batch * h * w, 9 * dim)
        g_codes.insert(0, (g @ taps[q].mT.reshape(9 * dim, dim)).view(batch, h * w, dim))
        z = codes[k].reshape(batch * h * w, dim)
        g_taps[q] = g_taps[q] + (z.T @ g).view(dim, 3, 3, dim).permute(1, 2, 0, 3)
    g_weight = ctx.ratio * torch.stack(g_taps).permute(0, 4, 3, 1, 2)
    g_codebook = torch.zeros_like(codebook).index_add(0, ids.flatten(), torch.cat(g_codes, dim=1).flatten(0, 1))
    return None, g_codebook, g_weight, ctx.ratio * torch.stack(g_bias), None, None, None, None, None


_quantize.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("mars::shifted_bicubic_matrices", mutates_args=())
def _shifted(like: Tensor, scales: Sequence[int]) -> Tensor:
    """Return `shifted_matrices` on the device and in the dtype of `like`.

    An operator, so that a compiled gradient finds them on the device, too, instead of copying them there.
    """
    _check_sizes(scales)
    return shifted_matrices(tuple(scales), like.dtype, like.device).clone()


@_shifted.register_fake
def _(like: Tensor, scales: Sequence[int]) -> Tensor:
    _check_sizes(scales)
    return like.new_empty(sum(3 * size * out for s in pairs(scales) for size, out in zip(s, scales[-2:], strict=True)))


def _check_sizes(scales: Sequence[int]) -> None:
    if len(scales) < 2 or min(scales) < 1:
        raise ValueError(f"shifted_bicubic_matrices: want scales of 1 or more cells each way, got {list(scales)}")
