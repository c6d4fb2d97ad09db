"""A sound that a caller gives, a file or samples, as the waveform that a model takes."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mars.arguments import Array, integer, tensor
from mars.config import AudioConfig
from mars.data.decode import Recording, Sound, convert, record
from mars.data.notes import SHORTEST, fault
from mars.errors import BadFileError, ConfigError, DataError

Given: TypeAlias = "str | Path | Array | tuple[Array, int]"


def waveform(name: str, given: Given, config: AudioConfig) -> tuple[Tensor, frozenset[str]]:
    """Return a sound as float32 (samples,) at the front end's rate and length, and which of `decode.CHANGES` it took.

    Args:
        name: what messages call it.
        given: the path of a file; a waveform at the front end's rate; or a waveform and its rate in Hz. A waveform has
            full scale 1, and the shorter of its two axes, if it has two, are channels.

    Raises:
        ConfigError: it is none of these.
        DataError: the file cannot be read, or there is no sound in it.
        MissingPackage: soxr is needed for another rate, and missing.
    """
    what = str(given) if isinstance(given, str | Path) else name
    try:
        if isinstance(given, str | Path):
            path = Path(given)
            if not path.is_file():
                raise DataError(f"{path} is not a file; give a sound as {name}")
            recording = record(path, max(config.samples / config.sample_rate, SHORTEST))
        else:
            samples, rate = given if isinstance(given, tuple) else (given, config.sample_rate)
            recording = Recording(_channels(name, samples), integer(f"the rate of {name} in Hz", rate, 1), None)
        found: Sound = convert(recording, sample_rate=config.sample_rate, samples=config.samples)
        if reason := fault(found.audio):
            raise BadFileError(reason)
    except BadFileError as error:
        raise DataError(f"{what}: {error}") from None
    return torch.from_numpy(found.audio.copy()), found.changes


def _channels(name: str, samples: Array) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return a waveform as float32 (frames, channels)."""
    wanted = "a path, a waveform (samples,) with full scale 1, or a waveform and its rate"
    x = tensor(name, samples, wanted)
    if not x.is_floating_point() or x.ndim not in (1, 2) or not x.numel():
        raise ConfigError(f"{name}: want {wanted}, got {x.dtype} {tuple(x.shape)}")
    x = x.detach().cpu().float()
    return (x[:, None] if x.ndim == 1 else x if x.shape[0] >= x.shape[1] else x.T).numpy()
