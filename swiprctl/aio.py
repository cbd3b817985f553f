"""The client for asyncio. Standard library only; ``import swiprctl`` does not load it.

::

    from swiprctl.aio import AsyncClient

    async with AsyncClient() as client:
        print((await client.compute("cat.jpg")).scores)
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import itertools
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

from swiprctl import protocol, session
from swiprctl.connection import CHUNK, connect
from swiprctl.defaults import DEFAULT_TIMEOUT, RELOAD_TIMEOUT, default_socket
from swiprctl.images import absolute_name, name_of, open_image
from swiprctl.protocol import Result, SwiprError
from swiprctl.session import HOPELESS, IN_FLIGHT, Session

if TYPE_CHECKING:
    from swiprctl.images import Image

T = TypeVar("T")
SomeImage = TypeVar("SomeImage", bound="Image")


class AsyncClient:
    """A connection to swiprd in an event loop, opened at the first call and kept.

    Any number of tasks may call at a time: their requests share the connection, and each gets its
    own answer. Files are opened in threads, because a file system may take its time. To be closed
    with ``aclose``, or used in ``async with``; belongs to the loop in which it is first used.

    Args:
        socket_path: the daemon's socket; None means the one that ``swiprctl.Client`` finds.
        timeout: seconds that one call may take, connecting included; above 0, at most a day.

    Raises:
        ValueError: ``timeout`` is out of its range.
    """

    def __init__(self, socket_path: str | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.socket_path = default_socket() if socket_path is None else socket_path
        self.timeout = session.check_timeout(timeout)
        self._ids = itertools.count(1)
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._closings = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls that wait fail. The next call would open another."""
        self._closings += 1
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.aclose()

    async def compute(self, image: Image, *, thumbnail: int | None = None) -> Result:
        """Return the scores of ``image``; arguments and errors are those of ``Client.compute``."""
        call = _Call(self.timeout, self._closings)
        async with self._in_time(self.timeout), _opened(image) as fd:
            request = session.compute_request(
                absolute_name(image), timeout=self.timeout, thumbnail=thumbnail
            )
            return await self._compute(image, request, fd, call)

    def compute_many(
        self,
        images: Iterable[SomeImage],
        *,
        thumbnail: int | None = None,
        in_flight: int = IN_FLIGHT,
        timeout: float = RELOAD_TIMEOUT,
    ) -> AsyncGenerator[tuple[SomeImage, Result | SwiprError], None]:
        """Yield each image with its scores, or with the error in their place, in the order given.

        As ``Client.compute_many``, but on the connection of all calls. One who leaves the loop
        before its end had better close what this returns (``contextlib.aclosing``).

        Args:
            images: as ``compute`` takes them.
            thumbnail: as for ``compute``.
            in_flight: how many images to take and send before the first is answered, from 1 to 64.
                With more than 1, images that come one at a time wait for those after them. The
                iterable is asked in the event loop: it must not make that wait.
            timeout: seconds that one image may take, from when it is taken. The default lets the
                daemon load its model first.

        Raises:
            SwiprError: nothing more can be scored: ``cannot_connect``, ``timeout``, ``busy``,
                ``unavailable``, ``shutting_down`` or ``bad_reply``. What is wrong with one image
                is yielded instead.
            ValueError: ``in_flight`` or ``timeout`` is out of its range.
        """
        return self._many(
            iter(images),
            thumbnail,
            session.check_in_flight(in_flight),
            session.check_timeout(timeout),
        )

    async def _many(
        self, rest: Iterator[SomeImage], thumbnail: int | None, in_flight: int, timeout: float
    ) -> AsyncGenerator[tuple[SomeImage, Result | SwiprError], None]:
        waiting: deque[tuple[SomeImage, asyncio.Task[Result | SwiprError]]] = deque()
        failure: Exception | None = None
        try:
            while True:
                try:
                    for image in itertools.islice(rest, in_flight - len(waiting)):
                        task = asyncio.create_task(self._outcome(image, thumbnail, timeout))
                        waiting.append((image, task))
                except Exception as error:  # the program's own: what is in flight is not its fault
                    failure, rest = error, iter(())
                if not waiting:
                    break
                image, task = waiting[0]
                outcome = await task
                waiting.popleft()
                yield image, outcome
        finally:
            for _, task in waiting:
                task.cancel()
            await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
        if failure is not None:
            raise failure

    async def ping(self) -> None:
        """Return when the daemon has answered; errors are those of ``Client.ping``."""
        await self._call({"op": "ping"})

    async def status(self) -> dict[str, Any]:
        """Return the daemon's account of itself; errors are those of ``Client.status``."""
        return session.status_in(await self._call({"op": "status"}))

    async def reload(self) -> None:
        """Let the daemon read its settings and its model again; see ``Client.reload``."""
        await self._call({"op": "reload"})

    async def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        async with self._in_time(self.timeout):
            return await self._ask(request, None, _Call(self.timeout, self._closings))

    async def _outcome(
        self, image: Image, thumbnail: int | None, timeout: float
    ) -> Result | SwiprError:
        request = session.compute_request(absolute_name(image), thumbnail=thumbnail)
        refusal: SwiprError | None = None
        call = _Call(timeout, self._closings)
        try:
            async with asyncio.timeout(timeout), _opened(image) as fd:
                while True:
                    try:
                        return await self._compute(image, request, fd, call)
                    except SwiprError as error:
                        pause = session.pause_after(error)
                        if pause is None:
                            raise
                        refusal = error
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise refusal or session.no_answer(self.socket_path, timeout) from None
        except SwiprError as error:
            if error.code in HOPELESS or session.pause_after(error) is not None:
                raise  # the latter: this process can open no more files
            return error

    async def _compute(self, image: Image, request: dict[str, Any], fd: int, call: _Call) -> Result:
        try:
            return protocol.decode_result(await self._ask(request, fd, call))
        except SwiprError as error:
            raise session.named(error, name_of(image)) from None

    async def _ask(self, request: dict[str, Any], fd: int | None, call: _Call) -> dict[str, Any]:
        lost_in_a_row = 0
        while True:
            connection = await self._connected(call)
            before = connection.answered
            try:
                return await connection.ask(request, fd)
            except ConnectionError as error:
                # Its successor is asked; see ``Client``. One that answered others has not failed.
                lost_in_a_row = 1 if connection.answered > before else lost_in_a_row + 1
                if lost_in_a_row > 1:
                    reason = error.strerror or str(error)
                    raise session.closed_twice(self.socket_path, reason) from None

    async def _connected(self, call: _Call) -> _Connection:
        async with self._connecting:
            self._check_open(call)
            if self._connection is not None and self._connection.is_lost:
                await self._connection.end()
                self._connection = None
            if self._connection is None:
                sock = await _in_thread(
                    socket.socket.close, connect, self.socket_path, call.deadline
                )
                try:
                    self._check_open(call)
                except SwiprError:
                    sock.close()
                    raise
                self._connection = _Connection(sock, self._ids)
            return self._connection

    def _check_open(self, call: _Call) -> None:
        if call.closings != self._closings:
            raise _closed()

    @contextlib.asynccontextmanager
    async def _in_time(self, timeout: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            raise session.no_answer(self.socket_path, timeout) from None


class _Call:
    """One call: until when it may connect, and how often the client was closed before it."""

    __slots__ = ("closings", "deadline")

    def __init__(self, timeout: float, closings: int) -> None:
        self.deadline = time.monotonic() + timeout
        self.closings = closings


def _closed() -> SwiprError:
    return SwiprError("cannot_connect", "the client was closed")


class _Connection:
    """A connected socket in the event loop, and who waits for an answer on it.

    Attributes:
        answered: how many replies have come.
        is_lost: whether it can be used no more.
    """

    def __init__(self, sock: socket.socket, ids: Iterator[int]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._session = Session(ids)
        self._loop = asyncio.get_running_loop()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._sending = asyncio.Lock()
        self._reading = self._loop.create_task(self._read())
        self.answered = 0
        self.is_lost = False

    async def aclose(self) -> None:
        """Close it; whoever waits is told."""
        self._lose(_closed())
        await self.end()

    async def end(self) -> None:
        """Close it, once it is lost, when all that has come is handed out."""
        await asyncio.wait([self._reading])
        self._socket.close()

    async def ask(self, request: dict[str, Any], fd: int | None) -> dict[str, Any]:
        """Return the reply to ``request``, with which ``fd`` goes.

        Raises:
            ConnectionError: there will be none.
            SwiprError: what the reply says.
        """
        id, line = self._session.begin(request)
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._answers[id] = answer
        try:
            await self._send(line, fd)
            return await answer
        finally:
            # A reply that comes when nobody waits any more is dropped.
            del self._answers[id]
            if answer.done() and not answer.cancelled():
                answer.exception()  # it is not complained about that nobody took it

    async def _send(self, line: bytes, fd: int | None) -> None:
        async with self._sending:
            if self.is_lost:
                raise ConnectionResetError(errno.ECONNRESET, "the connection is lost")
            sent = 0
            try:
                while sent < len(line):
                    try:
                        fds = [] if sent or fd is None else [fd]
                        sent += socket.send_fds(self._socket, [line[sent:]], fds)
                    except BlockingIOError:
                        await self._wait_writable()
            except ConnectionError:
                self.is_lost = True  # what the daemon answered before it went is still read
                raise
            except BaseException as failure:
                if sent:  # after half a line, nothing can be sent any more, whatever stopped it
                    self._lose(failure)
                if isinstance(failure, OSError):
                    raise session.cannot_send(failure) from None
                raise

    async def _wait_writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._socket, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(self._socket)

    async def _read(self) -> None:
        try:
            while data := await self._loop.sock_recv(self._socket, CHUNK):
                self._session.feed(data)
                while (reply := self._session.next_reply()) is not None:
                    self._hand_out(*reply)
            self._lose(ConnectionResetError(errno.ECONNRESET, "end of the stream"))
        except (OSError, SwiprError) as failure:
            self._lose(failure)

    def _hand_out(self, id: int, reply: dict[str, Any] | SwiprError) -> None:
        self.answered += 1
        answer = self._answers.get(id)
        if answer is None or answer.done():
            return
        if isinstance(reply, SwiprError):
            answer.set_exception(reply)
        else:
            answer.set_result(reply)

    def _lose(self, failure: BaseException) -> None:
        if not isinstance(failure, (ConnectionError, SwiprError)):
            failure = ConnectionAbortedError(errno.ECONNABORTED, "the connection broke off")
        self.is_lost = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends what reads
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(copy.copy(failure))  # each has a traceback of its own


@contextlib.asynccontextmanager
async def _opened(image: Image) -> AsyncIterator[int]:
    fd = await _in_thread(os.close, open_image, image)
    try:
        yield fd
    finally:
        os.close(fd)


async def _in_thread(undo: Callable[[T], object], call: Callable[..., T], *args: object) -> T:
    """Return ``call(*args)`` from a thread; ``undo`` gets what it returns when nobody waits."""
    future = asyncio.get_running_loop().run_in_executor(None, call, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(lambda done: done.exception() or undo(done.result()))
        raise
