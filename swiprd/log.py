"""Where log lines go, and what they look like there. The front and the workers share it."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

SYSLOG: Final = "/dev/log"

PRIORITIES: Final = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
"""Priorities of syslog(3), which sd-daemon(3) writes before each line for the journal."""


def start_logging(target: str, level: str, who: str) -> None:
    """Log what is at least as severe as ``level`` to ``target``.

    Args:
        target: ``terminal``, ``journal``, ``file`` or ``syslog``. All but the last are standard
            error, which is the caller's to open. For the journal each line begins with its
            priority; in a file, where nobody else tells the time, with the time.
        level: ``debug``, ``info``, ``warning`` or ``error``.
        who: what stands before a message, as in ``swiprd: listening``. The journal knows already
            who ``swiprd`` is.

    """
    handler: logging.Handler
    if target == "syslog":
        handler = _syslog_handler(who)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_formatter(target, who))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def printable(text: str) -> str:
    """Return ``text`` on one line that cannot steer a terminal: much of it is a stranger's."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def set_level(level: str) -> None:
    """Log from now on what is at least as severe as ``level``."""
    logging.getLogger().setLevel(level.upper())


def _syslog_handler(who: str) -> logging.Handler:
    from logging.handlers import SysLogHandler  # which imports much that others do not need

    handler = SysLogHandler(SYSLOG, SysLogHandler.LOG_DAEMON)
    handler.ident = f"{who.replace(' ', '-')}[{os.getpid()}]: "
    handler.append_nul = False  # which the journal would keep
    handler.setFormatter(_Formatter("%(message)s"))
    return handler


class _Formatter(logging.Formatter):
    """Keeps a message on one line; a traceback behind it has its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))


class _JournalFormatter(_Formatter):
    """Gives each line its priority, those of a traceback too: the journal takes one at a time."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES[record.levelname]}>"
        return prefix + super().format(record).replace("\n", "\n" + prefix)


def _formatter(target: str, who: str) -> logging.Formatter:
    match target:
        case "journal":
            prefix = who.removeprefix("swiprd").lstrip()
            return _JournalFormatter(f"{prefix}: %(message)s" if prefix else "%(message)s")
        case "file":
            return _Formatter(f"%(asctime)s {who}[%(process)d]: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    return _Formatter(f"{who}: %(message)s")
