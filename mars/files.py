"""Files that are whole and on the disk, without PyTorch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict


class Entry(TypedDict):
    """What a manifest says of a file."""

    sha256: str
    bytes: int


def write_atomically(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write data to path by way of a temporary file beside it, so that no reader sees half a file.

    With `durable` it outlasts a power failure too.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    """Write parts, one after another, to the new file path and flush it to disk; hashed on a second thread meanwhile.

    Raises:
        FileExistsError: `path` exists.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file, ThreadPoolExecutor(1) as second:
        for part in parts:
            hashed = second.submit(digest.update, part)
            size += file.write(part)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def new_folder(parent: Path, name: str) -> Path:
    """Make the folder `name` in `parent`, or `name-2`, `name-3` and so on where that is taken: nobody else gets it."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def sha256(path: Path) -> str:
    """Hex sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or directory to disk; a directory only where the system can."""
    directory = path.is_dir()
    if directory and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (directory and error.errno == errno.EINVAL):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def size_of(path: Path) -> int:
    """Bytes of the files below a directory, 0 where there is none; what vanishes meanwhile counts as nothing."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if file.is_file() else 0
    return total


def probe(folder: Path) -> None:
    """Write, flush, rename and remove a small file in folder: what a checkpoint needs.

    Raises:
        OSError: one of these cannot be done.
    """
    one, other = (folder / f".probe{n}.{secrets.token_hex(4)}.tmp" for n in (1, 2))
    try:
        write_new(one, [b"probe"])
        one.rename(other)
        sync(folder)
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
