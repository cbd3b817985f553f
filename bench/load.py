"""Closed loops: so many clients, each of which asks again as soon as it is answered."""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.subjects import Service

ROUNDS: Final = 1.5
"""Answers for each client, on the average, before a load may end: what was asked when it began has
gone through the queue by then."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a service did under a load.

    Attributes:
        rate: answers a second.
        waits: milliseconds that each answer took, from its request on.
        before: for each answer, how many others came between its request and itself.
    """

    rate: float
    waits: list[float]
    before: list[float]


def by_connections(service: Service, clients: int, seconds: float, picture: Path) -> Loaded:
    """Load ``service`` over ``clients`` connections that stay open, for ``seconds`` or longer."""
    return asyncio.run(_by_connections(service, clients, seconds, picture))


async def _by_connections(service: Service, clients: int, seconds: float, picture: Path) -> Loaded:
    answered: list[tuple[float, float]] = []
    begun = set()
    stop = asyncio.Event()

    async def client(number: int) -> None:
        reader, writer = await service.open()
        try:
            while not stop.is_set():
                began = time.perf_counter()
                await service.exchange(reader, writer, picture)
                answered.append((began, time.perf_counter()))
                begun.add(number)
        finally:
            writer.close()
            await writer.wait_closed()

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]

    async def until(reached: Callable[[], bool]) -> None:
        while not reached():
            await asyncio.sleep(0.05)
            for task in tasks:
                if task.done():
                    await task  # it has failed

    # The first round finds an empty queue.
    await until(lambda: len(begun) == clients)
    answered.clear()
    enough = time.perf_counter() + seconds
    await until(lambda: time.perf_counter() > enough and len(answered) > ROUNDS * clients)
    found = list(answered)
    # Not cancelled: some services would go on with what was asked, in the turn of the next.
    stop.set()
    await asyncio.gather(*tasks)
    return loaded(found)


def by_processes(service: Service, clients: int, seconds: float, picture: Path) -> Loaded:
    """Load ``service`` by ``clients`` callers that start a client process for each request."""
    answered: list[tuple[float, float]] = []
    stop = threading.Event()
    failures: list[BaseException] = []

    def call() -> None:
        try:
            while not stop.is_set():
                began = time.perf_counter()
                service.run_client(picture)
                answered.append((began, time.perf_counter()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(seconds)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    # Nobody asked any more once the time was over, and the first ones found an empty queue.
    ended = min(began for began, _ in answered) + seconds
    return loaded([(b, e) for b, e in sorted(answered)[clients:] if e <= ended])


def loaded(answered: list[tuple[float, float]]) -> Loaded:
    """Return what ``answered``, the times of requests and of their answers, amount to."""
    ends = sorted(end for _, end in answered)
    if len(ends) < 2:
        raise RuntimeError(f"{len(ends)} answers came: measure for longer")
    # Between answers, and not by the window's own edges: of 60 answers one more is 2 %.
    rate = (len(ends) - 1) / (ends[-1] - ends[0])
    return Loaded(
        rate,
        [1000 * (end - began) for began, end in answered],
        [float(bisect_left(ends, end) - bisect_right(ends, began)) for began, end in answered],
    )
