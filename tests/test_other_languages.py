"""The wire needs no library: the clients in docs/clients, and a line from a shell."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final

import pytest

from swiprctl import protocol
from swiprctl.defaults import SYSTEM_SOCKET
from swiprctl.terminal import NO_ANSWER_CODES
from tests.daemon import CHELSEA, SWIPRCTL, Daemon
from tests.peer import Behaviour, Peer, Talk, closes_without_answer, full_backlog

CLIENTS: Final = Path(__file__).parent.parent / "docs" / "clients"
SOURCES: Final = {
    "bash": "compute.sh",
    "c": "compute.c",
    "go": "compute.go",
    "node": "compute.js",
}
SENDS_A_DESCRIPTOR: Final = ("c", "go")

Done = subprocess.CompletedProcess[str]


def program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"the tests need {name}; README.md names its package"
    return found


def made_of(language: str, source: Path, folder: Path) -> list[str]:
    """Return the words that run a client; what has to be compiled for that goes to ``folder``."""
    target = str(folder / f"compute-{language}")
    if language == "c":
        flags = ["-Wall", "-Wextra", "-Werror"]
        subprocess.run([program("gcc"), *flags, "-o", target, source], check=True)
    elif language == "go":
        # Its tools are large, and nothing else here wants them.
        if shutil.which("go") is None:
            pytest.skip("go is not there; install Debian's golang-go")
        env = {**os.environ, "GOCACHE": str(folder / "cache"), "CGO_ENABLED": "0", "GOFLAGS": ""}
        subprocess.run([program("go"), "build", "-o", target, source], env=env, check=True)
    else:
        return [program(language), str(source)]
    return [target]


class Client:
    """One of the clients, ready to run.

    Attributes:
        language: what it is written in.
    """

    def __init__(self, language: str, command: Sequence[str]) -> None:
        self.language = language
        self._command = command

    def run(self, *words: str | bytes | Path, stdout: IO[bytes] | None = None, **env: str) -> Done:
        """Run it with ``words`` and with ``env`` beside the environment."""
        return subprocess.run(
            [*self._command, *words],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module", params=SOURCES)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Each of the clients as it is."""
    with tempfile.TemporaryDirectory(prefix="swipr-") as place:
        source = CLIENTS / SOURCES[request.param]
        yield Client(request.param, made_of(request.param, source, Path(place)))


@pytest.fixture
def impatient(client: Client, folder: Path) -> Client:
    """The same client with one second where it has thirty."""
    text = (CLIENTS / SOURCES[client.language]).read_text()
    assert "30" in text
    (folder / SOURCES[client.language]).write_text(text.replace("30", "1"))
    return Client(
        client.language, made_of(client.language, folder / SOURCES[client.language], folder)
    )


def told(done: Done) -> str:
    """Return the code that ``done`` tells on standard error, on one line and with a message."""
    assert done.stdout == ""
    code, colon, message = done.stderr.removesuffix("\n").partition(": ")
    assert colon
    assert message.isascii()
    assert message.isprintable()
    return code


def answers(data: bytes) -> Behaviour:
    """Send ``data`` to each request."""

    def behave(talk: Talk) -> None:
        for _ in talk.requests():
            talk.sock.sendall(data)

    return behave


def says_nothing(talk: Talk) -> None:
    """Leave the client waiting until it goes, whether or not it has ended its sending side."""
    poll = select.poll()
    poll.register(talk.sock, 0)
    poll.poll(30_000)


def expected(daemon: Daemon) -> str:
    command = [*SWIPRCTL, "--socket", daemon.path, "compute", str(CHELSEA)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- with a daemon -------------------------------------------------------------------------------


def test_socat_gets_the_tuple(daemon: Daemon) -> None:
    """A line from printf through socat is a whole client."""
    command = [program("socat"), "-t", "30", "-", f"UNIX-CONNECT:{daemon.path}"]
    line = f'{{"path":"{CHELSEA}"}}\n'.encode()
    done = subprocess.run(command, input=line, capture_output=True, check=True)
    scores = json.loads(done.stdout)["scores"]
    assert ",".join(f"{score:.6f}" for score in scores) + "\n" == expected(daemon)


def test_a_client_prints_what_swiprctl_prints(client: Client, daemon: Daemon) -> None:
    """The tuple and nothing else."""
    done = client.run(CHELSEA, daemon.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected(daemon), "")


@pytest.mark.parametrize(
    "name",
    [
        b"a 'b' \"c\" \\d \\n ${e} *",
        b"two\nlines\n",
        b"\x01\t\x1b[31m\x7f",
        "caf\u00e9 \u732b \U0001f408".encode(),
        b"Latin-1 \xe9, \xc3 and \xed\xb3\xa9",
    ],
    ids=ascii,
)
def test_a_file_may_have_any_name(
    client: Client, name: bytes, daemon: Daemon, folder: Path
) -> None:
    """It is found by it, and an error with it stays one line."""
    if client.language == "node" and b"\xe9," in name:
        pytest.skip("node is not told names that are not UTF-8")
    path = os.path.join(os.fsencode(folder), name)
    assert told(done := client.run(path, daemon.path)) == "not_found"
    assert done.returncode == 1
    shutil.copy(os.fsencode(CHELSEA), path)
    done = client.run(path, daemon.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected(daemon), "")


def test_a_path_may_be_relative(client: Client, daemon: Daemon) -> None:
    """It is the current folder's."""
    done = client.run(os.path.relpath(CHELSEA), daemon.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected(daemon), "")


def test_what_is_no_image_is_told(client: Client, daemon: Daemon, folder: Path) -> None:
    """A text, a folder, a pipe that nobody writes to: each by its code, and at once."""
    (folder / "text").write_text("no image\n")
    os.mkfifo(folder / "pipe")
    for path, code in (
        (folder / "text", "not_an_image"),
        (folder, "not_a_file"),
        (folder / "pipe", "not_a_file"),
        (folder / "none", "not_found"),
    ):
        done = client.run(path, daemon.path)
        assert (told(done), done.returncode) == (code, 1)


def test_the_socket_is_named_by_the_environment_too(client: Client, daemon: Daemon) -> None:
    """An operand comes before it, and the system's socket behind it."""
    assert client.run(CHELSEA, SWIPR_SOCKET=daemon.path).stdout == expected(daemon)
    assert client.run(CHELSEA, daemon.path, SWIPR_SOCKET="/none").stdout == expected(daemon)
    assert SYSTEM_SOCKET in (CLIENTS / SOURCES[client.language]).read_text()


def test_an_answer_that_cannot_be_written_is_a_failure(client: Client, daemon: Daemon) -> None:
    """A full disk does not look like success."""
    with open("/dev/full", "wb") as full:
        done = client.run(CHELSEA, daemon.path, stdout=full)
    assert done.returncode == 1
    assert "No space left" in done.stderr or "no space left" in done.stderr


# --- without one ---------------------------------------------------------------------------------


def test_wrong_usage_is_told(client: Client) -> None:
    """With no operand, and with too many."""
    for words in ([], ["a.png", "/socket", "more"]):
        done = client.run(*words)
        assert (told(done), done.returncode) == ("usage", 2)


def test_without_a_daemon_nothing_is_said_about_the_image(client: Client, folder: Path) -> None:
    """Where there is no socket, where it is none, and where nobody listens."""
    (folder / "file").touch()
    with Peer(folder) as peer:
        pass
    for path in (folder / "none", folder / "file", peer.path):
        done = client.run(CHELSEA, path)
        assert (told(done), done.returncode) == ("cannot_connect", 3)


def test_who_opens_the_image_is_as_the_client_says(client: Client, folder: Path) -> None:
    """It sends a descriptor, or the absolute path."""
    scores = b'{"id":null,"scores":[1,0.25,1e-07],"labels":["a","b","c"]}\n'
    with Peer(folder, answers(scores)) as peer:
        done = client.run(os.path.relpath(CHELSEA), peer.path)
        (received,) = peer.requests
    assert (done.returncode, done.stdout) == (0, "1.000000,0.250000,0.000000\n")
    if client.language in SENDS_A_DESCRIPTOR:
        assert received.images == [CHELSEA.read_bytes()]
    else:
        assert os.path.samefile(received.message["path"], CHELSEA)
        assert received.images == []
    assert received.message["timeout_ms"] == 30_000


def test_errors_have_the_exit_status_that_swiprctl_gives_them(client: Client, folder: Path) -> None:
    """Whatever the message says, an error is never an answer."""
    codes = sorted(protocol.CODES.keys() - protocol.CLIENT_CODES)
    message = 'a"scores":[0.5,0.5] "retryable":true, \\"code":"timeout", \n\u732b \\'
    errors = [protocol.SwiprError(code, message) for code in codes]
    with Peer(folder, *(answers(protocol.encode_error(error)) for error in errors)) as peer:
        for code in codes:
            done = client.run(CHELSEA, peer.path)
            assert told(done) == code
            assert done.returncode == (3 if code in NO_ANSWER_CODES else 1), code
            assert "0.5,0.5] " in done.stderr


@pytest.mark.parametrize(
    "reply",
    [
        b" \n",
        b"null\n",
        b"[0.5]\n",
        b"{}\n",
        b'{"scores":[]}\n',
        b'{"scores":0.5}\n',
        b'{"scores":["a"]}\n',
        b'{"scores":[0.5,}\n',
        b'{"scores":[0.5\n',
        b'{"error":{},"scores":[0.5]}\n',
        b'{"error":{"message":"no code"}}\n',
        b"\x00\xff\n",
    ],
    ids=ascii,
)
def test_what_is_no_reply_is_no_answer(client: Client, reply: bytes, folder: Path) -> None:
    """Of what is neither scores nor an error, nothing reaches standard output."""
    with Peer(folder, answers(reply)) as peer:
        done = client.run(CHELSEA, peer.path)
    assert (told(done), done.returncode) == ("bad_reply", 1)


def test_a_daemon_that_leaves_has_said_nothing(client: Client, folder: Path) -> None:
    """Neither without a reply nor in the middle of one."""

    def leaves_midway(talk: Talk) -> None:
        next(talk.requests())
        talk.sock.sendall(b'{"id":null,"scores":[0.5,0.5],"labels":["a","b"]}')

    with Peer(folder, closes_without_answer, leaves_midway) as peer:
        for _ in range(2):
            done = client.run(CHELSEA, peer.path)
            assert (told(done), done.returncode) == ("cannot_connect", 3)


def test_a_client_that_is_turned_away_may_try_again(client: Client, folder: Path) -> None:
    """The daemon says busy and closes, before or after the request arrives."""
    busy = protocol.encode_error(protocol.SwiprError("busy", "too many"))
    with Peer(folder, lambda talk: talk.sock.sendall(busy)) as peer:
        for _ in range(10):
            done = client.run(CHELSEA, peer.path)
            assert told(done) in ("busy", "cannot_connect")
            assert done.returncode == 3


def test_a_client_does_not_wait_for_ever(impatient: Client, folder: Path) -> None:
    """Neither for a reply nor for somebody who accepts it."""
    with Peer(folder, says_nothing) as peer, full_backlog(folder) as full:
        for path, codes in ((peer.path, ("timeout",)), (full, ("timeout", "cannot_connect"))):
            began = time.monotonic()
            done = impatient.run(CHELSEA, path)
            assert told(done) in codes
            assert done.returncode == 3
            assert time.monotonic() - began < 20
