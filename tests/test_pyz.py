"""swiprctl.pyz: the client as one file."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import swiprctl
from tests.daemon import CHELSEA, COFFEE, Daemon

ROOT = Path(__file__).parent.parent
PYTHON = Path("/usr/bin/python3")
"""The system's own: it has nothing of ours, and starts as a user's would."""


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file, made as README says, by the system's Python."""
    folder = tmp_path_factory.mktemp("pyz")
    tree = folder / "tree"  # make writes beside the sources
    for name in ("swiprctl", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tree)
    make = shutil.which("make")
    assert make is not None, "the tests need make"
    command = [make, "-s", "-C", str(tree), f"PYTHON={PYTHON}", "swiprctl.pyz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shutil.move(tree / "swiprctl.pyz", folder)
    shutil.rmtree(tree)
    yield folder / "swiprctl.pyz"
    shutil.rmtree(folder)


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with the system's Python first."""
    env = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": "/nowhere"}
    return subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=env
    )


def test_it_is_a_program_of_its_own(pyz: Path, daemon: Daemon) -> None:
    """It can be called as it is, and answers as swiprctl does."""
    assert run(pyz, "--version").stdout == f"swiprctl {swiprctl.__version__}\n"
    done = run(pyz, "--socket", daemon.path, "compute", CHELSEA, COFFEE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"0\.0\d+,0\.9\d+  {CHELSEA}\n0\.9\d+,0\.0\d+  {COFFEE}\n", done.stdout)


def test_whoever_may_read_it_may_run_it(pyz: Path) -> None:
    """It is copied to where others find it."""
    mode = pyz.stat().st_mode
    assert mode & 0o111 == (mode & 0o444) >> 2


def test_it_has_every_command(pyz: Path, daemon: Daemon, folder: Path) -> None:
    """Those that need a file of their own, too."""
    options = ("--socket", daemon.path)
    assert run(pyz, *options, "status", "--prometheus").stdout.startswith("# HELP swipr_info")
    page = folder / "report.html"
    done = run(pyz, *options, "report", CHELSEA.parent, "-o", page)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "chelsea.png" in page.read_text()


def test_nothing_that_is_installed_or_set_gets_in_its_way(pyz: Path, folder: Path) -> None:
    """Neither modules beside it, nor those that variables name."""
    for name in ("json.py", "swiprctl.py", "sitecustomize.py"):
        (folder / name).write_text("raise SystemExit('taken from the wrong place')\n")
    moved = Path(shutil.copy(pyz, folder))
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [moved, "--version"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"swiprctl {swiprctl.__version__}\n")


def test_another_python_takes_the_sources(pyz: Path, folder: Path) -> None:
    """Where the compiled modules are not its own."""
    other = folder / "other.pyz"
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(other, "w") as new:
        names = old.namelist()
        for name in names:
            data = old.read(name)
            new.writestr(name, b"\0\0\r\n" + data[4:] if name.endswith(".pyc") else data)
    sources = {name for name in names if name.endswith(".py")}
    assert {f"{name}c" for name in sources} == {name for name in names if name.endswith(".pyc")}
    done = run(sys.executable, other, "--version")
    assert (done.returncode, done.stdout) == (0, f"swiprctl {swiprctl.__version__}\n")


def test_the_same_sources_give_the_same_file(pyz: Path, folder: Path) -> None:
    """Whenever and wherever it is made."""
    again = folder / "again.pyz"
    done = run(PYTHON, ROOT / "tools" / "make_pyz.py", again)
    assert (done.returncode, done.stderr) == (0, "")
    assert again.read_bytes() == pyz.read_bytes()


def cpu_seconds(*command: str) -> float:
    """Return the processor time that a command takes from its start to its end."""
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    env = {"PATH": "/usr/bin:/bin"}
    pid = os.posix_spawn(command[0], command, env, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_it_starts_in_little_more_than_what_it_is_made_of(pyz: Path, daemon: Daemon) -> None:
    """At most 1.5 times as much as Python with socket and json alone, an answer included.

    As processor time, which busy neighbours change least; medians of runs in turn.
    """
    commands = {
        "bare": (str(PYTHON), "-c", "import socket, json"),
        "ping": (str(pyz), "--socket", daemon.path, "ping"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(25):
        for name, command in commands.items():
            seconds[name].append(cpu_seconds(*command))
    bare, ping = (statistics.median(seconds[name]) for name in ("bare", "ping"))
    print(f"swiprctl.pyz ping: {ping / bare:.2f} times a bare start")
    assert ping <= 1.5 * bare
