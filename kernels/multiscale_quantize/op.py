"""Contract of `multiscale_quantize`: the coarse-to-fine residual quantiser of VAR."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels import _native
from mars.kernels._backend import backend
from mars.kernels.multiscale_quantize import reference
from mars.kernels.multiscale_quantize.reference import area_downsample as area_downsample
from mars.kernels.multiscale_quantize.reference import dequantize_scale as dequantize_scale
from mars.kernels.multiscale_quantize.resampling import bicubic_matrix
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
    A sample's numbers do not depend on the batch that it is in. float64 is computed in plain PyTorch, but for the
    search, which is in float32.

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
    _check(f, codebook, weight, bias, phi_index, scales, metric, keep)
    flat = [size for scale in scales for size in scale]
    return _quantize(f.detach(), codebook, weight, bias, list(phi_index), flat, metric, ratio, keep)


def _check(
    f: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    phi_index: Sequence[int],
    scales: Sequence[tuple[int, int]],
    metric: str,
    keep: Tensor | None,
) -> None:
    if f.ndim != 4 or codebook.ndim != 2 or f.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        raise ValueError(
            f"multiscale_quantize: want f (B, D, H, W) and codebook (V, D), D and V at least 1; "
            f"got {tuple(f.shape)}, {tuple(codebook.shape)}"
        )
    dim, height, width = f.shape[1:]
    if weight.shape[1:] != (dim, dim, 3, 3) or bias.shape != (len(weight), dim):
        raise ValueError(
            f"multiscale_quantize: want weight (Q, {dim}, {dim}, 3, 3) and bias (Q, {dim}); "
            f"got {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    others = (codebook, weight, bias)
    if f.dtype not in (torch.float32, torch.float64) or any(t.dtype != f.dtype for t in others):
        raise ValueError(
            "multiscale_quantize: want f, codebook, weight and bias all float32 or all float64; "
            f"got {', '.join(str(t.dtype) for t in (f, *others))}"
        )
    if any(t.device != f.device for t in (*others, *([] if keep is None else [keep]))):
        raise ValueError(f"multiscale_quantize: want all tensors on f's device, {f.device}")
    if not scales or tuple(scales[-1]) != (height, width) or len(phi_index) != len(scales):
        raise ValueError(
            f"multiscale_quantize: the last of the scales {tuple(scales)} must be f's grid {(height, width)} "
            f"and phi_index needs one entry per scale, got {len(phi_index)}"
        )
    if any(not (1 <= h <= height and 1 <= w <= width) for h, w in scales):
        raise ValueError(
            f"multiscale_quantize: want scales within (1, 1)..{(height, width)}, f's grid, got {tuple(scales)}"
        )
    if any(not 0 <= q < len(weight) for q in phi_index):
        raise ValueError(f"multiscale_quantize: want phi_index in 0..{len(weight) - 1}, got {list(phi_index)}")
    if metric not in get_args(Metric):
        raise ValueError(f"multiscale_quantize: metric must be l2 or cosine, got {metric!r}")
    if keep is not None and (keep.shape != f.shape[:1] or keep.is_floating_point() or keep.is_complex()):
        raise ValueError(
            f"multiscale_quantize: want keep ({len(f)},) of integers, got {tuple(keep.shape)} of {keep.dtype}"
        )


@torch.library.custom_op("mars::multiscale_quantize", mutates_args=())
def _quantize(
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
    grids = _pairs(scales)
    if keep is not None and keep.device.type == "cpu" and ((keep < 0) | (keep > len(grids))).any():
        raise ValueError(f"multiscale_quantize: want keep in 0..{len(grids)}, got {keep.tolist()}")
    arguments: Any = (f, codebook, weight, bias, phi_index, grids, metric, ratio, keep)
    chosen = backend(f.device.type) if f.dtype == torch.float32 else "reference"
    if chosen == "native":
        return _on_cpu(*arguments)
    if chosen == "triton":
        from mars.kernels.multiscale_quantize import triton

        return triton.multiscale_quantize(*arguments)
    return reference.multiscale_quantize(*arguments)


def _on_cpu(
    f: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    phi_index: Sequence[int],
    scales: list[tuple[int, int]],
    metric: Metric,
    ratio: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    f, codebook, flat = f.contiguous(), codebook.contiguous(), [size for scale in scales for size in scale]
    searched = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
    taps, bias = reference.fold(weight, bias, ratio)
    keep = None if keep is None else keep.to(torch.int64).contiguous()
    ids, totals = _fake(f, codebook, weight, bias, phi_index, flat, metric, ratio, keep)
    status = _native.functions().mars_multiscale_quantize(
        f.data_ptr(),
        *f.shape,
        codebook.data_ptr(),
        searched.data_ptr(),
        len(codebook),
        metric == "cosine",
        taps.data_ptr(),
        bias.data_ptr(),
        len(scales),
        (ctypes.c_int64 * len(flat))(*flat),
        (ctypes.c_int64 * len(scales))(*phi_index),
        _bicubic_on(tuple(flat), f.dtype, f.device).data_ptr(),
        None if keep is None else keep.data_ptr(),
        ids.data_ptr(),
        totals.data_ptr(),
        _native.threads(),
    )
    _native.check(status)
    return ids, totals


@_quantize.register_fake
def _fake(
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
    grids = _pairs(scales)
    ids = f.new_empty((len(f), sum(h * w for h, w in grids)), dtype=torch.int64)
    return ids, f.new_empty((len(grids), *f.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codebook, weight, _, ctx.phi_index, scales, _, ctx.ratio, keep = inputs
    ctx.scales = _pairs(scales)
    ctx.save_for_backward(codebook, weight, output[0], keep)


def _backward(ctx: Any, _: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    """All scales together: the tokens are known, and a contribution is part of its own and of all later sums."""
    codebook, weight, ids, keep = ctx.saved_tensors
    scales, grid, n = ctx.scales, ctx.scales[-1], len(ctx.scales)
    to_sums = [grad[n - 1]]
    for k in reversed(range(n - 1)):
        to_sums.insert(0, grad[k] + to_sums[0])
    if keep is not None:
        to_sums = [g.where((keep > k).view(-1, 1, 1, 1), 0) for k, g in enumerate(to_sums)]
    lengths = [h * w for h, w in scales]
    codes = F.embedding(ids, codebook).transpose(1, 2).split(lengths, dim=2)
    flat = _bicubic(grad.new_empty(0), [size for scale in scales for size in scale])
    sizes = [size * out for scale in scales for size, out in zip(scale, grid, strict=True)]
    matrices = [m.view(-1, m.numel() // grid[i % 2]) for i, m in enumerate(flat.split(sizes))]
    rows, columns = matrices[::2], matrices[1::2]
    g_weight, g_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[:2])
    g_codes: list[Any] = [None] * n
    for q in sorted(set(ctx.phi_index)):
        members = [k for k in range(n) if ctx.phi_index[k] == q]
        g = torch.cat([to_sums[k] for k in members])
        h = torch.cat([rows[k] @ codes[k].unflatten(2, scales[k]) @ columns[k].T for k in members])
        ones = [1, 1]  # stride, padding, dilation
        g_h, g_weight[q], g_bias[q] = torch.ops.aten.convolution_backward(
            g * ctx.ratio, h, weight[q], [h.shape[1]], ones, ones, ones, False, [0, 0], 1, [True, True, True]
        )
        g_h = torch.add(g_h, g, alpha=1 - ctx.ratio).view(len(members), *grad.shape[1:])
        for k, part in zip(members, g_h.unbind(), strict=True):
            g_codes[k] = (rows[k].T @ part @ columns[k]).flatten(2)
    found = torch.cat(g_codes, dim=2).transpose(1, 2).flatten(0, 1)
    g_codebook = torch.zeros_like(codebook).index_add(0, ids.flatten(), found)
    return None, g_codebook, g_weight, g_bias, None, None, None, None, None


_quantize.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("mars::bicubic_matrices", mutates_args=())
def _bicubic(like: Tensor, scales: Sequence[int]) -> Tensor:
    """All scales' up-sampling matrices to the last, end to end: rows (H, h), then columns (W, w).

    An operator, so that a compiled gradient finds them on the device, too, instead of copying them there.
    """
    return _bicubic_on(tuple(scales), like.dtype, like.device).clone()


@_bicubic.register_fake
def _(like: Tensor, scales: Sequence[int]) -> Tensor:
    return like.new_empty(sum(size * out for s in _pairs(scales) for size, out in zip(s, scales[-2:], strict=True)))


@cache
def _bicubic_on(scales: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    matrices = (bicubic_matrix(size, out) for s in _pairs(scales) for size, out in zip(s, scales[-2:], strict=True))
    return torch.tensor([entry for matrix in matrices for row in matrix for entry in row], dtype=dtype, device=device)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
