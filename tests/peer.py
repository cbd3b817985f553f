"""A peer that listens where a daemon would, and behaves badly on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Received(NamedTuple):
    """One request as it came: its fields, and what could be read from its descriptors."""

    message: dict[str, Any]
    images: list[bytes]


class Talk:
    """One client's connection, as a behaviour sees it.

    Attributes:
        sock: the connection.
        received: all requests of all clients so far.
    """

    def __init__(self, sock: socket.socket, requests: list[Received]) -> None:
        self.sock = sock
        self.received = requests
        self._buffer = b""
        self._images: list[bytes] = []

    def requests(self) -> Iterator[dict[str, Any]]:
        """Yield the client's requests until it leaves."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                received = Received(json.loads(line), self._images)
                self._buffer, self._images = rest, []
                self.received.append(received)
                yield received.message
            elif not self._receive():
                return

    def _receive(self) -> bool:
        # No further than one line: the descriptors that come are that line's.
        waiting = self.sock.recv(65536, socket.MSG_PEEK)
        size = waiting.find(b"\n") + 1 or len(waiting) or 1
        data, fds, _, _ = socket.recv_fds(self.sock, size, 4)
        for fd in fds:
            self._images.append(os.pread(fd, os.fstat(fd).st_size, 0))
            os.close(fd)
        self._buffer += data
        return bool(data)


Behaviour = Callable[[Talk], None]


def replies(make: Callable[[Any], bytes]) -> Behaviour:
    """Send what ``make`` returns for the request's id, to each request."""

    def behave(talk: Talk) -> None:
        for request in talk.requests():
            talk.sock.sendall(make(request["id"]))

    return behave


def line(**fields: Any) -> bytes:
    """Return ``fields`` as one line of JSON."""
    return json.dumps(fields).encode() + b"\n"


def error(id: Any, code: str, number: int = -1, message: str = "told to") -> bytes:
    """Return a well-formed reply that carries an error."""
    found = {"code": code, "number": number, "message": message, "retryable": False}
    return line(id=id, error=found)


pongs = replies(lambda number: line(id=number, pong=True))
never_answers = replies(lambda number: b"")


def closes_without_answer(talk: Talk) -> None:
    """Take one request and leave."""
    next(talk.requests())


def closes_without_reading(talk: Talk) -> None:
    """Leave before the request was read, once it has arrived."""
    select.select([talk.sock], [], [])


def drips(talk: Talk) -> None:
    """Send one byte after another and never a newline, until the client leaves."""
    next(talk.requests())
    while not select.select([talk.sock], [], [], 0.02)[0]:
        talk.sock.sendall(b" ")


class Peer:
    """Serves one client after another in a thread, as long as the ``with`` block lasts.

    Args:
        folder: where its socket goes.
        behaviours: what is done with the first connection, the second, and so on; the last one
            counts for all that follow. A connection is closed when its behaviour returns.
    """

    def __init__(self, folder: Path, *behaviours: Behaviour) -> None:
        self.path = str(folder / "peer")
        self.requests: list[Received] = []
        self.connections = 0
        self._behaviours = behaviours
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="peer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join(30)
        assert not self._thread.is_alive(), "a client did not leave the peer"
        self._listener.close()
        if self._failure is not None and raised is None:
            raise self._failure

    def _serve(self) -> None:
        try:
            while (sock := self._accept()) is not None:
                self.connections += 1
                behave = self._behaviours[min(self.connections, len(self._behaviours)) - 1]
                # A client that is gone is what many a test is about.
                with sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    behave(Talk(sock, self.requests))
        except BaseException as failure:
            self._failure = failure

    def _accept(self) -> socket.socket | None:
        try:
            return self._listener.accept()[0]
        except OSError:
            return None


@contextlib.contextmanager
def full_backlog(folder: Path) -> Iterator[str]:
    """A socket where nobody accepts and no further client can wait; gives its path."""
    path = str(folder / "full")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                sock.setblocking(False)
                sock.connect(path)
        yield path
