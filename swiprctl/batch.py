"""Many images over one connection: sent ahead, answered in order, and none lost. Blocking."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque

from swiprctl import protocol, session
from swiprctl.connection import Connection
from swiprctl.images import absolute_name, name_of, open_image
from swiprctl.protocol import SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from swiprctl.images import Image
    from swiprctl.protocol import Result

    SomeImage = TypeVar("SomeImage", bound=Image)


class _Item:
    """One image, from when it is taken until its turn to be yielded has come.

    Attributes:
        name: what it is called on the wire.
        fd: what is sent, and perhaps sent again; None once there is an outcome.
        outcome: scores or error.
    """

    __slots__ = ("fd", "image", "name", "outcome")

    def __init__(self, image: Image) -> None:
        self.image = image
        self.name = absolute_name(image)
        self.fd: int | None = None
        self.outcome: Result | SwiprError | None = None

    def settle(self, outcome: Result | SwiprError) -> None:
        if isinstance(outcome, SwiprError):
            session.named(outcome, name_of(self.image))
        self.outcome = outcome
        self.close()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Batch:
    """What ``Client.compute_many`` does; the arguments are explained there."""

    def __init__(
        self,
        socket_path: str,
        ids: Iterator[int],
        *,
        thumbnail: int | None,
        in_flight: int,
        timeout: float,
    ) -> None:
        self._socket_path = socket_path
        self._ids = ids
        self._thumbnail = thumbnail
        self._in_flight = in_flight
        self._timeout = timeout
        self._connection: Connection | None = None
        self._items: deque[_Item] = deque()  # in the order of the images
        self._asked: dict[int, _Item] = {}  # by the ids of their requests
        self._unasked: deque[_Item] = deque()  # to be sent, or to be sent again
        self._not_before = 0.0
        self._lost_in_a_row = 0
        self._last_refusal: SwiprError | None = None
        self._deadline = 0.0
        self._is_more = True
        self._gave_up = False
        self._failure: Exception | None = None

    def run(self, images: Iterable[SomeImage]) -> Iterator[tuple[SomeImage, Result | SwiprError]]:
        """Yield each image and its outcome, in order."""
        rest = iter(images)
        try:
            self._fill(rest)
            while self._items:
                if self._items[0].outcome is None:
                    if self._gave_up:
                        break
                    self._go_on()
                    continue
                item = self._items.popleft()
                yield item.image, item.outcome  # type: ignore[misc] # it is what was taken
                self._start_clock()
                self._fill(rest)
            if self._failure is not None:
                raise self._failure
        finally:
            self._hang_up()
            for item in self._items:
                item.close()

    def _fill(self, images: Iterator[Image]) -> None:
        """Take and send as many images as may be in flight."""
        while self._is_more and len(self._items) < self._in_flight:
            try:
                self._take(next(images))
            except StopIteration:
                self._is_more = False
            except Exception as failure:  # the program's own: what is in flight is not its fault
                self._is_more = False
                self._failure = failure

    def _take(self, image: Image) -> None:
        self._start_clock()
        item = _Item(image)
        try:
            item.fd = open_image(image)
        except SwiprError as error:
            if error.code == "busy":  # so would the next one be
                raise
            item.settle(error)
        else:
            self._unasked.append(item)
        self._items.append(item)
        if self._unasked and time.monotonic() >= self._not_before:
            self._attempt(self._send)

    def _go_on(self) -> None:
        """Wait until something has happened to the images that are in flight."""
        pause = self._not_before - time.monotonic()
        if self._unasked and not self._asked and pause > 0:
            # The daemon said when to ask again, and there is nothing else to be waited for.
            time.sleep(min(pause, max(0.0, self._deadline - time.monotonic())))
        self._attempt(self._exchange)

    def _exchange(self) -> None:
        if time.monotonic() >= self._not_before:
            self._send()
        elif not self._asked and time.monotonic() >= self._deadline:
            raise TimeoutError
        if self._asked:
            self._receive()

    def _attempt(self, step: Callable[[], None]) -> None:
        """Take ``step``; when the connection is lost in it, all that is unanswered is sent anew."""
        try:
            try:
                step()
            except TimeoutError:
                raise self._last_refusal or session.no_answer(
                    self._socket_path, self._timeout
                ) from None
            except ConnectionError as error:
                self._take_what_came()
                self._lost_in_a_row += 1
                if self._lost_in_a_row > 1:
                    reason = error.strerror or str(error)
                    raise session.closed_twice(self._socket_path, reason) from None
                self._hang_up()
        except SwiprError as failure:
            # What has been answered by now is still yielded.
            self._is_more = False
            self._gave_up = True
            self._failure = failure

    def _take_what_came(self) -> None:
        """Take the answers that a daemon sent before it went."""
        with contextlib.suppress(OSError):
            while self._asked:
                self._receive()

    def _send(self) -> None:
        if self._connection is None:
            self._connection = Connection(self._socket_path, self._ids, self._deadline)
        while self._unasked:
            item = self._unasked[0]
            request = session.compute_request(item.name, thumbnail=self._thumbnail)
            id = self._connection.send(request, item.fd, self._deadline)
            self._asked[id] = self._unasked.popleft()

    def _receive(self) -> None:
        assert self._connection is not None, "somebody was asked"
        try:
            id, reply = self._connection.receive(self._deadline)
        except SwiprError as refusal:  # of the whole connection
            self._ask_later(refusal)
            self._hang_up()
            return
        item = self._asked.pop(id)
        try:
            if isinstance(reply, SwiprError):
                raise reply
            outcome: Result | SwiprError = protocol.decode_result(reply)
        except SwiprError as error:
            if session.pause_after(error) is not None:
                self._unasked.append(item)
                self._ask_later(error)
                return
            if error.code in session.HOPELESS:
                raise
            outcome = error
        item.settle(outcome)
        self._note_progress()

    def _ask_later(self, refusal: SwiprError) -> None:
        pause = session.pause_after(refusal)
        if pause is None:
            raise refusal
        self._last_refusal = refusal
        self._lost_in_a_row = 0  # it did answer
        self._not_before = time.monotonic() + pause

    def _note_progress(self) -> None:
        self._lost_in_a_row = 0
        self._last_refusal = None
        self._start_clock()

    def _start_clock(self) -> None:
        # Only waiting for the daemon counts, not what the program does between images.
        self._deadline = time.monotonic() + self._timeout

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        # In the order in which they were taken.
        self._unasked.extendleft(reversed(self._asked.values()))
        self._asked.clear()
