"""What systemd says to a service and hears from it, without its library.

The protocols are those of sd_listen_fds(3) and sd_notify(3). Nothing here reads the process's
environment by itself: ``__main__`` hands it in.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from typing import Final

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class ActivationError(Exception):
    """What was handed over is not what sd_listen_fds(3) and our socket unit promise."""


def listen_fds(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """Take over the listening sockets that the service manager opened, and forget the variables.

    The variables are removed, so that no child takes the sockets for its own. The sockets are
    never unlinked, shut down or listened on again here: they belong to the service manager.

    Returns:
        Non-blocking, close-on-exec sockets; none when nothing was handed to this process.

    Raises:
        ActivationError: the variables are malformed, or a descriptor is no listening Unix stream
            socket.
    """
    pid, count, names = (environment.pop(name, None) for name in VARIABLES)
    if pid is None and count is None:
        return []
    addressee = _number(pid)
    if addressee is None:
        raise ActivationError(f"expected LISTEN_PID to be a process id, got {pid!r}")
    if addressee != os.getpid():
        return []  # meant for another process; sd_listen_fds(3) passes over it too
    number = _number(count)
    if number is None or not 1 <= number <= 16:
        raise ActivationError(f"expected LISTEN_FDS to be a count from 1 to 16, got {count!r}")
    if names is not None and len(names.split(":")) != number:
        raise ActivationError(f"expected {number} names in LISTEN_FDNAMES, got {names!r}")
    return [_listener(fd) for fd in range(FIRST_FD, FIRST_FD + number)]


def _number(text: str | None) -> int | None:
    """Return the unsigned 64-bit number in ``text``, None when it is none."""
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 19):
        return None
    return int(text)


def _listener(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ActivationError(f"descriptor {fd} is no socket: {error.strerror}") from None
    kind = (sock.family, sock.type)
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM) or not listens:
        sock.detach()
        raise ActivationError(f"descriptor {fd} is not a listening Unix stream socket")
    sock.setblocking(False)
    return sock


class ServiceManager:
    """Whoever started this service and wants to hear how it fares; perhaps nobody.

    Attributes:
        watchdog: seconds within which it must hear ``WATCHDOG=1`` again; None: it does not wait
            for that.
    """

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        """Take ``address`` from ``$NOTIFY_SOCKET``; None: nobody asked, nothing is sent."""
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog = watchdog
        # Kept, because later there may be no descriptor left, and the watchdog must be fed.
        self._socket = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def tell(self, *assignments: str) -> None:
        """Send ``NAME=value`` lines of sd_notify(3), as in ``tell("READY=1", "STATUS=ready")``.

        A value stays on its line, whatever it holds. Nothing is raised when the manager cannot be
        reached: no service dies of that.
        """
        if self._socket is None or not self._address:
            return
        lines = [assignment.replace("\n", " ") for assignment in assignments]
        data = "\n".join(lines).encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            self._socket.sendto(data, self._address)

    def close(self) -> None:
        """Tell nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def service_manager(environment: MutableMapping[str, str]) -> ServiceManager:
    """Return who is to be told, and forget the variables: they are not for our children.

    Raises:
        ActivationError: the watchdog's variables are malformed.
    """
    address, usec, pid = (
        environment.pop(name, None) for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    )
    if usec is None or (pid is not None and _number(pid) != os.getpid()):
        return ServiceManager(address)
    microseconds = _number(usec)
    if not microseconds:
        raise ActivationError(f"expected WATCHDOG_USEC to be microseconds, got {usec!r}")
    return ServiceManager(address, microseconds / 1e6)


def reloading() -> tuple[str, str]:
    """Return what announces a reload; ``READY=1`` ends it."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"


def extend_timeout(seconds: float) -> str:
    """Return what asks for ``seconds`` from now, where the unit's own time might be less."""
    return f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}"


def is_journal(environment: Mapping[str, str], fd: int) -> bool:
    """Return whether what is written to ``fd`` goes to the journal; see systemd.exec(5)."""
    device, colon, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return bool(colon) and (device, inode) == (str(found.st_dev), str(found.st_ino))
