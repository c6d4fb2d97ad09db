"""Checks of the arguments of the Python interface: numbers and tensors, with one kind of error for others."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mars.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = "Tensor | npt.NDArray[Any]"


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number of Python or NumPy as an `int`.

    Raises:
        ConfigError: it is not one from `least` to `most`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        expected = f"at least {least}" if most is None else f"{least}..{most}"
        kind = "" if number is not None else "a whole number, "
        raise ConfigError(f"{name} must be {kind}{expected}, got {value!r:.80}")
    return number


def number(name: str, value: Any) -> float:
    """Return a number of Python or NumPy as a `float`; NaN and infinity are allowed.

    Raises:
        ConfigError: it is not one.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ConfigError(f"{name} must be a number, got {value!r:.80}")


def tensor(name: str, x: Array, expected: str) -> Tensor:
    """Return a tensor, or a NumPy array as a tensor: a copy, whatever its byte order and strides.

    Raises:
        ConfigError: it is something else, or of a dtype that PyTorch does not have; `expected` is in the message.
    """
    import torch  # late: settings and labels are checked without it

    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise ConfigError(f"{name}: want {expected}, got a NumPy array of {x.dtype}") from None
    raise ConfigError(f"{name}: want {expected}, as a tensor or a NumPy array, got {type(x).__name__}")
