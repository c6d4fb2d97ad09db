"""Locks on folders: one process holds a folder, and the system releases its lock however the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mars.errors import ConfigError

NAME = ".lock"
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_SCRATCH = (".tmp-", "-new")  # how the name of a folder of unfinished work begins and ends

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # nobody else may read what is locked, and the file's start is read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def claim(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Lock `folder` against other trainers while the block runs.

    Yields whether the folder is locked, which not every network file system can do; `say` then gets a warning.

    Raises:
        ConfigError: another process has it; the message names process and host.
    """
    descriptor, problem = _lock(folder)
    try:
        if problem is not None:
            say(f"warning: {folder} cannot be locked ({problem.strerror}); make sure that no other trainer uses it")
        yield problem is None
    finally:
        os.close(descriptor)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`, to fill and rename to `path`; if it is still there it is removed.

    What processes that were killed have left of theirs goes first; see `sweep`.

    Raises:
        ConfigError: another process fills one for the same `path`.
    """
    sweep(path.parent)
    place = path.with_name(path.name.join(_SCRATCH))
    descriptor, problem = _lock_new(place)
    try:
        if problem is not None:  # nobody could tell whose it is: one that is nobody else's, and stays after a kill
            with contextlib.suppress(OSError):
                (place / NAME).unlink()
                place.rmdir()
            place = Path(tempfile.mkdtemp("", f"{_SCRATCH[0]}{path.name}-", path.parent))
        _empty(place)
        new = place / path.name  # a level below: the lock is no part of the result, nor let go before that is in place
        new.mkdir()
        yield new
    finally:
        _remove(place)
        os.close(descriptor)
        if sys.platform == "win32":  # where open files cannot be removed
            shutil.rmtree(place, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove unfinished work in `folder` whose process has ended."""
    for place in folder.glob("*".join(_SCRATCH)):
        with contextlib.suppress(OSError, ConfigError):
            if not (place / NAME).exists():  # its owner was killed before it had locked it, or is about to
                place.rmdir()
                continue
            descriptor, problem = _lock(place)
            if problem is None:
                _remove(place)
            os.close(descriptor)


def _lock_new(place: Path) -> tuple[int, OSError | None]:
    """Make `folder` if needed and `_lock` it, trying again while a process that sweeps holds or removes it."""
    tries = 20
    while True:
        place.mkdir(exist_ok=True)
        try:
            return _lock(place)
        except (FileNotFoundError, ConfigError):
            tries -= 1
            if not tries:
                raise
        time.sleep(0.05)


def _empty(place: Path) -> None:
    for entry in place.iterdir():
        if entry.name != NAME:
            shutil.rmtree(entry, ignore_errors=True)


def _remove(place: Path) -> None:
    """Remove a folder, its lock last: until then no other process can lock it."""
    with contextlib.suppress(OSError):
        _empty(place)
        (place / NAME).unlink(missing_ok=True)
        place.rmdir()


def _lock(folder: Path) -> tuple[int, OSError | None]:
    """Open a file that locks `folder` until it is closed; and why it does not, if the file system has no locks.

    Raises:
        ConfigError: another process has it; the message names process and host.
    """
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _take(descriptor)
            if not _is_at(path, descriptor):  # removed by its owner between the two
                os.close(descriptor)
                continue
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor, error
            os.close(descriptor)
            if error.errno not in _HELD:
                raise
            raise ConfigError(
                f"{folder} is in use by {_holder(path)}; wait for it to end or name another folder"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk it is as good a lock without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor, None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Return the process and host that hold the lock, as the holder wrote them."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            if text := path.read_text(encoding="utf-8", errors="replace").strip():
                return text
        time.sleep(0.01)
    return "another process"


def held(folder: Path) -> bool | None:
    """Return whether a trainer has `folder`; None where that cannot be known."""
    if sys.platform == "win32" or not (folder / NAME).is_file():
        return None
    with (folder / NAME).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system that has no locks
            return None
    return False
