"""Image files: how one is opened for a client, and how its bytes are read.

The front opens, the worker looks and reads: whatever a file system can do to a reader, it does to
the process that can be killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from typing import Final

from swiprctl.protocol import SwiprError

EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors that say that this process or the machine has run out, not that anything is amiss."""
READS: Final = 3
"""How often a file is read that changes meanwhile."""
KERNEL_FILE_SYSTEMS: Final = frozenset(
    {
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x27E0EB,  # cgroup
        0x63677270,  # cgroup2
        0x7655821,  # resctrl
        0x64626720,  # debugfs
        0x74726163,  # tracefs
        0x73636673,  # securityfs
        0xF97CFF8C,  # selinuxfs
        0x43415D53,  # smackfs
        0x5A3C69F0,  # aafs, AppArmor's
        0xCAFE4A11,  # bpf
        0xDE5E81E4,  # efivarfs
        0x6165676C,  # pstore
        0x62656570,  # configfs
        0x42494E4D,  # binfmt_misc
        0x65735543,  # fusectl
        0x1CD1,  # devpts
        0x19800202,  # mqueue
        0x67596969,  # rpc_pipefs
        0x6E667364,  # nfsd
    }
)
"""Where files are made up by the kernel, and to read one may do something: linux/magic.h, and the
file systems' own sources for the last two."""

SYS_OPENAT2: Final = 437  # asm-generic/unistd.h; the same on every machine since Linux 5.6
AT_FDCWD: Final = -100  # linux/fcntl.h
RESOLVE_NO_MAGICLINKS: Final = 0x02  # linux/openat2.h

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def open_image(path: str) -> int:
    """Open ``path`` for reading and return the descriptor, which the caller closes.

    Links are followed, but for those of /proc that lead to what a process holds: one of the
    daemon's own descriptors may be another client's picture. Nothing but a regular file is opened
    for reading: to open a device may start it, to open a pipe may wake who writes to it. May block
    for as long as the file system does.

    Raises:
        SwiprError: ``not_found``, ``permission_denied`` or ``not_a_file``; ``busy`` when the
            daemon or the machine can open no more files, or another process holds this one.
    """
    try:
        place = _find(os.fsencode(path))
        try:
            found = os.fstat(place)
            if not stat.S_ISREG(found.st_mode):
                raise SwiprError("not_a_file", f"{path}: {_wrong_kind(found)}")
            if _file_system(place) in KERNEL_FILE_SYSTEMS:
                raise SwiprError(
                    "not_a_file",
                    f"{path}: expected a file on a disk, got one that the kernel makes up",
                )
            return _open_found(place)
        finally:
            os.close(place)
    except (FileNotFoundError, NotADirectoryError):
        raise SwiprError("not_found", f"{path}: no such file") from None
    except PermissionError:
        raise SwiprError(
            "permission_denied",
            f"{path}: the daemon has no permission to read it; send a descriptor, as swiprctl does",
        ) from None
    except OSError as error:
        # EAGAIN: somebody holds a lease on it, who has been asked by this to give it back.
        code = "busy" if error.errno in (*EXHAUSTED, errno.EAGAIN) else "not_a_file"
        if error.errno == errno.ELOOP:
            raise SwiprError(
                code, f"{path}: links lead in a circle, or to what a process holds (/proc/…/fd)"
            ) from None
        raise SwiprError(code, f"{path}: cannot be opened: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate
        raise SwiprError("not_found", f"no file can have the name {path!r}") from None


def _find(path: bytes) -> int:
    """Return a descriptor that stands for the place ``path`` and does nothing to what is there."""
    if b"\0" in path:
        raise ValueError(path)
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_NO_MAGICLINKS)  # open_how
    fd: int = _LIBC.syscall(SYS_OPENAT2, AT_FDCWD, path, how, len(how))
    if fd >= 0:
        return fd
    number = ctypes.get_errno()
    # The second is what filters of system calls answer; want of permission is EACCES.
    if number in (errno.ENOSYS, errno.EPERM):
        raise SwiprError(
            "permission_denied",
            "this daemon cannot open paths safely, for want of openat2 (Linux 5.6, let through by"
            " filters of system calls); send a descriptor, as swiprctl does",
        )
    raise OSError(number, os.strerror(number))


def _file_system(fd: int) -> int:
    found = ctypes.create_string_buffer(256)  # struct statfs, whose first long is f_type
    if _LIBC.fstatfs(fd, found) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(ctypes.c_ulong.from_buffer(found).value) & 0xFFFFFFFF


def _open_found(place: int) -> int:
    # O_NONBLOCK: a file that somebody holds a lease on (fcntl(2)) is not waited for.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{place}", flags)
    except FileNotFoundError:
        raise SwiprError("internal", "the daemon needs /proc to open files by path") from None


def read_image(fd: int, *, max_bytes: int) -> bytes:
    """Return the bytes of the regular file behind ``fd``, from its start.

    The descriptor's own offset, which its sender shares, is neither used nor moved. Nothing is
    mapped, so a file that changes meanwhile is no fault; it is read again, or refused.

    Raises:
        SwiprError: ``not_a_file``, ``too_large``, ``permission_denied`` (opened for writing only)
            or ``not_an_image`` (empty, it cannot be read, or it does not stop changing).
    """
    for _ in range(READS):
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise SwiprError("not_a_file", _wrong_kind(found))
        if found.st_size > max_bytes:
            raise SwiprError(
                "too_large", f"the file has {found.st_size} bytes, expected at most {max_bytes}"
            )
        data = _read(fd, found.st_size)
        if _version(os.fstat(fd)) != _version(found):
            continue
        if not data:
            raise SwiprError("not_an_image", "the file is empty")
        if len(data) < found.st_size:
            told = f"the file says that it has {found.st_size} bytes, but gives {len(data)}"
            raise SwiprError("not_an_image", told)
        return data
    raise SwiprError(
        "not_an_image", "the file changes while it is read; try again when it is written"
    )


def _read(fd: int, size: int) -> bytes:
    parts = []
    offset = 0
    while offset < size:
        try:
            part = os.pread(fd, size - offset, offset)
        except OSError as error:
            if error.errno == errno.EBADF:
                told = "the descriptor is not open for reading"
                raise SwiprError("permission_denied", told) from None
            raise SwiprError("not_an_image", f"the file cannot be read: {error.strerror}") from None
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _version(found: os.stat_result) -> tuple[int, int, int]:
    # What the file system tells, and no more: its clock ticks every 4 ms or so, and a writer that
    # stops half-way leaves a file like any other.
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _wrong_kind(found: os.stat_result) -> str:
    return f"expected a regular file, got {_kind(found.st_mode)}"


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
