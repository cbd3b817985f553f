"""One life of the daemon: reloads, signals, and what its service manager hears: swiprd.daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiprctl import SwiprError
from swiprd.process import ENVIRONMENT
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, SWIPRD, Daemon, code_of, read_lines, wait_until


@pytest.fixture
def reloadable(start_daemon: StartDaemon, folder: Path) -> Daemon:
    """A daemon that is ready, with its settings in ``folder/settings``."""
    (folder / "settings").write_text("max_file_mib = 1\n")
    daemon = start_daemon("--config", str(folder / "settings"))
    daemon.wait_ready()
    return daemon


def test_a_reload_reads_the_settings_again(reloadable: Daemon, folder: Path) -> None:
    """With the reply the new ones are in use, by a new worker, on connections that were open."""
    (folder / "big").write_bytes(b"\0" * (2**20 + 1))
    workers = reloadable.worker_pids()
    with reloadable.client() as client:
        assert code_of(lambda: client.compute(folder / "big")) == "too_large"
        (folder / "settings").write_text("max_file_mib = 2\nlog_level = 'warning'\n")
        client.reload()
        assert code_of(lambda: client.compute(folder / "big")) == "not_an_image"
        assert client.compute(CHELSEA).scores[1] > 0.9
    wait_until(lambda: len(reloadable.worker_pids()) == 1, "the old worker to go")
    assert reloadable.worker_pids() != workers


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("max_file_mib = 0", "max_file_mib in {}: expected a whole number from 1 to 1024, got 0"),
        ("nonsense", "{}: not TOML"),
        ("model = '/none'", "cannot read the bundle /none: No such file or directory"),
    ],
)
def test_a_reload_that_fails_changes_nothing(
    reloadable: Daemon, folder: Path, settings: str, reason: str
) -> None:
    """The same worker answers, under the same settings; the reason is told and logged."""
    (folder / "settings").write_text(settings)
    workers = reloadable.worker_pids()
    with reloadable.client() as client:
        with pytest.raises(SwiprError) as failure:
            client.reload()
        said = f"everything stays as it was: {reason.format(folder / 'settings')}"
        assert failure.value.code == "reload_failed"
        assert failure.value.message.startswith(said)
        assert client.compute(CHELSEA).scores[1] > 0.9
    assert reloadable.worker_pids() == workers
    assert f"not reloaded: {said}" in reloadable.log()


def test_sighup_reloads(reloadable: Daemon, folder: Path) -> None:
    """However many come at once, at most one more is done than is under way."""
    for _ in range(5):
        os.kill(reloadable.pid, signal.SIGHUP)
    wait_until(lambda: "swiprd: reloaded" in reloadable.log(), "the first")
    with reloadable.client() as client:
        client.reload()
        assert client.compute(CHELSEA).scores[1] > 0.9
    assert 2 <= reloadable.log().count("swiprd: reloaded") <= 3


def test_a_client_that_leaves_does_not_take_its_reload_back(reloadable: Daemon) -> None:
    """It has been asked for, and is done."""
    with reloadable.connect() as connection:
        connection.sendall(b'{"op":"reload"}\n')
        wait_until(lambda: len(reloadable.worker_pids()) == 2, "a second worker")
    wait_until(lambda: "swiprd: reloaded" in reloadable.log(), "the reload")


def test_strangers_may_not_reload(reloadable: Daemon) -> None:
    """Who is neither root nor the daemon's user is told whom it takes."""
    if os.geteuid() != 0:
        pytest.skip("only root can ask as somebody else")
    program = (
        "import os, sys; from swiprctl import Client;os.setuid(65534); Client(sys.argv[1]).reload()"
    )
    Path(reloadable.path).parent.chmod(0o755)
    Path(reloadable.path).parent.parent.chmod(0o755)
    Path(reloadable.path).chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, reloadable.path], capture_output=True, text=True
    )
    assert "only root, the daemon's own user and admin_users may ask for a reload" in done.stderr
    assert "(you are user 65534)" in done.stderr
    assert "reloaded" not in reloadable.log()


def test_a_stop_ends_a_reload(reloadable: Daemon) -> None:
    """The new worker is given up, whoever asked for it is told, and the daemon goes at once."""
    with reloadable.connect() as connection:
        connection.sendall(b'{"op":"reload"}\n')
        wait_until(lambda: len(reloadable.worker_pids()) == 2, "a second worker")
        began = time.monotonic()
        reloadable.process.send_signal(signal.SIGTERM)
        reply = json.loads(*read_lines(connection))
        assert reply["error"]["code"] == "shutting_down"
    assert reloadable.process.wait(30) == 0
    assert time.monotonic() - began < 10


def test_signals_around_the_end_do_not_keep_it(reloadable: Daemon) -> None:
    """A reload under way, another one waiting, and one that comes too late are all given up."""
    reloadable.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(reloadable.worker_pids()) == 2, "a second worker")
    reloadable.process.send_signal(signal.SIGHUP)
    reloadable.process.send_signal(signal.SIGTERM)
    time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        reloadable.process.send_signal(signal.SIGHUP)
    assert reloadable.process.wait(10) == 0, reloadable.log()


def test_a_settings_file_that_is_a_pipe_is_refused(reloadable: Daemon, folder: Path) -> None:
    """Nobody writes into it, and nobody waits for that."""
    (folder / "settings").unlink()
    os.mkfifo(folder / "settings")
    with reloadable.client() as client:
        with pytest.raises(SwiprError, match="settings: expected a regular file"):
            client.reload()
        client.ping()


class Manager:
    """Hears what a daemon tells its service manager."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(30)
        self.heard: list[str] = []

    def wait_for(self, line: str) -> None:
        """Return once a message with that line has come."""
        while line not in self.heard:
            self.heard += self._socket.recv(4096).decode().splitlines()

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


def test_the_service_manager_hears_a_whole_life(folder: Path) -> None:
    """Ready at once, then in words what goes on; reloads with their time; the stop with more."""
    manager = Manager(folder)
    environment = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "600000"}
    (folder / "settings").write_text("")
    words = [*SWIPRD, "--socket", str(folder / "s"), "--config", str(folder / "settings")]
    daemon = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    Daemon.running.add(daemon.pid)
    try:
        manager.wait_for("READY=1")
        manager.wait_for("STATUS=loading the model")
        manager.wait_for("STATUS=ready: other,animal; eager fp32")
        manager.heard.clear()
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
            manager.heard.remove("WATCHDOG=1")
        daemon.send_signal(signal.SIGHUP)
        manager.wait_for("RELOADING=1")
        assert any(line.startswith("MONOTONIC_USEC=") for line in manager.heard)
        assert "EXTEND_TIMEOUT_USEC=125000000" in manager.heard
        manager.wait_for("READY=1")
        manager.wait_for("STATUS=reloading; until then ready: other,animal; eager fp32")
        manager.heard.clear()
        manager.wait_for("STATUS=ready: other,animal; eager fp32")
        daemon.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert "EXTEND_TIMEOUT_USEC=46000000" in manager.heard
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()
        daemon.wait()
        Daemon.running.discard(daemon.pid)
        manager.close()


def test_a_worker_finds_in_its_environment_what_makes_it_fast(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already is left as it is."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    daemon = start_daemon()
    daemon.wait_ready()
    (worker,) = daemon.worker_pids()
    found = Path(f"/proc/{worker}/environ").read_text().split("\0")
    wanted = ENVIRONMENT | {"GOMP_SPINCOUNT": "7"}
    assert {f"{name}={value}" for name, value in wanted.items()} <= set(found)
