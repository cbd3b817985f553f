"""swiprctl status: what people, programs and Prometheus get."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swiprctl.commands.status import as_json, as_metrics, as_table
from tests.daemon import CHELSEA, SWIPRCTL, Daemon, code_of, wait_until
from tests.peer import Peer, Talk, line
from tests.tasks import interruptible


def run(daemon: Daemon | Peer, *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``swiprctl status`` to its end."""
    command = [*SWIPRCTL, "--socket", daemon.path, "status", *args]
    return subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)


@pytest.fixture
def used(daemon: Daemon) -> Daemon:
    """A daemon that has scored something, and refused something."""
    with daemon.client() as client:
        client.compute(CHELSEA)
        assert code_of(lambda: client.compute(__file__)) == "not_an_image"
    return daemon


def test_people_get_a_table(used: Daemon) -> None:
    """Every line says what it is about; numbers have their units."""
    done = run(used)
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(re.split(r" +", row.strip(), maxsplit=1) for row in done.stdout.splitlines())
    assert re.fullmatch(rf"swiprd \d+\.\d+\.\d+, process {used.pid}", rows["daemon"])
    assert re.fullmatch(r"for +(\d+ s|\d+ min \d+ s)", rows["up"])
    assert re.fullmatch(r"ready; without work, the worker ends in 1[45] min \d+ s", rows["state"])
    assert rows["labels"] == "other, animal"
    assert rows["engine"] == "eager, fp32"
    assert re.fullmatch(r"[\d,]+ scored, 0 waiting", rows["images"])
    assert "not_an_image" in rows["replies"]
    assert rows["clients"] == "1 connected"
    (worker,) = used.worker_pids()
    assert re.fullmatch(rf"front \d\d MiB, worker {worker} \d{{3}} MiB", rows["memory"])
    for part in ("decode", "compute", "whole"):
        assert re.fullmatch(r"[\d.]+ +[\d.]+ +[\d.]+", rows[part])
    shown = [row for row in done.stdout.splitlines() if not row.startswith("replies")]
    assert max(map(len, shown)) <= 100


def test_programs_get_what_the_daemon_said(used: Daemon) -> None:
    """On one line, with every field."""
    done = run(used, "--json")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout).keys() == used.status().keys()


def test_prometheus_gets_metrics_that_its_own_parser_takes(used: Daemon) -> None:
    """Each with a help text and a type; times in seconds, sizes in bytes."""
    status = used.status()
    families = {
        family.name: family
        for family in text_string_to_metric_families(run(used, "--prometheus").stdout)
    }
    assert all(family.documentation and family.type != "unknown" for family in families.values())
    assert all(name.startswith("swipr_") for name in families)

    def value(name: str, **labels: str) -> float:
        samples = [s for family in families.values() for s in family.samples if s.name == name]
        (found,) = [sample.value for sample in samples if sample.labels.items() >= labels.items()]
        return found

    assert value("swipr_info", model=str(status["model"]), engine="eager", precision="fp32") == 1
    assert (value("swipr_state", state="ready"), value("swipr_state", state="idle")) == (1, 0)
    assert value("swipr_replies_total", code="ok") >= 1
    assert 1e7 < value("swipr_memory_bytes", process="front") < 1e8
    assert 1e8 < value("swipr_memory_bytes", process="worker0") < 1e10
    assert 0 < value("swipr_worker_ends_in_seconds") <= 900
    count = value("swipr_image_whole_seconds_count")
    assert count == status["images"]
    for part in ("decode", "compute", "whole"):
        name = f"swipr_image_{part}_seconds"
        low, high = (value(name, quantile=share) for share in ("0.5", "0.99"))
        assert 0 < low <= high < 60
        assert value(f"{name}_sum") > 0


def test_texts_of_a_metric_are_escaped() -> None:
    """A code that somebody invents cannot become a metric of its own."""
    code = 'a"} 1\nswipr_fake 2\\'
    text = as_metrics({"replies": {code: 7}})
    (sample,) = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "swipr_replies_total"
    ]
    assert (sample.labels, sample.value) == ({"code": code}, 7)


ODD: list[dict[str, Any]] = [
    {},
    {"latency": None, "workers": None, "replies": None, "labels": None},
    {"latency": [], "workers": {}, "replies": [], "labels": "x", "uptime": "1"},
    {"latency": {"decode": 1}, "workers": [1, {}], "replies": {"ok": "1"}, "images": 1},
    {"latency": {"decode": {"sum": None}}, "labels": [1], "state": 7, "memory": True},
]


@pytest.mark.parametrize("status", ODD, ids=str)
def test_what_a_daemon_leaves_out_is_no_disaster(status: dict[str, Any]) -> None:
    """One of another version may say less, or otherwise: a dash, or no metric."""
    table = as_table(status)
    assert "-" in table
    assert "None" not in table
    list(text_string_to_metric_families(as_metrics(status)))
    assert json.loads(as_json(status)) == status


def test_a_hostile_word_cannot_steer_the_terminal() -> None:
    """A reason may hold a file's name."""
    table = as_table({"state": "failed", "reason": "bad\x1b[31m\nstate ready", "labels": ["\r"]})
    assert "\x1b" not in table
    assert r"failed: bad\x1b[31m\nstate ready" in table


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (61.2, "1 min 1 s"),
        (3599.7, "1 h 0 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_time_has_two_units_at_most(seconds: float, words: str) -> None:
    """As people say it."""
    assert f"up for   {words}\n" in as_table({"uptime": seconds})


# --- again and again -----------------------------------------------------------------------------


def counts(talk: Talk) -> None:
    """Tell a new status each time."""
    for number, request in enumerate(talk.requests(), 1):
        talk.sock.sendall(line(id=request["id"], status={"images": number}))


def test_watching_prints_a_line_of_json_each_time(folder: Path) -> None:
    """Until it is interrupted."""
    with Peer(folder, counts) as peer, interruptible():
        command = [*SWIPRCTL, "--socket", peer.path, "status", "--json", "--watch", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            lines = [json.loads(process.stdout.readline()) for _ in range(3)]
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
    assert lines == [{"images": 1}, {"images": 2}, {"images": 3}]
    assert (process.returncode, said) == (130, b"")


def test_watching_waits_for_a_daemon_to_come_back(folder: Path) -> None:
    """What is amiss is told, and it is asked again."""
    command = [*SWIPRCTL, "--socket", str(folder / "peer"), "status", "--json", "--watch", "0.1"]
    with (
        interruptible(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert b"(cannot_connect)" in process.stderr.readline()
            with Peer(folder, counts):
                assert json.loads(process.stdout.readline()) == {"images": 1}
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=30)
        finally:
            process.kill()


def test_on_a_terminal_the_table_stays_in_its_place(folder: Path) -> None:
    """Each goes over the one before."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    shown = b""

    def has_two() -> bool:
        nonlocal shown
        if select.select([ours], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):
                shown += os.read(ours, 65536)
        return b"2 scored" in shown

    with Peer(folder, counts) as peer:
        process = subprocess.Popen(
            [*SWIPRCTL, "--socket", peer.path, "status", "--watch=0.1"],
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            wait_until(has_two, "the second")
        finally:
            process.kill()
            process.wait()
            os.close(ours)
    first, second = shown.split(b"\x1b[H\x1b[J")[1:3]
    assert (b"1 scored" in first, b"2 scored" in second) == (True, True)
