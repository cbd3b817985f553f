"""The measurements. The subjects take turns, so that a busy moment strikes all alike."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import load
from bench.subjects import PYTHON, SWIPRCTL, SWIPRD, EngineAlone, Process, Service

TURN: Final = 2
"""Pictures that are scored in one turn; the first is not counted, for the others had the
processor's caches before it. Few, and many rounds: neighbours of a virtual machine are busy for a
second or a few, so what is to be compared must lie close together."""

IMPORT_TORCH: Final = "python3 -c 'import torch'"

Samples = dict[str, list[float]]


def paired(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratios of what was measured in the same round.

    Their median moves less than the ratio of medians, for a busy round slows both.
    """
    return [a / b for a, b in zip(over, under, strict=True)]


def take_turns(turns: Iterable[Callable[[], None]], rounds: int) -> None:
    """Call each of ``turns`` once a round: from the first to the last, then the other way round."""
    order = list(turns)
    for _ in range(rounds):
        for turn in order:
            turn()
        order.reverse()


def say(words: str) -> None:
    """Tell who waits what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


class Stolen:
    """How much of the processors' time the host gave to others, a measurement at a time."""

    def __init__(self) -> None:
        """Nothing is being measured yet."""
        self._ticks: dict[str, tuple[int, int]] = {}
        self._name = ""
        self._before = (0, 0)

    def begin(self, name: str) -> None:
        """End the measurement before, and tell who waits that this one begins, or goes on."""
        self.end()
        say(name)
        self._name, self._before = name, _ran_and_stolen()

    def end(self) -> None:
        """End the measurement, if there is one."""
        if self._name:
            ran, stolen = self._ticks.get(self._name, (0, 0))
            (ran_before, stolen_before), (ran_now, stolen_now) = self._before, _ran_and_stolen()
            self._ticks[self._name] = (
                ran + ran_now - ran_before,
                stolen + stolen_now - stolen_before,
            )
            self._name = ""

    def shares(self) -> dict[str, float]:
        """Return, by measurement, percent of the time in which something here could have run."""
        return {
            name: 100 * stolen / max(ran + stolen, 1) for name, (ran, stolen) in self._ticks.items()
        }


def _ran_and_stolen() -> tuple[int, int]:
    """Return clock ticks since the machine started, of all processors: see proc_stat(5)."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return user + nice + system + irq + softirq, steal


# --- one request ---------------------------------------------------------------------------------


def latency(
    engines: Sequence[EngineAlone],
    services: Sequence[Service],
    multipliers: Sequence[EngineAlone],
    rounds: int,
    picture: Path,
) -> dict[str, Any]:
    """Return milliseconds of one request: of engines their parts, of services the whole.

    Beside them, how fast torch multiplies matrices, in GFLOP/s.
    """
    parts: dict[str, Samples] = {engine.name: defaultdict(list) for engine in engines}
    wholes: Samples = defaultdict(list)
    speeds: Samples = defaultdict(list)

    def multiply(multiplier: EngineAlone) -> None:
        speeds[multiplier.name].extend(multiplier.ask(TURN, picture)[1:])

    def compute(engine: EngineAlone) -> None:
        for measured in engine.ask(TURN, picture)[1:]:
            for part, ms in measured.items():
                parts[engine.name][part].append(ms)

    def serve(service: Service) -> None:
        wholes[service.name].extend(service.ask(TURN, picture)[1:])

    turns = [
        *(partial(multiply, multiplier) for multiplier in multipliers),
        *(partial(compute, engine) for engine in engines),
        *(partial(serve, service) for service in services if service.address is not None),
    ]
    take_turns(turns, rounds)
    return {"engines": parts, "services": wholes, "matmul": speeds}


def client_latency(services: Sequence[Service], rounds: int, picture: Path) -> Samples:
    """Return milliseconds of one request with a client process of its own."""
    taken: Samples = defaultdict(list)

    def call(service: Service) -> None:
        taken[service.name].extend([service.run_client(picture) for _ in range(TURN)][1:])

    callers = [service for service in services if service.client is not None]
    take_turns((partial(call, service) for service in callers), rounds)
    return taken


def growth(
    engines: Sequence[EngineAlone],
    services: Sequence[Service],
    pictures: Mapping[float, Path],
) -> dict[str, dict[float, list[float]]]:
    """Return the milliseconds of one request by megapixels: of services with a client process."""
    found: dict[str, dict[float, list[float]]] = defaultdict(dict)
    for megapixels, picture in pictures.items():
        for engine in engines:
            asked = engine.ask(TURN, picture)
            found[f"{engine.name}, alone"][megapixels] = [parts["whole"] for parts in asked[1:]]
        for service in services:
            taken = [service.run_client(picture) for _ in range(TURN)]
            found[service.name][megapixels] = taken[1:]
    return found


# --- many requests -------------------------------------------------------------------------------


def throughput(
    services: Iterable[Service],
    counts: Sequence[int],
    seconds: float,
    picture: Path,
    *,
    by: Callable[[Service, int, float, Path], load.Loaded],
) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Return answers a second, and all waits, by clients at the same time."""
    found: dict[str, dict[int, dict[str, list[float]]]] = defaultdict(dict)
    for service in services:
        for count in counts:
            say(f"{service.name}, {count} at a time")
            loaded = by(service, count, seconds, picture)
            found[service.name][count] = {
                "rate": [loaded.rate], "waits": loaded.waits, "before": loaded.before,
            }  # fmt: skip
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of ``values`` do not exceed, by nearest rank."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the median and the middle half, as in ``70.1 (68.0 to 72.3)``."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# --- processes -----------------------------------------------------------------------------------


def memory(process: Process) -> list[dict[str, Any]]:
    """Return what each process of a service holds, in MB: its share of all, and what is its own."""
    found = []
    for pid in process.pids():
        fields: dict[str, int] = defaultdict(int)
        try:
            with open(f"/proc/{pid}/smaps_rollup") as rollup:
                for line in rollup:
                    name, _, rest = line.partition(":")
                    if rest.endswith("kB\n"):
                        fields[name] = int(rest.split()[0])
            with open(f"/proc/{pid}/cmdline") as cmdline:
                words = cmdline.read().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        found.append(
            {
                "process": _role(words),
                "rss": fields["Rss"] / 1000,
                "pss": fields["Pss"] / 1000,
                "private": (fields["Private_Clean"] + fields["Private_Dirty"]) / 1000,
            }
        )
    return found


STARTS: Final = {
    "python3 -c 'import socket, json'": [PYTHON, "-c", "import socket, json"],
    "swiprctl ping": [SWIPRCTL, "ping"],
    "python3 -c 'import zmq'": [PYTHON, "-c", "import zmq"],
}


def _role(words: list[str]) -> str:
    if "swiprd.worker" in words:
        return "worker"
    names = " ".join(words)
    if SWIPRD in names:
        return "front"
    return "its own" if "multiprocessing" in names else "server"


def starts(daemon: Service, rounds: int) -> Samples:
    """Return the milliseconds of whole processes: of our client, and of what others begin with."""
    taken: Samples = defaultdict(list)

    def start(name: str) -> None:
        began = time.perf_counter()
        subprocess.run(
            STARTS[name], check=True, stdout=subprocess.DEVNULL, env=daemon.environment()
        )
        taken[name].append(1000 * (time.perf_counter() - began))

    take_turns((partial(start, name) for name in STARTS), rounds)
    return taken
