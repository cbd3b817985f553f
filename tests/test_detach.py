"""swiprd without a service manager: in the background, and as the first process of a container."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swiprctl import Client
from swiprd.detach import DetachError, check_syslog
from tests.daemon import CHELSEA, SWIPRD, Daemon, wait_until


class Detached:
    """A daemon that left its terminal, with its files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid_file = folder / "pid"
        self.log_file = folder / "log"
        self.socket = str(folder / "s")
        self.inherited: list[int] = []

    def start(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run the command and return what came of it, which is over at once."""
        command = [*SWIPRD, "--detach", "--socket", self.socket, "--pid-file", str(self.pid_file)]
        command += flags or ["--log-file", str(self.log_file)]
        environment = {**os.environ, "SWIPRD_CACHE_DIR": str(self.folder / "cache")}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
            cwd=self.folder,
            pass_fds=self.inherited,
        )

    @property
    def pid(self) -> int:
        """Its process id, by its own account."""
        return int(self.pid_file.read_text())

    def is_gone(self) -> bool:
        """Whether nothing of it is left in its folder but the log."""
        return not self.pid_file.exists() and not Path(self.socket).exists()


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process of the test's own with the block."""
    Daemon.running.add(process.pid)
    try:
        yield
    finally:
        process.kill()  # which does nothing to one that has been waited for
        process.wait()
        Daemon.running.discard(process.pid)


@pytest.fixture
def detached(folder: Path) -> Iterator[Detached]:
    """Files for a daemon; one that runs at the end is ended."""
    daemon = Detached(folder)
    yield daemon
    if daemon.pid_file.exists():
        pid = daemon.pid
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {pid}")


def test_the_prompt_comes_back_when_the_daemon_listens(detached: Detached) -> None:
    """Then its id is in the file, its socket answers, and it belongs to no terminal or session."""
    done = detached.start()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Client(detached.socket, timeout=60) as client:
        assert client.status()["pid"] == detached.pid
        assert client.compute(CHELSEA).scores[1] > 0.9
    fields = Path(f"/proc/{detached.pid}/stat").read_text().rpartition(")")[2].split()
    session, terminal = int(fields[3]), int(fields[4])
    assert session not in (os.getsid(0), detached.pid)  # nor can it ever get a terminal
    assert terminal == 0
    assert os.readlink(f"/proc/{detached.pid}/cwd") == "/"
    os.kill(detached.pid, signal.SIGTERM)
    wait_until(detached.is_gone, "its files to go")
    log = detached.log_file.read_text()
    assert "listening at" in log
    assert log.rstrip().endswith(": stopped")


def test_it_keeps_no_descriptor_but_its_own(detached: Detached) -> None:
    """What the shell had open, a pipe for instance, is closed: nobody waits for its end in vain."""
    reader, writer = os.pipe()
    try:
        detached.inherited = [writer]
        assert detached.start().returncode == 0
        os.close(writer)
        os.set_blocking(reader, False)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_are_no_trap(detached: Detached, closed: str) -> None:
    """Their numbers go to nothing else: what a library prints would go to whoever has them."""
    words = [*SWIPRD, "--detach", "--socket", detached.socket]
    words += ["--pid-file", str(detached.pid_file), "--log-file", str(detached.log_file)]
    shell = ["sh", "-c", f'exec "$@" {closed}', "-"]
    assert subprocess.run([*shell, *words], timeout=30).returncode == 0
    pid = detached.pid
    for process in (pid, wait_for_child(pid)):
        for fd in (1, 2):
            assert os.readlink(f"/proc/{process}/fd/{fd}") == str(detached.log_file)


def wait_for_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: bool(children.read_text()), "a worker")
    return int(children.read_text())


def test_a_pid_file_that_is_anothers_by_now_is_left(detached: Detached, folder: Path) -> None:
    """Somebody removed it, a second daemon made a new one: the first one's end does not take it."""
    assert detached.start().returncode == 0
    first = detached.pid
    detached.pid_file.unlink()
    assert detached.start("--socket", str(folder / "t"), "--log-file", "l").returncode == 0
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{first}").exists(), "the end of the first")
    assert detached.pid != first


def test_the_pid_file_is_beside_the_socket(folder: Path) -> None:
    """Unless it is named: who names a place for one need not find a place for the other."""
    path = folder / "s"
    words = ["--detach", "--socket", str(path), "--log-file", str(folder / "log")]
    assert subprocess.run([*SWIPRD, *words], timeout=30).returncode == 0
    pid = int((folder / "s.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not (folder / "s.pid").exists(), "its end")


def test_a_second_instance_is_refused(detached: Detached, folder: Path) -> None:
    """It says which process runs, and what to do; the first one is not disturbed."""
    assert detached.start().returncode == 0
    first = detached.pid
    done = detached.start("--socket", str(folder / "other"), "--log-file", str(folder / "l"))
    assert done.returncode == 1
    assert f"a daemon runs already as process {first}" in done.stderr
    assert "--pid-file" in done.stderr
    assert not (folder / "other").exists()
    with Client(detached.socket) as client:
        assert client.status()["pid"] == first == detached.pid


def test_what_a_dead_daemon_left_is_no_obstacle(detached: Detached) -> None:
    """After kill -9 the file is there, but its lock is not."""
    assert detached.start().returncode == 0
    first = detached.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{first}").exists(), "its end")
    assert detached.pid == first
    assert detached.start().returncode == 0
    assert detached.pid != first


@pytest.mark.parametrize(
    ("flags", "status", "reason"),
    [
        (["--log-file", "/nowhere/log"], 1, "cannot write to /nowhere/log: No such file"),
        (["--pid-file", "/nowhere/pid", "--log-file", "l"], 1, "cannot make /nowhere/pid"),
        (["--socket", "/nowhere/s", "--log-file", "l"], 1, "cannot listen at /nowhere/s"),
        (["--threads", "many", "--log-file", "l"], 2, "--threads: expected a whole number"),
    ],
    ids=["log", "pid", "socket", "setting"],
)
def test_what_is_wrong_is_said_before_the_terminal_is_left(
    detached: Detached, flags: list[str], status: int, reason: str
) -> None:
    """One line on standard error, an exit status, and nothing left behind."""
    done = detached.start(*flags)
    assert done.returncode == status
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert detached.is_gone()


@pytest.mark.parametrize("flag", ["--pid-file", "--log-file"])
def test_flags_of_the_background_are_refused_in_the_foreground(folder: Path, flag: str) -> None:
    """Who gives them and forgets --detach would look for files that nobody writes."""
    done = subprocess.run(
        [*SWIPRD, flag, str(folder / "f")], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"swiprd: {flag} is for a daemon in the background")


def test_a_lock_that_others_can_hold_is_refused(detached: Detached) -> None:
    """Whoever can open the file could keep the daemon from starting."""
    detached.pid_file.touch()
    detached.pid_file.chmod(0o644)
    done = detached.start()
    assert done.returncode == 1
    assert "others can hold the lock" in done.stderr
    detached.pid_file.unlink()


def test_without_syslog_a_file_must_be_named() -> None:
    """Where nobody takes the lines they would be lost without a word."""
    if Path("/dev/log").exists():
        check_syslog()
    else:
        with pytest.raises(DetachError, match="name a file with --log-file"):
            check_syslog()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_can_be_the_first_process_of_a_container(folder: Path, number: int) -> None:
    """There the kernel has no default for signals: they stop it, and its worker goes with it."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a process the first of its namespace")
    path = str(folder / "s")
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "log").open("wb") as log:
        container = subprocess.Popen([*command, *SWIPRD, "--socket", path], stderr=log)
    with ended(container):
        wait_until(lambda: Path(path).exists(), "the daemon")
        with Client(path, timeout=60) as client:
            assert client.status()["pid"] == 1
            assert client.compute(CHELSEA).scores[1] > 0.9
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text()
        os.kill(int(children), number)
        assert container.wait(30) == 0, (folder / "log").read_text()
        assert not Path(path).exists()


def test_a_foreground_daemon_stops_when_its_terminal_goes(folder: Path) -> None:
    """With a terminal SIGHUP means that it has hung up; without one it means a reload."""
    ours, theirs = os.openpty()
    program = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(2, termios.TIOCSCTTY, 0);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    path = str(folder / "s")
    try:
        daemon = subprocess.Popen(
            [sys.executable, "-c", program, *SWIPRD, "--socket", path], stderr=theirs
        )
    finally:
        os.close(theirs)
    with ended(daemon):
        wait_until(lambda: Path(path).exists(), "the daemon")
        with Client(path) as client:
            client.ping()
        os.close(ours)
        assert daemon.wait(30) == 0
        assert not Path(path).exists()
