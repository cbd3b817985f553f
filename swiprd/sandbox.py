"""What the worker gives up by itself, whoever starts it, before it sees a stranger's picture.

It dies with its front and keeps no descriptor but its own. Where the kernel has Landlock, it reads
what a model needs and nothing else, and writes, runs, connects to and signals nothing. What was
opened before, as the log, and what is received, as pictures, stays usable.

It must not import torch, which starts threads: what is given up here is given up by the calling
thread, and by those that it starts from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from swiprctl import protocol

log = logging.getLogger("swiprd")

MAX_DESCRIPTORS: Final = 256
"""A worker that computes has four, and one more for each picture that it was sent."""
LIBRARIES: Final = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache")
"""The system's own; Python's are beside its modules."""
MACHINE: Final = ("/proc/cpuinfo", "/proc/self", "/sys/devices/system", "/dev/urandom")
"""What torch and the C library want to know of the machine and the process."""

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38
# linux/capability.h
LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
CAP_DAC_READ_SEARCH: Final = 2
# asm-generic/unistd.h; they are the same wherever torch runs
LANDLOCK: Final = {"create_ruleset": 444, "add_rule": 445, "restrict_self": 446}
# linux/landlock.h; landlock(7) tells which ABI brought what
CREATE_RULESET_VERSION: Final = 1
RULE_PATH_BENEATH: Final = 1
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
RESOLVE_UNIX: Final = 1 << 16
FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 5: 16, 9: 17}
"""From which ABI on Landlock knows how many rights over files. They are the lowest bits."""
NETWORK_RIGHTS: Final = {4: 2, 10: 4}
"""The same of the network: to bind and to connect, by TCP and then by UDP."""
SCOPES: Final = {6: 2}
"""The same of scopes: abstract sockets and signals stay within the process."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class SandboxError(Exception):
    """The kernel refuses to take something away; the message is one line that says what."""

    def __init__(self, call: str, number: int) -> None:
        filtered = "; let it pass the filter of system calls" if number == errno.EPERM else ""
        super().__init__(f"{call}: {os.strerror(number)}{filtered}")
        self.number = number


def die_with_front(link: socket.socket) -> bool:
    """Have the kernel kill this process when the front ends, even while it is stopped or computes.

    More exactly, when that thread of the front ends which started it; see prctl(2).

    Args:
        link: one end of a socket pair that the front made; the front must be the parent.

    Returns:
        Whether the front is still there; without it, no signal comes any more.

    Raises:
        SandboxError: the kernel refuses.
    """
    _prctl("PR_SET_PDEATHSIG", PR_SET_PDEATHSIG, signal.SIGKILL)
    ucred = struct.Struct("=iII")  # pid, uid and gid; see unix(7)
    found = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size)
    return os.getppid() == int(ucred.unpack(found)[0])


def close_inherited(kept: int) -> None:
    """Close every descriptor but ``kept`` and the standard ones."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(fd)


def confine(readable: Iterable[str], *, max_memory: int) -> None:
    """Give up for good what neither loading a model nor computing needs.

    Of root's capabilities one is left, to read the models of other users. Where the kernel has no
    Landlock, files and network stay open, and the log says so. Landlock has no right over chmod(2),
    utime(2) and the like; over sockets with a path from ABI 9, UDP from 10.

    Args:
        readable: files, and folders with all that is in them, that can be read beside Python's
            own. What is not there is passed over.
        max_memory: bytes of address space; 0: as much as there is.

    Raises:
        SandboxError: the kernel refuses.
    """
    _prctl("PR_SET_NO_NEW_PRIVS", PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    # A core file holds pictures. Not 0 bytes, which many have: where a program takes core files, as
    # on Ubuntu, the kernel heeds no limit but 1 (coredump_pipe in its fs/coredump.c).
    _limit(resource.RLIMIT_CORE, 1)
    _limit(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
    if max_memory:
        _limit(resource.RLIMIT_AS, max_memory)
    # Nothing can be run, so nothing is to be found: where ctypes.util.find_library, which torch's
    # packages for GPUs call, finds a compiler, it fails for want of a temporary file.
    os.environ["PATH"] = ""
    try:
        abi = _landlock("create_ruleset", None, 0, CREATE_RULESET_VERSION)
    except SandboxError as error:
        # EPERM is what filters of system calls answer that do not know it, as older containers'.
        if error.number not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
        log.warning("there is no Landlock: files and network stay open to the worker (%s)", error)
        return
    files, network, scopes = (_bits(t, abi) for t in (FILE_RIGHTS, NETWORK_RIGHTS, SCOPES))
    attributes = struct.pack("=QQQ", files, network, scopes)  # struct landlock_ruleset_attr
    ruleset = _landlock("create_ruleset", attributes, len(attributes), 0)
    try:
        for path in (*LIBRARIES, *MACHINE, *_python(), *readable):
            _allow(ruleset, path, READ_FILE | READ_DIR)
        _allow(ruleset, os.devnull, READ_FILE | WRITE_FILE)
        _allow(ruleset, "/dev/log", RESOLVE_UNIX & files)
        _landlock("restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _drop_capabilities() -> None:
    # struct __user_cap_header_struct, and two of __user_cap_data_struct: 32 capabilities each.
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    if _LIBC.capget(header, data) < 0:
        raise SandboxError("capget", ctypes.get_errno())
    _, permitted, *_ = struct.unpack("=6I", data)
    kept = permitted & 1 << CAP_DAC_READ_SEARCH
    nothing_else = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    # Not where there is nothing to drop: a filter of system calls may not let it pass.
    if permitted != kept and _LIBC.capset(header, nothing_else) < 0:
        raise SandboxError("capset", ctypes.get_errno())


def _python() -> Iterator[str]:
    """Yield where modules are, and the libraries that they bring."""
    home = os.path.realpath(os.path.expanduser("~"))
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    paths = [
        *sys.path,
        *(os.path.dirname(module) for module in (__file__, protocol.__file__)),  # if editable
        *(os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")),
        *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")),
    ]
    for path in map(os.path.realpath, paths):
        if os.path.commonpath([path, home]) == path:
            log.warning("nothing is imported from %s: all of %s would be readable", path, home)
        else:
            yield path


def _bits(counts: Mapping[int, int], abi: int) -> int:
    return (1 << max((count for first, count in counts.items() if first <= abi), default=0)) - 1


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # whoever comes to read it will say why it cannot be
        return
    try:
        found = os.fstat(fd)
        if not stat.S_ISDIR(found.st_mode):
            rights &= ~READ_DIR
        if rights and not os.path.samestat(found, os.stat("/")):  # with which all would be allowed
            rule = struct.pack("=Qi", rights, fd)  # struct landlock_path_beneath_attr
            _landlock("add_rule", ruleset, RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def _limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(kind, (limit, limit))
    except (OSError, ValueError):  # which is what EPERM becomes
        raise SandboxError("setrlimit", errno.EPERM) from None


def _prctl(name: str, option: int, value: int) -> None:
    _checked(f"prctl {name}", _LIBC.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))


def _landlock(name: str, *args: bytes | int | None) -> int:
    words = (ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args)
    return _checked(f"landlock_{name}", _LIBC.syscall(ctypes.c_ulong(LANDLOCK[name]), *words))


def _checked(call: str, result: int) -> int:
    if result < 0:
        raise SandboxError(call, ctypes.get_errno())
    return result
