"""What is measured beside one another, in batches: each starts all services and engines anew.

Two processes of one engine differ by some percent for as long as they live, and after another start
by others. So each is started several times, and what it was in every life counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import load
from bench.material import LARGE, USUAL
from bench.measures import (
    Stolen,
    client_latency,
    growth,
    latency,
    say,
    starts,
    throughput,
)
from bench.subjects import SWIPR, SWIPR_BF16, EngineAlone, Service
from swiprd.model import TOLERANCES

BATCHES: Final = 4
CLIENTS: Final = (1, 4, 16, 64)
CALLERS: Final = (1, 16)


@dataclass(frozen=True, slots=True)
class Amount:
    """How much one batch measures.

    Attributes:
        rounds: of one request, by picture.
        client_rounds: of one request with a client process.
        seconds: under each number of clients.
        starts: of client processes alone.
    """

    rounds: Mapping[str, int]
    client_rounds: int
    seconds: float
    starts: int


WHOLE: Final = Amount({USUAL: 20, LARGE: 8}, 10, 5.0, 10)
QUICK: Final = Amount({USUAL: 2, LARGE: 2}, 2, 4.0, 3)


@dataclass(frozen=True, slots=True)
class Subjects:
    """How to start what is measured, by name: services, engines, and what multiplies matrices."""

    services: Mapping[str, Callable[[], Service]]
    engines: Mapping[str, Callable[[], EngineAlone]]
    multipliers: Mapping[str, Callable[[], EngineAlone]]


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures: those of the latency table by name, and others by megapixels."""

    named: Mapping[str, Path]
    by_size: Mapping[float, Path]


def measure_batches(
    subjects: Subjects, pictures: Pictures, stolen: Stolen, *, quick: bool
) -> dict[str, Any]:
    """Return all that is measured while everything runs beside everything, of all batches."""
    amount, count = (QUICK, 1) if quick else (WHOLE, BATCHES)
    batches = []
    for number in range(count):
        say(f"batch {number + 1} of {count}")
        batches.append(_batch(subjects, pictures, stolen, amount, backwards=number % 2 == 1))
    return joined(batches)


def joined(batches: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Return dicts that have the same keys as one, their lists put one behind another."""
    return {
        key: joined([batch[key] for batch in batches])
        if isinstance(first, Mapping)
        else [value for batch in batches for value in batch[key]]
        for key, first in batches[0].items()
    }


@contextlib.contextmanager
def _started(
    subjects: Subjects, *, backwards: bool
) -> Iterator[tuple[list[Service], list[EngineAlone], list[EngineAlone]]]:
    """Start all, in either order, and end all at last. They come in the order of ``subjects``."""
    kinds = (subjects.services, subjects.engines, subjects.multipliers)
    with contextlib.ExitStack() as running:
        started: list[dict[str, Any]] = [{} for _ in kinds]
        every = [(kind, name) for kind, starters in enumerate(kinds) for name in starters]
        for kind, name in reversed(every) if backwards else every:
            say(f"starting {name}")
            started[kind][name] = subject = kinds[kind][name]()
            running.callback(subject.process.end)
        services, engines, multipliers = (
            [found[name] for name in starters]
            for found, starters in zip(started, kinds, strict=True)
        )
        yield services, engines, multipliers


def _batch(
    subjects: Subjects, pictures: Pictures, stolen: Stolen, amount: Amount, *, backwards: bool
) -> dict[str, Any]:
    usual = pictures.named[USUAL]
    found: dict[str, Any] = {"latency": {}}
    step = -1 if backwards else 1
    with _started(subjects, backwards=backwards) as (services, engines, multipliers):
        _compare(services, usual)
        for name, rounds in amount.rounds.items():
            stolen.begin(f"one request, {name}")
            found["latency"][name] = latency(
                engines, services, multipliers, rounds, pictures.named[name]
            )
        stolen.begin("one request, with a client process")
        found["client latency"] = client_latency(services, amount.client_rounds, usual)
        stolen.begin("many clients, over connections")
        connected = [service for service in services if service.address is not None]
        found["throughput"] = throughput(
            connected[::step], CLIENTS[::step], amount.seconds, usual, by=load.by_connections
        )
        stolen.begin("many clients, a process a request")
        called = [service for service in services if service.client is not None]
        # Longer, for the first answer of each caller does not count.
        found["client throughput"] = throughput(
            called[::step], CALLERS[::step], 2 * amount.seconds, usual, by=load.by_processes
        )
        stolen.begin("growth with the picture")
        grown = [service for service in services if service.name in ("script service", SWIPR)]
        (compiled,) = (engine for engine in engines if engine.name == "compiled")
        found["growth"] = growth([compiled], grown, pictures.by_size)
        stolen.begin("client processes")
        (daemon,) = (service for service in services if service.name == SWIPR)
        found["client starts"] = starts(daemon, amount.starts)
        stolen.end()
    return found


def _compare(services: Sequence[Service], picture: Path) -> None:
    """Fail unless all say the same of a picture: by pillow's filter and in bf16, about."""
    furthest_allowed = {"script service": 0.05, SWIPR_BF16: TOLERANCES["bf16"]}
    found = {service.name: service.scores(picture) for service in services}
    for name, scores in found.items():
        furthest = max(abs(a - b) for a, b in zip(scores, found[SWIPR], strict=True))
        if furthest > furthest_allowed.get(name, 1e-4):
            raise RuntimeError(f"{name} says {scores}, {SWIPR} {found[SWIPR]}")
