"""Contract of `nearest_code`: the vector quantiser's search (van den Oord et al. 2017, eq. 1).

What is computed, in float32 and in this order: the score of code v starts at -|c_v|^2 / 2 ("l2", summed in float64 and
then rounded) or at 0 ("cosine", on rows of the codebook divided by their length), and x_d c_vd is added to it with one
rounding (a fused multiply-add) for d = 0, 1, ...; the index of the largest score is the answer, the lowest one on ties.
The length of x and |x|^2 do not enter, because they do not change the choice. The native and the Triton kernels give
that index exactly, at every level and tile size; plain PyTorch, whose matrix products leave the order open, can differ
from it where two scores are within rounding of each other.

NaN and infinity: a row of x that holds one gets index 0; a row of the codebook that holds one, or whose squared length
is not a float32, is never chosen unless no other is left.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal, NoReturn, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mars.kernels import _native
from mars.kernels._backend import Backend, backend
from mars.kernels.nearest_code import reference

Metric = Literal["l2", "cosine"]
_TRITON_DIM = 256  # a row of x is held in registers


def nearest_code(x: Tensor, codebook: Tensor | PackedCodebook, metric: Metric = "l2") -> Tensor:
    """Index of the codebook row nearest to each row of x, the lowest index on ties. Never holds an (N, V) matrix.

    Args:
        x: (N, D), any float dtype and strides; the search is in float32. No gradient.
        codebook: (V, D), or what `pack_codebook` made of it, whose metric then holds; that form cannot be compiled.
        metric: "l2", the smallest squared distance, or "cosine", the largest cosine.

    Returns:
        int64 (N,).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the metric is unknown.
    """
    if isinstance(codebook, PackedCodebook):
        return codebook.search(x)
    return _nearest_code(x.detach(), codebook.detach(), metric)


@torch.library.custom_op("mars::nearest_code", mutates_args=())
def _nearest_code(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    _check(x, codebook.shape, codebook.device)
    return pack_codebook(codebook, metric).search(x)  # type: ignore[arg-type]  # checked there


@_nearest_code.register_fake
def _fake(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    _check(x, codebook.shape, codebook.device)
    _check_codebook(codebook, metric)
    return x.new_empty(x.shape[0], dtype=torch.int64)


def pack_codebook(codebook: Tensor, metric: Metric = "l2") -> PackedCodebook:
    """Prepare a codebook (V, D) once for many calls of `nearest_code`; later changes to it are not seen.

    Raises:
        ValueError: as `nearest_code`.
    """
    _check_codebook(codebook, metric)
    return PackedCodebook(_plain(_with_memory(codebook)), metric, backend(codebook.device.type))


class PackedCodebook:
    """A codebook in the layout of the kernel that will search it, unchanging, for this process. See `pack_codebook`."""

    def __init__(self, codebook: Tensor, metric: str, chosen: Backend) -> None:
        if chosen == "triton" and codebook.shape[1] > _TRITON_DIM:
            chosen = "reference"
        self.shape, self.device, self.metric, self.backend = codebook.shape, codebook.device, metric, chosen
        self._packed: Any
        if chosen == "reference":
            self._packed = codebook.clone()
            return
        if metric == "cosine":
            codebook = F.normalize(codebook, dim=-1)
        if chosen == "triton":
            from mars.kernels.nearest_code import triton

            with torch.cuda.device_of(codebook):
                self._packed = triton.prepare(codebook, biased=metric == "l2")
        else:
            lib = _native.functions()
            self._packed = lib.mars_codebook_pack(codebook.data_ptr(), *codebook.shape, metric == "cosine")
            if not self._packed:
                raise MemoryError(f"nearest_code: no memory to pack a codebook {tuple(codebook.shape)}")
            weakref.finalize(self, lib.mars_codebook_free, self._packed)

    def search(self, x: Tensor) -> Tensor:
        """int64 (N,): see `nearest_code`. x: (N, D)."""
        _check(x, self.shape, self.device)
        if torch.compiler.is_compiling():
            raise RuntimeError("nearest_code: a packed codebook cannot be compiled; give the codebook (V, D) itself")
        x = _plain(_with_memory(x))
        if self.backend == "reference":
            return reference.nearest_code(x, self._packed, self.metric)
        if self.backend == "triton":
            from mars.kernels.nearest_code import triton

            with torch.cuda.device_of(x):
                return triton.search(x, self._packed)
        ids = x.new_empty(len(x), dtype=torch.int64)
        _native.check(
            _native.functions().mars_nearest_code(self._packed, x.data_ptr(), len(x), ids.data_ptr(), _native.threads())
        )
        return ids

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a packed codebook belongs to its process: send the codebook and pack it there")

    @property
    def pointer(self) -> int:
        """The packed form for the library's own functions ("native" only)."""
        assert self.backend == "native"
        return self._packed


def _plain(x: Tensor) -> Tensor:
    """What the kernels read: float32, contiguous, and no view that negates on reading."""
    return x.detach().float().contiguous().resolve_neg()


def _with_memory(x: Tensor) -> Tensor:
    """x, whose values the kernels will find. An op is not run on fake tensors; packing and a packed search could be."""
    if isinstance(x, FakeTensor):
        raise ValueError(f"nearest_code: want tensors with their values in memory; {tuple(x.shape)} is a fake one")
    _native.check_memory("nearest_code", x)
    return x


def _check(x: Tensor, shape: torch.Size, device: torch.device) -> None:
    if x.ndim != 2 or len(shape) != 2 or x.shape[1] != shape[1]:
        raise ValueError(f"nearest_code: want x (N, D) and codebook (V, D); got {tuple(x.shape)}, {tuple(shape)}")
    if not x.is_floating_point():
        raise ValueError(f"nearest_code: want x of a floating-point dtype, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"nearest_code: want x and codebook on one device; got {x.device}, {device}")


def _check_codebook(codebook: Tensor, metric: str) -> None:
    if codebook.ndim != 2 or 0 in codebook.shape or len(codebook) >= 2**31:
        raise ValueError(
            f"nearest_code: want a codebook (V, D) with 1 <= V < 2**31 and D >= 1, got {tuple(codebook.shape)}"
        )
    if not codebook.is_floating_point():
        raise ValueError(f"nearest_code: want a codebook of a floating-point dtype, got {codebook.dtype}")
    if metric not in get_args(Metric):
        raise ValueError(f"nearest_code: metric must be one of {', '.join(get_args(Metric))}; got {metric!r}")
