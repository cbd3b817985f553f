"""A program for atheris: the daemon's front in this process, fed with what libFuzzer comes up with.

The server, its connections and the protocol are the daemon's own, with their coverage watched, and
speak over real sockets. There is no worker: every compute is answered ``unavailable``. One input is
one client; it fails when a reply is missing, one too many or malformed, when something is logged as
an error, when it takes too long, or when a descriptor is left behind.

Its arguments are libFuzzer's. It is a program and no module to import: it would instrument all that
is imported with it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import resource
import socket
import sys
import time

import atheris

with atheris.instrument_imports(include=["swiprctl.protocol", "swiprd"]):
    from swiprctl.protocol import SwiprError
    from swiprd.config import load_config
    from swiprd.server import Server
    from swiprd.supervisor import Supervisor

from tests.faults.oracle import expected_replies
from tests.faults.seeds import CUT

MAX_LINE = 1024
CONFIG = load_config(
    file=os.devnull,
    environment={},
    flags={"max_line_bytes": str(MAX_LINE), "max_in_flight": "8", "drain_timeout": "0"},
)
PATIENCE = 10.0
"""Seconds for one input."""
EVERY = 500
"""After so many inputs descriptors are counted, and memory is looked at."""
MOST_MEMORY = 300 * 2**20
"""Bytes that this process may have, atheris' own included. Not libFuzzer's limit, which counts what
the process had that started this one."""


class Complaints(logging.Handler):
    """Keeps what is logged as an error: the front has none to log here."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep ``record``."""
        self.seen.append(self.format(record))


class Front:
    """The front, and what clients do to it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(b"")  # an abstract name of the kernel's choice
        self.listener.listen()
        self.listener.setblocking(False)
        self.complaints = Complaints()
        logging.getLogger("swiprd").addHandler(self.complaints)
        pipe = os.pipe()
        self.descriptors = [os.open(__file__, os.O_RDONLY), os.open("/", os.O_RDONLY), *pipe]
        self.inputs = 0
        self.task = self.loop.create_task(self._serve())
        self._one(b"{}\n", [])
        self.before = self._held()

    async def _serve(self) -> None:
        async def reload() -> None:
            raise SwiprError("reload_failed", "there is nothing to reload")

        supervisor = Supervisor(CONFIG, out_of_service="this front has no worker")
        server = Server(CONFIG, [self.listener], supervisor, own=None, reload=reload)
        async with asyncio.TaskGroup() as group:
            group.create_task(supervisor.run())
            await server.run()

    def _held(self) -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    def try_input(self, data: bytes) -> None:
        """Be a client that sends ``data`` in pieces, with descriptors where ``data`` says so."""
        pieces = []
        for piece in data.split(CUT):
            count, which = divmod(piece[0] if piece else 0, 16)
            fd = self.descriptors[which % len(self.descriptors)]
            pieces.append((piece[1:], [fd] * (count if count <= 3 else 0)))
        sent = b"".join(piece for piece, _ in pieces)
        self._one(sent, pieces)
        self.inputs += 1
        if self.inputs % EVERY == 0:
            deadline = time.monotonic() + PATIENCE
            while self._held() != self.before:  # what was sent is closed in threads, soon
                left = self._held() - self.before
                assert time.monotonic() < deadline, f"left behind: {left}"
                time.sleep(0.001)
            with open("/proc/self/statm", "rb") as statm:
                memory = int(statm.read().split()[1]) * resource.getpagesize()
            assert memory < MOST_MEMORY, f"{memory} bytes"

    def _one(self, sent: bytes, pieces: list[tuple[bytes, list[int]]]) -> None:
        received = self.loop.run_until_complete(
            asyncio.wait_for(self._talk(pieces or [(sent, [])]), PATIENCE)
        )
        replies = [json.loads(line) for line in received.splitlines()]
        wanted = expected_replies(sent, MAX_LINE)
        assert len(replies) == wanted, f"{len(replies)} replies, expected {wanted}: {received!r}"
        for reply in replies:
            assert "id" in reply
            assert len(reply) == 2, reply
            assert "scores" not in reply
        assert not self.complaints.seen, self.complaints.seen
        assert not self.task.done(), "the front has ended"

    async def _talk(self, pieces: list[tuple[bytes, list[int]]]) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await self.loop.sock_connect(sock, self.listener.getsockname())
            for data, fds in pieces:
                if data:
                    socket.send_fds(sock, [data], fds)
                    await asyncio.sleep(0)  # it may arrive as it is cut, or with the next
            sock.shutdown(socket.SHUT_WR)
            received = b""
            while data := await self.loop.sock_recv(sock, 65536):
                received += data
        return received


@functools.cache
def front() -> Front:
    """Return the one front of this process, which libFuzzer starts late."""
    return Front()


if __name__ == "__main__":
    atheris.Setup(sys.argv, lambda data: front().try_input(data))
    atheris.Fuzz()
