"""One client's connection: its requests are read one after another and answered side by side.

A request without an id is answered in its turn among those without one; a request with an id as
soon as its answer is there. What the requests mean is the server's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from swiprctl import protocol
from swiprctl.protocol import Line, Request, SwiprError
from swiprd.channel import Channel
from swiprd.config import Config
from swiprd.userio import UserIO

log = logging.getLogger("swiprd")

LINGER: Final = 1.0
"""Seconds in which a client whose stream cannot be followed any further may read what we said."""

Answer = Callable[[Request | SwiprError], Awaitable[bytes]]
"""Turns a request, or what was wrong with it, into the line to reply. Raises nothing."""


class Connection:
    """Reads requests from ``sock`` and sends what ``answer`` makes of them."""

    def __init__(self, sock: socket.socket, answer: Answer, config: Config, io: UserIO) -> None:
        self._channel = Channel(sock, max_line=config.max_line_bytes, io=io)
        self._io = io
        self.reconfigure(config)
        self._answer = answer
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._in_flight: set[asyncio.Task[None]] = set()
        self._one_done = asyncio.Event()
        self._last_in_turn: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until the client is done and everything it asked is answered, or it is gone."""
        self._task = asyncio.current_task()
        try:
            # A broken connection ends its whole group: nobody is there to be answered.
            async with asyncio.TaskGroup() as group:
                await self._read(group)
        except* OSError as gone:
            log.debug("a client left: %s", gone.exceptions[0])
        finally:
            self._channel.close()

    def reconfigure(self, config: Config) -> None:
        """Use ``config`` from the next request on."""
        self._config = config
        self._channel.reconfigure(
            max_line=config.max_line_bytes,
            line_timeout=config.line_timeout,
            send_timeout=config.reply_timeout,
        )

    def stop_reading(self) -> None:
        """Answer what has arrived by now, then end."""
        self._stopped = True
        self._channel.stop_receiving()

    def abandon(self) -> None:
        """Drop everything; the client is given no more time."""
        if self._task is not None:
            self._task.cancel()

    async def refuse(self, error: SwiprError) -> None:
        """Say ``error`` and nothing else, and end."""
        self._task = asyncio.current_task()
        try:
            await self._channel.send(await self._answer(error))
            await self._linger()
        except OSError as gone:
            log.debug("a client left: %s", gone)
        finally:
            self._channel.close()

    async def _read(self, group: asyncio.TaskGroup) -> None:
        first = True
        while True:
            try:
                line = await self._channel.receive(begun=first)
            except SwiprError as refusal:
                self._begin(group, refusal)
                await asyncio.wait(self._in_flight)
                await self._linger()
                return
            if line is None:
                break
            first = False
            self._begin(group, self._decode(line))
            while len(self._in_flight) >= self._config.max_in_flight:
                self._one_done.clear()
                await self._one_done.wait()
            await asyncio.sleep(0)  # who sends many lines at once takes turns with the others
        if self._channel.peer_is_gone():
            raise ConnectionResetError("it closed the connection")
        if self._channel.unfinished:
            if self._stopped:
                error = SwiprError("shutting_down", "the daemon is stopping; try again")
            else:
                error = SwiprError(
                    "bad_request", "the last line is cut off: expected a newline at its end"
                )
            self._begin(group, error)

    async def _linger(self) -> None:
        # Closed with bytes unread, the client might never get to read the reply.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                await self._channel.linger()

    def _begin(self, group: asyncio.TaskGroup, request: Request | SwiprError) -> None:
        before = self._last_in_turn if request.id is None else None
        task = group.create_task(self._respond(request, before))
        if request.id is None:
            self._last_in_turn = task
        self._in_flight.add(task)
        # As a callback, because a task that is cancelled before it begins runs no code of its own.
        task.add_done_callback(lambda done: self._end(done, request))

    def _end(self, task: asyncio.Task[None], request: Request | SwiprError) -> None:
        self._let_go(request)
        self._in_flight.discard(task)
        self._one_done.set()

    async def _respond(
        self, request: Request | SwiprError, before: asyncio.Task[None] | None
    ) -> None:
        reply = await self._answer(request)
        self._let_go(request)  # a client that does not read could have thousands of them held
        if before is not None:
            await asyncio.wait([before])
        await self._channel.send(reply)

    def _decode(self, line: Line) -> Request | SwiprError:
        try:
            return protocol.decode_request(line, max_depth=self._config.max_depth)
        except SwiprError as error:
            if line.fd is not None:
                self._io.close([line.fd])
            # Not the one that was raised: by its traceback, it holds the whole line and more.
            return SwiprError(error.code, error.message, error.id)

    def _let_go(self, request: Request | SwiprError) -> None:
        if isinstance(request, Request):
            request.path = None
            if request.fd is not None:
                self._io.close([request.fd])
                request.fd = None
