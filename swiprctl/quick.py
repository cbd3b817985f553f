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
from swiprctl.terminal import DONE, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

_PONG: Final = b'{"id":1,"pong":true}\n'
_RESULT: Final = b'{"id":1,"scores":['
_MARKS: Final = (
    b'],"labels":["',
    b'"],"model":"',
    b'","engine":"',
    b'","precision":"',
    b'","ms":',
    b',"decode_ms":',
    b"}\n",
)
"""What follows each value of a result, in ``protocol.encode_result``'s order."""
_OF_NUMBERS: Final = b"0123456789.e-,"
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
        if not name.isascii() or not name.isprintable() or '"' in name or "\\" in name:
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
    scores = usual_scores(reply)
    if scores is None:
        scores = _scores_in_full(reply, path)
    write(",".join(f"{score:.6f}" for score in scores) + "\n")
    return DONE


def usual_scores(reply: bytes) -> Sequence[float] | None:
    """Return the scores in a reply, its newline included; None: it is not of the usual form."""
    # Without a backslash, every quotation mark begins or ends a string.
    if b"\\" in reply or not reply.isascii() or not reply.startswith(_RESULT):
        return None
    rest = reply[len(_RESULT) :]
    values = []
    for mark in _MARKS:
        value, found, rest = rest.partition(mark)
        if not found:
            return None
        values.append(value)
    scores, labels, *_, ms, decode_ms = values
    numbers = b",".join((scores, ms, decode_ms))
    if rest or numbers.translate(None, _OF_NUMBERS) or labels.count(b'","') != scores.count(b","):
        return None
    try:
        *found_scores, _, _ = map(float, numbers.split(b","))
    except ValueError:
        return None
    return found_scores


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
        rights = [] if fd is None else [_rights(fd)]
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


def _rights(fd: int) -> tuple[int, int, bytes]:
    import _socket

    return _socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder)


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
