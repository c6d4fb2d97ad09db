"""The command lines: they parse and check arguments, and call the library."""

from __future__ import annotations

import sys
from importlib import import_module


def _start(name: str) -> None:
    """Import and run a command; a Ctrl-C during the import is reported in one line too."""
    try:
        main = import_module(f"mars.cli.{name}").main
    except KeyboardInterrupt:
        sys.stderr.write("Error: interrupted\n")
        sys.exit(130)
    main()


def mars_train() -> None:
    _start("train")


def mars_generate() -> None:
    _start("generate")


def mars_data() -> None:
    _start("data")


def mars_eval() -> None:
    _start("evaluate")


def mars_instrument() -> None:
    _start("instrument")


def mars() -> None:
    _start("root")
