"""Log lines as they arrive: on a terminal, in the journal, in a file, at syslog: swiprd.log."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

PROGRAM = r"""
import logging, sys
from swiprd.log import set_level, start_logging

start_logging(sys.argv[1], "warning", sys.argv[2])
log = logging.getLogger("swiprd")
log.info("too little")
log.warning("careful")
set_level("debug")
log.debug("fine")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("two\nlines \x1b[31m")
"""


def logged(target: str, who: str = "swiprd") -> list[str]:
    """Return the lines that the program wrote to standard error; it wrote nothing else."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, target, who], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr.splitlines()


@pytest.mark.parametrize("who", ["swiprd", "swiprd worker"])
def test_on_a_terminal_lines_are_plain(who: str) -> None:
    """They begin with who speaks; what is below the level is not there."""
    assert logged("terminal", who)[:3] == [
        f"{who}: careful",
        f"{who}: fine",
        f"{who}: two\\nlines \\x1b[31m",
    ]


@pytest.mark.parametrize(("who", "prefix"), [("swiprd", ""), ("swiprd worker", "worker: ")])
def test_each_line_for_the_journal_has_a_priority(who: str, prefix: str) -> None:
    """Each, because the journal takes every line of a traceback for a message of its own."""
    lines = logged("journal", who)
    assert lines[:2] == [f"<4>{prefix}careful", f"<7>{prefix}fine"]
    assert lines[2] == f"<3>{prefix}two\\nlines \\x1b[31m"
    assert len(lines) > 5
    assert all(line.startswith("<3>") for line in lines[2:])


def test_in_a_file_lines_have_a_time_and_a_process() -> None:
    """Nobody else would put them there."""
    first = logged("file")[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} swiprd\[\d+\]: careful", first)
