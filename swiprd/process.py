"""One worker process, as the front holds it: started, spoken to over a socket pair, killed.

Nothing of the worker (``swiprd.worker``) is imported here. Who is given what, and when a worker
has had its time, is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

from swiprctl import protocol
from swiprctl.protocol import Result, SwiprError
from swiprd.channel import Channel
from swiprd.metrics import memory_of

log = logging.getLogger("swiprd")

# -P: the folder that the daemon was started in is no place to import from.
WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "swiprd.worker")
ENVIRONMENT: Final = {
    "GOMP_SPINCOUNT": "1000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
}
"""What a worker finds in its environment where ours does not say otherwise.

How often torch's threads look for work before they sleep: with libgomp's own 300,000, threads on
busy cores wait for one another. And how much freed memory glibc keeps, instead of giving it back
and having the kernel clear it again for the next picture: blocks up to the most that it allows
(mallopt(3)), and as much as 24 megapixels take. Milliseconds a picture of 1080 x 1350, a
compiled ResNeXt-50 on two cores, idle and beside one busy process: spins 300,000: 71 and 683;
5,000: 70 and 142; 1,000: 72 and 122; these with the memory kept: 64 and 117. Of 12 megapixels:
155 and 1661; 157 and 263; 158 and 222; 128 and 195."""
DESCRIPTION: Final = frozenset({"model", "labels", "engine", "precision"})
"""What a worker says of its model when it is ready."""
LOAD_CODES: Final = frozenset({"unavailable"})
COMPUTE_CODES: Final = frozenset(
    {"not_a_file", "permission_denied", "too_large", "too_many_pixels", "not_an_image", "internal"}
)
"""What a worker may say went wrong. All else is no answer: a picture may have taken it over."""
REAP_TIMEOUT: Final = 10.0
"""Seconds that a killed process is given to disappear."""


class WorkerDied(Exception):
    """The worker went away, or broke the protocol, in the middle of something."""


class WorkerProcess:
    """One worker and the socket to it. ``end`` must be awaited.

    Attributes:
        pid: its process id.
        exited: whether it is gone.
    """

    def __init__(self, command: tuple[str, ...], on_exit: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # whatever a library prints belongs into the log
                    pass_fds=[theirs.fileno()],
                    env={**ENVIRONMENT, **os.environ},
                    cwd="/",
                )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self.pid = self._process.pid
            self._pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self._channel = Channel(ours, max_line=protocol.MAX_LINE)
        self._last_id = 0
        self.exited = False
        self._exit: asyncio.Future[None] = loop.create_future()
        self._on_exit = on_exit
        loop.add_reader(self._pidfd, self._note_exit)

    def _note_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._process.wait()
        self.exited = True
        self._exit.set_result(None)
        self._on_exit()

    async def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Send the settings and return what the worker says of its model once it is ready."""
        reply = await self._call(protocol.encode(settings), None, LOAD_CODES)
        described = reply.get("ready")
        if not isinstance(described, dict) or described.keys() != DESCRIPTION:
            raise _broken("no proper 'ready'")
        return described

    async def compute(self, fd: int, thumbnail: int | None) -> Result:
        """Return the scores of the image behind ``fd``, and a copy of it of that size."""
        self._last_id += 1
        request = {"id": self._last_id, "thumbnail": thumbnail}
        reply = await self._call(protocol.encode(request), fd, COMPUTE_CODES)
        if reply.get("id") != self._last_id:
            raise _broken("it answered another request than it was asked")
        try:
            return protocol.decode_result(reply)
        except SwiprError as error:
            raise _broken(error.message) from None

    async def _call(self, line: bytes, fd: int | None, codes: frozenset[str]) -> dict[str, Any]:
        try:
            await self._channel.send(line, fd)
            reply = await self._channel.receive()
        except OSError as error:
            raise WorkerDied(f"the worker is gone: {error.strerror}") from None
        except SwiprError as error:
            raise _broken(error.message) from None
        if reply is None:
            raise WorkerDied("the worker died")
        if reply.fd is not None:
            os.close(reply.fd)
            raise _broken("it sent a descriptor")
        try:
            return protocol.decode_reply(reply.data, max_depth=protocol.MAX_DEPTH)
        except SwiprError as error:
            if error.code not in codes:
                raise _broken(f"{error.code}: {error.message}") from None
            raise

    def memory(self) -> int:
        """Return the bytes of memory that are the worker's now; 0 when it is gone."""
        return memory_of(self.pid)

    async def end(self) -> None:
        """Kill the process, if it still runs, and leave nothing of it behind."""
        self._channel.close()
        if not self.exited:
            self._process.kill()
        try:
            await self._wait_for_exit()
        except asyncio.CancelledError:  # the daemon stops, but not before its worker is gone
            await self._wait_for_exit()
            raise
        finally:
            if not self.exited:
                asyncio.get_running_loop().remove_reader(self._pidfd)
                log.error("worker %d cannot be killed; it is left behind", self.pid)
            os.close(self._pidfd)

    async def _wait_for_exit(self) -> None:
        await asyncio.wait([self._exit], timeout=REAP_TIMEOUT)


def _broken(how: str) -> WorkerDied:
    return WorkerDied(f"the worker broke the protocol: {how}")
