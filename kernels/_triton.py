"""This module launches Triton kernels, and says how they are listed to be compiled and inspected without a GPU.

Every kernels/<op>/triton.py has a tuple `CONFIGS` of `Compilation`: each kernel at each tile size that it launches,
with what its machine code must keep to. tests/kernels/test_compiled.py compiles and checks them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

ARCHITECTURES = (80, 89, 90, 120)  # compute capabilities: A100; RTX 40 and Ada; H100 and H200; RTX 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """This is one kernel at one tile size, and what its machine code must keep to.

    That it neither spills nor has a stack, and that its shared memory fits, is checked of every kernel.
    """

    kernel: Any  # the function under @triton.jit
    tile: str  # names the configuration, e.g. "128x64 D=64 bf16"; unique together with kernel, warps and stages
    signature: Mapping[str, str]  # every argument that is no constant: "*bf16", "*fp32", "*i64", "i32", "fp32", ...
    constants: Mapping[str, object]  # the tl.constexpr arguments
    warps: int
    stages: int
    multiples_of_16: tuple[str, ...] = ()  # integer arguments that are; pointers are taken to be 16-byte aligned
    architectures: tuple[int, ...] = ARCHITECTURES  # where it is launched
    mma: Literal["none", "warp", "warpgroup"] = "none"  # in the main loop; "warpgroup": HGMMA on sm_90, else HMMA
    depth: int = 0  # the K of the tl.dot in the main loop, summed over the loop's dots that make one score
    instructions_per_score: Mapping[int, float] = field(default_factory=dict)  # architecture: most allowed; needs depth
    wide_loads: bool = False  # at least 9/10 of the bytes that the kernel's instructions load move 128 bits at a time
    wide_stores: bool = False
    in_order: bool = False  # the float32 tl.dot of the kernel adds its products one by one, fused, first column first

    def __post_init__(self) -> None:
        if self.instructions_per_score and not self.depth:
            raise ValueError(f"Compilation: instructions_per_score needs the depth of the tl.dot ({self.name})")

    @property
    def name(self) -> str:
        """Return kernel, tile, warps and stages, e.g. `_filter_kernel 128x128 D=32 w4 s3`."""
        return f"{self.kernel.fn.__name__} {self.tile} w{self.warps} s{self.stages}"


_prepared: dict[tuple[Any, ...], Any] = {}  # how to launch a compiled kernel, by all that it was compiled for
_MOST_PREPARED = 4096
_ALIGNED = 16  # bytes; Triton compiles wider accesses for pointers that are


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    *,
    warps: int,
    stages: int,
) -> None:
    """Launch `kernel[grid](*pointers, *numbers, *constants)` on the device of its first tensor.

    Triton looks at each argument of each call for what the kernel may be compiled for: too long beside a small kernel.
    So from the second call with the same numbers, constants and types on, what the first one compiled is launched.
    """
    first = pointers[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return launch(kernel, grid, pointers, numbers, constants, warps=warps, stages=stages)
    key = id(kernel), grid, numbers, constants, warps, stages, first.get_device(), *[x.dtype for x in pointers]
    aligned = all(x.data_ptr() % _ALIGNED == 0 for x in pointers)
    if aligned and (run := _prepared.get(key)) is not None:
        run(*pointers, *numbers, *constants)
        return None
    compiled = kernel[grid](*pointers, *numbers, *constants, num_warps=warps, num_stages=stages)
    if aligned and compiled is not None:  # None: interpreted
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = compiled[(*grid, 1, 1)[:3]]
    return None


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; Triton's own takes microseconds outside of a kernel."""
    return -(-a // b)
