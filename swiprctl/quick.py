"""What is asked most, ``ping`` and ``compute PATH``, without the client library.

What that imports, json and socket above all, takes longer than all else that a process of swiprctl
does. So this speaks through the part of socket that is written in C, and reads the usual replies
only, byte for byte as the daemon writes them. Every other reply is left to ``swiprctl.session``;
and where there is none, to the whole client: no request has an effect that asking twice doubles.
"""

from __future__ import annotations

import os
import sys
import time

from swiprctl.defaults import DEFAULT_TIMEOUT, default_socket
from swiprctl.terminal import DONE, write, write_tuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

_PONG: Final = b'{"id":1,"pong":true}\n'
_MARKS: Final = (
    '{"id":1,"scores":[',
    '],"labels":["',
    '"],"model":"',
    '","engine":"',
    '","precision":"',
    '","ms":',
    ',"decode_ms":',
    "}\n",
)
"""What stands around the values of a result, as ``protocol.encode_result`` writes it."""
_CHUNK: Final = 65536
"""Bytes received at a time, and of a reply at most."""


def answer(words: Sequence[str]) -> int | None:
    """Answer a command line and return its exit status; None: it is left to the whole client.

    Raises:
        SwiprError: the daemon said so, or gave no answer in time.
        NotWritten: nobody takes the answer.
    """
    if len(words) == 1 and words[0] == "ping":
        return _ping()
    if len(words) == 2 and words[0] == "compute":
        return _compute(words[1])
    return None


def _ping() -> int | None:
    reply = _ask(b'{"id":1,"op":"ping"}\n', None)
    if reply is None:
        return None
    if reply != _PONG:
        _in_full(reply)
    write("pong\n")
    return DONE


def _compute(path: str) -> int | None:
    # Not an option, not standard input, not a folder, of which more is to be said.
    if path.startswith("-") or os.path.isdir(path):
        return None
    try:
        name = os.path.abspath(path)
        if not _is_plain(name):
            return None
        # O_NONBLOCK: a FIFO without a writer must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        timeout_ms = int(DEFAULT_TIMEOUT * 1000)
        request = f'{{"id":1,"path":"{name}","timeout_ms":{timeout_ms}}}\n'
        reply = _ask(request.encode("ascii"), fd)
    finally:
        os.close(fd)
    if reply is None:
        return None
    scores = usual_scores(reply) or _scores_in_full(reply, path)
    write_tuple(scores)
    return DONE


def usual_scores(reply: bytes) -> list[float] | None:
    """Return the scores in a reply, its newline included; None: it is not as the usual ones are.

    What it takes, ``protocol`` takes as well, for the same scores.
    """
    values = _between_marks(reply.decode("ascii")) if reply.isascii() else []
    if not values:
        return None
    scores, labels, model, engine, precision, ms, decode_ms = values
    score_texts, label_texts = scores.split(","), labels.split('","')
    if len(score_texts) != len(label_texts):
        return None
    if not all(map(_is_plain, (*label_texts, model, engine, precision))):
        return None
    try:
        *found, _, _ = map(_number, (*score_texts, ms, decode_ms))
    except ValueError:
        return None
    return found


def _between_marks(text: str) -> list[str]:
    """Return what stands between the marks; nothing where they are not there, or not all."""
    values = []
    for mark in _MARKS:
        value, found, text = text.partition(mark)
        if not found:
            return []
        values.append(value)
    before, *values = values
    return [] if before or text else values


def _is_plain(text: str) -> bool:
    """Whether ``text`` stands in JSON as it is."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


def _number(text: str) -> float:
    number = float(text)
    # The shortest form, which is what is written, is JSON's too, but for these.
    if repr(number) != text or not abs(number) <= sys.float_info.max:
        raise ValueError
    return number


def _ask(request: bytes, fd: int | None) -> bytes | None:
    """Return the reply to ``request`` and ``fd``; None: there is none, and one may ask again."""
    try:
        import _socket
    except ImportError:  # not a part of every Python
        return None
    path = default_socket()
    deadline = time.monotonic() + DEFAULT_TIMEOUT
    connection = None
    try:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        connection.settimeout(DEFAULT_TIMEOUT)
        connection.connect(path)
        rights = []
        if fd is not None:
            number = fd.to_bytes(4, sys.byteorder)
            rights.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, number))
        if connection.sendmsg([request], rights) < len(request):
            return None
        reply = b""
        while not reply.endswith(b"\n"):
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            data = connection.recv(_CHUNK)
            reply += data
            if not data or len(reply) > _CHUNK:
                return None
        return reply
    except TimeoutError:
        from swiprctl.session import no_answer

        raise no_answer(path, DEFAULT_TIMEOUT) from None
    except OSError:
        return None
    finally:
        if connection is not None:
            connection.close()


def _in_full(reply: bytes) -> dict[str, Any]:
    from swiprctl.protocol import SwiprError
    from swiprctl.session import Session

    session = Session(iter((1,)))
    session.begin({})
    session.feed(reply)
    answer = session.next_reply()
    assert answer is not None, "it ends with a newline"
    _, found = answer
    if isinstance(found, SwiprError):
        raise found
    return found


def _scores_in_full(reply: bytes, path: str) -> Sequence[float]:
    from swiprctl.protocol import SwiprError, decode_result
    from swiprctl.session import named

    try:
        return decode_result(_in_full(reply)).scores
    except SwiprError as error:
        raise named(error, path) from None
