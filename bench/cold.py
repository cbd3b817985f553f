"""Cold starts: from the first connect, with nothing running, to the first tuple."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Final

from bench.material import Material
from bench.measures import IMPORT_TORCH, Samples, take_turns
from bench.script_service import ask
from bench.subjects import BENCH, PYTHON, SWIPRD, Process
from swiprctl import Client

FIRST_ANSWER_SECONDS: Final = 120.0
SCRIPT: Final = "script service, process to first tuple"
STAGES: Final = {
    "listening at": "front",
    "the manifest is read": "worker's process",
    "torch is imported": "import torch, read the bundle",
    "the engine is loaded": "load the engine",
    "is ready after": "golden answers",
}
"""What the daemon's log says, and which part of the start has come to its end then."""


def cold_starts(
    daemons: dict[str, list[str]], material: Material, folder: Path, rounds: int, picture: Path
) -> tuple[Samples, dict[str, Samples]]:
    """Return milliseconds of whole starts, by round, and of the daemons' parts.

    Args:
        daemons: names, and settings as flags. The first is started just before or after the
            import of torch.
        material: what the script service serves.
        folder: for sockets and logs.
        rounds: how often.
        picture: what is asked first.
    """
    wholes: Samples = defaultdict(list)
    parts: dict[str, Samples] = {name: defaultdict(list) for name in daemons}

    def start(name: str) -> float:
        found = _cold_start(daemons[name], folder, picture)
        for part, ms in found.items():
            parts[name][part].append(ms)
        return sum(found.values())

    def measure(name: str, take: Callable[[], float]) -> None:
        wholes[name].append(take())

    starts: dict[str, Callable[[], float]] = {
        IMPORT_TORCH: _import_torch,
        **{name: partial(start, name) for name in daemons},
        SCRIPT: partial(_start_of_script, material, folder, picture),
    }
    take_turns((partial(measure, name, take) for name, take in starts.items()), rounds)
    return wholes, parts


def _import_torch() -> float:
    began = time.perf_counter()
    words = [PYTHON, "-c", "import torch; print()"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # To take the interpreter apart takes time, too, but of that nobody waits for the end.
        return 1000 * (time.perf_counter() - began)


def _start_of_script(material: Material, folder: Path, picture: Path) -> float:
    endpoint = f"ipc://{folder / 'cold.zmq'}"
    words = [PYTHON, str(BENCH / "script_service.py"), endpoint, str(material.bundle)]
    began = time.perf_counter()
    process = Process(words, log=folder / "cold-script.log")
    try:
        answer = ask(endpoint, str(picture))
        taken = 1000 * (time.perf_counter() - began)
    finally:
        process.end()
    if not answer.startswith(("0.", "1.")):
        raise RuntimeError(f"the script service answered {answer}")
    return taken


def _cold_start(settings: list[str], folder: Path, picture: Path) -> dict[str, float]:
    """Return the milliseconds of each part, in order; the last is the first picture."""
    address = str(folder / "cold.sock")
    # Systemd's own: it listens, and becomes the daemon with the first client.
    words = ["systemd-socket-activate", f"--listen={address}", SWIPRD, "--log-level", "debug"]
    lines: list[tuple[float, str]] = []
    with subprocess.Popen([*words, *settings], stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        reader = threading.Thread(target=_read, args=(daemon.stderr, lines))
        reader.start()
        try:
            while not os.path.exists(address):
                time.sleep(0.01)
            began = time.perf_counter()
            with Client(address, timeout=FIRST_ANSWER_SECONDS) as client:
                client.compute(picture)
            ended = time.perf_counter()
        finally:
            daemon.terminate()
            daemon.wait()
            reader.join()
            Path(address).unlink(missing_ok=True)
    parts, last = {}, began
    for stamp, line in lines:
        for words_of_log, part in STAGES.items():
            if words_of_log in line:
                parts[part] = 1000 * (stamp - last)
                last = stamp
    if len(parts) != len(STAGES):
        raise RuntimeError(f"the log has not all of {list(STAGES)}: {lines}")
    return {**parts, "first picture": 1000 * (ended - last)}


def _read(log: IO[str], lines: list[tuple[float, str]]) -> None:
    lines.extend((time.perf_counter(), line) for line in log)
