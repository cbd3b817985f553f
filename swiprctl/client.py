"""The blocking client: one connection to swiprd, one request at a time.

Standard library only. It opens the image itself and sends the descriptor, so the daemon needs no
permission of its own to read it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from swiprctl import protocol
from swiprctl.protocol import Result, SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, Self

    from swiprctl.protocol import RequestId

SYSTEM_SOCKET: Final = "/run/swipr/swipr.sock"
DEFAULT_TIMEOUT: Final = 15.0
"""Seconds for one call: the daemon's own deadline for an image (10 s) and a little."""
RELOAD_TIMEOUT: Final = 150.0
"""Seconds for a reload: the daemon's own deadline for loading a model (120 s) and a little."""
MAX_TIMEOUT: Final = 86400.0
"""Seconds that one call may be given at most: a day."""


def default_socket() -> str:
    """Return where the daemon is expected to listen.

    ``$SWIPR_SOCKET``, else the user's own ``$XDG_RUNTIME_DIR/swipr/swipr.sock`` where that exists,
    else ``/run/swipr/swipr.sock``.
    """
    named = os.environ.get("SWIPR_SOCKET")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        own = os.path.join(runtime, "swipr", "swipr.sock")
        if os.path.exists(own):
            return own
    return SYSTEM_SOCKET


class Client:
    """A connection to swiprd, opened at the first call and kept.

    ::

        with Client() as client:
            result = client.compute("cat.jpg")
            print(result.scores)

    Not safe for use by several threads at once: give each its own. After a time-out or a broken
    connection the next call connects anew, so a late reply is never taken for another's.

    Args:
        socket_path: the daemon's socket; None means ``default_socket()``.
        timeout: seconds that one call may take, connecting included; at most ``MAX_TIMEOUT``.

    Raises:
        ValueError: ``timeout`` is out of its range.
    """

    def __init__(self, socket_path: str | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        if not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(
                f"expected a timeout above 0 and up to {MAX_TIMEOUT:g} seconds, got {timeout}"
            )
        self.socket_path = default_socket() if socket_path is None else socket_path
        self.timeout = timeout
        self._socket: socket.socket | None = None
        self._reader = protocol.LineReader(max_line=protocol.MAX_LINE)
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next call would open another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def compute(self, path: str | bytes | os.PathLike[str]) -> Result:
        """Return the scores of the image at ``path``.

        Raises:
            SwiprError: see its ``code``: ``not_found``, ``permission_denied`` and ``not_a_file``
                for a path that cannot be opened; ``cannot_connect`` and ``timeout`` where the
                daemon does not answer; otherwise the daemon's own code.
        """
        name = os.fsdecode(path)
        try:
            fd = _open_image(name)
            try:
                reply = self._call(
                    {"path": os.path.abspath(name), "timeout_ms": max(1, int(self.timeout * 1000))},
                    fd,
                )
            finally:
                os.close(fd)
        except SwiprError as error:
            if name and error.code in protocol.IMAGE_CODES:
                error.message = f"{name}: {error.message}"
            raise
        return protocol.decode_result(reply)

    def ping(self) -> None:
        """Return when the daemon has answered; the model need not be loaded.

        Raises:
            SwiprError: ``cannot_connect`` or ``timeout``.
        """
        self._call({"op": "ping"})

    def status(self) -> dict[str, Any]:
        """Return the daemon's account of itself; PROTOCOL.md names the fields.

        Raises:
            SwiprError: ``cannot_connect`` or ``timeout``.
        """
        status = self._call({"op": "status"}).get("status")
        if not isinstance(status, dict):
            raise SwiprError("bad_reply", "the daemon's reply is malformed: no proper 'status'")
        return status

    def reload(self) -> None:
        """Let the daemon read its settings and its model again; return when these are in use.

        It takes as long as loading a model does: give ``timeout`` ``RELOAD_TIMEOUT`` or so.

        Raises:
            SwiprError: ``reload_failed``, when everything stayed as it was; ``permission_denied``
                for other users than those who may; ``cannot_connect``, ``timeout``.
        """
        self._call({"op": "reload"})

    def _call(self, request: dict[str, Any], fd: int | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        self._last_id += 1
        line = protocol.encode({"id": self._last_id, **request})
        try:
            try:
                reply = self._exchange(line, fd, deadline)
            except ConnectionError:
                # The daemon we were connected to went away without an answer: restarted, or gone
                # idle under socket activation. Its successor is asked; no request has an effect
                # that asking twice would double.
                reply = self._exchange(line, fd, deadline)
        except TimeoutError:
            raise SwiprError(
                "timeout",
                f"no answer from {self.socket_path} within {self.timeout:g} s;"
                " give it more time or ask it for its status",
            ) from None
        except OSError as error:
            raise SwiprError(
                "cannot_connect",
                f"the daemon at {self.socket_path} twice closed the connection without an answer"
                f" ({error.strerror}); see its log",
            ) from None
        return self._accept(reply)

    def _exchange(self, line: bytes, fd: int | None, deadline: float) -> bytes:
        whole = False
        try:
            if self._socket is None:
                self._socket = _connect(self.socket_path, deadline)
                self._reader = protocol.LineReader(max_line=protocol.MAX_LINE)
            self._send(self._socket, line, fd, deadline)
            reply = self._receive(self._socket, deadline)
            whole = True
            return reply
        finally:
            if not whole:
                self.close()

    def _accept(self, data: bytes) -> dict[str, Any]:
        try:
            reply = protocol.decode_reply(data, max_depth=protocol.MAX_DEPTH)
            self._check_id(reply.get("id"))
        except SwiprError as error:
            if error.id is not None:  # the daemon may not know the id of what it refuses
                self._check_id(error.id)
            if error.code == "bad_reply":
                self.close()
            raise
        return reply

    def _check_id(self, id: RequestId) -> None:
        if id != self._last_id:
            self.close()
            raise SwiprError(
                "bad_reply", f"expected the reply to request {self._last_id}, got another's"
            )

    def _send(self, sock: socket.socket, line: bytes, fd: int | None, deadline: float) -> None:
        sock.settimeout(_left(deadline))
        sent = socket.send_fds(sock, [line], [] if fd is None else [fd])
        if sent < len(line):
            sock.settimeout(_left(deadline))
            sock.sendall(line[sent:])

    def _receive(self, sock: socket.socket, deadline: float) -> bytes:
        while True:
            try:
                line = self._reader.next_line()
            except SwiprError as error:
                raise SwiprError("bad_reply", f"the daemon's reply is malformed: {error}") from None
            if line is not None:
                return line.data
            sock.settimeout(_left(deadline))
            data = sock.recv(65536)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "end of the stream")
            self._reader.feed(data)


def _connect(path: str, deadline: float) -> socket.socket:
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
    if isinstance(error, FileNotFoundError):
        start = "systemctl start swipr.socket" if path == SYSTEM_SOCKET else "start swiprd"
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


def _open_image(path: str) -> int:
    # O_NONBLOCK: a FIFO without a writer must not hang us. The daemon looks at what it is.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not path:
        raise SwiprError("not_found", "the path is empty")
    try:
        return os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise SwiprError("not_found", "no such file") from None
    except PermissionError:
        raise SwiprError("permission_denied", "no permission to read it") from None
    except OSError as error:
        # Out of descriptors or memory: that says nothing about the image.
        exhausted = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        code = "busy" if exhausted else "not_a_file"
        raise SwiprError(code, f"{path}: cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise SwiprError("not_found", f"no such file: {error}") from None
