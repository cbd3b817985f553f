"""A connection to swiprd as blocking code has it, and how one waits on it."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from swiprctl import session
from swiprctl.defaults import SYSTEM_SOCKET
from swiprctl.protocol import SwiprError
from swiprctl.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final

CHUNK: Final = 65536
"""Bytes received at a time."""


class Connection:
    """A connected socket and what was asked on it. Deadlines are on ``time.monotonic``'s clock.

    Args:
        path: of the daemon's socket.
        ids: where the requests' ids come from.
        deadline: until when to wait for the daemon to accept.

    Raises:
        TimeoutError: nobody accepted in time.
        SwiprError: ``cannot_connect``.
    """

    def __init__(self, path: str, ids: Iterator[int], deadline: float) -> None:
        self._socket = connect(path, deadline)
        self._session = Session(ids)

    def close(self) -> None:
        """Close the socket; what was not answered never will be."""
        self._socket.close()

    def send(self, request: dict[str, Any], fd: int | None, deadline: float) -> int:
        """Send ``request``, and ``fd`` beside it; return the request's id.

        Raises:
            TimeoutError: the daemon does not take it in time.
            ConnectionError: the connection is broken.
            SwiprError: ``busy``: this process may not send another descriptor.
        """
        id, line = self._session.begin(request)
        self._socket.settimeout(_left(deadline))
        try:
            sent = socket.send_fds(self._socket, [line], [] if fd is None else [fd])
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:  # as ETOOMANYREFS
            raise session.cannot_send(error) from None
        if sent < len(line):
            self._socket.settimeout(_left(deadline))
            self._socket.sendall(line[sent:])
        return id

    def receive(self, deadline: float) -> tuple[int, dict[str, Any] | SwiprError]:
        """Return the next reply, or the error in its place, with its id.

        Raises:
            TimeoutError: none comes in time.
            ConnectionError: the connection is broken.
            SwiprError: it can be used no more; see ``Session.next_reply``.
        """
        while (reply := self._session.next_reply()) is None:
            self._socket.settimeout(_left(deadline))
            data = self._socket.recv(CHUNK)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "end of the stream")
            self._session.feed(data)
        return reply


def connect(path: str, deadline: float) -> socket.socket:
    """Return a socket that is connected to ``path``; blocking, whatever it waits for.

    Args:
        path: of the daemon's socket.
        deadline: on ``time.monotonic``'s clock.

    Raises:
        TimeoutError: nobody accepted in time.
        SwiprError: ``cannot_connect``, with what to do about it.
    """
    sock = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            _set_connect_timeout(sock, deadline)
            sock.connect(path)
            # A signal that interrupts the wait leaves Python believing that it has connected.
            if _is_connected(sock):
                return sock
    except (BlockingIOError, TimeoutError):
        error: Exception = TimeoutError()
    except OSError as reason:
        error = SwiprError("cannot_connect", _why_not(path, reason))
    if sock is not None:
        sock.close()
    raise error


def _set_connect_timeout(sock: socket.socket, deadline: float) -> None:
    # A full backlog makes a Unix connect wait, but only a blocking one: with Python's own
    # time-outs it would fail at once with EAGAIN. SO_SNDTIMEO bounds that wait in the kernel.
    seconds = _left(deadline)
    timeval = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    return True


def _why_not(path: str, error: OSError) -> str:
    if not path:
        return "the path of the daemon's socket is empty; see --socket and SWIPR_SOCKET"
    if isinstance(error, FileNotFoundError):
        has_systemd = path == SYSTEM_SOCKET and os.path.exists("/run/systemd/system")
        start = "systemctl start swipr.socket" if has_systemd else "start swiprd"
        return (
            f"no daemon at {path}: there is no such socket;"
            f" {start} or name its socket with --socket or SWIPR_SOCKET"
        )
    if isinstance(error, ConnectionRefusedError):
        if not _is_socket(path):
            return f"no daemon at {path}: that is no socket; name swiprd's with --socket"
        return f"no daemon at {path}: nothing listens there; start swiprd"
    if isinstance(error, PermissionError):
        return f"no permission for {path}{_whose(path)}"
    return f"cannot connect to {path}: {error.strerror or error}"


def _is_socket(path: str) -> bool:
    import stat  # only for a message

    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True  # gone meanwhile


def _whose(path: str) -> str:
    try:
        import grp
        import pwd

        found = os.stat(path)
        user, group = pwd.getpwuid(found.st_uid).pw_name, grp.getgrgid(found.st_gid).gr_name
    except (ImportError, OSError, KeyError):
        return "; ask whoever runs swiprd"
    return f"; it is for the user {user} and members of the group {group}, once logged in anew"


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
