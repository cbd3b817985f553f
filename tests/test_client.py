"""The blocking client, against a real daemon and against peers that behave badly."""

from __future__ import annotations

import contextlib
import grp
import json
import math
import os
import pwd
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import swiprctl
from swiprctl import Client, SwiprError
from tests.daemon import CHELSEA, COFFEE, Daemon, code_of, exchange
from tests.peer import (
    Behaviour,
    Peer,
    Talk,
    closes_without_answer,
    closes_without_reading,
    drips,
    error,
    full_backlog,
    line,
    never_answers,
    pongs,
    replies,
)

FASTAI = Path(__file__).parent / "fastai"
NOBODY = 65534
A_LITTLE = 1.0
"""Seconds that a call may take beyond its time-out on a busy machine."""

at_line_end = re.compile(r"[\r\n]")


def failure_of(call: Callable[[], object]) -> SwiprError:
    """Return the error that ``call`` raises."""
    with pytest.raises(SwiprError) as caught:
        call()
    return caught.value


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Give up root for a while, if we are root: to it no file is forbidden."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture(scope="module")
def cat(daemon: Daemon) -> tuple[float, ...]:
    """The scores of the cat."""
    with daemon.client() as client:
        return client.compute(CHELSEA).scores


def test_the_public_names_are_these() -> None:
    """What can be imported from swiprctl is a promise, so it changes only on purpose."""
    assert swiprctl.__all__ == ["Client", "Result", "SwiprError", "Thumbnail"]
    assert all(hasattr(swiprctl, name) for name in swiprctl.__all__)


# --- answers -------------------------------------------------------------------------------------


def test_compute_returns_what_the_daemon_says(daemon: Daemon) -> None:
    """Scores, labels and model are those on the wire, to the last digit."""
    with daemon.connect() as sock:
        (data,) = exchange(sock, line(path=str(CHELSEA)))
    raw = json.loads(data)
    with daemon.client() as client:
        result = client.compute(CHELSEA)
    assert list(result.scores) == raw["scores"]
    assert list(result.labels) == raw["labels"] == ["other", "animal"]
    assert result.model == raw["model"]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", result.model)
    assert 0 < result.ms < 30_000


def test_compute_tells_pictures_apart(daemon: Daemon, cat: tuple[float, ...]) -> None:
    """On one connection each picture gets scores of its own: a cat's are not a cup's."""
    with daemon.client() as client:
        cup, again = (client.compute(path).scores for path in (COFFEE, CHELSEA))
    assert cat[1] > 0.9
    assert cup[1] < 0.1
    assert again == cat


@pytest.mark.parametrize(
    "form", [str, os.fsencode, Path, os.path.relpath], ids=["str", "bytes", "path", "relative"]
)
@pytest.mark.parametrize("name", [b"cat.png", b"caf\xe9.png", b"two\nlines \x1b.png"])
def test_compute_takes_any_path(
    daemon: Daemon,
    folder: Path,
    cat: tuple[float, ...],
    form: Callable[[str], str | bytes | Path],
    name: bytes,
) -> None:
    """A path may be str, bytes or os.PathLike, relative, and not even UTF-8."""
    path = os.fsdecode(os.fsencode(folder) + b"/" + name)
    shutil.copy(CHELSEA, path)
    with daemon.client() as client:
        assert client.compute(form(path)).scores == cat


def test_ping_and_status_answer(daemon: Daemon) -> None:
    """The daemon answers to ping, and its status is its own."""
    with daemon.client() as client:
        client.ping()
        status = client.status()
    assert status["pid"] == daemon.pid
    assert status["state"] == "ready"


# --- images that cannot be scored ----------------------------------------------------------------


def make_missing(path: Path) -> None:
    """Leave ``path`` alone."""


def make_socket(path: Path) -> None:
    """Bind a socket at ``path``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))


def make_endless_link(path: Path) -> None:
    """Make ``path`` a link to itself."""
    path.symlink_to(path)


def make_cut_off(path: Path) -> None:
    """Write the first part of a picture."""
    path.write_bytes(CHELSEA.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("make", "code", "number"),
    [
        (make_missing, "not_found", -2),
        (Path.mkdir, "not_a_file", -3),
        (os.mkfifo, "not_a_file", -3),
        (make_socket, "not_a_file", -3),
        (make_endless_link, "not_a_file", -3),
        (Path.touch, "not_an_image", -3),
        (make_cut_off, "not_an_image", -3),
    ],
)
def test_what_is_no_image_is_named(
    daemon: Daemon, folder: Path, make: Callable[[Path], None], code: str, number: int
) -> None:
    """Each kind of trouble has its code, names the path as it was given, and does not hang."""
    path = folder / "it"
    make(path)
    with daemon.client(timeout=10) as client:
        error = failure_of(lambda: client.compute(path))
        assert (error.code, error.number, error.retryable) == (code, number, False)
        assert error.message == str(error)
        assert error.message.startswith(f"{path}: ")
        client.ping()


@pytest.mark.parametrize("name", ["", str(CHELSEA / "x"), "a\0b", "a\ud800"])
def test_what_cannot_be_a_file_is_not_found(daemon: Daemon, name: str) -> None:
    """A name under which no file can be is not found, like any other that is missing."""
    with daemon.client() as client:
        error = failure_of(lambda: client.compute(name))
    assert (error.code, error.number) == ("not_found", -2)


def test_a_file_that_may_not_be_read_is_told_so(daemon: Daemon, folder: Path) -> None:
    """Whoever asks must be allowed to read the file, whatever the daemon could read."""
    folder.chmod(0o755)
    path = folder / "secret.png"
    shutil.copy(CHELSEA, path)
    path.chmod(0)
    with daemon.client() as client:
        client.ping()
        with unprivileged():
            error = failure_of(lambda: client.compute(path))
    assert (error.code, error.number) == ("permission_denied", -3)
    assert error.message.startswith(f"{path}: ")


# --- what is sent --------------------------------------------------------------------------------

REST = {"engine": "e", "precision": "p", "ms": 1, "decode_ms": 1}
"""What a whole reply has beside scores, labels and model."""

scores = replies(
    lambda number: line(id=number, scores=[0.25, 0.75], labels=["no", "yes"], model="", **REST)
)


def test_the_open_file_goes_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the absolute path goes one descriptor from which the image can be read."""
    shutil.copy(CHELSEA, folder / "cat.png")
    monkeypatch.chdir(folder)
    with Peer(folder, scores) as peer, Client(peer.path, timeout=10) as client:
        assert client.compute("cat.png").scores == (0.25, 0.75)
        (received,) = peer.requests
    assert received.message["path"] == str(folder / "cat.png")
    assert received.images == [CHELSEA.read_bytes()]


def test_the_client_passes_its_time_on(folder: Path) -> None:
    """What it will not wait for any more need not be computed any more."""
    with Peer(folder, never_answers) as peer:
        with Client(peer.path, timeout=0.3) as client, pytest.raises(SwiprError):
            client.compute(CHELSEA)
        assert peer.requests[0].message["timeout_ms"] == 300


def test_nothing_but_an_image_brings_a_descriptor(folder: Path) -> None:
    """Other requests than compute carry their op and no descriptor."""
    with Peer(folder, pongs) as peer, Client(peer.path, timeout=10) as client:
        client.ping()
        assert code_of(client.status) == "bad_reply"
    assert [received.message["op"] for received in peer.requests] == ["ping", "status"]
    assert [received.images for received in peer.requests] == [[], []]


def test_one_connection_serves_many_calls(folder: Path) -> None:
    """Calls share one connection, and each has an id of its own."""
    with Peer(folder, pongs) as peer:
        with Client(peer.path, timeout=10) as client:
            for _ in range(3):
                client.ping()
        ids = [received.message["id"] for received in peer.requests]
        assert len(set(ids)) == 3
        assert peer.connections == 1


def test_a_closed_client_connects_anew(folder: Path) -> None:
    """Closing is not the end: the next call opens another connection."""
    with Peer(folder, pongs) as peer, Client(peer.path, timeout=10) as client:
        client.ping()
        client.close()
        client.close()
        client.ping()
        assert peer.connections == 2


# --- peers that behave badly ---------------------------------------------------------------------


def constant(data: bytes) -> Behaviour:
    """Reply ``data`` to whatever comes."""
    return replies(lambda number: data)


@pytest.mark.parametrize(
    "behave",
    [
        constant(b"garbage\n"),
        constant(b"\n"),
        constant(b"\xff\n"),
        constant(b"[]\n"),
        constant(b"{}\n"),
        constant(line(pong=True)),
        constant(line(id=None, pong=True)),
        constant(line(id="1", pong=True)),
        constant(line(id=True, pong=True)),
        constant(b'{"id":1,"id":1}\n'),
        constant(b'{"id":1,"pong":NaN}\n'),
        replies(lambda number: line(id=number + 1, pong=True)),
        replies(lambda number: line(id=number - 1, pong=True)),
        replies(lambda number: error(number + 1, "not_found", -2)),
        replies(lambda number: line(id=number, error="oops")),
        constant(b"x" * 100_000 + b"\n"),
        constant(b'{"id":1,"x":"' + b"x" * 65536 + b'"}\n'),
        constant(b"[" * 60_000 + b"\n"),
    ],
)
def test_a_reply_that_is_not_ours_is_refused(folder: Path, behave: Behaviour) -> None:
    """What is not a proper reply to this very request is bad_reply; the next call is well."""
    with Peer(folder, behave, pongs) as peer, Client(peer.path, timeout=10) as client:
        error = failure_of(client.ping)
        assert (error.code, error.number, error.retryable) == ("bad_reply", -1, False)
        client.ping()
        assert peer.connections == 2


def test_scores_that_are_not_whole_are_refused(folder: Path) -> None:
    """A reply to compute without proper scores is bad_reply, and nothing is returned."""
    behave = replies(
        lambda number: line(id=number, scores=[0.5], labels=["a", "b"], model="", **REST)
    )
    with Peer(folder, behave) as peer, Client(peer.path, timeout=10) as client:
        assert code_of(lambda: client.compute(CHELSEA)) == "bad_reply"


@pytest.mark.parametrize("status", [None, [], "ready"])
def test_a_status_that_is_no_object_is_refused(folder: Path, status: object) -> None:
    """A reply to status must hold one."""
    behave = replies(lambda number: line(id=number, status=status))
    with Peer(folder, behave) as peer, Client(peer.path, timeout=10) as client:
        assert code_of(client.status) == "bad_reply"


@pytest.mark.parametrize("echoed", [True, False])
def test_an_error_of_the_daemon_is_raised_as_it_came(folder: Path, echoed: bool) -> None:
    """The daemon's own error comes through, with its id or, when it knew none, without."""
    behave = replies(lambda number: error(number if echoed else None, "on_fire", -9, "hot"))
    with Peer(folder, behave) as peer, Client(peer.path, timeout=10) as client:
        failure = failure_of(client.ping)
    assert (failure.code, failure.number, failure.message) == ("on_fire", -9, "hot")


def test_a_second_reply_is_not_taken_for_the_next(folder: Path) -> None:
    """A reply that came twice is refused at the next call, which never returns the old answer."""
    behave = replies(lambda number: line(id=number, status={"number": number}) * 2)
    with Peer(folder, behave) as peer, Client(peer.path, timeout=10) as client:
        first = client.status()["number"]
        assert code_of(client.status) == "bad_reply"
        assert client.status()["number"] == first + 2


def stops_halfway(talk: Talk) -> None:
    """Take one request, send all of the reply but its newline, and leave."""
    request = next(talk.requests())
    talk.sock.sendall(line(id=request["id"], pong=True).removesuffix(b"\n"))


def leaves_after_one(talk: Talk) -> None:
    """Answer one request and leave."""
    request = next(talk.requests())
    talk.sock.sendall(line(id=request["id"], pong=True))


leaving = pytest.mark.parametrize(
    "behave", [closes_without_answer, closes_without_reading, stops_halfway]
)


@leaving
def test_a_lost_request_is_sent_once_more(folder: Path, behave: Behaviour) -> None:
    """When the peer leaves before its reply is whole, its successor gets the same request."""
    with Peer(folder, behave, scores) as peer, Client(peer.path, timeout=10) as client:
        assert client.compute(CHELSEA).scores == (0.25, 0.75)
        assert peer.connections == 2
    *first, last = peer.requests
    assert last.images == [CHELSEA.read_bytes()]
    asked_again = last.message | {"id": 1}
    assert [received for received in first if received != (asked_again, last.images)] == []


@leaving
def test_a_request_that_is_lost_twice_is_given_up(folder: Path, behave: Behaviour) -> None:
    """A peer that leaves twice before its reply is whole is cannot_connect; then all is well."""
    with Peer(folder, behave, behave, pongs) as peer, Client(peer.path, timeout=10) as client:
        error = failure_of(client.ping)
        assert (error.code, error.number, error.retryable) == ("cannot_connect", -4, True)
        assert f"{peer.path} twice closed the connection without an answer" in error.message
        client.ping()
        assert peer.connections == 3


def test_a_daemon_that_was_replaced_between_calls_is_not_missed(folder: Path) -> None:
    """A connection that broke while it was idle costs the next call nothing."""
    with Peer(folder, leaves_after_one) as peer, Client(peer.path, timeout=10) as client:
        for _ in range(3):
            client.ping()
        assert peer.connections == 3


def test_a_daemon_that_left_for_good_is_told(folder: Path) -> None:
    """When nobody listens any more after the connection broke, that is the reason given."""

    def leave_for_good(talk: Talk) -> None:
        next(talk.requests())
        (folder / "peer").unlink()

    with Peer(folder, leave_for_good) as peer, Client(peer.path, timeout=10) as client:
        error = failure_of(client.ping)
    assert error.code == "cannot_connect"
    assert "there is no such socket" in error.message


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, -math.inf, 1e12])
def test_a_time_out_that_cannot_be_waited_for_is_refused(timeout: float) -> None:
    """A client whose calls could not work or not end is not made in the first place."""
    with pytest.raises(ValueError, match="timeout"):
        Client("/nowhere", timeout=timeout)


@pytest.mark.parametrize(
    "behave",
    [never_answers, constant(b'{"id":1,'), drips],
    ids=["silence", "half-a-line", "drips"],
)
def test_a_call_ends_in_time(folder: Path, behave: Behaviour) -> None:
    """However the peer keeps it waiting, a call ends with timeout, and the next one is well."""
    with Peer(folder, behave, pongs) as peer, Client(peer.path, timeout=0.3) as client:
        began = time.monotonic()
        error = failure_of(lambda: client.compute(CHELSEA))
        took = time.monotonic() - began
        assert (error.code, error.number) == ("timeout", -3)
        assert "within 0.3 s" in error.message
        assert 0.3 <= took < 0.3 + A_LITTLE
        client.timeout = 10
        client.ping()
        assert peer.connections == 2


def test_a_full_backlog_ends_in_time(folder: Path) -> None:
    """Where nobody accepts, connecting waits for its turn, and no longer than the time-out."""
    with full_backlog(folder) as path, Client(path, timeout=0.3) as client:
        began = time.monotonic()
        assert code_of(client.ping) == "timeout"
        assert 0.3 <= time.monotonic() - began < 0.3 + A_LITTLE


def test_asking_twice_takes_no_longer(folder: Path) -> None:
    """The second attempt has only the time that the first has left of the call's."""

    def leave_late(talk: Talk) -> None:
        next(talk.requests())
        select.select([talk.sock], [], [], 1.2)

    peer = Peer(folder, leave_late, never_answers)
    with peer, Client(peer.path, timeout=1.5) as client:
        began = time.monotonic()
        assert code_of(client.ping) == "timeout"
        assert 1.5 <= time.monotonic() - began < 1.5 + A_LITTLE
        assert peer.connections == 2


@pytest.mark.parametrize("waiting", ["to connect", "for the answer"])
def test_signals_do_not_disturb_a_call(folder: Path, waiting: str) -> None:
    """Signals that the program handles, even many, neither end a call early nor draw it out."""
    ended = threading.Event()
    main = threading.get_ident()

    def bother() -> None:
        while not ended.wait(0.05):
            signal.pthread_kill(main, signal.SIGUSR1)

    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    bothering = threading.Thread(target=bother)
    try:
        with full_backlog(folder) as full, Peer(folder, never_answers) as peer:
            path = full if waiting == "to connect" else peer.path
            with Client(path, timeout=0.5) as client:
                bothering.start()
                began = time.monotonic()
                error = failure_of(client.ping)
                took = time.monotonic() - began
    finally:
        ended.set()
        bothering.join()
        signal.signal(signal.SIGUSR1, before)
    assert received
    assert error.code == "timeout", error.message
    assert 0.5 <= took < 0.5 + A_LITTLE


def test_a_late_answer_is_never_taken_for_anothers(daemon: Daemon) -> None:
    """After a time-out the next call gets its own answer, not the one that comes late."""
    with daemon.client() as client:
        cup = client.compute(COFFEE).scores
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            client.timeout = 0.3
            assert code_of(lambda: client.compute(CHELSEA)) == "timeout"
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        client.timeout = 30
        assert client.compute(COFFEE).scores == cup


# --- connecting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_missing, "there is no such socket; start swiprd or name its socket with --socket"),
        (make_socket, "nothing listens there; start swiprd"),
        (Path.touch, "that is no socket; name swiprd's with --socket"),
        (make_endless_link, "cannot connect to"),
    ],
)
def test_without_a_daemon_the_message_says_what_to_do(
    folder: Path, make: Callable[[Path], None], words: str
) -> None:
    """No socket, a stale one and something else are told apart, on one line with the path."""
    path = folder / "s"
    make(path)
    with Client(str(path), timeout=10) as client:
        for call in (client.ping, client.status, lambda: client.compute(CHELSEA)):
            error = failure_of(call)
            assert (error.code, error.number, error.retryable) == ("cannot_connect", -4, True)
            assert str(path) in error.message
            assert words in error.message
            assert not at_line_end.search(error.message)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "the path of the daemon's socket is empty"),
        ("/" + "x" * 200, f"cannot connect to /{'x' * 200}: "),
    ],
)
def test_a_path_that_no_socket_can_have_cannot_be_connected(path: str, words: str) -> None:
    """An overlong path is told like any other; an empty one, of a variable that is not set."""
    error = failure_of(Client(path, timeout=10).ping)
    assert error.code == "cannot_connect"
    assert error.message.startswith(words)


def test_without_permission_the_message_says_what_to_do(folder: Path) -> None:
    """A socket that the user may not connect to is told as such."""
    folder.chmod(0o755)
    with Peer(folder, pongs) as peer, Client(peer.path, timeout=10) as client:
        Path(peer.path).chmod(0)
        names = f"{pwd.getpwuid(os.geteuid()).pw_name} and members of the group "
        names += grp.getgrgid(os.getegid()).gr_name
        with unprivileged():
            error = failure_of(client.ping)
    assert (error.code, error.number) == ("cannot_connect", -4)
    assert f"no permission for {peer.path}; it is for the user " + names in error.message


def test_without_descriptors_left_the_message_says_so(folder: Path) -> None:
    """What keeps the program itself from connecting is not blamed on the daemon."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Peer(folder, pongs) as peer, Client(peer.path, timeout=10) as client:
        next_free = os.dup(0)
        os.close(next_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, limits[1]))
        try:
            error = failure_of(client.ping)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert peer.connections == 0
    assert error.code == "cannot_connect"
    assert error.message == f"cannot connect to {peer.path}: Too many open files"


@pytest.mark.parametrize(
    ("named", "own_exists", "expected"),
    [
        ("/named", True, "/named"),
        ("/named", False, "/named"),
        ("", True, "own"),
        (None, True, "own"),
        (None, False, "/run/swipr/swipr.sock"),
    ],
)
def test_the_default_socket_is_the_nearest(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    own_exists: bool,
    expected: str,
) -> None:
    """The named socket comes first, then the user's own where there is one, then the system's."""
    own = folder / "swipr" / "swipr.sock"
    if own_exists:
        own.parent.mkdir()
        make_socket(own)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    if named is None:
        monkeypatch.delenv("SWIPR_SOCKET", raising=False)
    else:
        monkeypatch.setenv("SWIPR_SOCKET", named)
    assert Client().socket_path == (str(own) if expected == "own" else expected)


@pytest.mark.parametrize("runtime", [None, ""])
def test_without_any_hint_the_systems_socket_is_meant(
    monkeypatch: pytest.MonkeyPatch, runtime: str | None
) -> None:
    """With neither variable set it is /run/swipr/swipr.sock."""
    monkeypatch.delenv("SWIPR_SOCKET", raising=False)
    if runtime is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert Client().socket_path == "/run/swipr/swipr.sock"


# --- imports -------------------------------------------------------------------------------------

HEAVY = frozenset(
    {
        "asyncio",
        "dataclasses",
        "logging",
        "pathlib",
        "typing",
        "subprocess",
        "numpy",
        "torch",
        "PIL",
        "swiprd",
    }
)
LIBRARY = frozenset({"swiprctl", "__future__", "struct", "_struct"})


@pytest.mark.parametrize("module", ["swiprctl.client", "swiprctl.__main__"])
def test_an_import_loads_little(module: str) -> None:
    """Beyond socket and json, only these modules are loaded: one more would be a decision."""
    code = (
        "import sys, socket, json\n"
        "before = set(sys.modules)\n"
        f"sys.path.insert(0, {str(Path(swiprctl.__file__).parents[1])!r})\n"
        f"import {module}\n"
        "print(json.dumps([sorted(sys.modules), sorted(set(sys.modules) - before)]))\n"
    )
    # Without the site module, which loads what else is installed here.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)
    loaded, added = (
        {name.partition(".")[0] for name in names} for names in json.loads(done.stdout)
    )
    assert not loaded & HEAVY
    assert added - LIBRARY == set()
    assert "swiprctl" in added
