"""What the daemon measures of itself."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from swiprctl import protocol
from swiprctl.protocol import Result
from swiprd.metrics import WINDOW, Latency, memory_of
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, Daemon


def result(ms: float, decode_ms: float) -> Result:
    """Return a result that took so long."""
    return Result(
        scores=(1.0,),
        labels=("a",),
        model="m",
        engine="eager",
        precision="fp32",
        ms=ms,
        decode_ms=decode_ms,
    )


def test_without_an_image_there_is_no_time() -> None:
    """Null, not zero."""
    nothing = {"p50": None, "p95": None, "p99": None, "sum": 0.0}
    assert Latency().summary() == {"decode": nothing, "compute": nothing, "whole": nothing}


def test_quantiles_are_times_that_images_took() -> None:
    """By nearest rank, of each part on its own; sums are of all."""
    latency = Latency()
    for number in range(100, 0, -1):
        latency.note(result(ms=3 * number, decode_ms=number), whole=10 * number)
    assert latency.images == 100
    assert latency.summary() == {
        "decode": {"p50": 50, "p95": 95, "p99": 99, "sum": 5050},
        "compute": {"p50": 100, "p95": 190, "p99": 198, "sum": 10100},
        "whole": {"p50": 500, "p95": 950, "p99": 990, "sum": 50500},
    }


def test_only_the_last_images_count_for_quantiles() -> None:
    """An hour ago is no news; sums go on, so that rates can be had of them."""
    latency = Latency()
    for ms in [1000.0] * WINDOW + [1.0] * WINDOW:
        latency.note(result(ms=ms, decode_ms=0), whole=ms)
    assert latency.summary()["whole"] == {"p50": 1, "p95": 1, "p99": 1, "sum": 1001 * WINDOW}


@pytest.mark.parametrize(
    ("ms", "decode_ms"), [(1.7e308, -1.7e308), (-1.7e308, 1.7e308), (1.7e308, 1.7e308), (-1, -1)]
)
def test_a_worker_cannot_spoil_the_sums(ms: float, decode_ms: float) -> None:
    """It may be a picture's own by now; its parts lie within what the front has measured."""
    latency = Latency()
    for _ in range(3):
        latency.note(result(ms=ms, decode_ms=decode_ms), whole=10)
    found = latency.summary()
    for part in found.values():
        assert all(value is not None and 0 <= value <= 30 for value in part.values())
    protocol.encode({"latency": found})


def test_memory_is_what_the_kernel_counts() -> None:
    """Of ourselves, of another process, and none of one that is gone."""
    with open("/proc/self/status") as file:
        (told,) = [line.split()[1] for line in file if line.startswith("VmRSS")]
    assert memory_of("self") == pytest.approx(int(told) * 1024, rel=0.1)
    assert memory_of(os.getpid()) == pytest.approx(memory_of("self"), rel=0.1)
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    assert memory_of(process.pid) == 0


def test_the_status_counts_images_and_their_time(daemon: Daemon) -> None:
    """An image that is scored counts; one that is not, does not."""
    before = daemon.status()
    with daemon.client() as client:
        began = time.monotonic()
        scored = client.compute(CHELSEA)
        took = (time.monotonic() - began) * 1000
        client.ping()
    after = daemon.status()
    assert int(str(after["images"])) - int(str(before["images"])) == 1

    def gained(part: str) -> float:
        sums = [status["latency"][part]["sum"] for status in (before, after)]  # type: ignore[index]
        return float(sums[1] - sums[0])

    assert gained("decode") == pytest.approx(scored.decode_ms, abs=0.01)
    assert gained("compute") == pytest.approx(scored.ms - scored.decode_ms, abs=0.01)
    assert scored.ms < gained("whole") <= took


def test_the_status_tells_when_the_worker_will_end(start_daemon: StartDaemon) -> None:
    """The time left runs down while nothing comes, and there is none once it has ended."""
    daemon = start_daemon("--idle-timeout", "2")
    with daemon.client() as client:
        client.compute(CHELSEA)
        first = client.status()
        assert 0 < first["idle_in"] <= 2
        time.sleep(0.05)
        assert client.status()["idle_in"] < first["idle_in"]
        while client.status()["state"] == "ready":
            time.sleep(0.1)
        idle = client.status()
    assert (idle["state"], idle["idle_in"]) == ("idle", None)
    assert idle["workers"] == [{"pid": None, "state": "idle", "memory": 0}]
