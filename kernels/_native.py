"""This module loads the library of native CPU kernels, declares its functions and selects the instruction set.

Two environment variables are read when the library is loaded: MARS_NATIVE_LIBRARY, a path in place of the installed
library, and MARS_NATIVE_LEVEL, one of `LEVELS` in place of the best that the processor has.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path

import torch  # its OpenMP runtime must be there first, so that the library shares it

from mars.errors import ConfigError, KernelError

ABI = 2  # MARS_ABI of native/mars_native.h
LEVELS = ("portable", "avx2", "avx512", "bf16", "vnni", "amx")  # enum Level of native/simd.h
_NAMES = ("libmars_native.so", "libmars_native.dylib", "mars_native.dll")

_P, _I64, _I32, _F32, _F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "mars_threaded": (_I32, []),
    "mars_level": (_I32, []),
    "mars_level_supported": (_I32, [_I32]),
    "mars_set_level": (_I32, [_I32]),
    "mars_codebook_pack": (_P, [_P, _I64, _I64, _I32]),
    "mars_codebook_free": (None, [_P]),
    "mars_nearest_code": (_I32, [_P, _P, _I64, _P, _I32]),
    "mars_multiscale_quantize": (_I32, [_P, *[_I64] * 4, *[_P] * 4, _I64, *[_P] * 6, _I32]),
    "mars_cmx": (_I32, [*[_I64] * 6, _P, _P, _I32]),
    "mars_inverse_cmx": (_I32, [*[_I64] * 6, _P, _P, _I32]),
    "mars_spectrogram_cmx": (_I32, [*[_I64] * 5, _F64, _F64, _P, *[_I64] * 3, _P, _I32]),
    "mars_spectrogram_cmx_backward": (
        _I32,
        [*[_I64] * 5, _F64, _F64, _P, _P, *[_I64] * 3, _P, *[_I64] * 3, _I32],
    ),
    "mars_inverse_spectrogram_cmx": (_I32, [*[_I64] * 7, _F64, _F64, _P, _P, _I32]),
}


@cache
def library() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none."""
    path = _path()
    if path is None:
        return "not built: this installation found no C++17 compiler (install mars again where there is one)"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    if not hasattr(lib, "mars_abi"):
        return f"{path} is another library than that of mars"
    lib.mars_abi.restype = _I32
    if (abi := lib.mars_abi()) != ABI:
        return f"{path} has ABI {abi}, want {ABI}: install mars again"
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    if level := os.environ.get("MARS_NATIVE_LEVEL"):
        _set_level(lib, level)
    return lib


def _path() -> Path | None:
    if chosen := os.environ.get("MARS_NATIVE_LIBRARY"):
        return Path(chosen)
    folder = resources.files("mars.kernels")
    return next((Path(str(folder / name)) for name in _NAMES if (folder / name).is_file()), None)


def functions() -> ctypes.CDLL:
    """Return the library, or raise KernelError where there is none."""
    lib = library()
    if isinstance(lib, str):
        raise KernelError(f"no native kernels: {lib}")
    return lib


def check_memory(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError where the storage of a tensor was made smaller than what it reaches: kernels read by address."""
    for x in tensors:
        if x is not None and x.untyped_storage().nbytes() < _reach(x) and x.numel():
            raise ValueError(
                f"{op}: want tensors with their values in memory; one {tuple(x.shape)} of {x.dtype} has a storage that "
                "was made smaller"
            )


def _reach(x: torch.Tensor) -> int | torch.SymInt:
    """Return the bytes from the start of the storage of x to the end of its last element."""
    if x.is_contiguous():
        return x.nbytes + x.storage_offset() * x.itemsize
    last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.itemsize


def check(status: int) -> None:
    """Raise MemoryError where a function of the library returned -1."""
    if status:
        raise MemoryError("a native kernel ran out of memory")


def threads() -> int:
    """Return how many threads a call may use: those of torch, or one where the library was built without OpenMP."""
    return torch.get_num_threads() if functions().mars_threaded() else 1


def levels() -> list[str]:
    """Return the instruction sets that both this processor and the library have, the best last."""
    lib = functions()
    return [name for i, name in enumerate(LEVELS) if lib.mars_level_supported(i)]


def level() -> str:
    """Return the instruction set in use."""
    return LEVELS[functions().mars_level()]


@contextmanager
def use_level(name: str) -> Iterator[None]:
    """Use another instruction set inside the `with` block; raises ConfigError where the processor lacks it."""
    lib = functions()
    before = lib.mars_level()
    _set_level(lib, name)
    try:
        yield
    finally:
        lib.mars_set_level(before)


def _set_level(lib: ctypes.CDLL, name: str) -> None:
    if name not in LEVELS or lib.mars_set_level(LEVELS.index(name)):
        have = ", ".join(n for i, n in enumerate(LEVELS) if lib.mars_level_supported(i))
        raise ConfigError(f"MARS_NATIVE_LEVEL: want one of {have} on this processor, got {name!r}")
