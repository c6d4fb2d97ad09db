"""These functions call native.cpp, on a CPU; each computes what the one of its name in `reference` defines."""

from __future__ import annotations

import torch
from torch import Tensor

from mars.kernels import _native
from mars.kernels.cmx import layout


def cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """See `op.cmx`."""
    x = layout.plain(x)
    y = x.new_empty(layout.multiplexed(x, *factors))
    sizes = *layout.sizes(x), *factors, x.element_size()
    _native.check(_native.functions().mars_cmx(*sizes, x.data_ptr(), y.data_ptr(), _native.threads()))
    return y


def inverse_cmx(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """See `op.inverse_cmx`."""
    x = layout.plain(x)
    y = x.new_empty(layout.demultiplexed(x, *factors))
    sizes = *layout.sizes(y), *factors, x.element_size()
    _native.check(_native.functions().mars_inverse_cmx(*sizes, x.data_ptr(), y.data_ptr(), _native.threads()))
    return y


def spectrogram_cmx(z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """See `op.spectrogram_cmx`; z is complex64."""
    x = z.new_empty(layout.multiplexed(z, *factors), dtype=torch.float32)
    z = layout.batched(z)
    run = _native.functions().mars_spectrogram_cmx
    pointers = z.data_ptr(), *z.stride(), x.data_ptr()
    _native.check(run(*z.shape, *factors, epsilon, scale, *pointers, _native.threads()))
    return x


def spectrogram_cmx_backward(grad: Tensor, z: Tensor, factors: tuple[int, int], epsilon: float, scale: float) -> Tensor:
    """Return the gradient of `spectrogram_cmx` to z, in memory whose contiguous dimension is that of z."""
    grad_z = layout.empty_like(z)
    grad, z, to = layout.plain(grad), layout.batched(z), layout.batched(grad_z)
    run = _native.functions().mars_spectrogram_cmx_backward
    pointers = grad.data_ptr(), z.data_ptr(), *z.stride(), to.data_ptr(), *to.stride()
    _native.check(run(*z.shape, *factors, epsilon, scale, *pointers, _native.threads()))
    return grad_z


def inverse_spectrogram_cmx(
    x: Tensor, factors: tuple[int, int], epsilon: float, scale: float, zeros: tuple[int, int]
) -> Tensor:
    """See `op.inverse_spectrogram_cmx`; x is float32."""
    x = layout.plain(x)
    m = x.new_empty(layout.demultiplexed(x, *factors, sum(zeros)))
    n, bins, frames = layout.sizes(m)
    size = n, bins - sum(zeros), frames, *factors, *zeros
    run = _native.functions().mars_inverse_spectrogram_cmx
    _native.check(run(*size, epsilon, scale, x.data_ptr(), m.data_ptr(), _native.threads()))
    return m
