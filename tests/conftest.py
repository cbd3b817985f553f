"""What every test shares: a place, a daemon, and a look at what is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon

# Torchvision, which tests import too, would have torch make a folder in /tmp.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/")

StartDaemon = Callable[..., Daemon]


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later look for leftovers: half of a run's time."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the long form of ``tests/faults``."""
    parser.addoption("--soak", action="store_true", help="try faults for hours, not minutes")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a descriptor, a child process or a thread behind."""
    before = _held()
    yield
    gc.collect()
    after = _held()
    left = {kind: after[kind] - before[kind] for kind in after}
    assert not any(left.values()), f"the test left behind: {left}"


def _held() -> dict[str, set[str]]:
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            descriptors.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    children = {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
        if int(pid) not in Daemon.running
    }
    threads = {thread.name for thread in threading.enumerate()}
    return {"descriptors": descriptors, "processes": children, "threads": threads}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the test's own, with a path short enough for a Unix socket."""
    path = tempfile.mkdtemp(prefix="swipr-")
    yield Path(path)
    shutil.rmtree(path)


@pytest.fixture
def start_daemon(folder: Path) -> Iterator[StartDaemon]:
    """Start a daemon of the test's own; it must end well when it is stopped."""
    daemons: list[Daemon] = []

    def start(*flags: str, **options: object) -> Daemon:
        place = Path(tempfile.mkdtemp(dir=folder))
        daemons.append(Daemon(place, *flags, **options))  # type: ignore[arg-type]
        return daemons[-1]

    yield start
    for daemon in daemons:
        if daemon.pid in Daemon.running:
            assert daemon.stop() == 0, daemon.log()


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """One daemon with its model loaded, for all tests that leave it as it was."""
    path = Path(tempfile.mkdtemp(prefix="swipr-"))
    daemon = Daemon(path)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        assert daemon.stop() == 0, daemon.log()
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: beside busy neighbours, two wait for one another."""
    import torch  # only for the tests that have it already

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
