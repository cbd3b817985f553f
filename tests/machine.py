"""A machine of the tests' own, with a real systemd as its first process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

from swiprctl import Client
from tests.daemon import Daemon, wait_until

PROJECT: Final = Path(__file__).parent.parent
NAMESPACES: Final = ("--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup")
TOOLS: Final = (
    "unshare",
    "nsenter",
    "setpriv",
    "systemctl",
    "/lib/systemd/systemd",
    "/usr/bin/python3",
)


def why_not() -> str | None:
    """Return why no such machine can be had here; None: it can."""
    if os.geteuid() != 0:
        return "only root can boot a systemd of its own"
    missing = [tool for tool in (*TOOLS, "/lib/systemd/systemd") if shutil.which(tool) is None]
    if missing:
        return f"a systemd of its own needs {', '.join(missing)}"
    version = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run(["/usr/bin/python3", "-c", version], capture_output=True, text=True)
    if done.stdout.split() != [str(number) for number in sys.version_info[:2]]:
        return "the system's own Python is another than the one that runs the tests"
    trial = (
        "mount -t tmpfs t /mnt && cd /mnt && mkdir u w m c && mount -t cgroup2 c c &&"
        " mount -t overlay -o lowerdir=/,upperdir=u,workdir=w o m"
    )
    command = ["unshare", "--fork", *NAMESPACES, "sh", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no systemd can be booted: {done.stderr.strip()}"


class Machine:
    """A booted machine; what it writes is gone when it is stopped.

    Attributes:
        root: a folder of this machine through which that one's files are seen.
        said: what ``make install`` printed.
    """

    def __init__(self) -> None:
        self.said = ""
        self._stage = tempfile.mkdtemp(prefix="swipr-machine-")
        script = PROJECT / "tests" / "machine.sh"
        packages = sysconfig.get_path("purelib")
        self._cgroup = _new_cgroup()
        enter = 'test -z "$1" || echo $$ >"$1/cgroup.procs"; shift; exec "$@"'
        # It dies with whoever runs the tests, and leaves this machine's cgroups alone.
        command = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", enter, "-", self._cgroup or ""]
        command += ["unshare", "--fork", "--kill-child", *NAMESPACES]
        self._process = subprocess.Popen(
            [*command, "sh", str(script), self._stage, str(PROJECT), packages],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        Daemon.running.add(self._process.pid)
        try:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            wait_until(lambda: bool(children.read_text()), "the first process")
            self._init = int(children.read_text())
            self.root = Path(f"/proc/{self._init}/root")
            wait_until(self._is_booted, "systemd to boot")
            self.run("systemctl", "start", "systemd-journald.socket", "systemd-journald.service")
        except BaseException:
            self.stop()
            raise

    def _is_booted(self) -> bool:
        assert self._process.poll() is None, "the machine did not boot"
        name = Path(f"/proc/{self._init}/comm").read_text().strip()
        if name != "systemd":
            return False
        return self.run("systemctl", "is-active", "basic.target", check=False).returncode == 0

    def command(self, *words: str, user: str | None = None) -> list[str]:
        """Return the command line that runs ``words`` in the machine, as root or as ``user``."""
        as_user = [] if user is None else ["runuser", "-u", user, "--"]
        enter = ["nsenter", f"--target={self._init}", "--all", "env", "-i"]
        return [*enter, "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", *as_user, *words]

    def run(
        self, *words: str, user: str | None = None, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine and return what came of it."""
        command = self.command(*words, user=user)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if check:
            assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, *properties: str) -> list[str]:
        """Return properties of a unit, in the order of their names."""
        flags = [f"--property={name}" for name in properties]
        lines = self.run("systemctl", "show", unit, *flags).stdout.splitlines()
        values = dict(line.split("=", 1) for line in lines)
        return [values[name] for name in properties]

    def configure(self, **settings: object) -> None:
        """Write the settings and have them used."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        path = self.root / "etc/swipr/swiprd.toml"
        path.write_text("\n".join(lines) + "\n")
        self.run("systemctl", "reload-or-restart", "swipr.service")

    def journal(self, *words: str) -> str:
        """Return what the service has logged."""
        return self.run("journalctl", "--unit=swipr.service", "--no-pager", *words).stdout

    def client(self, timeout: float = 60) -> Client:
        """Return a client of the machine's daemon, which is root's."""
        return Client(str(self.root / "run/swipr/swipr.sock"), timeout=timeout)

    def install(self, *variables: str) -> None:
        """Run ``make install`` there."""
        words = ["make", "-C", "/srv/project", "install", "PYTHON=/usr/bin/python3", *variables]
        # Nothing is reached from there: setuptools must do as it is here.
        self.said = self.run("env", "PIP_NO_BUILD_ISOLATION=0", *words, timeout=170).stdout

    def stop(self) -> None:
        """End the machine and everything in it."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        Daemon.running.discard(self._process.pid)
        os.rmdir(self._stage)
        if self._cgroup is not None:
            _remove_cgroup(self._cgroup)


def _new_cgroup() -> str | None:
    """Return the folder of a cgroup of the machine's own; None: they cannot be had."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2":
            cgroup = tempfile.mkdtemp(prefix="swipr-machine-", dir=place)
            os.chmod(cgroup, 0o755)  # noqa: S103 - users have managers of their own below
            return cgroup
    return None


def _remove_cgroup(top: str) -> None:
    def is_gone() -> bool:
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):  # its last process is not quite gone
                os.rmdir(folder)
        return not os.path.exists(top)

    wait_until(is_gone, f"{top} to be empty", 10)
