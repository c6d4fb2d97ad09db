"""Command lines: parse, check, hand over."""

from __future__ import annotations

import sys
from importlib import import_module


def _start(name: str) -> None:
    """Run a command; a Ctrl-C while it is imported gets its one line too."""
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
