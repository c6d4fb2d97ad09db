"""This is the contract of `nearest_code`, the vector quantiser's search (van den Oord et al. 2017, eq. 1).

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

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mars.kernels import _backend, _native
from mars.kernels._direct import unobserved
from mars.kernels.nearest_code import native, packing, reference

Metric = Literal["l2", "cosine"]
_TRITON_DIM = 256  # a row of x is held in registers


def nearest_code(x: Tensor, codebook: Tensor | PackedCodebook, metric: Metric = "l2") -> Tensor:
    """Return the index of the codebook row nearest to each row of x, the lowest on ties, without an (N, V) matrix.

    Args:
        x: (..., D), any float dtype and strides; the search is in float32. No gradient.
        codebook: (V, D), or what `pack_codebook` made of it, whose metric then holds; that form cannot be compiled.
        metric: "l2", the smallest squared distance, or "cosine", the largest cosine.

    Returns:
        int64 (...): the shape of x without its last dimension.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the metric is unknown.
    """
    if x.ndim not in (0, 2):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return nearest_code(rows, codebook, metric).view(x.shape[:-1])
    if isinstance(codebook, PackedCodebook):
        return codebook.search(x)
    x, codebook = x.detach(), codebook.detach()
    return (_search if unobserved(x, codebook) else _nearest_code)(x, codebook, metric)


def _search(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    _check(x, codebook.shape, codebook.device)
    return pack_codebook(codebook, metric).search(x)  # type: ignore[arg-type]  # checked there


_nearest_code = torch.library.custom_op("mars::nearest_code", _search, mutates_args=())


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
    return PackedCodebook(_plain(_with_memory(codebook)), metric, _backend.backend(codebook.device.type))


class _Implementation(NamedTuple):
    """A backend prepares a codebook, float32 (V, D) and contiguous, and searches what that made of it."""

    pack: Callable[[Tensor, str], Any]
    search: Callable[[Tensor, Any], Tensor]


def _unit(codebook: Tensor, metric: str) -> Tensor:
    return F.normalize(codebook, dim=-1) if metric == "cosine" else codebook


_IMPLEMENTATIONS = {
    "reference": _Implementation(
        lambda codebook, metric: (codebook.clone(), metric), lambda x, packed: reference.nearest_code(x, *packed)
    ),
    "native": _Implementation(
        lambda codebook, metric: native.Packed(_unit(codebook, metric), metric == "cosine"), native.search
    ),
    "triton": _Implementation(
        lambda codebook, metric: packing.pack(_unit(codebook, metric), biased=metric == "l2"),
        _backend.deferred("mars.kernels.nearest_code.triton", "search"),
    ),
}


class PackedCodebook:
    """This is a codebook in the layout of the kernel that will search it, for this process; see `pack_codebook`."""

    def __init__(self, codebook: Tensor, metric: str, backend: str) -> None:
        if backend == "triton" and codebook.shape[1] > _TRITON_DIM:
            backend = "reference"
        pack, self._search = _backend.select("nearest_code", _IMPLEMENTATIONS, backend)
        self.shape, self.device, self.metric, self.backend = codebook.shape, codebook.device, metric, backend
        self._packed = pack(codebook, metric)

    def search(self, x: Tensor) -> Tensor:
        """Return int64 (N,) for x (N, D); see `nearest_code`."""
        _check(x, self.shape, self.device)
        if torch.compiler.is_compiling():
            raise RuntimeError("nearest_code: a packed codebook cannot be compiled; give the codebook (V, D) itself")
        return self._search(_plain(_with_memory(x)), self._packed)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a packed codebook belongs to its process: send the codebook and pack it there")

    @property
    def pointer(self) -> int:
        """Return the address of the packed form for the library's own functions ("native" only)."""
        assert isinstance(self._packed, native.Packed)
        return self._packed.pointer


def _plain(x: Tensor) -> Tensor:
    """Return x as the kernels read it: float32, contiguous, and no view that negates on reading."""
    return x.detach().float().contiguous().resolve_neg()


def _with_memory(x: Tensor) -> Tensor:
    """Return x, or raise ValueError where it is fake, which packing could be called with, or lacks its memory."""
    if isinstance(x, FakeTensor):
        raise ValueError(f"nearest_code: want tensors with their values in memory; {tuple(x.shape)} is a fake one")
    _native.check_memory("nearest_code", x)
    return x


def _check(x: Tensor, shape: torch.Size, device: torch.device) -> None:
    if x.ndim != 2 or len(shape) != 2 or x.shape[1] != shape[1]:
        raise ValueError(f"nearest_code: want x (..., D) and codebook (V, D); got {tuple(x.shape)}, {tuple(shape)}")
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
