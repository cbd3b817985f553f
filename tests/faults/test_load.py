"""More than the machine can serve, and as much as it can for a long time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from swiprctl import Client, SwiprError
from swiprd.userio import THREADS
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, COFFEE, Daemon
from tests.faults.conftest import Trial
from tests.tasks import run

TIMES = 10
"""How much more is asked than can be served."""
SECONDS = 60.0
WARM = 15.0
"""Seconds after which the front's memory must no longer grow."""
FLAT = 2**20
"""Bytes that memory may differ by and still be called flat: allocators take it in such steps."""
CONNECTIONS = 20
HASTE_MS = 400
"""The deadline of every other request: shorter than the queue is long."""


class Held(NamedTuple):
    """What a process holds."""

    memory: int
    descriptors: int
    threads: int


def held(pid: int) -> Held:
    """Return what ``pid`` holds; its memory is what is its own, in bytes."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    memory = int(fields["RssAnon"].split()[0]) * 1024
    return Held(memory, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]))


# --- too much ------------------------------------------------------------------------------------


def test_ten_times_more_than_can_be_served(start_daemon: StartDaemon, trial: Trial) -> None:
    """Done, busy and timed out are all that was sent; the front's memory does not grow."""
    daemon = start_daemon()
    daemon.wait_ready()
    rate = TIMES * capacity(daemon)
    with trial.attempt() as attempt:
        outcomes, memory = run(flood(daemon, rate), seconds=2 * SECONDS)
        attempt.count = outcomes.total()
    trial.notes.update(outcomes)
    trial.words.append(f"{rate:.0f} a second, front's memory {memory / 1024:+.0f} KiB")
    assert set(outcomes) == {"done", "busy", "timeout"}
    assert outcomes.total() > 0.9 * rate * SECONDS
    assert outcomes["done"] > 0.5 * SECONDS * rate / TIMES
    assert memory < FLAT
    with daemon.client() as client:
        assert client.compute(CHELSEA).scores[1] > 0.9
    assert "Traceback" not in daemon.log()


def capacity(daemon: Daemon) -> float:
    """Return how many pictures a second are computed."""
    with daemon.client() as client:
        began = time.monotonic()
        count = 0
        while time.monotonic() < began + 2:
            client.compute(CHELSEA)
            count += 1
    return count / (time.monotonic() - began)


async def flood(daemon: Daemon, rate: float) -> tuple[Counter[str], int]:
    """Ask for a picture ``rate`` times a second; return what came of it, and by how many bytes the
    front has grown once it was warm.
    """
    outcomes: Counter[str] = Counter()
    clients = [await asyncio.open_unix_connection(daemon.path) for _ in range(CONNECTIONS)]
    sent = 0

    async def ask(number: int) -> None:
        nonlocal sent
        writer = clients[number][1]
        due = time.monotonic()
        end = due + SECONDS
        while time.monotonic() < end:
            request: dict[str, object] = {"id": sent, "path": str(CHELSEA)}
            if sent % 2:
                request["timeout_ms"] = HASTE_MS
            writer.write(json.dumps(request).encode() + b"\n")
            sent += 1
            await writer.drain()
            due += CONNECTIONS / rate
            await asyncio.sleep(max(0, due - time.monotonic()))
        writer.write_eof()

    async def listen(number: int) -> None:
        reader, writer = clients[number]
        seen = set()
        while line := await reader.readline():
            reply = json.loads(line)
            assert reply["id"] not in seen
            seen.add(reply["id"])
            error = reply.get("error")
            outcomes[error["code"] if error else "done"] += 1
            assert error is None or "scores" not in reply
        writer.close()
        await writer.wait_closed()

    async def weigh() -> int:
        await asyncio.sleep(WARM)
        before = held(daemon.pid).memory
        await asyncio.sleep(SECONDS - WARM - 1)
        return held(daemon.pid).memory - before

    async with asyncio.TaskGroup() as group:
        growth = group.create_task(weigh())
        for number in range(CONNECTIONS):
            group.create_task(ask(number))
            group.create_task(listen(number))
    assert outcomes.total() == sent, f"{outcomes.total()} replies to {sent} requests"
    return outcomes, growth.result()


# --- for a long time -----------------------------------------------------------------------------


def test_mixed_requests_for_a_long_time(
    start_daemon: StartDaemon, folder: Path, trial: Trial
) -> None:
    """No process gains memory, a descriptor or a thread."""
    count = trial.count(short=500, long=100_000)
    daemon = start_daemon()
    daemon.wait_ready()
    (worker,) = daemon.worker_pids()
    pictures = assorted(folder)
    warm = Soak(daemon, pictures)
    warm.ask(count // 5)
    descriptors = daemon.descriptors_at_rest()
    began, before, worker_before = time.monotonic(), held(daemon.pid), held(worker)
    soak = Soak(daemon, pictures)
    with trial.attempt(count):
        soak.ask(count)
        assert soak.outcomes.total() == count
        assert "wrong" not in soak.outcomes
    hours = (time.monotonic() - began) / 3600
    after, worker_after = held(daemon.pid), held(worker)
    trial.notes.update(soak.outcomes)
    slope = (after.memory - before.memory) / hours / 2**20
    gained = (worker_after.memory - worker_before.memory) / 2**20
    trial.words.append(f"front {slope:+.2f} MB an hour over {hours:.2f} h, worker {gained:+.1f} MB")
    assert daemon.worker_pids() == [worker]
    assert daemon.descriptors_at_rest() == descriptors
    assert after.threads <= 1 + THREADS
    assert worker_after[1:] == worker_before[1:]
    assert gained < 50
    # In a short time one page more would be much an hour.
    assert slope < 1 or after.memory - before.memory < FLAT / 4


def assorted(folder: Path) -> list[Path]:
    """Return pictures of many kinds and sizes, and files that are none."""
    whole = Image.open(COFFEE).convert("RGB")
    paths = [CHELSEA, COFFEE, folder / "none.png", folder / "cut.jpg", folder]
    for size in ((32, 24), (640, 480), (3000, 2000)):
        for kind, mode in (("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("tif", "L")):
            path = folder / f"{size[0]}.{kind}"
            whole.resize(size).convert(mode).save(path)
            paths.append(path)
    (folder / "cut.jpg").write_bytes((folder / "640.jpg").read_bytes()[:3000])
    return paths


class Soak:
    """Clients that ask for all sorts of things, and are told the same each time."""

    CLIENTS = 4

    def __init__(self, daemon: Daemon, pictures: list[Path]) -> None:
        self._daemon = daemon
        self._pictures = pictures
        self._answers: dict[Path, object] = {}
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()

    def ask(self, count: int) -> None:
        """Make that many requests and wait for their replies; all clients are gone afterwards."""
        threads = [
            threading.Thread(target=self._ask, args=[count // self.CLIENTS, seed])
            for seed in range(self.CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(self, count: int, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - no secret
        client = Client(self._daemon.path, timeout=120)
        for _ in range(count):
            # Large pictures are rare: they would be most of the time.
            picture = chance.choice(self._pictures[: -4 if chance.random() < 0.98 else None])
            outcome = self._outcome(client, chance.random(), picture)
            with self._lock:
                self.outcomes[outcome] += 1
            if chance.random() < 0.05:
                client.close()  # and the next request opens another connection
        client.close()

    def _outcome(self, client: Client, which: float, picture: Path) -> str:
        try:
            if which < 0.1:
                client.ping()
                return "ping"
            if which < 0.15:
                client.status()
                return "status"
            if which < 0.3:
                client._call({"path": str(picture)})
                return "by path"
            scores = client.compute(picture).scores
        except SwiprError as error:
            return error.code
        with self._lock:
            return "scored" if self._answers.setdefault(picture, scores) == scores else "wrong"
