"""This calls the kernel of native.cpp, on a CPU: all scales in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mars.kernels import _native
from mars.kernels.multiscale_quantize import reference
from mars.kernels.multiscale_quantize.problem import Problem
from mars.kernels.multiscale_quantize.resampling import shifted_matrices
from mars.kernels.nearest_code import PackedCodebook


def multiscale_quantize(problem: Problem) -> tuple[Tensor, Tensor]:
    """See `op.multiscale_quantize`."""
    f, codebook, scales = problem.f.contiguous(), problem.codebook.contiguous(), problem.scales
    packed = PackedCodebook(codebook, problem.metric, "native")
    taps, bias = reference.fold(problem.weight, problem.ratio), (problem.bias * problem.ratio).contiguous()
    keep = None if problem.keep is None else problem.keep.to(torch.int64).contiguous()
    flat = [size for scale in scales for size in scale]
    ids, totals = problem.outputs()
    status = _native.functions().mars_multiscale_quantize(
        f.data_ptr(),
        *f.shape,
        codebook.data_ptr(),
        packed.pointer,
        taps.data_ptr(),
        bias.data_ptr(),
        len(scales),
        (ctypes.c_int64 * len(flat))(*flat),
        (ctypes.c_int64 * len(scales))(*problem.phi_index),
        shifted_matrices(tuple(flat), f.dtype, f.device).data_ptr(),
        None if keep is None else keep.data_ptr(),
        ids.data_ptr(),
        totals.data_ptr(),
        _native.threads(),
    )
    _native.check(status)
    return ids, totals
