"""Weights that others have trained, read so that nothing in their files is run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mars.errors import CheckpointError
from mars.files import opened, read_bytes

LARGEST = 1 << 30  # bytes of a file whose content is summed up at once; the published networks have 90 MB


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors by name from a file that `torch.save` wrote.

    Raises:
        CheckpointError: it is missing, damaged, or holds anything but tensors.
    """
    try:
        with opened(path) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # PyTorch names no class of errors for what a file can do to its reader, and advises to run it
        raise CheckpointError(f"{path} cannot be read as PyTorch weights; it is damaged or something else") from None
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{path} holds something else than tensors by name; want a state dict")
    return dict(content)


def git_blob(path: Path) -> str:
    """Return the name that git gives the file's content: sha1 of a header and the bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    content = read_bytes(path, CheckpointError, LARGEST)
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
