"""Contract of `multiscale_quantize`: the coarse-to-fine residual quantiser of VAR."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
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
from mars.kernels.nearest_code import PackedCodebook
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
    totals, ids = _quantize(f.detach(), codebook, weight, bias, list(phi_index), flat, metric, ratio, keep)
    return ids, totals


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    if any(a > b for coarse, fine in pairwise(scales) for a, b in zip(coarse, fine, strict=True)):
        raise ValueError(
            f"multiscale_quantize: want scales coarse to fine, none smaller than the one before; got {scales}"
        )
    if any(not 0 <= q < len(weight) for q in phi_index):
        raise ValueError(f"multiscale_quantize: want phi_index in 0..{len(weight) - 1}, got {list(phi_index)}")
    if metric not in get_args(Metric):
        raise ValueError(f"multiscale_quantize: metric must be l2 or cosine, got {metric!r}")
    if keep is not None and (keep.shape != f.shape[:1] or keep.dtype not in _INTEGERS):
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
    _check(f, codebook, weight, bias, phi_index, grids, metric, keep)
    _native.check_memory("multiscale_quantize", f, codebook, weight, bias, keep)
    if keep is not None and keep.device.type == "cpu" and ((keep < 0) | (keep > len(grids))).any():
        raise ValueError(f"multiscale_quantize: want keep in 0..{len(grids)}, got {keep.tolist()}")
    arguments: Any = (f, codebook, weight, bias, phi_index, grids, metric, ratio, keep)
    chosen = backend(f.device.type) if f.dtype == torch.float32 else "reference"
    with torch.autocast(f.device.type, enabled=False):
        if chosen == "native":
            ids, totals = _on_cpu(*arguments)
        elif chosen == "triton":
            from mars.kernels.multiscale_quantize import triton

            with torch.cuda.device_of(f):
                ids, totals = triton.multiscale_quantize(*arguments)
        else:
            ids, totals = reference.multiscale_quantize(*arguments)
    return totals, ids  # the differentiable one first, as `torch.library.opcheck` needs it


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
    packed = PackedCodebook(codebook, metric, "native")
    taps, bias = reference.fold(weight, ratio), (bias * ratio).contiguous()
    keep = None if keep is None else keep.to(torch.int64).contiguous()
    totals, ids = _outputs(f, scales)
    status = _native.functions().mars_multiscale_quantize(
        f.data_ptr(),
        *f.shape,
        codebook.data_ptr(),
        packed.pointer,
        taps.data_ptr(),
        bias.data_ptr(),
        len(scales),
        (ctypes.c_int64 * len(flat))(*flat),
        (ctypes.c_int64 * len(scales))(*phi_index),
        _shifted_on(tuple(flat), f.dtype, f.device).data_ptr(),
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
    _check(f, codebook, weight, bias, phi_index, grids, metric, keep)
    return _outputs(f, grids)


def _outputs(f: Tensor, grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Uninitialised running sums and tokens."""
    ids = f.new_empty((len(f), sum(h * w for h, w in grids)), dtype=torch.int64)
    return f.new_empty((len(grids), *f.shape)), ids


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codebook, weight, _, ctx.phi_index, scales, _, ctx.ratio, keep = inputs
    ctx.scales = _pairs(scales)
    ctx.save_for_backward(codebook, weight, output[1], keep)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """No chain through the scales: the tokens are known, and a contribution is part of its own and of all later sums.

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
    """All scales' up-sampling to the last and its shifts by -1, 0, 1, end to end: rows (H, 3, h), columns (W, 3, w).

    An operator, so that a compiled gradient finds them on the device, too, instead of copying them there.
    """
    _check_sizes(scales)
    return _shifted_on(tuple(scales), like.dtype, like.device).clone()


@_shifted.register_fake
def _(like: Tensor, scales: Sequence[int]) -> Tensor:
    _check_sizes(scales)
    return like.new_empty(sum(3 * size * out for s in _pairs(scales) for size, out in zip(s, scales[-2:], strict=True)))


def _check_sizes(scales: Sequence[int]) -> None:
    if len(scales) < 2 or min(scales) < 1:
        raise ValueError(f"shifted_bicubic_matrices: want scales of 1 or more cells each way, got {list(scales)}")


@lru_cache(maxsize=64)
def _shifted_on(scales: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    entries: list[float] = []
    for scale in _pairs(scales):
        for size, out in zip(scale, scales[-2:], strict=True):
            none = [(0.0,) * size]
            padded = [*none, *bicubic_matrix(size, out), *none]
            entries += [entry for i in range(out) for row in padded[i : i + 3] for entry in row]
    return torch.tensor(entries, dtype=dtype, device=device)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    if len(flat) % 2:
        raise ValueError(f"multiscale_quantize: want scales in pairs (h, w), got {len(flat)} numbers")
    return list(zip(flat[::2], flat[1::2], strict=True))
