"""The wire needs no library: socat, Node and C get the tuple that swiprctl gets."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.daemon import CHELSEA, SWIPRCTL, Daemon

CLIENTS = Path(__file__).parent / "clients"


def run(*command: str, given: bytes = b"") -> str:
    program = shutil.which(command[0])
    assert program is not None, f"the tests need {command[0]}; CONTRIBUTING.md names its package"
    done = subprocess.run([program, *command[1:]], input=given, capture_output=True, check=True)
    return done.stdout.decode()


def expected(daemon: Daemon) -> str:
    return run(*SWIPRCTL, "--socket", daemon.path, "compute", str(CHELSEA))


def as_tuple(reply: str) -> str:
    return ",".join(f"{score:.6f}" for score in json.loads(reply)["scores"]) + "\n"


def test_socat_gets_the_tuple(daemon: Daemon) -> None:
    """A line from printf through socat is a whole client."""
    line = f'{{"path":"{CHELSEA}"}}\n'.encode()
    reply = run("socat", "-t", "30", "-", f"UNIX-CONNECT:{daemon.path}", given=line)
    assert as_tuple(reply) == expected(daemon)


def test_node_gets_the_tuple(daemon: Daemon) -> None:
    """Node's own modules suffice."""
    assert run("node", str(CLIENTS / "compute.js"), daemon.path, str(CHELSEA)) == expected(daemon)


def test_c_gets_the_tuple_with_a_descriptor(daemon: Daemon, folder: Path) -> None:
    """A page of C sends a descriptor and reads the reply."""
    program = str(folder / "compute")
    run("gcc", "-Wall", "-Wextra", "-Werror", "-o", program, str(CLIENTS / "compute.c"))
    assert as_tuple(run(program, daemon.path, str(CHELSEA))) == expected(daemon)
