"""Reading and writing files whole and durably, without PyTorch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from mars.errors import MarsError

LARGEST = 1 << 26  # bytes of JSON or text that are read; the listing of a million notes has a quarter of that
DEEPEST = 64  # lists and objects inside one another; more would exhaust the stack of whoever walks over them


class Entry(TypedDict):
    """An entry of a manifest: a file's size and sha256."""

    sha256: str
    bytes: int


def write_atomically(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write data to path by way of a temporary file beside it, so that no reader sees half a file.

    With `durable` the file also survives a power failure.
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
    """Make the folder `name` in `parent`, or `name-2`, `name-3` … if taken; no two processes get the same one."""
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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading. A pipe could be waited for, and a device read, without end.

    Raises:
        OSError: it is missing, cannot be opened, or is no regular file.
    """
    # Without O_NONBLOCK the open itself waits for the writer of a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield file


def read_limited(path: Path, largest: int = LARGEST) -> bytes:
    """Read a regular file as bytes.

    Raises:
        OSError: it is missing, no regular file, cannot be read, or is over `largest` bytes (`errno.EFBIG`).
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size  # room is made for as much as is asked for
        data = file.read(min(size, largest) + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"over {largest:,} bytes", str(path))
    return data


def read_bytes(path: Path, error: type[MarsError], largest: int = LARGEST) -> bytes:
    """Read a regular file as bytes.

    Raises:
        MarsError: of the kind `error`: it is missing, cannot be read, or is over `largest` bytes.
    """
    try:
        return read_limited(path, largest)
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as problem:
        if problem.errno == errno.EFBIG:
            raise error(f"{path} is {problem.strerror}, the most that such a file may have") from None
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from None


def read_text(path: Path, error: type[MarsError], largest: int = LARGEST) -> str:
    """Read a regular file as UTF-8 text. Raises as `read_bytes`."""
    try:
        return read_bytes(path, error, largest).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{path} cannot be read as UTF-8 text: {problem.reason} at byte {problem.start:,}") from None


def read_json(path: Path, error: type[MarsError], largest: int = LARGEST) -> Any:
    """Read a regular file as JSON. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, error, largest), str(path), error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number:.20} is too large a number")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


def parse_json(text: bytes | str, where: str, error: type[MarsError]) -> Any:
    """Parse strict JSON: no NaN, no infinity, no key twice, at most `DEEPEST` lists and objects inside one another.

    Raises:
        MarsError: of the kind `error`, naming `where`.
    """

    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        value = STRICT.decode(decoded)
    except RecursionError:
        raise _too_deep(where, error) from None
    except ValueError as problem:
        raise error(f"{where} cannot be read as JSON: {problem}") from None
    level = [value]
    for _ in range(DEEPEST):
        inside = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        level = [x for values in inside for x in values]
    if any(isinstance(x, dict | list) for x in level):
        raise _too_deep(where, error)
    return value


def _too_deep(where: str, error: type[MarsError]) -> MarsError:
    return error(f"{where} cannot be read as JSON: more than {DEEPEST} lists and objects inside one another")


def sha256(path: Path) -> str:
    """Return the sha256 of a regular file in hexadecimal. Raises `OSError`."""
    with opened(path) as file:
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


def cache_folder() -> Path:
    """Where mars may keep what can be made again: $MARS_CACHE_DIR, else `mars` in the user's folder for such things."""
    if own := os.environ.get("MARS_CACHE_DIR"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mars"


def size_of(path: Path) -> int:
    """Return the bytes of all files below a directory, 0 if there is none; files that vanish meanwhile count as 0."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if file.is_file() else 0
    return total


def probe(folder: Path) -> None:
    """Write, flush, rename and remove a small file in folder, to see early that a checkpoint can be written.

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
