"""Cold starts: from the first connect, with nothing running, to the first tuple."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import IO, Final

from bench.material import Material
from bench.measures import Samples
from bench.subjects import PYTHON, SWIPRD, start_script
from swiprctl import Client

FIRST_ANSWER_SECONDS: Final = 120.0
IMPORT_TORCH: Final = "python3 -c 'import torch'"
SCRIPT: Final = "script service, process to first tuple"
STAGES: Final = {
    "listening at": "front",
    "the bundle is read": "worker's process, and reading the bundle",
    "torch is imported": "import torch",
    "the engine is loaded": "load the engine",
    "is ready after": "golden answers",
}
"""What the daemon's log says, and which part of the start has come to its end then."""


def cold_starts(
    daemons: dict[str, list[str]], material: Material, folder: Path, rounds: int, picture: Path
) -> tuple[Samples, dict[str, Samples]]:
    """Return milliseconds of whole starts, and of the daemons' parts.

    Args:
        daemons: names, and settings as flags.
        material: what the script service serves.
        folder: for sockets and logs.
        rounds: how often.
        picture: what is asked first.
    """
    wholes: Samples = defaultdict(list)
    parts: dict[str, Samples] = {name: defaultdict(list) for name in daemons}
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([PYTHON, "-c", "import torch"], check=True)
        wholes[IMPORT_TORCH].append(1000 * (time.perf_counter() - began))
        for name, settings in daemons.items():
            found = _cold_start(settings, folder, picture)
            wholes[name].append(sum(found.values()))
            for part, ms in found.items():
                parts[name][part].append(ms)
        began = time.perf_counter()
        start_script("cold-script", material, folder).process.end()
        wholes[SCRIPT].append(1000 * (time.perf_counter() - began))
    return wholes, parts


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
