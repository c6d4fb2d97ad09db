"""`python -m mars.kernels` prints which implementations of the operations this machine has, and why not the others."""

from __future__ import annotations

import sys
from typing import get_args

import torch

from mars.errors import ConfigError, KernelError
from mars.kernels import _backend, _native
from mars.kernels._backend import Backend
from mars.kernels.scale_causal_attention.op import availability, choice


def main() -> None:
    write = sys.stdout.write
    devices = ["cpu"] + [d for d in ("cuda", "mps") if getattr(torch, d).is_available()]
    _backend.choice()
    choice()
    for device in devices:
        try:
            write(f"{device}: {_backend.backend(device)}\n")
        except KernelError as error:  # MARS_KERNELS asks for one that is missing
            write(f"{device}: {error}\n")
        for backend in get_args(Backend):
            write(f"  {backend:<10} {_backend.missing(backend, device) or 'yes'}\n")
        write("  attention:\n")
        for backend, why in availability(device).items():
            write(f"    {backend:<10} {why or 'yes'}\n")
    library = _native.library()
    if not isinstance(library, str):
        have = _native.levels()
        missing = [level for level in _native.LEVELS if level not in have]
        write(f"instruction set: {_native.level()} (of {', '.join(have)}")
        write(f"; this processor lacks {', '.join(missing)})\n" if missing else ")\n")
        write(f"threads: {_native.threads()}\n")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:  # an environment variable has a wrong value
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(error.code)
