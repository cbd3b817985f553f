"""Clients that go on asking, and know what they must be told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from swiprctl import Client, SwiprError
from tests.daemon import Daemon

PATIENCE = 120.0
"""Seconds after which a client says that it has been left without an answer."""


class Crowd:
    """Threads, each with a client that asks for the same pictures again and again.

    Args:
        answers: the scores of each picture.

    Attributes:
        outcomes: how often each outcome was seen: "right", "wrong", "hung", or an error's code.
    """

    def __init__(self, daemon: Daemon, clients: int, answers: Mapping[Path, object]) -> None:
        self._path = daemon.path
        self._answers = answers
        self._enough = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=self._ask, args=[number], name=f"client {number}")
            for number in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def asked(self) -> int:
        """Return how many requests have ended."""
        with self._lock:
            return self.outcomes.total()

    def _ask(self, number: int) -> None:
        pictures = list(self._answers)
        with Client(self._path, timeout=PATIENCE) as client:
            while not self._enough.is_set():
                number += 1
                picture = pictures[number % len(pictures)]
                outcome = self._outcome(client, picture)
                with self._lock:
                    self.outcomes[outcome] += 1

    def _outcome(self, client: Client, picture: Path) -> str:
        try:
            scores = client.compute(picture).scores
        except SwiprError as error:
            return "hung" if error.message.startswith("no answer") else error.code
        return "right" if scores == self._answers[picture] else "wrong"


def answers_of(daemon: Daemon, *pictures: Path) -> dict[Path, object]:
    """Return the scores of each picture, as they are without any fault."""
    with daemon.client() as client:
        return {picture: client.compute(picture).scores for picture in pictures}
