"""Lines and descriptors over a connected Unix stream socket.

``receive`` is the one place that knows how the kernel hands out descriptors; the worker calls it
on a blocking socket. ``Channel`` is the same in an event loop, for the front: towards its clients
and towards its workers.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
from collections.abc import Iterable
from typing import Final

from swiprctl.protocol import Line, LineReader, SwiprError
from swiprd.userio import UserIO

_CHUNK: Final = 4096
_LINGER_CHUNK: Final = 65536
# One descriptor is allowed. There is room for all that can be sent (SCM_MAX_FD in the kernel's
# net/scm.h): those for which there is none are closed by the kernel, and that may take its time.
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(253 * array.array("i").itemsize)


def receive(sock: socket.socket, reader: LineReader, unwanted: list[int]) -> bool:
    """Receive once from ``sock`` into ``reader``; False at the end of the stream.

    At most the rest of one line is taken. The kernel may hand out a descriptor together with
    bytes that were sent before it, or with several lines that were sent along with it; by never
    reading past a newline, a descriptor can only arrive with the line whose bytes it was sent
    with. Descriptors that are not wanted are added to ``unwanted``, for the caller to close.

    Raises:
        BlockingIOError: nothing is there, on a non-blocking socket.
        OSError: the connection is broken.
    """
    waiting = sock.recv(_CHUNK, socket.MSG_PEEK)
    if not waiting:
        return False
    size = waiting.find(b"\n") + 1 or len(waiting)
    data, fds, lost = _receive_message(sock, size)
    unwanted.extend(reader.feed(data, fds, fds_lost=lost))
    return True


def _receive_message(sock: socket.socket, size: int) -> tuple[bytes, array.array[int], bool]:
    # Not socket.recv_fds: in Python 3.11 it forgets its flags.
    data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, fds, bool(flags & socket.MSG_CTRUNC)


class Channel:
    """A connected, non-blocking socket in the event loop.

    One task receives; any number may send, and their lines never mix. The owner closes it.

    Args:
        sock: becomes non-blocking.
        max_line: longest line in bytes that is received.
        io: what closes the socket, and descriptors that are not wanted; None: this thread, for
            a peer that cannot make it wait.
        line_timeout: seconds that the peer is given to finish a line that it has begun; None: for
            ever.
        send_timeout: seconds that the peer is given to take a line; None: for ever.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        max_line: int,
        io: UserIO | None = None,
        line_timeout: float | None = None,
        send_timeout: float | None = None,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        # The loop would make a repr of a socket that it does not know, at each wait. Whoever closes
        # the socket has ended all waits before: the number may be another's afterwards.
        self._fd = sock.fileno()
        self._reader = LineReader(max_line=max_line)
        self._loop = asyncio.get_running_loop()
        self._io = io
        self._sending = asyncio.Lock()
        self._line_timeout = line_timeout
        self._send_timeout = send_timeout
        self._readable: asyncio.Future[None] | None = None
        self._no_more = False

    async def receive(self, *, begun: bool = False) -> Line | None:
        """Return the next line; None at the end of the stream. The caller owns its descriptor.

        Args:
            begun: the line counts as begun, whether a byte of it has come or not.

        Raises:
            SwiprError: ``too_long`` or ``timeout``; nothing more can be received then.
            OSError: the connection is broken.
        """
        deadline = None
        while (line := self._reader.next_line()) is None:
            if self._io is not None:
                await self._io.catch_up()
            unwanted: list[int] = []
            try:
                if not receive(self._socket, self._reader, unwanted):
                    return None
            except BlockingIOError:
                if self._no_more:
                    return None
                limit = self._line_timeout
                if deadline is None and limit is not None and (begun or self.unfinished):
                    deadline = self._loop.time() + limit
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._wait_readable()
                except TimeoutError:
                    raise SwiprError(
                        "timeout", f"no whole request came within {limit:g} s"
                    ) from None
            finally:
                self._discard(unwanted)
        return line

    def stop_receiving(self) -> None:
        """Let ``receive`` hand out what has arrived by now and then end, as if the peer had."""
        self._no_more = True
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    async def linger(self) -> None:
        """End our side of the stream, then receive and forget until the peer has ended its own.

        Raises:
            OSError: the connection is broken.
        """
        self._socket.shutdown(socket.SHUT_WR)
        while True:
            try:
                data, fds, _ = _receive_message(self._socket, _LINGER_CHUNK)
                self._discard(fds)
                if not data:
                    return
                if self._io is not None:
                    await self._io.catch_up()
                await asyncio.sleep(0)  # a peer that never stops must not hold up the others
            except BlockingIOError:
                await self._wait_readable()

    @property
    def unfinished(self) -> int:
        """Bytes received of a line whose newline has not come."""
        return self._reader.unfinished

    def peer_is_gone(self) -> bool:
        """Whether the peer has closed: it reads no more, where one that only ended sending does."""
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))  # POLLHUP and POLLERR come unasked

    async def send(self, data: bytes, fd: int | None = None) -> None:
        """Send ``data`` whole, and ``fd`` with its first byte.

        Raises:
            OSError: the connection is broken, or the peer does not take the line in time.
        """
        async with self._sending:
            sent, deadline = 0, None
            while sent < len(data):
                try:
                    if fd is not None:
                        sent = socket.send_fds(self._socket, [data], [fd])
                        fd = None
                    else:
                        sent += self._socket.send(data[sent:])
                except BlockingIOError:
                    if deadline is None and self._send_timeout is not None:
                        deadline = self._loop.time() + self._send_timeout
                    async with asyncio.timeout_at(deadline):
                        await self._wait_writable()

    def close(self) -> None:
        """Close the socket, and any descriptor that arrived and was not handed out."""
        self._discard(self._reader.release())
        if self._io is None:
            self._socket.close()
        else:
            self._io.close_socket(self._socket)

    def _discard(self, fds: Iterable[int]) -> None:
        if self._io is not None:
            self._io.close(fds)
        else:
            for fd in fds:
                os.close(fd)

    def reconfigure(self, *, max_line: int, line_timeout: float, send_timeout: float) -> None:
        """Use these limits from the next line on."""
        self._reader.max_line = max_line
        self._line_timeout = line_timeout
        self._send_timeout = send_timeout

    async def _wait_readable(self) -> None:
        self._readable = self._loop.create_future()
        self._loop.add_reader(self._fd, _wake, self._readable)
        try:
            await self._readable
        finally:
            self._loop.remove_reader(self._fd)
            self._readable = None

    async def _wait_writable(self) -> None:
        writable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._fd, _wake, writable)
        try:
            await writable
        finally:
            self._loop.remove_writer(self._fd)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
