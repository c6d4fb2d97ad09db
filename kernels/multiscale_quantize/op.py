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
    f, codebook = f.contiguous(), codebook.contiguous()
    searched = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
    taps, bias = reference.fold(weight, bias, ratio)
    keep = None if keep is None else keep.to(torch.int64).contiguous()
    ids, totals = _fake(f, codebook, weight, bias, phi_index, [size for s in scales for size in s], metric, ratio, keep)
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
        (ctypes.c_int64 * (2 * len(scales)))(*(size for s in scales for size in s)),
        (ctypes.c_int64 * len(scales))(*phi_index),
        _bicubic(tuple(scales)).data_ptr(),
        None if keep is None else keep.data_ptr(),
        ids.data_ptr(),
        totals.data_ptr(),
        _native.threads(),
    )
    _native.check(status)
    return ids, totals


@cache
def _bicubic(scales: tuple[tuple[int, int], ...]) -> Tensor:
    """All scales' up-sampling matrices to the last, end to end: rows (H, h), then columns (W, w)."""
    matrices = (bicubic_matrix(size, out) for scale in scales for size, out in zip(scale, scales[-1], strict=True))
    return torch.tensor([entry for matrix in matrices for row in matrix for entry in row], dtype=torch.float32)


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
    """The gradient of a scale's contribution is the sum of those of its own and all later running sums."""
    codebook, weight, ids, keep = ctx.saved_tensors
    grad = grad.flip(0).cumsum(0).flip(0)
    if keep is not None:
        kept = keep > torch.arange(len(ctx.scales), device=keep.device)[:, None]
        grad = grad.where(kept[:, :, None, None, None], 0)
    grid, (n, batch) = ctx.scales[-1], grad.shape[:2]
    lengths = [h * w for h, w in ctx.scales]
    upsampled = [
        reference.look_up(part, codebook, scale, grid)
        for part, scale in zip(ids.split(lengths, dim=1), ctx.scales, strict=True)
    ]
    by_scale: list[Tensor] = [grad] * n
    weights, biases = [], []
    for q in range(len(weight)):
        members = [k for k in range(n) if ctx.phi_index[k] == q]
        if not members or batch == 0:
            weights.append(torch.zeros_like(weight[q]))
            biases.append(weight.new_zeros(weight.shape[1]))
            by_scale = [grad[k] if k in members else by_scale[k] for k in range(n)]
            continue
        g = grad[members].flatten(0, 1)
        g_map, g_weight, g_bias = torch.ops.aten.convolution_backward(
            g * ctx.ratio,
            torch.cat([upsampled[k] for k in members]),
            weight[q],
            [weight.shape[1]],
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, True, True],
        )
        weights.append(g_weight)
        biases.append(g_bias)
        parts = torch.add(g_map, g, alpha=1 - ctx.ratio).split(batch)
        for k, part in zip(members, parts, strict=True):
            by_scale[k] = part
    rows = torch.cat([_downsample(part, scale) for part, scale in zip(by_scale, ctx.scales, strict=True)], dim=1)
    g_codebook = torch.zeros_like(codebook).index_add(0, ids.flatten(), rows.flatten(0, 1))
    return None, g_codebook, torch.stack(weights), torch.stack(biases), None, None, None, None, None


_quantize.register_autograd(_backward, setup_context=_save)


def _downsample(g: Tensor, scale: tuple[int, int]) -> Tensor:
    """The transpose of bicubic up-sampling: (B, D, H, W) -> (B, h w, D)."""
    if tuple(g.shape[2:]) == scale:
        return g.flatten(2).transpose(1, 2)
    rows, columns = (
        torch.tensor(bicubic_matrix(size, out), dtype=g.dtype, device=g.device)
        for size, out in zip(scale, g.shape[2:], strict=True)
    )
    return (rows.T @ g @ columns).flatten(2).transpose(1, 2)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
