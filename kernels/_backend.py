"""This module decides which implementation an operation runs.

MARS_KERNELS chooses: "auto" (native on a CPU and Triton on CUDA where they are there, else plain PyTorch),
"reference" (plain PyTorch everywhere), "native" or "triton" (an error where that is missing). It is read when this
module is imported; `use` changes it for a while.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from mars.errors import ConfigError, KernelError
from mars.kernels import _native

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["reference", "native", "triton"]
_Entry = TypeVar("_Entry")
_CHOICES = ("auto", *get_args(Backend))
_FAST: dict[str, Backend] = {"cpu": "native", "cuda": "triton"}  # what "auto" takes on a device type

_choice = os.environ.get("MARS_KERNELS", "auto")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run the operations inside the `with` block on another implementation, named as for MARS_KERNELS."""
    global _choice
    if name not in _CHOICES:
        raise ValueError(f"kernels.use: want one of {', '.join(_CHOICES)}, got {name!r}")
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


_planned: str | None = None


@contextmanager
def planned(device: str) -> Iterator[None]:
    """Inside the `with` block, choose as on a device type that has its kernels, wherever the (fake) tensors are."""
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def device_type(x: Tensor) -> str:
    """Return the device type to choose for: that of x, or the one that is planned for."""
    return _planned or x.device.type


def choice() -> str:
    """Return what MARS_KERNELS or `use` asks for, "auto" included.

    Raises ConfigError where MARS_KERNELS is none of them.
    """
    if _choice not in _CHOICES:  # not when it is read: an error of an import could not be told as one line
        raise ConfigError(f"MARS_KERNELS: want one of {', '.join(_CHOICES)}, got {_choice!r}")
    return _choice


def missing(backend: Backend, device: str) -> str | None:
    """Return why an implementation cannot run on tensors of a device type, or None where it can."""
    if device == _planned:
        return None
    if backend == "native":
        if device != "cpu":
            return "native kernels run on the CPU"
        library = _native.library()
        return library if isinstance(library, str) else None
    if backend == "triton":
        if not _triton_installed():
            return "triton is not installed: pip install triton"
        if device != "cuda":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return "Triton kernels run on CUDA (or interpreted, slowly, with TRITON_INTERPRET=1)"
            return _interpreter_stops()
    return None


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interpreter_stops() -> str | None:
    """Return why Triton's interpreter fails here: before 3.7 it makes numbers of arrays, which NumPy 2.4 refuses."""
    triton, numpy = metadata.version("triton"), metadata.version("numpy")
    if _minor(triton) < (3, 7) and _minor(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} stops on NumPy {numpy}: it wants Triton 3.7 or NumPy below 2.4"
    return None


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def backend(device: str) -> Backend:
    """Return the implementation for tensors of a device type ("cpu", "cuda", "mps", ...).

    Raises ConfigError where MARS_KERNELS is unknown, KernelError where it asks for one that cannot run here.
    """
    if choice() == "auto":
        fast = _FAST.get(device)
        if fast is None:
            return "reference"
        why = missing(fast, device)
        if why is None:
            return fast
        _warn(fast, why)
        return "reference"
    chosen: Backend = _choice  # type: ignore[assignment]
    if (why := missing(chosen, device)) is not None:
        raise KernelError(f"MARS_KERNELS={chosen}: {why}")
    return chosen


def select(op: str, table: Mapping[str, _Entry], backend: str) -> _Entry:
    """Return what the table {backend: function} of an operation holds for a backend.

    Raises KernelError where it holds nothing: no operation runs on an implementation that was not asked for.
    """
    if backend not in table:
        raise KernelError(f"{op}: want a backend of {', '.join(table)}, got {backend!r}")
    return table[backend]


def deferred(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module that is imported at its first call, as `import mars` must not need Triton."""
    function: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(module), name)
        return function(*arguments)

    return call


@cache  # once a process
def _warn(name: str, why: str) -> None:
    warnings.warn(f"mars runs on plain PyTorch, which is slower: no {name} kernels ({why})", stacklevel=3)
