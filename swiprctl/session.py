"""The client's end of one connection, without the connection: requests out, replies matched.

Standard library only. No socket and no clock: the blocking client and the one for asyncio both
carry their bytes through this.
"""

from __future__ import annotations

from swiprctl import protocol
from swiprctl.protocol import SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final

MAX_TIMEOUT: Final = 86400.0
"""Seconds that one call may be given at most: a day."""
RETRY_PAUSE: Final = 1.0
"""Seconds after which another try is worth while where the daemon does not say."""
IN_FLIGHT: Final = 8
"""Images of one batch that are sent before the first is answered: enough to keep a few workers at
work, and few enough for other clients to get their turns in between."""

MAX_IN_FLIGHT: Final = 64
"""Requests of one connection that a daemon answers at a time. With more, both could come to wait
for the other to read."""
SHORTEST_PAUSE: Final = 0.05
"""Seconds that are waited at least, whatever the daemon says."""
HOPELESS: Final = frozenset({"cannot_connect", "unavailable", "bad_reply"})
"""Codes after which no other image of a batch is worth asking for."""


class Session:
    """What was asked on one connection and not answered yet.

    Args:
        ids: where the requests' ids come from; shared by the sessions of one client, so that none
            is ever used twice.

    Attributes:
        unanswered: ids of the requests whose replies have not come.
    """

    __slots__ = ("_ids", "_reader", "unanswered")

    def __init__(self, ids: Iterator[int]) -> None:
        self._ids = ids
        self._reader = protocol.LineReader(max_line=protocol.MAX_LINE)
        self.unanswered: set[int] = set()

    def begin(self, request: dict[str, Any]) -> tuple[int, bytes]:
        """Return an id for ``request``, and the line to send."""
        id = next(self._ids)
        self.unanswered.add(id)
        return id, protocol.encode({"id": id, **request})

    def feed(self, data: bytes) -> None:
        """Take received bytes."""
        self._reader.feed(data)

    def next_reply(self) -> tuple[int, dict[str, Any] | SwiprError] | None:
        """Return the next reply, or the error in its place, with its id; None: more is needed.

        Raises:
            SwiprError: what the daemon says of the connection as a whole, or ``bad_reply``. The
                connection is of no use any more.
        """
        try:
            line = self._reader.next_line()
        except SwiprError as error:
            raise _malformed(str(error)) from None
        if line is None:
            return None
        found: dict[str, Any] | SwiprError
        try:
            found = protocol.decode_reply(line.data, max_depth=protocol.MAX_DEPTH)
            id = found.get("id")
        except SwiprError as error:
            if error.id is None:  # it is no reply of ours, or not about a single request
                raise
            found, id = error, error.id
        if id not in self.unanswered:
            raise _malformed("it answers what was not asked")
        assert type(id) is int, "ids are numbers"
        self.unanswered.remove(id)
        return id, found


def check_timeout(timeout: float) -> float:
    """Return ``timeout``, a number of seconds.

    Raises:
        ValueError: it is out of range.
    """
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(
            f"expected a timeout above 0 and up to {MAX_TIMEOUT:g} seconds, got {timeout}"
        )
    return timeout


def check_in_flight(in_flight: int) -> int:
    """Return ``in_flight``, a number of images.

    Raises:
        ValueError: it is out of range.
    """
    if not 1 <= in_flight <= MAX_IN_FLIGHT:
        raise ValueError(f"expected 1 to {MAX_IN_FLIGHT} images in flight, got {in_flight}")
    return in_flight


def compute_request(
    name: str, *, timeout: float | None = None, thumbnail: int | None = None
) -> dict[str, Any]:
    """Return a request for the scores of the image whose descriptor goes along.

    Args:
        name: the image's absolute path, or what else it is called.
        timeout: seconds after which the answer is not wanted any more.
        thumbnail: longest side, in pixels, of a small copy that is wanted as well.
    """
    request: dict[str, Any] = {"path": name}
    if timeout is not None:
        request["timeout_ms"] = max(1, int(timeout * 1000))
    if thumbnail is not None:
        request["thumbnail"] = thumbnail
    return request


def status_in(reply: dict[str, Any]) -> dict[str, Any]:
    """Return the status that ``reply`` carries.

    Raises:
        SwiprError: ``bad_reply``: it carries none.
    """
    status = reply.get("status")
    if not isinstance(status, dict):
        raise _malformed("no proper 'status'")
    return status


def named(error: SwiprError, name: str) -> SwiprError:
    """Return ``error`` with the image's name before it, if it says something about the image."""
    if name and error.code in protocol.IMAGE_CODES and not error.message.startswith(f"{name}: "):
        error.message = f"{name}: {error.message}"
    return error


def pause_after(error: SwiprError) -> float | None:
    """Return the seconds after which another try is worth while; None: it is not."""
    if error.code not in ("busy", "shutting_down"):
        return None
    if error.retry_after_ms is None:
        return RETRY_PAUSE
    return max(SHORTEST_PAUSE, error.retry_after_ms / 1000)


def no_answer(socket_path: str, timeout: float) -> SwiprError:
    """Return the error for a daemon that does not answer in time."""
    return SwiprError(
        "timeout",
        f"no answer from {socket_path} within {timeout:g} s;"
        " give it more time or ask it for its status",
    )


def cannot_send(error: OSError) -> SwiprError:
    """Return the error for a request that the system does not let this process send."""
    return SwiprError("busy", f"the request cannot be sent: {error.strerror}")


def closed_twice(socket_path: str, reason: str) -> SwiprError:
    """Return the error for a daemon that hung up on two connections in a row."""
    return SwiprError(
        "cannot_connect",
        f"the daemon at {socket_path} twice closed the connection without an answer"
        f" ({reason}); see its log",
    )


def _malformed(how: str) -> SwiprError:
    return SwiprError("bad_reply", f"the daemon's reply is malformed: {how}")
