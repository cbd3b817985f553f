"""The blocking client. Standard library only.

It opens the image itself and sends the descriptor, so the daemon needs no permission of its own to
read it.
"""

from __future__ import annotations

import itertools
import os
import time

from swiprctl import protocol, session
from swiprctl.connection import Connection
from swiprctl.defaults import DEFAULT_TIMEOUT, RELOAD_TIMEOUT, default_socket
from swiprctl.protocol import Result, SwiprError
from swiprctl.session import IN_FLIGHT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, Self, TypeVar

    from swiprctl.images import Image

    SomeImage = TypeVar("SomeImage", bound=Image)


class Client:
    """A connection to swiprd, opened at the first call and kept.

    ::

        with Client() as client:
            result = client.compute("cat.jpg")
            print(result.scores)

    Not safe for use by several threads at once: give each its own. After a time-out or a broken
    connection the next call connects anew, so a late reply is never taken for another's.

    Args:
        socket_path: the daemon's socket; None means ``$SWIPR_SOCKET``, else the user's own
            ``$XDG_RUNTIME_DIR/swipr/swipr.sock`` where it exists, else ``/run/swipr/swipr.sock``.
        timeout: seconds that one call may take, connecting included; above 0, at most a day.

    Raises:
        ValueError: ``timeout`` is out of its range.
    """

    def __init__(self, socket_path: str | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.socket_path = default_socket() if socket_path is None else socket_path
        self.timeout = session.check_timeout(timeout)
        self._connection: Connection | None = None
        self._ids = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next call would open another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def compute(self, image: Image, *, thumbnail: int | None = None) -> Result:
        """Return the scores of ``image``.

        Args:
            image: a path, or a binary file object. What the object still has to give is the image:
                of bytes, ``io.BytesIO(data)`` makes one.
            thumbnail: longest side, in pixels from 16 to 256, of a small copy of the picture that
                is wanted with the scores.

        Raises:
            SwiprError: see its ``code``: ``not_found``, ``permission_denied`` and ``not_a_file``
                for a path that cannot be opened; ``cannot_connect`` and ``timeout`` where the
                daemon does not answer; otherwise the daemon's own code.
        """
        from swiprctl.images import absolute_name, name_of, open_image  # what a ping does without

        request = session.compute_request(
            absolute_name(image), timeout=self.timeout, thumbnail=thumbnail
        )
        fd = open_image(image)
        try:
            return protocol.decode_result(self._call(request, fd))
        except SwiprError as error:
            raise session.named(error, name_of(image)) from None
        finally:
            os.close(fd)

    def compute_many(
        self,
        images: Iterable[SomeImage],
        *,
        thumbnail: int | None = None,
        in_flight: int = IN_FLIGHT,
        timeout: float = RELOAD_TIMEOUT,
    ) -> Iterator[tuple[SomeImage, Result | SwiprError]]:
        """Yield each image with its scores, or with the error in their place, in the order given.

        Images are taken, opened and sent while earlier ones are computed, and no more of them are
        held than are in flight, however many there are. A daemon that is busy is asked again when
        it says so; one that was restarted gets what it has not answered once more. The batch has
        a connection of its own, which ends with the iterator.

        Args:
            images: as ``compute`` takes them.
            thumbnail: as for ``compute``.
            in_flight: how many images to take and send before the first is answered, from 1 to 64.
                With more than 1, images that come one at a time wait for those after them.
            timeout: seconds without any answer after which the batch is given up. The default
                lets the daemon load its model first.

        Raises:
            SwiprError: nothing more can be scored: ``cannot_connect``, ``timeout``, ``busy``,
                ``unavailable``, ``shutting_down`` or ``bad_reply``. What is wrong with one image
                is yielded instead.
            ValueError: ``in_flight`` or ``timeout`` is out of its range.
        """
        from swiprctl.batch import Batch  # a program that asks once does without

        return Batch(
            self.socket_path,
            self._ids,
            thumbnail=thumbnail,
            in_flight=session.check_in_flight(in_flight),
            timeout=session.check_timeout(timeout),
        ).run(images)

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
        return session.status_in(self._call({"op": "status"}))

    def reload(self) -> None:
        """Let the daemon read its settings and its model again; return when these are in use.

        It takes as long as loading a model does: give ``timeout`` 150 s or so.

        Raises:
            SwiprError: ``reload_failed``, when everything stayed as it was; ``permission_denied``
                for other users than those who may; ``cannot_connect``, ``timeout``.
        """
        self._call({"op": "reload"})

    def _call(self, request: dict[str, Any], fd: int | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        try:
            try:
                reply = self._exchange(request, fd, deadline)
            except ConnectionError:
                # The daemon we were connected to went away without an answer: restarted, or gone
                # idle under socket activation. Its successor is asked; no request has an effect
                # that asking twice would double.
                reply = self._exchange(request, fd, deadline)
        except TimeoutError:
            raise session.no_answer(self.socket_path, self.timeout) from None
        except ConnectionError as error:
            raise session.closed_twice(self.socket_path, error.strerror or str(error)) from None
        if isinstance(reply, SwiprError):
            raise reply
        return reply

    def _exchange(
        self, request: dict[str, Any], fd: int | None, deadline: float
    ) -> dict[str, Any] | SwiprError:
        try:
            if self._connection is None:
                self._connection = Connection(self.socket_path, self._ids, deadline)
            self._connection.send(request, fd, deadline)
            _, reply = self._connection.receive(deadline)
        except BaseException:
            self.close()
            raise
        return reply
