"""What a request costs the client and the front: counted, not timed, so that no neighbour counts.

The bounds leave a little room for another Python; whoever meets one has made the usual way longer.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, Daemon, wait_until

ROOT = Path(__file__).parent.parent
REQUESTS = 50
PAUSE = 0.01
"""Seconds in which the front has done all that it does after a reply."""

# --- the client: instructions, beside those of what others import first --------------------------

USUAL = "import socket, json"
SWIPRCTL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from swiprctl.__main__ import run
run()
"""
LIBRARY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from swiprctl import Client
with Client() as client:
    client.ping() if sys.argv[1] == "ping" else client.compute(sys.argv[2])
os._exit(0)
"""


def instructions(program: str, *words: str, socket_path: str = "") -> int:
    """Return how many instructions a Python program executes, with no site-packages to look at."""
    env = {**os.environ, "SWIPR_SOCKET": socket_path}
    python = [sys.executable, "-I", "-S", "-c", program, *words]
    subprocess.run(python, check=True, capture_output=True, timeout=60, env=env)  # compiles it
    valgrind = shutil.which("valgrind")
    assert valgrind is not None, "the tests need valgrind"
    command = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", *python]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


@pytest.mark.parametrize(
    ("program", "words", "bound"),
    [
        (SWIPRCTL, ("ping",), 0.5),
        (SWIPRCTL, ("compute", str(CHELSEA)), 0.5),
        (LIBRARY, ("ping",), 1.1),
        (LIBRARY, ("compute", str(CHELSEA)), 1.1),
    ],
    ids=["swiprctl ping", "swiprctl compute", "Client.ping", "Client.compute"],
)
def test_a_client_does_little(
    daemon: Daemon, program: str, words: tuple[str, ...], bound: float
) -> None:
    """The command less than half of what it is to import socket and json, which the library does;
    the library hardly more, where argparse would be two tenths.
    """
    usual = instructions(USUAL)
    asked = instructions(program, *words, socket_path=daemon.path)
    print(f"{words[0]}: {asked / usual:.2f} times 'import socket, json'")
    assert asked < bound * usual


# --- the front: calls of functions, Python's and C's ---------------------------------------------

COUNTED = """
import signal, sys
calls = 0
def note(frame, event, function):
    global calls
    calls += event in ("call", "c_call")
def tell(*_):
    print("calls:", calls, file=sys.stderr, flush=True)
signal.signal(signal.SIGUSR1, tell)
from swiprd.__main__ import run
sys.setprofile(note)
run()
"""


@pytest.fixture
def counted(start_daemon: StartDaemon) -> Daemon:
    """A daemon whose front counts what it calls, and tells at SIGUSR1."""
    daemon = start_daemon(command=[sys.executable, "-P", "-c", COUNTED, "--socket", "SOCKET"])
    daemon.wait_ready()
    return daemon


def calls(daemon: Daemon) -> int:
    """Return how many calls its front has made."""
    told = daemon.log().count("calls:")
    daemon.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: daemon.log().count("calls:") > told, "the count of calls")
    return int(re.findall(r"calls: (\d+)", daemon.log())[-1])


def calls_for_one(daemon: Daemon, ask: Callable[[], object]) -> float:
    """Return how many calls the front makes for each of several requests.

    They come when it waits for them: one that is there already costs it little more than half.
    """
    ask()
    before = calls(daemon)
    for _ in range(REQUESTS):
        time.sleep(PAUSE)
        ask()
    return (calls(daemon) - before) / REQUESTS


def test_the_front_does_little_for_a_request(counted: Daemon) -> None:
    """It is in the way of every picture, and of all others while it is at one."""
    with counted.client() as client:
        ping = calls_for_one(counted, client.ping)
        compute = calls_for_one(counted, lambda: client.compute(CHELSEA))
    print(f"{ping:.0f} calls for a ping, {compute:.0f} for a picture")
    assert ping < 320
    assert compute < 815
