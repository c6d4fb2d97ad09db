"""This calls the search of native.cpp, on a CPU, which packs the codebook in memory of its own."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from mars.kernels import _native


class Packed:
    """This holds a codebook that the library packed, and frees it when it goes."""

    def __init__(self, codebook: Tensor, cosine: bool) -> None:
        """Pack a codebook, float32 (V, D), contiguous, whose rows have length 1 where `cosine` is true."""
        lib = _native.functions()
        self.pointer: int = lib.mars_codebook_pack(codebook.data_ptr(), *codebook.shape, cosine)
        if not self.pointer:
            raise MemoryError(f"nearest_code: no memory to pack a codebook {tuple(codebook.shape)}")
        weakref.finalize(self, lib.mars_codebook_free, self.pointer)


def search(x: Tensor, packed: Packed) -> Tensor:
    """Return the nearest code, int64 (N,), of each row of x, float32 (N, D), contiguous."""
    ids = x.new_empty(len(x), dtype=torch.int64)
    run = _native.functions().mars_nearest_code
    _native.check(run(packed.pointer, x.data_ptr(), len(x), ids.data_ptr(), _native.threads()))
    return ids
