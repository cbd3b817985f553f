"""The front, and whatever bytes and descriptors a client can send."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiprctl.protocol import MAX_LINE
from tests.daemon import CHELSEA, Daemon, exchange, read_lines
from tests.faults.conftest import Trial
from tests.faults.oracle import expected_replies
from tests.faults.seeds import SEEDS

ROOT = Path(__file__).parent.parent.parent
FRONT = (sys.executable, "-m", "tests.faults.front")
RUNS = {False: 16_600, True: 940_000}
"""Inputs of the coverage-guided search, in the short and in the long form."""
PING_MS = 100.0
"""Milliseconds within which a ping is answered afterwards."""


class Fds(NamedTuple):
    """Descriptors of what a client may send, and of what it must not."""

    picture: int
    text: int
    folder: int
    pipe: int
    socket: int
    written: int


@contextlib.contextmanager
def descriptors() -> Iterator[Fds]:
    """Open one of each."""
    with contextlib.ExitStack() as undo:
        ends = os.pipe()
        memory = os.memfd_create("written")
        sock = undo.enter_context(socket.socket(socket.AF_UNIX))
        fds = Fds(
            os.open(CHELSEA, os.O_RDONLY),
            os.open(__file__, os.O_RDONLY),
            os.open("/", os.O_RDONLY),
            ends[0],
            sock.fileno(),
            os.open(f"/proc/self/fd/{memory}", os.O_WRONLY),
        )
        for fd in {*fds, *ends, memory} - {sock.fileno()}:
            undo.callback(os.close, fd)
        yield fds


@contextlib.contextmanager
def as_it_was(daemon: Daemon) -> Iterator[None]:
    """Check that afterwards the daemon has what it had before, is well, and answers at once."""
    before, workers = daemon.descriptors_at_rest(), daemon.worker_pids()
    yield
    assert daemon.descriptors_at_rest() == before
    with daemon.client() as client:
        taken = []
        for _ in range(9):
            began = time.perf_counter()
            client.ping()
            taken.append(1000 * (time.perf_counter() - began))
        assert statistics.median(taken) < PING_MS, taken
        assert client.compute(CHELSEA).scores[1] > 0.9
        status: dict[str, Any] = client.status()
    assert daemon.worker_pids() == workers
    assert "internal" not in status["replies"], daemon.log()
    assert "Traceback" not in daemon.log()


# --- cut -----------------------------------------------------------------------------------------


def test_valid_streams_cut_at_every_byte(daemon: Daemon, trial: Trial) -> None:
    """Ended there, every whole line has its reply; only paused there, nothing is lost."""
    with descriptors() as fds, as_it_was(daemon):
        for stream, fd in (
            (b'{"op":"ping"}\n{"op":"hello","id":"h"}\n{"op":"status","id":2}\n', None),
            (b'{"path":"/no/such.png","id":"\\u00e9"}\n{"id":7,"path":"/"}\r\n', None),
            ('{"path":"/caf\N{LATIN SMALL LETTER E WITH ACUTE}","timeout_ms":9}\n'.encode(), None),
            (b'{"op":"compute","x":[{"y":[1.5e3,true,null]}]}\n', fds.text),
            (b'{"path":"chelsea.png"}\n', fds.picture),
            (b'\n{"op":"ping"}\n', None),
        ):
            whole = exchange_with(daemon, [stream], [fd])
            for at in range(1, len(stream)):
                with trial.attempt():
                    ended = exchange_with(daemon, [stream[:at]], [fd])
                    assert len(ended) == expected_replies(stream[:at], MAX_LINE)
                with trial.attempt():
                    paused = exchange_with(daemon, [stream[:at], stream[at:]], [fd, None])
                    assert list(map(without_time, paused)) == list(map(without_time, whole))


def exchange_with(
    daemon: Daemon, pieces: Sequence[bytes], fds: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Send the pieces, each with its descriptor, and return all replies, ordered by their id."""
    with daemon.connect() as sock:
        for piece, fd in zip(pieces, fds, strict=True):
            socket.send_fds(sock, [piece], [] if fd is None else [fd])
            os.sched_yield()
        received = exchange(sock, b"")
    return sorted(map(json.loads, received), key=lambda reply: str(reply["id"]))


def without_time(reply: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in reply.items()
        if key not in ("ms", "decode_ms", "status", "hello")
    }


# --- made up -------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ids = st.integers(-(2**63), 2**63) | st.text(max_size=140) | json_values
requests = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(["ping", "hello", "status", "compute", "relaod", ""]) | json_values,
        "id": ids,
        "path": st.sampled_from(["/none.png", "/", "/dev/null", "here", "/a\0b", "/\ud800"])
        | json_values,
        "timeout_ms": st.integers(-1, 10**10) | json_values,
        "thumbnail": st.integers(15, 257) | json_values,
        "x": json_values,
    },
)
odd_lines = st.sampled_from(
    [
        b"",
        b"\r",
        b"null",
        b'{"id":' + b"9" * 5000 + b"}",
        b'{"id":1e999}',
        b'{"id":"' + b"x" * 129 + b'"}',
        b'{"id":1,"id":2}',
        b'{"x":' + b"[" * 17 + b"]" * 17 + b"}",
        b"[" * 20_000,
        b'{"x":"' + b"y" * (MAX_LINE - 10) + b'"}',
        b'{"op":"ping","x":"' + b"y" * MAX_LINE + b'"}',
        b'\xef\xbb\xbf{"op":"ping"}',
        '{"op":"ping"}'.encode("utf-16"),
    ]
)
lines = st.one_of(
    requests.map(lambda request: json.dumps(request).encode()),
    requests.map(
        lambda request: json.dumps(request, ensure_ascii=False).encode("utf-8", "replace")
    ),
    st.binary(max_size=100).map(lambda data: data.replace(b"\n", b"")),
    odd_lines,
)
endings = st.sampled_from([b"\n"] * 9 + [b""])
streams = st.lists(st.tuples(lines, endings).map(b"".join), min_size=1, max_size=6).map(b"".join)
pieces = st.lists(
    st.tuples(st.integers(1, 200), st.sampled_from([""] * 12 + [*Fds._fields, "two", "many"])),
    max_size=12,
)


# What is found may have four lines of 64 KiB: it must be shown all the same.
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_streams_that_are_made_up(daemon: Daemon, trial: Trial) -> None:
    """One reply for each line, each of them well-formed, whatever is in the lines."""
    count = trial.count(short=3_000, long=60_000)
    with descriptors() as fds:
        sets = {name: [fd] for name, fd in fds._asdict().items()}
        sets |= {"": [], "two": [fds.text, fds.text], "many": [fds.text] * 50}

        @settings(max_examples=count, deadline=None, database=None, derandomize=not trial.soak)
        @given(stream=streams, cuts=pieces)
        def send(stream: bytes, cuts: list[tuple[int, str]]) -> None:
            trial.tried += 1
            with daemon.connect() as sock:
                start = 0
                for size, name in [*cuts, (len(stream), "")]:
                    # A daemon that has said too_long may be gone before all is sent.
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        if piece := stream[start : start + size]:
                            # What is larger than the socket's buffer goes only in part.
                            sent = socket.send_fds(sock, [piece], sets[name])
                            sock.sendall(piece[sent:])
                    start += size
                sock.shutdown(socket.SHUT_WR)
                received = read_lines(sock)
            assert len(received) == expected_replies(stream, MAX_LINE)
            for line in received:
                reply = json.loads(line)
                if "error" in reply:
                    assert reply.keys() == {"id", "error"}
                    assert reply["error"]["code"] != "internal"
                else:
                    assert len(reply) == 2 or len(reply["scores"]) == len(reply["labels"]) == 2
            trial.survived += 1

        with as_it_was(daemon):
            send()


# --- found by coverage ---------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def search(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """Atheris at work on a core of its own, while the tests above use another."""
    folder = tmp_path_factory.mktemp("search")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(seed)
    count = RUNS[bool(request.config.getoption("--soak"))]
    flags = [f"-runs={count}", "-seed=1", "-max_len=1200", "-len_control=0", "-rss_limit_mb=0"]
    command = [*FRONT, *flags, f"-artifact_prefix={folder}/", str(corpus)]
    with (folder / "log").open("w+") as log:
        search = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, text=True, errors="replace"
        )
        search.stderr = log
        Daemon.running.add(search.pid)
        yield search
        search.kill()
        search.wait()
        Daemon.running.discard(search.pid)


def test_streams_that_coverage_leads_to(search: subprocess.Popen[str], trial: Trial) -> None:
    """Atheris looks for inputs that take the front's code where it has not been."""
    search.wait()
    assert search.stderr is not None
    search.stderr.seek(0)
    said = search.stderr.read()
    found = re.search(r"Done (\d+) runs", said)
    assert found is not None, said[-5000:]
    assert search.returncode == 0, said[-5000:]
    trial.tried = trial.survived = int(found[1])
    assert trial.tried >= RUNS[trial.soak]
    cover = [int(number) for number in re.findall(r"cov: (\d+)", said)]
    trial.notes["branches of the front seen"] = cover[-1]
    assert cover[-1] > cover[0], "coverage has led nowhere"


def test_a_fault_of_the_front_would_be_found(folder: Path) -> None:
    """The same program fails when a reply is missing: here one that is expected in vain."""
    program = (
        "import runpy, tests.faults.oracle as o; real = o.expected_replies;"
        "o.expected_replies = lambda s, m: real(s, m) + (s.count(b'ping') > 1);"
        "runpy.run_module('tests.faults.front', run_name='__main__')"
    )
    seed = folder / "seed"
    seed.write_bytes(b'\0{"op":"ping"}\n{"op":"ping"}\n')
    command = [sys.executable, "-c", program, f"-artifact_prefix={folder}/", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "2 replies, expected 3" in done.stdout + done.stderr
