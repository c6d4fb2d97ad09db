"""Which notes each step trains on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from mars.runtime import stream


@lru_cache(maxsize=2)  # a step may end one epoch and open the next
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return torch.randperm(count, generator=stream(seed, 0, epoch)).numpy()


def batch_indices(seed: int, step: int, batch: int, notes: np.ndarray) -> np.ndarray:
    """The notes of one step: each epoch is a new permutation, and an epoch's rest opens the next one."""
    chosen: list[np.ndarray] = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, offset = divmod(position, len(notes))
        part = _order(seed, epoch, len(notes))[offset : offset + end - position]
        chosen.append(notes[part])
        position += len(part)
    return np.concatenate(chosen)
