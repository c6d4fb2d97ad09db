"""Checks of the samples that every measure is given, and an order of them that depends only on what is in them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from mars.errors import ConfigError, DataError

_BLOCK = 256  # samples summed at a time


def checked(name: str, samples: Tensor, *shape: str, minimum: int = 1) -> Tensor:
    """Return the samples, detached, on the CPU and contiguous; float32 if they were in less.

    name, shape: of the measure and of what it wants, for the message, such as "kid", "notes", "features".

    Raises:
        ValueError: another number of dimensions, or integers.
        DataError: fewer than `minimum` samples, or some that are not finite.
    """
    if samples.ndim != len(shape) or not samples.is_floating_point():
        expected = f"floating-point ({', '.join(shape)})"
        raise ConfigError(f"{name}: want {expected}, got {samples.dtype} {tuple(samples.shape)}")
    if len(samples) < minimum:
        raise DataError(f"{name}: want at least {minimum} {shape[0]}, got {len(samples)}; evaluate more of them")
    samples = samples.detach().cpu()
    samples = samples.to(torch.promote_types(samples.dtype, torch.float32)).contiguous()
    finite(name, samples, shape[0])
    return samples


def checked_pair(name: str, real: Tensor, fake: Tensor, *shape: str, minimum: int = 1) -> tuple[Tensor, Tensor]:
    """Return both sets as `checked`, of the same width.

    Raises:
        ValueError: as `checked`, or their last dimensions differ.
        DataError: as `checked`.
    """
    real = checked(f"{name} (real)", real, *shape, minimum=minimum)
    fake = checked(f"{name} (fake)", fake, *shape, minimum=minimum)
    if real.shape[-1] != fake.shape[-1]:
        sizes = f"{real.shape[-1]} (real), {fake.shape[-1]} (fake)"
        raise ConfigError(f"{name}: want as many {shape[-1]} for both, got {sizes}")
    return real, fake


def finite(name: str, samples: Tensor, kind: str) -> None:
    """Raise `DataError` if any of samples (n, ...) holds NaN or infinity."""
    bad = int((~_sums(samples).isfinite()).sum())
    if bad:
        raise DataError(f"{name}: {bad} of {len(samples)} {kind} hold NaN or infinity; leave them out or repair them")


def canonical_order(samples: Tensor) -> Tensor:
    """Return indices int64 (n,) that bring samples (n, ...) into an order of their own: by sum, then by content.

    A measure that draws subsets from its samples in this order gives the same value, bit for bit, in whatever order
    it got them. A sum changes little where a value does, so rounding that differs between two machines moves few
    samples; an order by hash would move them all.
    """
    sums = _sums(samples).numpy()
    _, first, count = np.unique(sums, return_index=True, return_counts=True)
    if len(first) == len(sums):
        return torch.from_numpy(np.argsort(sums))
    tied = np.isin(sums, sums[first[count > 1]])
    rows = samples.contiguous().flatten(1).numpy()
    content = [hashlib.blake2b(row).digest() if tie else b"" for row, tie in zip(rows, tied, strict=True)]
    return torch.tensor(sorted(range(len(sums)), key=lambda i: (sums[i], content[i])))


def canonical(samples: Tensor) -> Tensor:
    """Return samples (n, ...) in `canonical_order`, in float64."""
    return samples[canonical_order(samples)].double()


def _sums(samples: Tensor) -> Tensor:
    """Return the sum of each of samples (n, ...), float64 (n,)."""
    if samples.ndim == 1:
        return samples.double()
    # PyTorch converts all that it sums first, which for many log-mels would be gigabytes.
    return torch.cat([x.flatten(1).sum(1, dtype=torch.float64) for x in samples.split(_BLOCK)])
