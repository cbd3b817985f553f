"""The front's side towards clients: accept them, answer what they ask, stop without losing any."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import swiprctl
from swiprctl import protocol
from swiprctl.protocol import Request, SwiprError
from swiprd.config import Config
from swiprd.connection import MAX_IN_FLIGHT, Connection
from swiprd.files import EXHAUSTED, open_image
from swiprd.listen import OwnSocket
from swiprd.supervisor import Supervisor

log = logging.getLogger("swiprd")

ACCEPT_BATCH: Final = 64
ACCEPT_PAUSE: Final = 1.0
"""Seconds without accepting after the machine ran out of descriptors or memory."""
OPENER_THREADS: Final = 4
"""Files that are opened by path at a time; a file system may hang, the event loop must not."""
FAREWELL: Final = 1.0
"""Seconds to send what is left to be said once the drain's time is over."""


class Server:
    """Serves the clients that come to its listeners until it is stopped, or idle.

    Args:
        listeners: listening, non-blocking sockets; the caller closes them.
        own: the listener that is ours alone. None: somebody else listens on when this process is
            gone, as systemd does. Then ``run`` also returns after ``config.idle_timeout`` without
            a client, and clients who wait to be accepted are left to the successor.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[socket.socket],
        supervisor: Supervisor,
        *,
        own: OwnSocket | None,
    ) -> None:
        self._config = config
        self._listeners = listeners
        self._supervisor = supervisor
        self._own = own
        self._connections: set[Connection] = set()
        self._all_gone = asyncio.Event()
        self._stopping = asyncio.Event()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._openers = ThreadPoolExecutor(OPENER_THREADS, thread_name_prefix="open")
        self._started = time.monotonic()
        self._replies: Counter[str] = Counter()

    async def run(self) -> None:
        """Serve; return when everything that was asked is answered, or the drain's time is over."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            for listener in self._listeners:
                loop.add_reader(listener, self._accept, listener, group)
            self._note_gone()
            await self._stopping.wait()
            for listener in self._listeners:
                loop.remove_reader(listener)
            if self._own is not None:
                # Nobody new can come, who has come is accepted, and a successor may have the path.
                self._own.unlink()
                while self._accept(self._own.socket, group):
                    pass
                self._own.close()
            await self._drain()
            # Whoever still has a connection open now does not read what it is sent.
            for connection in self._connections:
                connection.abandon()
        self._openers.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Accept no more clients, answer what has been asked, and let ``run`` return."""
        self._stopping.set()

    async def stopping(self) -> None:
        """Return once ``stop`` has been called, or the daemon has been idle for long enough."""
        await self._stopping.wait()

    async def _drain(self) -> None:
        for connection in self._connections:
            connection.stop_reading()
        if not await self._wait_until_gone(self._config.drain_timeout):
            self._supervisor.stop()  # everything unanswered is answered with shutting_down
            await self._wait_until_gone(FAREWELL)

    async def _wait_until_gone(self, seconds: float) -> bool:
        if self._connections:
            self._all_gone.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._all_gone.wait()
            except TimeoutError:
                return False
        return True

    # --- clients ---------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> bool:
        """Accept a batch of clients; return whether more may be waiting."""
        for _ in range(ACCEPT_BATCH):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                log.error("cannot accept clients: %s", error.strerror)
                self._pause_accepting(listener, group)
                return False
            self._connections.add(connection := Connection(sock, self._answer))
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            group.create_task(self._serve(connection))
        return True

    def _pause_accepting(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        # The client stays in the backlog, where the listener would report it again and again.
        loop = asyncio.get_running_loop()
        if loop.remove_reader(listener):
            loop.call_later(ACCEPT_PAUSE, self._resume_accepting, listener, group)

    def _resume_accepting(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        if not self._stopping.is_set():
            asyncio.get_running_loop().add_reader(listener, self._accept, listener, group)

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception:  # one client's trouble must not become another's
            log.exception("a connection failed")
        finally:
            self._connections.discard(connection)
            self._note_gone()

    def _note_gone(self) -> None:
        if self._connections:
            return
        self._all_gone.set()
        idle = self._config.idle_timeout
        if self._own is None and idle and not self._stopping.is_set():
            self._idle_timer = asyncio.get_running_loop().call_later(idle, self._end_idle)

    def _end_idle(self) -> None:
        # From here to the removal of the readers nothing is accepted: those who connect now wait
        # in the backlog, which outlives this process.
        log.info("no client for %g s: good-bye", self._config.idle_timeout)
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
        self.stop()

    # --- requests --------------------------------------------------------------------------------

    async def _answer(self, request: Request | SwiprError) -> bytes:
        try:
            if isinstance(request, SwiprError):
                raise request
            reply = await self._perform(request)
            self._replies["ok"] += 1
            return reply
        except SwiprError as error:
            failure = error
        except Exception as error:
            log.exception("cannot answer a request")
            failure = SwiprError("internal", f"the daemon failed: {type(error).__name__}")
        failure.id = request.id
        self._replies[failure.code] += 1
        return protocol.encode_error(failure)

    async def _perform(self, request: Request) -> bytes:
        match request.op:
            case "compute":
                return await self._compute(request)
            case "ping":
                return protocol.encode({"id": request.id, "pong": True})
            case "hello":
                return protocol.encode({"id": request.id, "hello": self._hello()})
            case "status":
                return protocol.encode({"id": request.id, "status": self._status()})
        raise AssertionError(f"the protocol let {request.op!r} through")

    async def _compute(self, request: Request) -> bytes:
        if request.fd is not None:
            result = await self._supervisor.compute(request.fd)
            return protocol.encode_result(request.id, result)
        assert request.path is not None
        fd = await self._open(request.path)
        try:
            result = await self._supervisor.compute(fd)
        finally:
            os.close(fd)
        return protocol.encode_result(request.id, result)

    async def _open(self, path: str) -> int:
        opening = self._openers.submit(open_image, path)
        limit = self._config.compute_timeout
        try:
            async with asyncio.timeout(limit):
                return await asyncio.wrap_future(opening)
        except TimeoutError:
            opening.add_done_callback(_close_opened)
            raise SwiprError("timeout", f"{path} could not be opened within {limit:g} s") from None
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise

    def _hello(self) -> dict[str, Any]:
        config = self._config
        return {
            "server": f"swiprd {swiprctl.__version__}",
            "protocol": [protocol.VERSION, protocol.VERSION],
            "ops": protocol.OPS,
            "limits": {
                "line_bytes": protocol.MAX_LINE,
                "depth": protocol.MAX_DEPTH,
                "id_bytes": protocol.MAX_ID_BYTES,
                "in_flight": MAX_IN_FLIGHT,
                "queue": config.max_queue,
                "file_bytes": config.max_bytes,
                "pixels": config.max_pixels,
            },
            "model": self._supervisor.status()["model"],
        }

    def _status(self) -> dict[str, Any]:
        return {
            "version": swiprctl.__version__,
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._started, 3),
            **self._supervisor.status(),
            "connections": len(self._connections),
            "replies": dict(sorted(self._replies.items())),
        }


def _close_opened(opening: Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
