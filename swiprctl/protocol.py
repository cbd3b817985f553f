"""The wire between a program and swiprd: newline-delimited JSON.

Bytes in, objects out. Nothing here opens a socket, a file or a clock, or imports what the client
can do without: the client, the daemon's front and its worker all speak through this one file.
PROTOCOL.md is the reference for people.

The two directions::

    program                                        daemon
    encode(request)  ──────── one line ────────▶  LineReader.feed / next_line
                                                   decode_request
    LineReader, decode_reply  ◀──── one line ───  encode_result / encode_error / encode

A descriptor (SCM_RIGHTS) may travel beside a request. It belongs to the line in whose bytes it
arrived, so whoever reads the socket must not hand over a later line's bytes in the same ``feed``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import deque

TYPE_CHECKING = False  # typing itself would double the client's start-up
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

VERSION: Final = 1

MAX_LINE: Final = 65536
"""Longest line in bytes, its newline included."""
MAX_DEPTH: Final = 16
"""Deepest nesting of arrays and objects in one line."""
MAX_MESSAGE: Final = 5000
"""Characters of an error's message that are sent: escaped, they still fit in a line."""
MAX_ID_BYTES: Final = 128
"""Longest string ``id``, counted in UTF-8 bytes."""
MAX_ID_INTEGER: Final = 2**63 - 1
"""Largest integer ``id``, of either sign."""
MAX_PATH_BYTES: Final = 4096
"""Longest ``path``; Linux opens none that is longer (PATH_MAX)."""
MAX_MARKS: Final = MAX_PATH_BYTES + 256
"""Brackets, braces and commas in one request, those of a file's name included. No request needs
more, and a line full of them would take ten times as long as any other."""
MAX_TIMEOUT_MS: Final = 86_400_000
"""Largest ``timeout_ms``: a day."""
THUMBNAIL_SIDES: Final = (16, 256)
"""Smallest and largest ``thumbnail``, in pixels."""

OPS: Final = ("compute", "ping", "hello", "status", "reload")

RequestId = str | int | None


class Code:
    """What an error code means, whoever raises it.

    ``number`` is the script service's code for the same trouble: -1 unknown, -2 the path does not
    exist, -3 the image could not be analyzed, -4 the service could not be reached. ``retryable``
    is true when the same request may succeed later with nothing changed.
    """

    __slots__ = ("number", "retryable")

    def __init__(self, number: int, retryable: bool = False) -> None:
        self.number = number
        self.retryable = retryable


CODES: Final = {
    # the request
    "bad_request": Code(-1),
    "too_long": Code(-1),
    "unknown_op": Code(-1),
    # the image
    "not_found": Code(-2),
    "permission_denied": Code(-3),
    "not_a_file": Code(-3),
    "too_large": Code(-3),
    "too_many_pixels": Code(-3),
    "not_an_image": Code(-3),
    # the daemon
    "busy": Code(-1, retryable=True),
    "timeout": Code(-3),
    "unavailable": Code(-1, retryable=True),
    "worker_died": Code(-3),
    "shutting_down": Code(-1, retryable=True),
    "reload_failed": Code(-1),
    "internal": Code(-1),
    # seen only by a client, never sent
    "cannot_connect": Code(-4, retryable=True),
    "bad_reply": Code(-1),
    "model_changed": Code(-1),
}
IMAGE_CODES: Final = frozenset(
    {
        "not_found",
        "permission_denied",
        "not_a_file",
        "too_large",
        "too_many_pixels",
        "not_an_image",
        "worker_died",
    }
)
"""Codes that say something about the image, not about the daemon."""
CLIENT_CODES: Final = frozenset({"cannot_connect", "bad_reply", "model_changed"})
"""Codes that stay inside the client library."""


class SwiprError(Exception):
    """Any failure of a request, on either side of the wire.

    Attributes:
        code: stable name, a key of ``CODES``.
        message: one line for people, lower case, with what was got and what to do.
        number: the script service's number for it, -1 to -4.
        retryable: whether the same request may succeed later.
        retry_after_ms: after how many milliseconds it is worth while; None: nothing is said.
        id: the request's ``id`` where it is known; the daemon echoes it.
    """

    def __init__(self, code: str, message: str, id: RequestId = None) -> None:
        super().__init__(code, message, id)  # what unpickling calls again
        self.code = code
        self.message = message
        self.id = id
        # A newer daemon may send a code that this client does not know.
        kind = CODES.get(code, CODES["internal"])
        self.number = kind.number
        self.retryable = kind.retryable
        self.retry_after_ms: int | None = None

    def __str__(self) -> str:
        return self.message


# --- lines ---------------------------------------------------------------------------------------


class Line:
    """One line without its newline, and the descriptor that came with it.

    ``fd`` is owned by whoever holds the line. ``fd_fault`` is the error when descriptors came
    that cannot be used; then ``fd`` is None.
    """

    __slots__ = ("data", "fd", "fd_fault")

    def __init__(
        self, data: bytes, fd: int | None = None, fd_fault: SwiprError | None = None
    ) -> None:
        self.data = data
        self.fd = fd
        self.fd_fault = fd_fault


class LineReader:
    """Cuts a byte stream into lines, however the bytes arrive.

    Feed it what was received, then call ``next_line`` until it returns None. Memory is bounded by
    ``max_line`` and the size of one feed, and at most one descriptor is held.

    Attributes:
        max_line: longest line in bytes, its newline included; may be changed at any time.
    """

    __slots__ = ("_buffer", "_fd", "_fd_fault", "_ready", "_searched", "_too_long", "max_line")

    def __init__(self, *, max_line: int) -> None:
        self.max_line = max_line
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer known to hold no newline
        self._fd: int | None = None
        self._fd_fault: SwiprError | None = None
        self._ready: deque[Line] = deque()
        self._too_long = False

    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, fds_lost: bool = False
    ) -> Sequence[int]:
        """Take received bytes, and the descriptors that came with the first line they touch.

        Args:
            data: at least one byte.
            fds: descriptors received with ``data``.
            fds_lost: the kernel dropped descriptors (MSG_CTRUNC).

        Returns:
            The descriptors that are not wanted: the caller closes them.
        """
        if self._too_long:
            return fds
        refused: Sequence[int] = ()
        if len(fds) + fds_lost + (self._fd is not None) > 1:
            self._fd_fault = SwiprError(
                "bad_request",
                "more than one descriptor came with the request, expected at most one",
            )
        elif fds_lost:
            self._fd_fault = SwiprError(
                "busy", "the daemon has no room for another descriptor; try again in a moment"
            )
        if self._fd_fault is not None:
            held = () if self._fd is None else (self._fd,)
            self._fd = None
            refused = (*held, *fds)
        elif fds:
            self._fd = fds[0]
        self._buffer += data
        self._cut()
        return refused

    def _cut(self) -> None:
        start = 0
        while not self._too_long:
            end = self._buffer.find(b"\n", max(start, self._searched))
            length = (end if end >= 0 else len(self._buffer)) + 1 - start
            if length > self.max_line:
                self._too_long = True
                start = len(self._buffer)
            elif end < 0:
                break
            else:
                line = bytes(self._buffer[start:end])
                self._ready.append(Line(line, self._fd, self._fd_fault))
                self._fd = self._fd_fault = None
                start = end + 1
        del self._buffer[:start]
        self._searched = len(self._buffer)

    def next_line(self) -> Line | None:
        """Return the next whole line, or None when more bytes are needed.

        Raises:
            SwiprError: ``too_long`` once every line before the overlong one has been returned.
                The stream cannot be followed any further; each later call raises again.
        """
        if self._ready:
            return self._ready.popleft()
        if self._too_long:
            raise SwiprError("too_long", f"a line is longer than {self.max_line} bytes")
        return None

    def release(self) -> list[int]:
        """Forget everything that was received; return the descriptors, for the caller to close."""
        held = [line.fd for line in self._ready] + [self._fd]
        self._ready.clear()
        self._buffer.clear()
        self._searched = 0
        self._fd = self._fd_fault = None
        return [fd for fd in held if fd is not None]

    @property
    def unfinished(self) -> int:
        """Bytes received of a line whose newline has not come."""
        return len(self._buffer)


# --- JSON ----------------------------------------------------------------------------------------


def encode(message: dict[str, Any]) -> bytes:
    """Return ``message`` as one line: compact, other than ASCII escaped, newline at the end."""
    text = json.dumps(message, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def decode(data: bytes, *, max_depth: int) -> dict[str, Any]:
    """Return the JSON object in ``data``.

    Raises:
        SwiprError: ``bad_request`` for anything but one JSON object in UTF-8, nested at most
            ``max_depth`` deep, without duplicate keys and without NaN or Infinity.
    """
    try:
        message = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise SwiprError(
            "bad_request", f"the line is not UTF-8: byte {error.start} is wrong"
        ) from None
    except json.JSONDecodeError as error:
        raise SwiprError(
            "bad_request", f"the line is not JSON: {error.msg} at character {error.pos}"
        ) from None
    except RecursionError:
        raise SwiprError("bad_request", f"nested deeper than {max_depth} levels") from None
    except ValueError as error:  # our own hooks, and integers too long for int()
        raise SwiprError("bad_request", f"the line is not acceptable JSON: {error}") from None
    # Brackets inside strings count here too: that can only make the exact check run for nothing.
    if data.count(b"[") + data.count(b"{") > max_depth and _deeper_than(message, max_depth):
        raise SwiprError("bad_request", f"nested deeper than {max_depth} levels")
    if not isinstance(message, dict):
        raise SwiprError("bad_request", f"expected a JSON object, got {_kind(message)}")
    return message


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {_short(key)}")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, (dict, list)) for item in level)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names[type(value)]


def _short(text: str) -> str:
    """Quote a stranger's text for a message: one line, ASCII, bounded."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


# --- requests ------------------------------------------------------------------------------------


class Request:
    """One well-formed request. ``fd`` is owned by whoever holds the request.

    Attributes:
        timeout_ms: within how many milliseconds the answer is wanted; None: nothing is said.
        thumbnail: longest side of a small copy that is wanted as well, in pixels; None: none is.
    """

    __slots__ = ("fd", "id", "op", "path", "thumbnail", "timeout_ms")

    def __init__(
        self,
        id: RequestId,
        op: str,
        path: str | None,
        fd: int | None,
        timeout_ms: int | None = None,
        thumbnail: int | None = None,
    ) -> None:
        self.id = id
        self.op = op
        self.path = path
        self.fd = fd
        self.timeout_ms = timeout_ms
        self.thumbnail = thumbnail


def decode_request(line: Line, *, max_depth: int) -> Request:
    """Return the request in ``line``; on an error the line keeps its descriptor.

    Raises:
        SwiprError: ``bad_request`` or ``unknown_op``, with the request's id where it has a valid
            one.
    """
    if sum(map(line.data.count, (b"[", b"{", b","))) > MAX_MARKS:
        raise SwiprError(
            "bad_request", f"more than {MAX_MARKS} brackets, braces and commas in one request"
        )
    message = decode(line.data, max_depth=max_depth)
    id = _request_id(message)
    if line.fd_fault is not None:
        raise SwiprError(line.fd_fault.code, line.fd_fault.message, id)
    op = message.get("op", "compute")
    if not isinstance(op, str):
        raise SwiprError("bad_request", f"expected 'op' to be a string, got {_kind(op)}", id)
    if op not in OPS:
        raise SwiprError("unknown_op", f"no op {_short(op)}, expected one of {', '.join(OPS)}", id)
    if op != "compute":
        if line.fd is not None:
            raise SwiprError("bad_request", f"a descriptor came with {op}, which takes none", id)
        return Request(id, op, None, None)
    path = message.get("path")
    _check_path(path, line.fd, id)
    timeout_ms = _whole_number(message, "timeout_ms", (1, MAX_TIMEOUT_MS), id)
    thumbnail = _whole_number(message, "thumbnail", THUMBNAIL_SIDES, id)
    return Request(id, op, path, line.fd, timeout_ms, thumbnail)


def _request_id(message: dict[str, Any]) -> RequestId:
    id = message.get("id")
    if id is None:
        return None
    if isinstance(id, str):
        size = len(id.encode("utf-8", "surrogatepass"))
        if size > MAX_ID_BYTES:
            raise SwiprError(
                "bad_request", f"'id' has {size} bytes, expected at most {MAX_ID_BYTES}"
            )
        return id
    if isinstance(id, int) and not isinstance(id, bool):
        if abs(id) > MAX_ID_INTEGER:
            raise SwiprError("bad_request", "'id' does not fit in 64 bits")
        return id
    raise SwiprError("bad_request", f"expected 'id' to be a string or an integer, got {_kind(id)}")


def _check_path(path: Any, fd: int | None, id: RequestId) -> None:
    if path is None and fd is not None:
        return
    if not isinstance(path, str):
        got = "nothing" if path is None else _kind(path)
        raise SwiprError("bad_request", f"expected 'path' to be a string, got {got}", id)
    if fd is None and not path.startswith("/"):
        raise SwiprError(
            "bad_request", f"expected an absolute path or a descriptor, got {_short(path)}", id
        )
    if "\0" in path:
        raise SwiprError("bad_request", "the path holds a NUL character", id)
    try:
        # The inverse of what os.fsdecode does to a name that is not UTF-8.
        size = len(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise SwiprError("bad_request", "the path holds a lone surrogate", id) from None
    if size > MAX_PATH_BYTES:
        raise SwiprError(
            "bad_request", f"'path' has {size} bytes, expected at most {MAX_PATH_BYTES}", id
        )


def _whole_number(
    message: dict[str, Any], key: str, limits: tuple[int, int], id: RequestId
) -> int | None:
    value = message.get(key)
    if value is None or (type(value) is int and limits[0] <= value <= limits[1]):
        return value
    got = _short(str(value)) if type(value) is int else _kind(value)
    raise SwiprError(
        "bad_request",
        f"expected '{key}' to be a whole number from {limits[0]} to {limits[1]}, got {got}",
        id,
    )


# --- replies -------------------------------------------------------------------------------------


class Thumbnail:
    """A small copy of a picture, whole and as the model sees it.

    Attributes:
        data: a JPEG file, in base64.
        width: in pixels.
        height: in pixels.
    """

    __slots__ = ("data", "height", "width")

    def __init__(self, data: str, width: int, height: int) -> None:
        self.data = data
        self.width = width
        self.height = height


class Result:
    """What one image scored.

    Attributes:
        scores: one number per label, each in [0, 1] for a softmax or sigmoid model.
        labels: the labels, in the order of the scores.
        model: digest of the model that answered, ``sha256:`` and 64 hexadecimal digits.
        engine: what computed, ``eager`` or ``compiled``.
        precision: of the computation, ``fp32`` or ``bf16``.
        ms: the worker's time for the image, in milliseconds.
        decode_ms: of these, for reading, decoding and preprocessing.
        thumbnail: a small copy, where one was asked for and fits in the reply beside the rest.
    """

    __slots__ = (
        "decode_ms",
        "engine",
        "labels",
        "model",
        "ms",
        "precision",
        "scores",
        "thumbnail",
    )

    def __init__(
        self,
        *,
        scores: tuple[float, ...],
        labels: tuple[str, ...],
        model: str,
        engine: str,
        precision: str,
        ms: float,
        decode_ms: float,
        thumbnail: Thumbnail | None = None,
    ) -> None:
        self.scores = scores
        self.labels = labels
        self.model = model
        self.engine = engine
        self.precision = precision
        self.ms = ms
        self.decode_ms = decode_ms
        self.thumbnail = thumbnail

    def __repr__(self) -> str:
        pairs = ", ".join(
            f"{label}={score:.6f}" for label, score in zip(self.labels, self.scores, strict=True)
        )
        return f"<Result {pairs}>"


def encode_result(id: RequestId, result: Result) -> bytes:
    """Return the reply to a compute that succeeded."""
    reply: dict[str, Any] = {
        "id": id,
        "scores": result.scores,
        "labels": result.labels,
        "model": result.model,
        "engine": result.engine,
        "precision": result.precision,
        "ms": result.ms,
        "decode_ms": result.decode_ms,
    }
    small = result.thumbnail
    if small is not None:
        reply["thumbnail"] = {"width": small.width, "height": small.height, "data": small.data}
    return encode(reply)


def encode_error(error: SwiprError) -> bytes:
    """Return the reply to a request that failed in any way; it carries no scores."""
    found: dict[str, Any] = {
        "code": error.code,
        "number": error.number,
        "message": error.message[:MAX_MESSAGE],
        "retryable": error.retryable,
    }
    if error.retry_after_ms is not None:
        found["retry_after_ms"] = error.retry_after_ms
    return encode({"id": error.id, "error": found})


def decode_reply(data: bytes, *, max_depth: int) -> dict[str, Any]:
    """Return the reply in ``data``.

    Raises:
        SwiprError: the error that the reply carries, or ``bad_reply`` when it is none of ours.
    """
    try:
        message = decode(data, max_depth=max_depth)
        id = _request_id(message)
    except SwiprError as error:
        raise SwiprError("bad_reply", f"the daemon's reply is malformed: {error}") from None
    if "error" not in message:
        return message
    found = message["error"]
    failure = SwiprError(_field(found, "code", str), _field(found, "message", str), id)
    failure.number = _field(found, "number", int)
    failure.retryable = _field(found, "retryable", bool)
    if found.get("retry_after_ms") is not None:
        failure.retry_after_ms = _field(found, "retry_after_ms", int)
    raise failure


def decode_result(message: dict[str, Any]) -> Result:
    """Return the scores in a reply to compute.

    Raises:
        SwiprError: ``bad_reply`` when the scores and labels are not whole.
    """
    scores = _items(message, "scores", _is_number)
    labels = _items(message, "labels", lambda item: isinstance(item, str))
    if len(scores) != len(labels):
        raise SwiprError(
            "bad_reply",
            f"the daemon's reply is malformed: {len(scores)} scores for {len(labels)} labels",
        )
    return Result(
        scores=scores,
        labels=labels,
        model=_field(message, "model", str),
        engine=_field(message, "engine", str),
        precision=_field(message, "precision", str),
        ms=_number(message, "ms"),
        decode_ms=_number(message, "decode_ms"),
        thumbnail=_thumbnail(message.get("thumbnail")),
    )


def _thumbnail(found: Any) -> Thumbnail | None:
    if found is None:
        return None
    data = _field(found, "data", str)
    if not re.fullmatch("[A-Za-z0-9+/]+={0,2}", data):
        raise SwiprError("bad_reply", "the daemon's reply is malformed: no proper 'thumbnail'")
    return Thumbnail(data, _field(found, "width", int), _field(found, "height", int))


def _number(message: dict[str, Any], key: str) -> float:
    value: Any = message.get(key)
    if not _is_number(value):
        raise SwiprError("bad_reply", f"the daemon's reply is malformed: no proper '{key}'")
    return float(value)


def _is_number(value: Any) -> bool:
    # Not math.isfinite, which fails on an integer that no float can hold.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _field(message: Any, key: str, kind: type) -> Any:
    value = message.get(key) if isinstance(message, dict) else None
    if type(value) is not kind:
        raise SwiprError("bad_reply", f"the daemon's reply is malformed: no proper '{key}'")
    return value


def _items(message: dict[str, Any], key: str, valid: Callable[[Any], bool]) -> tuple[Any, ...]:
    items = message.get(key)
    if not isinstance(items, list) or not items or not all(map(valid, items)):
        raise SwiprError("bad_reply", f"the daemon's reply is malformed: no proper '{key}'")
    return tuple(items)
