"""A line on the terminal that says how far a long piece of work has come."""

from __future__ import annotations

import os
import sys
import time

from swiprctl import terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

PATIENCE: Final = 1.0
"""Seconds of work after which somebody may wonder."""
PAUSE: Final = 0.2
"""Seconds between two drawings."""
BAR: Final = 24
"""Width of the bar itself."""
CLEAR: Final = "\r\x1b[K"


def is_shown() -> bool:
    """Return whether somebody sits before standard error, at a terminal that can go back."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Counts, and shows the count where somebody can see it.

    What is printed meanwhile goes through ``write`` and ``tell``, which take the line away first.

    Args:
        total: how much there is to do; None: nobody knows.
        is_shown: whether there is somebody to show it to.
    """

    def __init__(self, total: int | None, *, is_shown: bool) -> None:
        self._total = total
        self._is_shown = is_shown
        self._done = 0
        self._began = time.monotonic()
        self._next = self._began + PATIENCE
        self._is_drawn = False

    def step(self) -> None:
        """Count one more."""
        self._done += 1
        if self._is_shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + PAUSE
            self._is_drawn = True
            _show(CLEAR + self._line())

    def write(self, text: str) -> None:
        """Write an answer to standard output; see ``terminal.write``.

        On a terminal, what is not printable is escaped: names come from strangers.
        """
        if sys.stdout is not None and sys.stdout.isatty():
            self.clear()
            text = "\n".join(map(terminal.printable, text.split("\n")))
        terminal.write(text)

    def tell(self, message: str) -> None:
        """Write a message to standard error."""
        self.clear()
        terminal.tell(message)

    def clear(self) -> None:
        """Take the line away; the next step draws it again."""
        if self._is_drawn:
            self._is_drawn = False
            self._next = 0.0
            _show(CLEAR)

    def _line(self) -> str:
        rate = self._done / (time.monotonic() - self._began)
        if not self._total:
            return f"{self._done:,} done, {rate:.1f}/s"
        share = min(1.0, self._done / self._total)
        bar = "#" * int(share * BAR)
        left = _clock((self._total - self._done) / rate)
        line = f"[{bar:.<{BAR}}] {self._done:,} of {self._total:,}, {rate:.1f}/s, {left} left"
        return line[: _columns() - 1]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _show(text: str) -> None:
    try:  # noqa: SIM105 - contextlib is not imported here otherwise
        os.write(sys.stderr.fileno(), text.encode())
    except OSError:
        pass
