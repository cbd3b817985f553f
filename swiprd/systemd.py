"""What systemd says to a service and hears from it, without its library.

The protocols are those of sd_listen_fds(3) and sd_notify(3). Nothing here reads the process's
environment by itself: ``__main__`` hands it in.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
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
    """Return the unsigned 32-bit number in ``text``, None when it is none."""
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 10):
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


def notify(address: str | None, *assignments: str) -> None:
    """Tell the service manager, as in ``notify(address, "READY=1", "STATUS=ready")``.

    Args:
        address: what ``$NOTIFY_SOCKET`` holds; None: nobody asked, nothing is done.
        assignments: ``NAME=value`` lines of sd_notify(3).

    Nothing is raised when the manager cannot be reached: no service dies of that.
    """
    if address is None:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), address)
    except OSError:
        pass
