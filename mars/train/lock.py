"""One trainer per run folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mars.errors import ConfigError

NAME = ".lock"
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

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
    """Keep other trainers out of `folder`. The system forgets the lock when the process ends, however that happens.

    Gives whether the folder is locked: not every network file system can; `say` then gets a warning.

    Raises:
        ConfigError: another process has it; the message names process and host.
    """
    path = folder / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _take(descriptor)
            locked = True
        except OSError as error:
            if error.errno in _HELD:
                holder = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
                raise ConfigError(f"{folder} is in use by {holder}; wait for it to end or name another --out") from None
            if error.errno not in _UNSUPPORTED:
                raise
            locked = False
            say(f"warning: {folder} cannot be locked ({error.strerror}); make sure that no other trainer uses it")
        if locked:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield locked
    finally:
        os.close(descriptor)


def held(folder: Path) -> bool | None:
    """Whether a trainer has `folder`; None where that cannot be told."""
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
