"""How swiprctl speaks: answers to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from swiprctl.protocol import SwiprError

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_ANSWER: Final = 3
"""The daemon was not reached, is busy, or ran out of time: nothing is said about the image."""
INTERRUPTED: Final = 130
NO_READER: Final = 141
"""What a shell says of a program that SIGPIPE ended."""

NO_ANSWER_CODES: Final = frozenset(
    {"cannot_connect", "busy", "timeout", "unavailable", "shutting_down"}
)


class NotWritten(Exception):
    """An answer could not be written.

    Attributes:
        status: the exit status that tells so.
    """

    def __init__(self, status: int, reason: str | None) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


def write(text: str) -> None:
    """Write ``text`` to standard output at once.

    Bytes of file names that are no text (``os.fsdecode``) come out as they were.

    Raises:
        NotWritten: nobody takes it.
    """
    if sys.stdout is None:
        raise NotWritten(FAILED, "standard output is closed")
    try:
        sys.stdout.buffer.write(encoded(text))
        sys.stdout.flush()
    except OSError as error:
        # Keep the interpreter from trying to write the rest once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise NotWritten(NO_READER, None) from None
        raise NotWritten(FAILED, error.strerror) from None


def write_tuple(scores: Iterable[float]) -> None:
    """Write the scores of one image, as the script service had them, to standard output.

    Raises:
        NotWritten: nobody takes them.
    """
    write(",".join(f"{score:.6f}" for score in scores) + "\n")


def encoded(text: str) -> bytes:
    """Return ``text`` in the encoding of file names, or in UTF-8 where that lacks a character."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """Return ``text`` on one line that cannot steer a terminal: a file name may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell(message: str) -> None:
    """Write ``message`` to standard error."""
    # Whether or not it can be told, the exit status says the same.
    if sys.stderr is not None:
        line = f"swiprctl: {message}\n".encode(sys.stderr.encoding, "backslashreplace")
        try:  # noqa: SIM105 - contextlib would add to every start
            os.write(sys.stderr.fileno(), line)
        except OSError:
            pass


def in_words(error: SwiprError) -> str:
    """Return ``error`` as it is told: one line, its code at the end."""
    return f"{printable(str(error))} ({error.code})"


def status_of(error: SwiprError) -> int:
    """Return the exit status of a command that ``error`` ended."""
    return NO_ANSWER if error.code in NO_ANSWER_CODES else FAILED
