"""A machine that runs out of things, or takes them away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swiprd.bundle import read_bundle, write_bundle
from swiprd.compiled import FormCache, this_host
from swiprd.config import DEFAULT_BUNDLE
from swiprd.safetensors import write_whole
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, Daemon, can_compute, code_of, read_lines, wait_until
from tests.faults.conftest import Trial

# --- descriptors ---------------------------------------------------------------------------------


def test_a_front_without_descriptors(start_daemon: StartDaemon, trial: Trial) -> None:
    """Clients wait or are told busy, those who are served go on, and afterwards all is well."""
    daemon = start_daemon("--max-per-user=256")
    daemon.wait_ready()
    before = daemon.descriptors_at_rest()
    _, most = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    for _ in range(trial.count(short=5, long=50)):
        trial.tried += 1
        with daemon.connect() as served:
            assert ask(served, b'{"op":"ping"}\n') == "pong"
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (daemon.descriptors_soon(), most))
            with contextlib.ExitStack() as stack:
                waiting = [stack.enter_context(daemon.connect()) for _ in range(20)]
                for sock in waiting:
                    sock.sendall(b'{"op":"ping"}\n')
                assert ask(served, b'{"op":"ping"}\n') == "pong"
                assert ask(served, b'{"path":"%s"}\n' % os.fsencode(CHELSEA)) == "busy"
                with CHELSEA.open("rb") as picture:
                    socket.send_fds(served, [b"{}\n"], [picture.fileno()])
                    assert reply_of(served) == "busy"
                wait_until(lambda: "cannot accept clients" in daemon.log(), "a full front", 5)
                resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (1024, most))
                assert [reply_of(sock) for sock in waiting] == ["pong"] * len(waiting)
                assert ask(served, b'{"path":"%s"}\n' % os.fsencode(CHELSEA)) == "scores"
        trial.survived += 1
    wait_until(lambda: daemon.descriptors_at_rest() == before, "all descriptors back")


def test_a_worker_that_cannot_be_started_for_want_of_descriptors(
    start_daemon: StartDaemon, trial: Trial
) -> None:
    """The front says unavailable, and why; when there are some again it serves."""
    trial.tried += 1
    daemon = start_daemon()
    daemon.wait_ready()
    _, most = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    with daemon.client() as client:
        client.compute(CHELSEA)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (daemon.descriptors_soon() - 2, most))
        (worker,) = daemon.worker_pids()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: client.status()["state"] == "failed", "a failed start")
        assert "Too many open files" in str(client.status()["reason"])
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (1024, most))
        wait_until(lambda: scored(daemon), "a worker")
    trial.survived += 1


def ask(sock: socket.socket, line: bytes) -> str:
    """Send a request and return the field that its reply has, or the code of its error."""
    sock.sendall(line)
    return reply_of(sock)


def reply_of(sock: socket.socket) -> str:
    (line,) = read_lines(sock, 1)
    reply = json.loads(line)
    return str(reply["error"]["code"]) if "error" in reply else str(list(reply)[1])


def scored(daemon: Daemon) -> bool:
    with daemon.client() as client:
        return can_compute(client)


# --- the cache -----------------------------------------------------------------------------------


def compile_into(cache: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Compile the default bundle with its forms in ``cache``."""
    command = [sys.executable, "-P", "-m", "swiprd", "compile", DEFAULT_BUNDLE, "--cache-dir"]
    return subprocess.run([*before, *command, str(cache)], capture_output=True, text=True)


@pytest.fixture
def full_disk(folder: Path) -> Iterator[Path]:
    """A folder on a disk of one page."""
    place = folder / "full"
    place.mkdir()
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=4k", "none", place],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["/bin/umount", place], check=True)


def test_a_cache_on_a_full_disk(
    full_disk: Path, folder: Path, start_daemon: StartDaemon, trial: Trial
) -> None:
    """A form that does not fit is an error that names it, and leaves nothing; the daemon serves."""
    trial.tried += 1
    library = folder / "library"
    library.write_bytes(os.urandom(100_000))
    forms = FormCache(str(full_disk), this_host(1))
    forms.prepare()
    with pytest.raises(OSError, match="No space left on device") as failure:
        forms.keep(str(library), "sha256:0", "fp32")
    assert str(failure.value.filename).startswith(f"{full_disk}/")
    with pytest.raises(OSError, match="No space left on device") as failure:
        write_whole(f"{full_disk}/model.safetensors", [library.read_bytes()])
    assert failure.value.filename == f"{full_disk}/model.safetensors"
    assert list(full_disk.iterdir()) == []
    daemon = start_daemon("--cache-dir", str(full_disk))
    assert scored(daemon)
    assert daemon.status()["engine"] == "eager"
    trial.survived += 1


def test_a_cache_that_is_not_ours(folder: Path, start_daemon: StartDaemon, trial: Trial) -> None:
    """Compiling says that it may not write there; the daemon serves without it."""
    trial.tried += 1
    cache = folder / "cache"
    cache.mkdir()
    powerless: tuple[str, ...] = ()
    if os.geteuid() == 0:
        os.chown(cache, 65534, 65534)
        powerless = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    cache.chmod(0o500)
    done = compile_into(cache, *powerless)
    assert done.returncode == 1
    assert f"no permission to write to {cache}; " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(cache.iterdir()) == []
    cache.chmod(0)
    swiprd = [*powerless, sys.executable, "-P", "-m", "swiprd", "--socket", "SOCKET"]
    daemon = start_daemon(command=[*swiprd, "--cache-dir", str(cache)])
    assert scored(daemon)
    trial.survived += 1


# --- the bundle ----------------------------------------------------------------------------------


@pytest.fixture
def bundle(folder: Path) -> Path:
    """A bundle that may be spoiled."""
    path = folder / "model.safetensors"
    shutil.copy(DEFAULT_BUNDLE, path)
    return path


@pytest.mark.parametrize("how", ["deleted", "cut off"])
def test_a_bundle_that_goes_while_it_is_served(
    how: str, bundle: Path, start_daemon: StartDaemon, trial: Trial
) -> None:
    """The worker has it whole; the next one says why it cannot, and serves once it is back."""
    trial.tried += 1
    daemon = start_daemon("--model", str(bundle))
    daemon.wait_ready()
    answer = answer_of(daemon)
    data = bundle.read_bytes()
    match how:
        case "deleted":
            bundle.unlink()
        case "cut off":
            os.truncate(bundle, len(data) // 2)
    assert answer_of(daemon) == answer
    (worker,) = daemon.worker_pids()
    os.kill(worker, signal.SIGKILL)
    with daemon.client() as client:
        wait_until(lambda: client.status()["state"] == "failed", "a failed start")
        assert code_of(lambda: client.compute(CHELSEA)) == "unavailable"
        assert str(bundle) in str(client.status()["reason"])
    bundle.write_bytes(data)
    wait_until(lambda: scored(daemon), "a worker")
    assert answer_of(daemon) == answer
    trial.survived += 1


def test_a_bundle_that_is_replaced(bundle: Path, start_daemon: StartDaemon, trial: Trial) -> None:
    """Every reply names the model that gave its scores, the old one until it is reloaded."""
    trial.tried += 1
    daemon = start_daemon("--model", str(bundle))
    daemon.wait_ready()
    _, old = answer_of(daemon)
    found = read_bundle(str(bundle))
    manifest = dataclasses.replace(found.manifest, labels=("OTHER", "ANIMAL"))
    write_bundle(str(bundle), manifest, found.tensors)
    assert answer_of(daemon)[1] == old
    with daemon.client(timeout=60) as client:
        client.reload()
    labels, new = answer_of(daemon)
    assert labels == ("OTHER", "ANIMAL")
    assert new == read_bundle(str(bundle)).digest != old
    trial.survived += 1


def answer_of(daemon: Daemon) -> tuple[tuple[str, ...], str]:
    """Return the labels and the model of an answer, whose scores must be right."""
    with daemon.client() as client:
        result = client.compute(CHELSEA)
    assert result.scores[1] > 0.9
    return result.labels, result.model
