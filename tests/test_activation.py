"""swiprd under socket activation, by systemd's own systemd-socket-activate."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swiprctl import Client
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, SWIPRCTL, SWIPRD, Daemon, wait_until


@pytest.fixture
def activate(start_daemon: StartDaemon) -> StartDaemon:
    """Start a listener that becomes the daemon when the first client connects."""
    activator = shutil.which("systemd-socket-activate")
    assert activator is not None, "install systemd's systemd-socket-activate (package systemd)"

    def start(*flags: str) -> Daemon:
        return start_daemon(command=[activator, "-l", "SOCKET", *SWIPRD, *flags])

    return start


def swiprctl(daemon: Daemon, *words: str) -> str:
    command = [*SWIPRCTL, "--socket", daemon.path, "--timeout", "60", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_first_request_starts_the_daemon_and_gets_its_tuple(activate: StartDaemon) -> None:
    """With nothing running but a listening socket, compute prints the tuple."""
    daemon = activate()
    assert daemon.worker_pids() == []
    other, animal = map(float, swiprctl(daemon, "compute", str(CHELSEA)).split(","))
    assert animal > 0.9
    assert other + animal == pytest.approx(1, abs=1e-5)
    assert "listening at" in daemon.log()


def test_clients_of_a_cold_socket_are_all_answered(activate: StartDaemon) -> None:
    """Thirty clients connect at once before there is a daemon; each gets the same tuple."""
    daemon = activate()
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: ask(daemon), range(30)))
    assert len(set(answers)) == 1


def ask(daemon: Daemon) -> tuple[float, ...]:
    with daemon.client(timeout=60) as client:
        return client.compute(CHELSEA).scores


def test_the_socket_file_is_left_to_its_owner(activate: StartDaemon) -> None:
    """An inherited socket is neither unlinked nor changed by the daemon that served on it."""
    daemon = activate()
    before = Path(daemon.path).stat()
    swiprctl(daemon, "ping")
    assert daemon.stop() == 0
    after = Path(daemon.path).stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_an_idle_daemon_goes_and_leaves_nothing(activate: StartDaemon) -> None:
    """After idle_timeout without clients the front goes too, with status 0."""
    daemon = activate("--idle-timeout", "0.5")
    swiprctl(daemon, "ping")
    assert daemon.process.wait(30) == 0
    assert "good-bye" in daemon.log()


def test_a_connected_client_keeps_an_idle_daemon(activate: StartDaemon) -> None:
    """While somebody is connected the front stays, whatever the workers do."""
    daemon = activate("--idle-timeout", "0.5")
    with daemon.client(timeout=60) as client:
        client.compute(CHELSEA)
        wait_until(lambda: client.status()["state"] == "idle", "the worker to go")
        client.ping()
    assert daemon.process.wait(30) == 0


def test_no_request_is_lost_between_two_daemons(start_daemon: StartDaemon, folder: Path) -> None:
    """Clients in a closed loop over one listening socket do not notice that daemons change."""
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(4) as pool:
        listener.bind(path := str(folder / "listener"))
        listener.listen(128)

        def start() -> Daemon:
            return start_daemon(command=_with_listener(listener), pass_fds=[listener.fileno()])

        asking = [pool.submit(ping_until, stop, path) for _ in range(4)]
        try:
            for _ in range(5):
                daemon = start()
                with Client(path, timeout=60) as client:
                    client.ping()
                assert daemon.stop() == 0
        finally:
            start()
            stop.set()
            counts = [future.result() for future in asking]
    assert min(counts) > 5


def ping_until(stop: threading.Event, path: str) -> int:
    count = 0
    while not stop.is_set():
        with Client(path, timeout=60) as client:
            client.ping()
            client.ping()
        count += 1
    return count


def _with_listener(listener: socket.socket) -> list[str]:
    # What systemd does: the socket becomes descriptor 3 of the process whose id is named.
    program = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", program, str(listener.fileno()), *SWIPRD]
