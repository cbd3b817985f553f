"""How much is tried, and the table of it at the end of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator

import pytest


@dataclasses.dataclass
class Attempt:
    """Faults that are made together; ``count`` may be found out on the way."""

    count: int


@dataclasses.dataclass
class Trial:
    """How one kind of fault came out.

    Attributes:
        soak: whether this is the long form.
        tried: how often the fault was made.
        survived: how often the daemon did what it should.
        notes: what else is worth to be told, and how often it was seen.
    """

    soak: bool
    tried: int = 0
    survived: int = 0
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    words: list[str] = dataclasses.field(default_factory=list)

    def count(self, *, short: int, long: int) -> int:
        """Return how many to try."""
        return long if self.soak else short

    @contextlib.contextmanager
    def attempt(self, count: int = 1) -> Iterator[Attempt]:
        """Count what the block tries as tried, and when it comes to a good end as survived."""
        attempt = Attempt(count)
        try:
            yield attempt
        except BaseException:
            self.tried += attempt.count
            raise
        self.tried += attempt.count
        self.survived += attempt.count


TRIALS = pytest.StashKey[list[str]]()


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> Iterator[Trial]:
    """What a test counts in; the count is printed at the end of the run."""
    trial = Trial(bool(request.config.getoption("--soak")))
    began = time.monotonic()
    yield trial
    name = request.node.name.removeprefix("test_").replace("_", " ")
    notes = [f"{count:,} {what}" for what, count in sorted(trial.notes.items())] + trial.words
    line = f"{name}: {trial.tried:,} tried, {trial.survived:,} survived"
    line += f" ({', '.join(notes)})" if notes else ""
    lines = request.config.stash.setdefault(TRIALS, [])
    lines.append(f"{line}; {time.monotonic() - began:.0f} s")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts."""
    if lines := terminalreporter.config.stash.get(TRIALS, []):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
