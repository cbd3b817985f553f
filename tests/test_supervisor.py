"""The front's hold on its workers, with workers that die, hang, lie and refuse: swiprd.supervisor.

The worker here is a small program without a model. A picture's own text says what it does to the
worker, and the file in the model's place says, a word for each start, how the worker begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swiprctl.protocol import Result, SwiprError
from swiprd.config import load_config
from swiprd.supervisor import ATTEMPTS, PATIENCE, Supervisor
from tests.tasks import run, until

WORKER = """
import json, os, signal, socket, sys
from swiprctl.protocol import LineReader, encode
from swiprd.channel import receive

link = socket.socket(fileno=int(sys.argv[1]))
reader = LineReader(max_line=65536)

def lines():
    while True:
        while (line := reader.next_line()) is None:
            if not receive(link, reader, []):
                sys.exit()
        yield line

def note(name, word):
    with open(os.path.join(folder, name), "a") as file:
        file.write(word + "\\n")
    with open(os.path.join(folder, name)) as file:
        return len(file.readlines())

incoming = lines()
settings = json.loads(next(incoming).data)
folder = os.path.dirname(settings["model"])
start = note("starts", str(os.getpid()))
words = open(settings["model"]).read().split()
match words[min(start, len(words)) - 1]:
    case "ready":
        described = {"model": "sha256:0", "labels": ["no", "yes"], "engine": "e", "precision": "p"}
        link.sendall(encode({"ready": described}))
    case "plain" if settings["cache_dir"] is not None:
        sys.exit(1)
    case "plain":
        described = {"model": "sha256:0", "labels": ["no", "yes"], "engine": "e", "precision": "p"}
        link.sendall(encode({"ready": described}))
    case "refuse":
        error = {"code": "unavailable", "number": -1, "message": "no good", "retryable": True}
        link.sendall(encode({"error": error}))
        sys.exit(1)
    case "die":
        sys.exit(1)
    case "hang":
        signal.pause()
    case "lie":
        link.sendall(b"hello\\n")
    case "boast":
        link.sendall(encode({"ready": {}}))
for line in incoming:
    id = json.loads(line.data)["id"]
    text = os.pread(line.fd, 1000, 0).decode()
    os.close(line.fd)
    seen = note("seen", text)
    word, _, value = text.partition(" ")
    reply = {"id": id, "labels": ["no", "yes"], "model": "sha256:0", "ms": 2, "decode_ms": 1}
    reply |= {"engine": "eager", "precision": "fp32"}
    match word:
        case "die":
            os._exit(1)
        case "die-once" if seen == 1:
            os._exit(1)
        case "hang":
            signal.pause()
        case "hang-first" if not os.path.basename(folder).startswith("reload"):
            signal.pause()
        case "wait":
            with open(os.path.join(folder, "gate")) as gate:
                gate.read()
        case "refuse":
            error = {"code": "not_an_image", "number": -3, "message": "odd", "retryable": False}
            link.sendall(encode({"id": id, "error": error}))
            continue
        case "raw":
            link.sendall(value.encode().decode("unicode_escape").encode())
            continue
        case "id":
            reply["id"] = id + int(value)
        case "long":
            reply["ms"] = "x" * 70_000
        case "gift":
            socket.send_fds(link, [encode(reply | {"scores": [1, 0]})], [0])
            continue
        case "grow":
            held = [*globals().get("held", ()), b"x" * (int(value) << 20)]
            value = os.getpid()
        case "descriptors":
            value = len(os.listdir("/proc/self/fd")) - 1  # less the one that lists
    link.sendall(encode(reply | {"scores": [1, float(value or 0)]}))
"""
COMMAND = (sys.executable, "-P", "-c", WORKER)
REST = '"model":"m","engine":"e","precision":"p","ms":1,"decode_ms":1}\\n'
"""What a whole reply ends with."""


class Bench:
    """A supervisor over such workers, and pictures for them."""

    def __init__(self, folder: Path, supervisor: Supervisor) -> None:
        self._folder = folder
        self._reloads = 0
        self.supervisor = supervisor

    async def compute(self, text: str) -> Result:
        """Have a picture computed that holds ``text``."""
        with (self._folder / "picture").open("w+") as picture:
            os.unlink(picture.name)
            picture.write(text)
            picture.flush()
            return await self.supervisor.compute(picture.fileno())

    async def outcome(self, text: str) -> float | str:
        """Return the second score, or the code of the error."""
        try:
            result = await self.compute(text)
        except SwiprError as error:
            return error.code
        assert result.labels == ("no", "yes")
        return float(result.scores[1])

    def outcomes(self, *texts: str) -> asyncio.Future[list[float | str]]:
        """Have them computed side by side."""
        return asyncio.gather(*map(self.outcome, texts))

    def noted(self, name: str) -> list[str]:
        """Return what the workers have noted: their ``starts``, or the pictures ``seen``."""
        file = self._folder / name
        return file.read_text().splitlines() if file.exists() else []

    async def seen(self, count: int) -> None:
        """Return once the workers have seen that many pictures."""
        await until(lambda: len(self.noted("seen")) >= count, f"{count} pictures")

    async def reload(self, starts: str = "ready", **settings: Any) -> str:
        """Reload with a model of that kind; return "done", or why not."""
        self._reloads += 1
        folder = self._folder / f"reload-{self._reloads}"
        folder.mkdir()
        (folder / "model").write_text(starts)
        flags = {"model": str(folder / "model")}
        flags |= {key: str(value) for key, value in settings.items()}
        config = load_config(file=None, environment={}, flags=flags)
        try:
            await self.supervisor.reload(config)
        except SwiprError as error:
            return f"{error.code}: {error}"
        return "done"

    async def open_gate(self) -> None:
        """Let one worker go on that waits."""
        await asyncio.to_thread((self._folder / "gate").write_bytes, b"")

    def state(self) -> str:
        """Return the supervisor's state in a word."""
        return str(self.supervisor.status()["state"])


@contextlib.asynccontextmanager
async def bench(
    folder: Path, starts: str = "ready", command: tuple[str, ...] = COMMAND, **settings: Any
) -> AsyncIterator[Bench]:
    (folder / "model").write_text(starts)
    os.mkfifo(folder / "gate")
    flags = {"model": str(folder / "model")} | {key: str(value) for key, value in settings.items()}
    config = load_config(file=None, environment={}, flags=flags)
    supervisor = Supervisor(config, command=command)
    assert not supervisor.overdue()
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0)  # it has begun
    try:
        yield Bench(folder, supervisor)
    finally:
        supervisor.stop()
        await running


def within(folder: Path, test: Callable[[Bench], Any], *args: Any, **settings: Any) -> None:
    """Run ``test`` on a bench; nothing of it is left afterwards."""

    async def main() -> None:
        async with bench(folder, *args, **settings) as ready:
            await test(ready)

    run(main())


# --- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_each_request_gets_its_own_scores(folder: Path, workers: int) -> None:
    """However many are asked for at once, and while the workers still start."""

    async def test(bench: Bench) -> None:
        values = [float(number) for number in range(100)]
        assert await bench.outcomes(*(f"score {value}" for value in values)) == values
        assert len(bench.noted("seen")) == 100
        assert len(bench.noted("starts")) <= workers

    within(folder, test, workers=workers)


def test_what_the_worker_says_of_a_picture_is_passed_on(folder: Path) -> None:
    """It costs the worker nothing, and is not tried again."""

    async def test(bench: Bench) -> None:
        assert await bench.outcomes("refuse", "score 1", "refuse") == [
            "not_an_image",
            1,
            "not_an_image",
        ]
        assert len(bench.noted("seen")) == 3
        assert len(bench.noted("starts")) == 1

    within(folder, test)


def test_workers_work_side_by_side(folder: Path) -> None:
    """A picture that takes long keeps one worker busy, not the other."""

    async def test(bench: Bench) -> None:
        long = asyncio.ensure_future(bench.outcome("wait 1"))
        await bench.seen(1)
        assert await bench.outcomes("score 2", "score 3") == [2, 3]
        assert not long.done()
        await bench.open_gate()
        assert await long == 1

    within(folder, test, workers=2)


def test_one_more_than_the_queue_holds_is_busy(folder: Path) -> None:
    """The limit counts those that wait; what is in work is not among them."""

    async def test(bench: Bench) -> None:
        first = asyncio.ensure_future(bench.outcome("wait 0"))
        await bench.seen(1)
        waiting = asyncio.ensure_future(bench.outcomes("score 1", "score 2", "score 3"))
        await until(lambda: bench.supervisor.status()["queued"] == 3, "the queue to be full")
        with pytest.raises(SwiprError) as busy:
            await bench.compute("score 4")
        assert busy.value.code == "busy"
        assert busy.value.retry_after_ms is not None
        assert 0 < busy.value.retry_after_ms < 10_000
        await bench.open_gate()
        assert await first == 0
        assert await waiting == [1, 2, 3]

    within(folder, test, max_queue=3)


def test_what_nobody_waits_for_any_more_is_not_computed(folder: Path) -> None:
    """A client that leaves takes its request out of the queue."""

    async def test(bench: Bench) -> None:
        first = asyncio.ensure_future(bench.outcome("wait 0"))
        await bench.seen(1)
        leaver = asyncio.ensure_future(bench.outcome("score 1"))
        stayer = asyncio.ensure_future(bench.outcome("score 2"))
        await until(lambda: bench.supervisor.status()["queued"] == 2, "both to wait")
        leaver.cancel()
        await bench.open_gate()
        assert (await first, await stayer) == (0, 2)
        assert bench.noted("seen") == ["wait 0", "score 2"]

    within(folder, test)


def test_a_worker_has_no_descriptors_but_its_own(folder: Path) -> None:
    """Standard input, output and error, the socket, and nothing of the front or of clients."""

    async def test(bench: Bench) -> None:
        with open(os.devnull) as a, open(os.devnull) as b:
            os.set_inheritable(a.fileno(), True)
            os.set_inheritable(b.fileno(), True)
            assert await bench.outcome("descriptors") == 4

    within(folder, test)


# --- workers that die, hang and lie --------------------------------------------------------------


def test_a_death_costs_nobody_an_answer(folder: Path) -> None:
    """The picture that it was about is tried once more, and the others are not touched."""

    async def test(bench: Bench) -> None:
        assert await bench.outcomes("die-once 1", "score 2", "score 3") == [1, 2, 3]
        assert len(bench.noted("starts")) == 2

    within(folder, test)


def test_a_picture_that_kills_is_given_up_alone(folder: Path) -> None:
    """It is tried as often as is promised, and costs only its own request."""

    async def test(bench: Bench) -> None:
        texts = ["score 1", "die", "score 2", "die", "score 3"]
        expected = [1, "worker_died", 2, "worker_died", 3]
        assert await bench.outcomes(*texts) == expected
        assert bench.noted("seen").count("die") == 2 * ATTEMPTS

    within(folder, test)


def test_a_picture_that_hangs_gets_timeout_alone(folder: Path) -> None:
    """Its worker is killed at the deadline, and it is not tried again."""

    async def test(bench: Bench) -> None:
        await bench.outcome("score 0")
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await bench.outcomes("hang", "score 1") == ["timeout", 1]
        assert loop.time() - began >= 0.3
        assert bench.noted("seen").count("hang") == 1
        dead, alive = bench.noted("starts")
        assert not Path("/proc", dead).exists()
        assert Path("/proc", alive).exists()

    within(folder, test, compute_timeout=0.3)


@pytest.mark.parametrize(
    "text",
    [
        "raw hello\\n",
        "raw {}\\n",
        'raw {"id":1}\\n',
        'raw {"id":1,"scores":[0.5]}\\n',
        'raw {"id":1,"scores":[0.5],"labels":["a","b"],' + REST,
        'raw {"id":1,"scores":[NaN],"labels":["a"],' + REST,
        'raw {"id":1,"error":{}}\\n',
        *(
            f'raw {{"id":1,"error":{{"code":"{code}",'
            + '"number":-1,"message":"m","retryable":false}}\\n'
            for code in ("ok", "busy", "timeout", "reload_failed", "not_found")
        ),
        'raw {"id":1,"error":{"code":"busy"},"scores":[1],"labels":["a"],' + REST,
        "id 1",
        "id -1",
        "long",
        "gift",
    ],
)
def test_a_reply_that_is_none_is_never_an_answer(folder: Path, text: str) -> None:
    """A worker that breaks the protocol is replaced as if it had died."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome(text) == "worker_died"
        assert len(bench.noted("seen")) == ATTEMPTS
        assert await bench.outcome("score 1") == 1

    within(folder, test)


def test_a_worker_that_dies_between_two_requests_is_replaced(folder: Path) -> None:
    """Nothing is lost, and the next does not wait for a worker that is gone."""

    async def test(bench: Bench) -> None:
        for number in range(3):
            assert await bench.outcome(f"score {number}") == number
            os.kill(int(bench.noted("starts")[-1]), signal.SIGKILL)
        assert await bench.outcome("score 3") == 3

    within(folder, test)


# --- workers that do not start -------------------------------------------------------------------


def test_a_refusal_is_told_to_everyone_at_once(folder: Path) -> None:
    """What a worker says against the model needs no second start to be believed."""

    async def test(bench: Bench) -> None:
        assert await bench.outcomes("score 1", "score 2") == ["unavailable"] * 2
        with pytest.raises(SwiprError, match="no good"):
            await bench.compute("score 3")
        status = bench.supervisor.status()
        assert (status["state"], status["reason"]) == ("failed", "no good")
        assert len(bench.noted("starts")) == 1

    within(folder, test, "refuse ready")


@pytest.mark.parametrize("fault", ["die", "lie", "boast", "hang"])
def test_starts_that_fail_without_a_word_are_tried_again(folder: Path, fault: str) -> None:
    """Requests wait for the start that succeeds."""

    async def test(bench: Bench) -> None:
        assert await bench.outcomes("score 1", "score 2") == [1, 2]
        assert len(bench.noted("starts")) == PATIENCE
        assert bench.supervisor.status()["reason"] is None

    within(folder, test, f"{fault} " * (PATIENCE - 1) + "ready", load_timeout=1)


def test_starts_that_keep_failing_are_given_up(folder: Path) -> None:
    """Then requests are refused with the reason, until one start succeeds after a while."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("score 1") == "unavailable"
        assert len(bench.noted("starts")) == PATIENCE
        assert bench.state() == "failed"
        while (outcome := await bench.outcome("score 2")) == "unavailable":
            await asyncio.sleep(0.01)
        assert outcome == 2
        assert len(bench.noted("starts")) == PATIENCE + 1

    within(folder, test, "die " * PATIENCE + "ready")


def test_a_model_that_stays_bad_is_tried_less_and_less_often(folder: Path) -> None:
    """However many ask, there is a second before the next start, and then two."""

    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        times: list[float] = []
        while len(times) < 3:
            assert await bench.outcome("score 1") == "unavailable"
            if len(bench.noted("starts")) > len(times):
                times.append(loop.time())
            await asyncio.sleep(0.01)
        assert times[1] - times[0] >= 0.9
        assert times[2] - times[1] >= 1.9

    within(folder, test, "refuse")


def test_a_worker_that_cannot_be_run_is_told(folder: Path) -> None:
    """The front goes on and says what is missing."""

    async def test(bench: Bench) -> None:
        with pytest.raises(SwiprError, match="no worker can be started: No such file") as refused:
            await bench.compute("score 1")
        assert refused.value.code == "unavailable"
        assert refused.value.retryable

    within(folder, test, command=("/nowhere/python",))


def test_without_descriptors_left_nothing_is_lost_or_left_behind(folder: Path) -> None:
    """A worker that cannot be started for want of descriptors is started when there are some."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("score 1") == 1
        with no_free_descriptors(spare=2):
            os.kill(int(bench.noted("starts")[0]), signal.SIGKILL)
            await until(lambda: bench.state() == "failed", "the starts to fail")
        while (outcome := await bench.outcome("score 2")) == "unavailable":
            await asyncio.sleep(0.01)
        assert outcome == 2
        assert len(bench.noted("starts")) == 2

    within(folder, test)


@contextlib.contextmanager
def no_free_descriptors(*, spare: int) -> Iterator[None]:
    """Leave this process but a few descriptors that it can still open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- reload --------------------------------------------------------------------------------------


def test_a_reload_puts_a_new_worker_in_the_place_of_the_old(folder: Path) -> None:
    """The old one's process is gone, what is asked next is answered by the new one."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("score 1") == 1
        (old,) = bench.supervisor.status()["workers"]
        assert await bench.reload() == "done"
        (new,) = bench.supervisor.status()["workers"]
        assert new["state"] == "ready"
        assert new["pid"] != old["pid"]
        await until(lambda: not Path(f"/proc/{old['pid']}").exists(), "the old worker to go")
        assert await bench.outcome("score 2") == 2
        assert bench.noted("seen") == ["score 1"]  # the second was the new worker's, elsewhere

    within(folder, test)


def test_an_old_worker_finishes_what_it_is_at(folder: Path) -> None:
    """And what waits behind it is done by the new one, without waiting any longer."""

    async def test(bench: Bench) -> None:
        long = asyncio.ensure_future(bench.outcome("wait 1"))
        await bench.seen(1)
        waiting = asyncio.ensure_future(bench.outcomes("score 2", "score 3"))
        assert await bench.reload() == "done"
        assert await waiting == [2, 3]
        assert not long.done()
        await bench.open_gate()
        assert await long == 1
        await until(lambda: not Path("/proc", bench.noted("starts")[0]).exists(), "it to go")
        await until(lambda: len(bench.supervisor._tasks) == 1, "its task to end")

    within(folder, test)


def test_what_an_old_worker_dies_of_is_tried_by_a_new_one(folder: Path) -> None:
    """A request is not lost because its worker has a successor already."""

    async def test(bench: Bench) -> None:
        long = asyncio.ensure_future(bench.outcome("hang-first 5"))
        await bench.seen(1)
        assert await bench.reload() == "done"
        os.kill(int(bench.noted("starts")[0]), signal.SIGKILL)
        assert await long == 5

    within(folder, test)


@pytest.mark.parametrize("starts", ["refuse", "die", "lie", "boast"])
def test_a_bad_model_changes_nothing(folder: Path, starts: str) -> None:
    """The old worker goes on, under load, and the reason is told; nothing of the try is left."""

    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.outcomes(*(f"score {n}" for n in range(20))))
        said = await bench.reload(starts)
        assert said.startswith("reload_failed: everything stays as it was: ")
        assert ("no good" in said) == (starts == "refuse")
        assert await asked == [float(n) for n in range(20)]
        assert await bench.outcome("score 7") == 7
        assert len(bench.noted("starts")) == 1
        tried = (folder / "reload-1" / "starts").read_text().split()
        assert len(tried) == (1 if starts == "refuse" else PATIENCE)
        assert not any(Path(f"/proc/{pid}").exists() for pid in tried)
        assert bench.state() == "ready"

    within(folder, test)


def test_a_model_that_loads_too_long_is_no_model(folder: Path) -> None:
    """The new load_timeout counts."""

    async def test(bench: Bench) -> None:
        assert "load_timeout, 1 s" in await bench.reload("hang", load_timeout=1)
        assert await bench.outcome("score 7") == 7

    within(folder, test)


def test_a_reload_mends_a_daemon_without_a_model(folder: Path) -> None:
    """Nothing was served before; afterwards there are answers at once."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("score 1") == "unavailable"
        assert await bench.reload() == "done"
        assert bench.state() == "ready"
        assert await bench.outcome("score 1") == 1

    within(folder, test, "refuse")


def test_a_reload_changes_the_number_of_workers(folder: Path) -> None:
    """Settings are the new ones, also those of the queue."""

    async def test(bench: Bench) -> None:
        assert await bench.reload(workers=3, max_queue=1) == "done"
        assert len(bench.supervisor.status()["workers"]) == 3
        hanging = []
        for _ in range(3):
            hanging.append(asyncio.ensure_future(bench.outcome("hang")))
            await asyncio.sleep(0.05)
            await until(lambda: bench.supervisor.status()["queued"] == 0, "it to be in work")
        waiting = asyncio.ensure_future(bench.outcome("score 1"))
        await until(lambda: bench.supervisor.status()["queued"] == 1, "one to wait")
        assert await bench.outcome("score 2") == "busy"
        bench.supervisor.stop()
        await asyncio.gather(waiting, *hanging)

    within(folder, test)


def test_the_end_does_not_wait_for_a_reload(folder: Path) -> None:
    """What is still loading is given up, and says so."""

    async def test(bench: Bench) -> None:
        reload = asyncio.ensure_future(bench.reload("hang"))
        await until((folder / "reload-1" / "starts").exists, "the start")
        bench.supervisor.give_up_reload()
        assert await reload == "shutting_down: the daemon is stopping; try again"
        assert (await bench.reload()).startswith("shutting_down")
        assert await bench.outcome("score 7") == 7

    within(folder, test)


def test_a_worker_that_has_grown_is_replaced(folder: Path) -> None:
    """At the bound it stays, past it another one loads beside it; nobody waits meanwhile."""

    async def test(bench: Bench) -> None:
        old = await bench.outcome("grow 40")
        assert await bench.outcome("grow 1") == old
        assert len(bench.noted("starts")) == 1
        assert await bench.outcome("grow 20") == old
        while (new := await bench.outcome("grow 0")) == old:
            await asyncio.sleep(0.005)
        assert bench.noted("starts") == [str(int(float(pid))) for pid in (old, new)]

    within(folder, test, recycle_mib=48)


def test_the_end_does_not_wait_for_the_successor_of_a_worker_that_has_grown(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes before the successor is started, or while it loads; nothing is logged."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("grow 40")
        await until(lambda: len(bench.noted("starts")) == 2, "a successor that hangs")

    within(folder, test, "ready hang", recycle_mib=16)

    async def main() -> None:
        async with bench(folder / "again", recycle_mib=16) as second:
            supervisor, recycle = second.supervisor, second.supervisor.recycle

            def stop_and_recycle(slot: Any) -> None:
                supervisor.stop()
                recycle(slot)

            supervisor.recycle = stop_and_recycle  # type: ignore[method-assign]
            assert await second.outcome("grow 40")

    (folder / "again").mkdir()
    run(main())
    assert "goes on" not in caplog.text


def test_a_worker_that_has_grown_goes_on_when_no_other_can_start(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again when it has grown as much again."""

    async def test(bench: Bench) -> None:
        old = await bench.outcome("grow 20")
        await until(lambda: "goes on: no other can start: no good" in caplog.text, "an attempt")
        for mib in (0, 10, 10):
            assert len(bench.noted("starts")) == 2
            assert await bench.outcome(f"grow {mib}") == old
        while await bench.outcome("grow 0") == old:
            await asyncio.sleep(0.005)
        assert len(bench.noted("starts")) == 3

    within(folder, test, "ready refuse ready", recycle_mib=16)


def test_a_worker_past_its_deadline_is_overdue_until_it_is_killed(folder: Path) -> None:
    """What hangs is killed in time, and so nothing is ever overdue."""

    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.outcome("hang"))
        await bench.seen(1)
        (slot,) = bench.supervisor._slots
        assert slot.deadline is not None
        assert not bench.supervisor.overdue()
        slot.deadline -= 1000  # as if nobody had looked at the clock
        assert bench.supervisor.overdue()
        assert await asked == "timeout"
        assert bench.supervisor.overdue()  # it is killed, but not gone
        await until(lambda: not bench.supervisor.overdue(), "it to be gone")
        assert not Path("/proc", bench.noted("starts")[0]).exists()

    within(folder, test, compute_timeout=0.5)


# --- the end -------------------------------------------------------------------------------------


def test_an_idle_worker_goes_and_the_next_request_brings_another(folder: Path) -> None:
    """Its process is gone, and with it its memory; nobody notices but by the wait."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("score 1") == 1
        await until(lambda: bench.state() == "idle", "the worker to go")
        (first,) = bench.noted("starts")
        await until(lambda: not Path("/proc", first).exists(), "its process to go")
        assert await bench.outcome("score 2") == 2
        assert len(bench.noted("starts")) == 2

    within(folder, test, idle_timeout=0.2)


def test_work_that_comes_as_an_idle_worker_goes_is_done(folder: Path) -> None:
    """Whether it comes just before, in that moment or just after."""

    async def test(bench: Bench) -> None:
        for number in range(30):
            assert await bench.outcome(f"score {number}") == number
            await asyncio.sleep(0.09 + number * 0.0008)
        assert len(bench.noted("starts")) > 1

    within(folder, test, idle_timeout=0.1)


def test_at_the_end_everything_unanswered_is_answered(folder: Path) -> None:
    """What is in work, what waits and what comes later: all are told that the daemon stops."""

    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.outcomes("hang", "score 1", "score 2"))
        await bench.seen(1)
        bench.supervisor.stop()
        assert await asked == ["shutting_down"] * 3
        assert await bench.outcome("score 3") == "shutting_down"
        (worker,) = bench.noted("starts")
        await until(lambda: not Path("/proc", worker).exists(), "the worker to be gone")

    within(folder, test)


def test_the_end_does_not_wait_for_a_start(folder: Path) -> None:
    """A worker that is still loading is ended like any other."""

    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.outcome("score 1"))
        await until(lambda: len(bench.noted("starts")) == 1, "the start")
        bench.supervisor.stop()
        assert await asked == "shutting_down"

    within(folder, test, "hang")


def test_a_worker_that_died_of_a_compiled_form_is_followed_by_one_without(folder: Path) -> None:
    """The form may be for another processor: what computes must never keep the service down."""

    async def test(bench: Bench) -> None:
        assert await bench.outcome("x 5") == 5
        assert len(bench.noted("starts")) == 2

    within(folder, test, "plain", cache_dir="/nonexistent")


def test_a_worker_that_said_why_it_cannot_start_keeps_its_compiled_forms(folder: Path) -> None:
    """Once the bundle is mended, the next worker takes the best engine again."""

    async def test(bench: Bench) -> None:
        await until(lambda: bench.state() == "failed", "a refusal")
        await until(lambda: not bench.supervisor._is_hopeless(), "another try")
        assert await bench.outcome("5") == "unavailable"
        assert len(bench.noted("starts")) == 2

    within(folder, test, "refuse plain plain", cache_dir="/nonexistent", load_timeout=5)
