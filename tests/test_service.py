"""The installed service under a real systemd: what etc/ and tools/install promise."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from swiprctl import Client, SwiprError
from swiprd.config import DEFAULT_BUNDLE
from tests.daemon import CHELSEA, exchange, wait_until
from tests.documents import DOCUMENTS, examples
from tests.machine import PROJECT, Machine, why_not
from tests.test_documents import ELSEWHERE, INSTALLED_BY_CI

# In CI nothing is skipped: a machine that cannot be booted there is a failure.
WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None and "CI" not in os.environ, reason=str(WHY_NOT))

PICTURE = f"/srv/project/tests/pictures/{CHELSEA.name}"
UNITS = ("swipr.socket", "swipr.service")


@pytest.fixture(scope="module")
def installed() -> Iterator[Machine]:
    """A machine on which ``make install`` was run, once for all tests here."""
    machine = Machine()
    try:
        machine.install()
        machine.run("useradd", "--create-home", "--groups", "swipr", "ada")
        machine.run("chmod", "700", "/home/ada")
        yield machine
    finally:
        machine.stop()


@pytest.fixture
def machine(installed: Machine) -> Machine:
    """The machine with its socket listening, nothing running, and no settings."""
    (installed.root / "etc/swipr/swiprd.toml").write_text("")
    installed.run("systemctl", "stop", "swipr.service")
    assert state(installed) == ["inactive", "dead", "0"]
    return installed


def state(machine: Machine) -> list[str]:
    return machine.show("swipr.service", "ActiveState", "SubState", "MainPID")


def main_pid(machine: Machine) -> int:
    """Return the front's process id, as it is here and not in the machine."""
    return pid_here(machine, int(machine.show("swipr.service", "MainPID")[0]))


def pid_here(machine: Machine, pid: int) -> int:
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has gone
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            if fields["NSpid"].split()[1:] == [str(pid)]:
                return int(fields["Pid"])
    raise AssertionError(f"no process {pid} in the machine")


def worker_pid(machine: Machine, *, after: int | None = None) -> int:
    """Return the process id of the worker, once one is ready that is not ``after``."""
    seen: list[int] = []

    def is_ready() -> bool:
        (worker,) = client.status()["workers"]
        if worker["state"] == "ready":
            with contextlib.suppress(AssertionError):  # it has just been killed
                seen.append(pid_here(machine, worker["pid"]))
        return seen[-1:] not in ([], [after])

    with machine.client() as client:
        wait_until(is_ready, "a worker")
    return seen[-1]


def processes(machine: Machine) -> str:
    return machine.run("pgrep", "--full", "--list-full", "/opt/swipr", check=False).stdout


@pytest.fixture(scope="module")
def expected(installed: Machine) -> tuple[float, ...]:
    """The scores of the picture, from a daemon that nobody disturbs."""
    with installed.client() as client:
        return client.compute(CHELSEA).scores


# --- installed -----------------------------------------------------------------------------------


def test_install_says_what_to_do_next(installed: Machine) -> None:
    """It names the socket, a first command, the group, the settings and the man pages."""
    names = ("/run/swipr/swipr.sock", "swiprctl compute", "usermod", "swiprctl reload")
    for words in (*names, "man swiprd"):
        assert words in installed.said


def test_systemd_finds_no_fault_with_the_units(installed: Machine) -> None:
    """systemd-analyze verify is silent about the units, the system's and the user's."""
    for folder in ("system", "user"):
        paths = [f"/usr/local/lib/systemd/{folder}/{unit}" for unit in UNITS]
        words = ["systemd-analyze", "verify", f"--{folder}", *paths]
        done = installed.run("env", "XDG_RUNTIME_DIR=/run", "HOME=/root", *words)
        assert done.stdout + done.stderr == ""


def test_the_service_is_hardly_exposed(installed: Machine) -> None:
    """Network, privileges and files are closed to it; systemd-analyze gives at most 1.0 of 10."""
    wanted = {
        "PrivateNetwork": "yes",
        "RestrictAddressFamilies": "AF_UNIX",
        "CapabilityBoundingSet": "",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "PrivateDevices": "yes",
        "ReadWritePaths": "",
        "User": "swipr",
    }
    shown = installed.run("systemctl", "show", "swipr.service", "-p", ",".join(wanted)).stdout
    assert dict(line.split("=", 1) for line in shown.splitlines()) == wanted
    shown = installed.run("systemd-analyze", "security", "--no-pager", "swipr.service").stdout
    found = re.search(r"Overall exposure level for swipr.service: ([0-9.]+)", shown)
    assert found is not None, shown
    print(found[0])
    assert float(found[1]) <= 1.0


def test_man_pages_are_where_man_looks(installed: Machine) -> None:
    """Man finds the pages under their names."""
    for page in ("1 swiprctl", "8 swiprd", "5 swiprd.toml", "7 swipr-protocol"):
        section, name = page.split()
        path = f"/usr/local/share/man/man{section}/{name}.{section}"
        found = installed.run("man", "-w", section, name).stdout.strip()
        assert (installed.root / found[1:]).samefile(installed.root / path[1:])


SUDO = """#!/bin/sh
if [ "$1" = -u ]; then
    exec runuser -u "$2" -- sh -c 'shift 2; exec "$@"' - "$@"
fi
exec "$@"
"""
"""What stands in for sudo, which a machine may lack."""
AS_ROOT = [
    (document, [example.command for example in group])
    for document in DOCUMENTS
    for _, group in itertools.groupby(
        (
            example
            for example in examples(document)
            if example.as_root
            and example.command not in ELSEWHERE
            and not example.command.startswith(INSTALLED_BY_CI)
        ),
        key=lambda example: example.block,
    )
]


@pytest.mark.parametrize(("document", "commands"), AS_ROOT)
def test_what_a_document_tells_root_to_do_works(
    machine: Machine, document: str, commands: list[str]
) -> None:
    """Block by block, in a clone that has the bundles which it speaks of."""
    sudo = machine.root / "usr/local/bin/sudo"
    sudo.write_text(SUDO)
    sudo.chmod(0o755)
    desk = machine.root / "root/desk"
    desk.mkdir()
    (desk / "tests").symlink_to("/srv/project/tests")
    for name in ("swipr.safetensors", "net.safetensors"):
        shutil.copy(DEFAULT_BUNDLE, desk / name)
    (machine.root / "var/lib/swipr").mkdir(parents=True, exist_ok=True)
    shutil.copy(DEFAULT_BUNDLE, machine.root / "var/lib/swipr/swipr.safetensors")
    (machine.root / "var/lib/prometheus/node-exporter").mkdir(parents=True, exist_ok=True)
    script = "\n".join(["set -e", "cd /root/desk", *commands])
    try:
        if "--detach" in script:  # where no service manager is
            machine.run("systemctl", "disable", "--now", "swipr.socket")
        machine.run("env", "USER=ada", "bash", "-c", script)
    finally:
        shutil.rmtree(desk)
        sudo.unlink()
        machine.run("systemctl", "enable", "--now", "swipr.socket")


def test_completion_is_where_shells_look(installed: Machine) -> None:
    """Bash and zsh find it by itself; fish where XDG_DATA_DIRS names /usr/local/share."""
    for name in ("swiprctl", "swiprd"):
        assert (installed.root / f"usr/local/share/bash-completion/completions/{name}").exists()
        script = f"autoload -Uz compinit; compinit -u -D; print $_comps[{name}]"
        assert installed.run("zsh", "-f", "-c", script).stdout == f"_{name}\n"
        place = ["env", "HOME=/tmp", "XDG_DATA_DIRS=/usr/local/share:/usr/share"]
        said = installed.run(*place, "fish", "-c", f"complete -C '{name} --help'").stdout
        assert said == "--help\tshow this help message and exit\n"


# --- requests ------------------------------------------------------------------------------------


def test_the_first_request_starts_the_service(machine: Machine) -> None:
    """With the socket enabled and nothing running, compute prints the tuple."""
    assert processes(machine) == ""
    done = machine.run("swiprctl", "--timeout", "60", "compute", PICTURE, user="ada")
    other, animal = map(float, done.stdout.split(","))
    assert animal > 0.9
    assert other + animal == pytest.approx(1, abs=1e-5)
    assert state(machine)[:2] == ["active", "running"]
    uid = int(machine.run("id", "--user", "swipr").stdout)
    assert uid != 0
    for pid in (main_pid(machine), worker_pid(machine)):
        assert Path(f"/proc/{pid}").stat().st_uid == uid


def test_strangers_are_kept_out(machine: Machine) -> None:
    """Who is not in the group swipr is told so, and whose socket it is."""
    done = machine.run("swiprctl", "ping", user="nobody", check=False)
    assert done.returncode == 3
    assert "members of the group swipr" in done.stderr


def test_a_picture_in_a_closed_home_is_scored(machine: Machine) -> None:
    """The owner's descriptor is enough; by its path the daemon cannot open the picture."""
    home = machine.root / "home/ada"
    picture = home / "cat.png"
    picture.write_bytes(CHELSEA.read_bytes())
    os.chown(picture, home.stat().st_uid, home.stat().st_gid)
    picture.chmod(0o600)
    done = machine.run("swiprctl", "--timeout", "60", "compute", "/home/ada/cat.png", user="ada")
    assert float(done.stdout.split(",")[1]) > 0.9
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(machine.client().socket_path)
        (reply,) = exchange(sock, b'{"path":"/home/ada/cat.png"}\n')
    assert json.loads(reply)["error"]["code"] in ("not_found", "permission_denied")


def test_fifty_clients_at_once_are_answered_by_a_cold_service(machine: Machine) -> None:
    """They connect before there is a daemon, and each gets the same tuple."""
    together = threading.Barrier(50)

    def ask(_: int) -> tuple[float, ...]:
        together.wait()
        with machine.client() as client:
            return client.compute(CHELSEA).scores

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert len(answers) == 50
    assert len(set(answers)) == 1


# --- restart and reload --------------------------------------------------------------------------


class Load:
    """Clients in a closed loop; whatever is no right answer ends the ``with`` block badly."""

    def __init__(self, ask: Callable[[], tuple[float, ...]], expected: tuple[float, ...]) -> None:
        self._ask = ask
        self._expected = expected
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(8)
        self.answered = 0

    def __enter__(self) -> Self:
        self._futures = [self._pool.submit(self._loop) for _ in range(8)]
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self.answered = sum(future.result() for future in self._futures)

    def _loop(self) -> int:
        count = 0
        while not self._stop.is_set():
            assert self._ask() == self._expected
            count += 1
        return count


@pytest.mark.timeout(400)
def test_restarts_and_reloads_cost_no_request(
    machine: Machine, expected: tuple[float, ...]
) -> None:
    """Twenty of each under eight clients: none is refused, lost or answered wrongly."""

    def ask() -> tuple[float, ...]:
        with machine.client() as client:
            return client.compute(CHELSEA).scores

    with Load(ask, expected) as load:
        for _ in range(20):
            machine.run("systemctl", "restart", "swipr.service")
            machine.run("systemctl", "reload", "swipr.service")
    assert load.answered > 100
    assert machine.show("swipr.service", "ActiveState", "Result") == ["active", "success"]
    print(f"{load.answered} requests during 20 restarts and 20 reloads, all answered")


def test_a_reload_is_not_noticed_on_an_open_connection(
    machine: Machine, expected: tuple[float, ...]
) -> None:
    """Not even the connection is lost, and what is asked next is answered by the new settings."""
    with machine.client() as client:
        assert client.compute(CHELSEA).scores == expected
        machine.configure(max_file_mib=1)
        (machine.root / "tmp/big").write_bytes(b"\0" * (2**20 + 1))
        with pytest.raises(SwiprError, match="expected at most 1048576") as error:
            client.compute(machine.root / "tmp/big")
        assert error.value.code == "too_large"
        assert client.compute(CHELSEA).scores == expected


def test_a_reload_with_a_bad_file_changes_nothing_and_says_why(
    machine: Machine, expected: tuple[float, ...]
) -> None:
    """Systemctl reload fails, the journal has the reason at priority err, the old model serves."""
    with machine.client() as client:
        client.compute(CHELSEA)
        before = main_pid(machine), worker_pid(machine)
        for text, reason in (
            ("idle_timeout = -1\n", "idle_timeout in /etc/swipr/swiprd.toml: expected"),
            ('model = "/var/lib/swipr/none"\n', "cannot read the bundle /var/lib/swipr/none"),
            ('model = "/etc/passwd"\n', "/etc/passwd is no bundle"),
        ):
            (machine.root / "etc/swipr/swiprd.toml").write_text(text)
            done = machine.run("systemctl", "reload", "swipr.service", check=False)
            assert done.returncode == 1
            last = machine.journal("--output=cat", "--priority=err", "--lines=2")
            assert f"not reloaded: everything stays as it was: {reason}" in last
        assert client.compute(CHELSEA).scores == expected
    assert (main_pid(machine), worker_pid(machine)) == before
    assert state(machine)[:2] == ["active", "running"]


def test_without_a_model_the_service_stays_up(machine: Machine) -> None:
    """It answers unavailable with the reason; after the file is back and a reload, tuples."""
    name = "/var/lib/swipr/animal.safetensors"
    bundle = machine.root / name[1:]
    (machine.root / "etc/swipr/swiprd.toml").write_text(f'model = "{name}"')
    with machine.client() as client:
        for _ in range(5):
            with pytest.raises(SwiprError, match=re.escape(name)) as error:
                client.compute(CHELSEA)
            assert error.value.code == "unavailable"
        front = main_pid(machine)
        bundle.write_bytes(Path(DEFAULT_BUNDLE).read_bytes())
        bundle.chmod(0o644)
        machine.run("systemctl", "reload", "swipr.service")
        assert client.compute(CHELSEA).scores[1] > 0.9
    assert main_pid(machine) == front
    bundle.unlink()


def test_a_service_with_bad_settings_says_so(machine: Machine) -> None:
    """Started by a client, it does not leave it waiting; a reload with good settings mends it."""
    settings = machine.root / "etc/swipr/swiprd.toml"
    settings.write_text("idle_timout = 300\n")
    began = time.monotonic()
    done = machine.run("swiprctl", "compute", PICTURE, check=False)
    assert time.monotonic() - began < 5
    assert done.returncode == 3
    assert "no setting 'idle_timout'" in done.stderr
    assert "mend it and run swiprctl reload" in done.stderr
    assert "no setting 'idle_timout'" in machine.show("swipr.service", "StatusText")[0]
    done = machine.run("swiprctl", "reload", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no setting 'idle_timout'" in done.stderr
    settings.write_text("idle_timeout = 300\n")
    assert machine.run("swiprctl", "reload").stdout == "reloaded\n"
    assert float(machine.run("swiprctl", "compute", PICTURE).stdout.split(",")[1]) > 0.9


def test_the_watchdog_is_fed_without_a_free_descriptor(machine: Machine) -> None:
    """Clients who take all that the daemon has do not get it killed."""
    with machine.client() as client:
        front = client.status()["pid"]
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(client.socket_path)
            time.sleep(25)  # WatchdogSec is 20
        wait_until(lambda: client.status()["connections"] == 1, "the others to be gone")
        assert client.status()["pid"] == front


def test_only_root_and_the_service_may_reload(machine: Machine) -> None:
    """A member of the group may have pictures scored, and no more."""
    done = machine.run("swiprctl", "reload", user="ada", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "only root, the daemon's own user and admin_users may ask for a reload" in done.stderr
    for user in (None, "swipr"):
        assert machine.run("swiprctl", "reload", user=user).stdout == "reloaded\n"


# --- what systemd is told ------------------------------------------------------------------------


def test_systemctl_status_tells_what_the_daemon_does(machine: Machine) -> None:
    """Loading, then ready with labels and engine; then idle, and the front is gone as well."""
    machine.configure(idle_timeout=2)
    text = machine.show("swipr.service", "StatusText")[0]
    assert text == "loading the model"
    worker_pid(machine)
    text = machine.show("swipr.service", "StatusText")[0]
    assert text == "ready: other,animal; eager fp32"
    with machine.client() as client:  # who stays connected keeps the front
        wait_until(lambda: client.status()["state"] == "idle", "the worker to go")
        text = machine.show("swipr.service", "StatusText")[0]
        assert text == "idle: the next image loads the model again"
    wait_until(lambda: state(machine)[0] == "inactive", "the front to go")


def test_log_lines_have_their_priorities(machine: Machine) -> None:
    """What the front says of itself is info, a model that cannot be served is an error."""
    (machine.root / "etc/swipr/swiprd.toml").write_text('model = "/none"')
    with machine.client() as client, contextlib.suppress(SwiprError):
        client.compute(CHELSEA)
    lines = [
        json.loads(line)
        for line in machine.journal("--output=json", "--lines=30", "_COMM=swiprd").splitlines()
    ]
    priorities = {line["MESSAGE"].split(":")[0]: line["PRIORITY"] for line in lines}
    assert priorities["listening at /run/swipr/swipr.sock"] == "6"
    assert priorities["the model cannot be served"] == "3"


def test_a_front_that_hangs_is_replaced(machine: Machine) -> None:
    """Stopped, it does not feed the watchdog: systemd ends it and starts another."""
    with machine.client() as client:
        client.ping()
    hung = main_pid(machine)
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: state(machine)[0] != "active", "the watchdog", 60)
    with machine.client(timeout=90) as client:
        client.ping()
    assert main_pid(machine) != hung
    assert "Watchdog timeout" in machine.run("journalctl", "--no-pager", "--lines=200").stdout
    assert machine.show("swipr.socket", "ActiveState", "Result") == ["active", "success"]


@pytest.mark.timeout(400)
def test_killed_workers_do_not_touch_the_service(machine: Machine) -> None:
    """Thirty times the worker is killed: the front stays, the service never leaves active."""
    with machine.client() as client:
        client.ping()
        entered, front = machine.show("swipr.service", "ActiveEnterTimestamp"), main_pid(machine)
        worker = None
        for _ in range(30):
            worker = worker_pid(machine, after=worker)
            os.kill(worker, signal.SIGKILL)
        assert client.compute(CHELSEA).scores[1] > 0.9
    assert main_pid(machine) == front
    assert machine.show("swipr.service", "ActiveEnterTimestamp") == entered
    assert machine.show("swipr.service", "NRestarts") == ["0"]


def test_workers_go_with_a_front_that_is_killed(machine: Machine) -> None:
    """Kill -9 of the front takes its worker along, and the next request is answered."""
    worker = worker_pid(machine)
    os.kill(main_pid(machine), signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the worker to go", 5)
    with machine.client() as client:
        assert client.compute(CHELSEA).scores[1] > 0.9


# --- idle ----------------------------------------------------------------------------------------

IDLE = 0.5


@pytest.mark.timeout(400)
def test_no_request_is_lost_around_the_idle_exit(machine: Machine) -> None:
    """300 requests from 50 ms before to 50 ms after the daemon's exit, all answered."""
    machine.configure(idle_timeout=IDLE)
    took = seconds_from_reply_to_exit(machine)
    order = random.Random(4)  # noqa: S311
    fronts = set()
    answered = 0
    with ThreadPoolExecutor(6) as pool:
        while answered < 300:
            with machine.client() as client:
                client.ping()
                fronts.add(client.status()["pid"])
            replied = time.monotonic()
            moments = [replied + order.uniform(IDLE - 0.05, took + 0.05)] * 6
            kinds = ["ping"] * 6 if answered % 60 else ["ping"] * 5 + ["compute"]
            answered += sum(pool.map(lambda *of: ask_at(machine, *of), moments, kinds))
    print(f"{answered} requests around the end of {len(fronts)} daemons, all answered")
    assert len(fronts) > 20  # and not one that was kept from going
    wait_until(lambda: state(machine)[0] == "inactive", "the last one to go")
    assert processes(machine) == ""
    assert machine.show("swipr.socket", "ActiveState", "SubState") == ["active", "listening"]


def seconds_from_reply_to_exit(machine: Machine) -> float:
    with machine.client() as client:
        client.ping()
    front = os.pidfd_open(main_pid(machine))
    try:
        with machine.client() as client:
            client.ping()
        began = time.monotonic()
        select.select([front], [], [], 30)
        return time.monotonic() - began
    finally:
        os.close(front)


def ask_at(machine: Machine, moment: float, kind: str) -> int:
    time.sleep(max(0.0, moment - time.monotonic()))
    # Without the second try of Client: what was connected is answered.
    request = {"op": "ping"} if kind == "ping" else {"path": PICTURE}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(machine.client().socket_path)
        (reply,) = exchange(sock, json.dumps(request).encode() + b"\n")
    return len(json.loads(reply).keys() & {"pong", "scores"})


# --- other ways to run it ------------------------------------------------------------------------


def test_the_same_units_serve_a_users_own_manager(machine: Machine) -> None:
    """Systemctl --user enables the socket; the daemon runs as the user, at the user's socket."""
    uid = machine.run("id", "--user", "ada").stdout.strip()
    runtime = f"/run/user/{uid}"
    machine.run("install", "-d", "-o", "ada", "-m", "700", runtime)
    (machine.root / "etc/systemd/system/manager.service").write_text(
        f"[Service]\nUser=ada\nType=notify\nDelegate=yes\nKillMode=mixed\n"
        f"Environment=XDG_RUNTIME_DIR={runtime} HOME=/home/ada\n"
        "ExecStart=/lib/systemd/systemd --user --unit=basic.target\n"
    )
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "manager.service")
    own = ["env", f"XDG_RUNTIME_DIR={runtime}", "HOME=/home/ada"]
    try:
        machine.run(*own, "systemctl", "--user", "enable", "--now", "swipr.socket", user="ada")
        words = ["swiprctl", "--timeout", "60", "compute", PICTURE]
        assert float(machine.run(*own, *words, user="ada").stdout.split(",")[1]) > 0.9
        machine.run(*own, "systemctl", "--user", "reload", "swipr.service", user="ada")
        with Client(str(machine.root / runtime[1:] / "swipr/swipr.sock")) as client:
            pid = pid_here(machine, client.status()["pid"])
        assert Path(f"/proc/{pid}").stat().st_uid == int(uid)
        assert state(machine)[0] == "inactive"  # the system's own was not asked
    finally:
        machine.run("systemctl", "stop", "manager.service")


def test_a_detached_daemon_logs_to_syslog(machine: Machine) -> None:
    """With priorities, under its name; the usual pid file keeps a second one away."""
    machine.run("systemctl", "stop", "swipr.socket")
    try:
        machine.run("swiprd", "--detach")
        pid = (machine.root / "run/swipr/swiprd.pid").read_text().strip()
        done = machine.run("swiprd", "--detach", check=False)
        assert f"runs already as process {pid}" in done.stderr
        (machine.root / "etc/swipr/swiprd.toml").write_text('model = "/none"')
        done = machine.run("swiprctl", "reload", check=False)
        assert "everything stays as it was: cannot read the bundle /none" in done.stderr
        said = machine.run("journalctl", "--no-pager", "--output=json", "SYSLOG_IDENTIFIER=swiprd")
        lines = [json.loads(line) for line in said.stdout.splitlines()]
        own = {line["MESSAGE"]: line["PRIORITY"] for line in lines if line["_PID"] == pid}
        assert own["listening at /run/swipr/swipr.sock"] == "6"
        assert any(m.startswith("not reloaded") and p == "3" for m, p in own.items())
        machine.run("kill", pid)
        wait_until(lambda: not (machine.root / "run/swipr/swiprd.pid").exists(), "its end")
    finally:
        machine.run("systemctl", "start", "swipr.socket")


def test_uninstall_leaves_only_what_an_administrator_made() -> None:
    """Settings and models stay; software, units, pages, completion and the socket are gone."""
    machine = Machine()
    try:
        before = files(machine)
        machine.install()
        machine.run("swiprctl", "ping")
        (machine.root / "var/lib/swipr/mine.safetensors").write_text("mine")
        (machine.root / "etc/default/swipr").write_text("SWIPRD_THREADS=1\n")
        made = files(machine) - before
        assert "usr/local/lib/systemd/system/swipr.socket" in made
        said = machine.run("make", "-C", "/srv/project", "uninstall").stdout
        left = files(machine) - before
        assert left == {
            "etc/swipr/swiprd.toml",
            "etc/default/swipr",
            "var/lib/swipr/mine.safetensors",
        }
        left_words = "the user and group swipr, /etc/swipr, /etc/default/swipr, /var/lib/swipr"
        assert f"Left as they are: {left_words}" in said
        assert processes(machine) == ""
        assert not (machine.root / "run/swipr/swipr.sock").exists()
        assert not (machine.root / "opt/swipr").exists()
    finally:
        machine.stop()


def files(machine: Machine) -> set[str]:
    places = ("etc", "usr/local", "var/lib", "var/cache")
    return {
        str(path.relative_to(machine.root))
        for place in places
        for path in (machine.root / place).rglob("*")
        if not path.is_dir() and "swipr" in str(path.relative_to(machine.root))
    }


def test_an_install_mends_what_a_broken_one_left(folder: Path) -> None:
    """Also under a tight umask, and where the first one got no further than half an environment."""
    machine = Machine()
    try:
        tight = ["sh", "-c", 'umask 077; exec "$@"', "-"]
        make = ["make", "-C", "/srv/project", "install", "PREFIX=/opt/other/swipr"]
        make += ["PYTHON=/usr/bin/python3"]
        # As in a download: pip finds there what it would fetch.
        known = ["env", "PIP_NO_BUILD_ISOLATION=0", "PYTHONPATH=/srv/packages"]
        machine.run("mkdir", "-p", "/opt/other/swipr/bin")
        machine.run("ln", "-s", "/usr/bin/python3", "/opt/other/swipr/bin/python")
        done = machine.run(*tight, *known, *make, check=False)
        assert "/opt/other/swipr holds something else" in done.stderr
        machine.run("touch", "/opt/other/swipr/.swipr")
        machine.run(*tight, *known, *make)
        command = ["/opt/other/swipr/bin/swiprctl", "--version"]
        assert machine.run(*command, user="nobody").stdout.startswith("swiprctl ")
        unit = (machine.root / "usr/local/lib/systemd/system/swipr.service").read_text()
        assert "ExecStart=/opt/other/swipr/bin/swiprd\n" in unit
        assert "/opt/swipr" not in unit
        assert not (machine.root / "srv/project/build").exists() or (PROJECT / "build").exists()
        for odd in ("PREFIX=/opt/a b", "PREFIX=opt", "PREFIX=/", "DESTDIR=stage"):
            done = machine.run(*known, *make, odd, check=False)
            assert "expected" in done.stderr
            assert "to be an absolute path" in done.stderr
    finally:
        machine.stop()


def test_what_is_not_ours_is_not_removed() -> None:
    """An environment in which something else lives survives an uninstall with its name."""
    machine = Machine()
    try:
        machine.run("/usr/bin/python3", "-m", "venv", "--without-pip", "/srv/app")
        machine.run("make", "-C", "/srv/project", "uninstall", "PREFIX=/srv/app")
        assert (machine.root / "srv/app/pyvenv.cfg").exists()
    finally:
        machine.stop()


def test_a_staged_install_touches_nothing_else(folder: Path) -> None:
    """With DESTDIR everything goes below it, and speaks of the places it will have later."""
    machine = Machine()
    try:
        before = files(machine)
        # As in a build: the environment is there already, because nothing can be downloaded here.
        machine.run("mkdir", "-p", "/srv/stage/opt")
        machine.run("/usr/bin/python3", "-m", "venv", "--without-pip", "/srv/stage/opt/swipr")
        (packages,) = (machine.root / "srv/stage/opt/swipr/lib").glob("*/site-packages")
        (packages / "packages.pth").write_text("/srv/packages\n")
        (machine.root / "srv/stage/opt/swipr/.swipr").touch()
        machine.install("DESTDIR=/srv/stage")
        assert files(machine) == before
        staged = machine.root / "srv/stage"
        assert (staged / "usr/local/bin/swiprctl").readlink() == Path("/opt/swipr/bin/swiprctl")
        for command in ("swiprctl", "swiprd"):
            script = (staged / "opt/swipr/bin" / command).read_text()
            assert script.startswith("#!/opt/swipr/bin/python")
            assert "/srv/stage" not in script
            # It is asked for one picture at a time, and has no use for the site module.
            assert script.partition("\n")[0].endswith(" -IS") is (command == "swiprctl")
        assert "/srv/stage" not in (staged / "opt/swipr/pyvenv.cfg").read_text()
        assert (staged / "etc/swipr/swiprd.toml").exists()
    finally:
        machine.stop()
