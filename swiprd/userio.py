"""Opening and closing files for one user, where one that hangs holds up nobody else.

Neither is always done at once. A socket with SO_LINGER is closed in as much time as its sender has
chosen, a file of FUSE when its owner's own program answers, a path on a dead file system perhaps
never. So it is not done in the event loop, nor in threads that others wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from swiprctl.protocol import SwiprError
from swiprd.files import open_image

THREADS: Final = 4
"""For each user: some may hang and the others go on."""
MAX_PENDING: Final = 16
"""What one user has sent and is not closed, before no more is received from that user."""


class UserIO:
    """Opens what one user names, and closes what that user has sent. ``end`` must be called."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="io")
        self._closing: deque[Future[None]] = deque()

    async def open(self, path: str, timeout: float) -> int:
        """Open the image at ``path`` and return its descriptor, for the caller to ``close``.

        Raises:
            SwiprError: as ``open_image`` does; ``timeout`` after so many seconds.
        """
        opening = self._threads.submit(open_image, path)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(opening)
        except BaseException as error:
            opening.add_done_callback(_close_opened)
            if isinstance(error, TimeoutError):
                raise SwiprError(
                    "timeout", f"{path} could not be opened within {timeout:g} s"
                ) from None
            raise

    def close(self, fds: Iterable[int]) -> None:
        """Close ``fds``, soon."""
        for fd in fds:
            self._closing.append(self._threads.submit(_close, fd))

    def close_socket(self, sock: socket.socket) -> None:
        """Close ``sock``, soon, and with it what its peer has sent and nobody received."""
        self._closing.append(self._threads.submit(sock.close))

    @property
    def pending(self) -> int:
        """How much is not closed."""
        while self._closing and self._closing[0].done():
            self._closing.popleft()
        return len(self._closing)

    async def catch_up(self) -> None:
        """Return when so little is not closed that more may be received."""
        while self.pending > MAX_PENDING:
            await asyncio.wait([asyncio.wrap_future(self._closing[0])])

    def end(self) -> None:
        """Let the threads end when they are done."""
        self._threads.shutdown(wait=False)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # it may tell of what was written, which is not ours
        os.close(fd)


def _close_opened(opening: Future[int]) -> None:
    # In the thread that opened it, or in the event loop when that is done already.
    if not opening.cancelled() and opening.exception() is None:
        _close(opening.result())
