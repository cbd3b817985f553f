"""Image files: how one is opened for a client, and how its bytes are read.

The front opens, the worker looks and reads: whatever a file system can do to a reader, it does to
the process that can be killed.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from swiprctl.protocol import SwiprError

EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors that say that this process or the machine has run out, not that anything is amiss."""


def open_image(path: str) -> int:
    """Open ``path`` for reading and return the descriptor, which the caller closes.

    May block for as long as the file system does.

    Raises:
        SwiprError: ``not_found``, ``permission_denied`` or ``not_a_file``; ``busy`` when the
            daemon or the machine can open no more files.
    """
    # O_NONBLOCK: a FIFO without a writer opens at once, and is then refused by what it is.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(os.fsencode(path), flags)
    except (FileNotFoundError, NotADirectoryError):
        raise SwiprError("not_found", f"{path}: no such file") from None
    except PermissionError:
        raise SwiprError(
            "permission_denied",
            f"{path}: the daemon has no permission to read it; send a descriptor, as swiprctl does",
        ) from None
    except OSError as error:
        code = "busy" if error.errno in EXHAUSTED else "not_a_file"
        raise SwiprError(code, f"{path}: cannot be opened: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate
        raise SwiprError("not_found", f"no file can have the name {path!r}") from None
    return fd


def read_image(fd: int, *, max_bytes: int) -> bytes:
    """Return the bytes of the regular file behind ``fd``, from its start.

    The descriptor's own offset, which its sender shares, is neither used nor moved, and nothing
    is mapped: a file that changes meanwhile gives other bytes, never a fault.

    Raises:
        SwiprError: ``not_a_file``, ``too_large``, ``permission_denied`` (opened for writing only)
            or ``not_an_image`` (empty, or it cannot be read).
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise SwiprError("not_a_file", f"expected a regular file, got {_kind(found.st_mode)}")
    if found.st_size > max_bytes:
        raise SwiprError(
            "too_large", f"the file has {found.st_size} bytes, expected at most {max_bytes}"
        )
    parts = []
    offset = 0
    while offset < found.st_size:
        try:
            part = os.pread(fd, found.st_size - offset, offset)
        except OSError as error:
            code = "permission_denied" if error.errno == errno.EBADF else "not_an_image"
            raise SwiprError(code, f"the file cannot be read: {error.strerror}") from None
        if not part:
            break
        parts.append(part)
        offset += len(part)
    if offset == 0:
        raise SwiprError("not_an_image", "the file is empty")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "something else"
