"""Files whose only use is their lock: whoever holds it is alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat


class ForeignLockError(Exception):
    """The file is there, and somebody else may hold its lock whenever they like."""


def lock_file(path: str, *, wait: bool) -> int:
    """Return a descriptor of the file at ``path``, made where there is none, that holds its lock.

    Only our own user may open the file, so nobody else can hold it. Whoever removes it does so
    while holding the lock; the lock ends with the last copy of the descriptor.

    Raises:
        BlockingIOError: somebody holds it, and ``wait`` is false.
        ForeignLockError: the file is not ours alone.
        OSError: it cannot be opened.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise ForeignLockError(
                    f"others can hold the lock {path}; remove it or choose another path"
                )
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_locked_file(path, fd):  # its last holder may have removed it meanwhile
                undo.pop_all()
                return fd


def is_locked_file(path: str, fd: int) -> bool:
    """Return whether the file behind ``fd`` is still the one at ``path``."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False
