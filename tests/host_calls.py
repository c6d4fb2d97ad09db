"""Counts what the Python side of a Triton operation does in a call, with the launches themselves left out.

`python -m tests.host_calls` prints, as JSON, for each operation the calls of functions (of Python and of C) that one
call makes once everything is prepared, and its launches. It needs the triton wheel but no GPU, and runs in a process
of its own, as the kernels must not be interpreted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch


class _Driver:
    """A GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """What Triton makes of a kernel, as far as it is launched."""

    function, packed_metadata = 1, ()

    def __init__(self, launched: list[str], name: str) -> None:
        self.launched, self.name = launched, name

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self.launched.append(self.name)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3
        return lambda *arguments: self.run(*grid, *arguments)


def stub() -> list[str]:
    """Replace GPU and compiler; returns the list that names of launched kernels are added to."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def compile_(self: Any, key: Any, signature: Any, device: int, *_: Any) -> _Compiled:
        found = self.device_caches[device][0][key] = _Compiled(launched, self.fn.__name__)
        return found

    driver.set_active(_Driver())
    JITFunction._do_compile = compile_
    return launched


def calls(function: Callable[[], object]) -> int:
    """The functions called by `function()`, itself included."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1  # but for the last call above


def operations() -> dict[str, Callable[[], object]]:
    """A small call of each operation."""
    from mars import kernels

    x, z = torch.randn(1, 4, 8), torch.randn(1, 4, 8, dtype=torch.complex64)
    rows, codebook = torch.randn(2, 4), kernels.pack_codebook(torch.randn(8, 4))
    q, gain = torch.randn(1, 2, 5, 16), torch.ones(2, requires_grad=True)
    leaves = [q.clone().requires_grad_() for _ in "qkv"]
    f, codes, weight, bias = (torch.randn(s) for s in ((1, 4, 16, 16), (16384, 4), (4, 4, 4, 3, 3), (4, 4)))
    scales, which = [(n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)], [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]

    def attention() -> torch.Tensor:
        return kernels.scale_causal_attention(*leaves, (1, 4), 0.5, head_scale=gain)

    def forward() -> None:
        with torch.no_grad():
            attention()

    return {
        "cmx": lambda: kernels.cmx(x, (2, 2)),
        "spectrogram_cmx": lambda: kernels.spectrogram_cmx(z, (2, 2), 0.01, 0.2),
        "nearest_code": lambda: kernels.nearest_code(rows, codebook),
        "attention": forward,
        "attention with gradients": lambda: torch.autograd.grad(attention(), [*leaves, gain], q),
        "multiscale_quantize": lambda: kernels.multiscale_quantize(f, codes, weight, bias, which, scales),
    }


def main() -> None:
    """Print {operation: [calls, launches]}."""
    from mars import kernels
    from mars.kernels import _backend

    torch.set_num_threads(1)
    launched, found = stub(), {}
    with _backend.planned("cpu"), kernels.use("triton"):
        for name, function in operations().items():
            for _ in range(3):
                function()
            launched.clear()
            found[name] = [calls(function), len(launched)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
