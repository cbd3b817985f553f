"""The command swiprctl as its users run it: output, errors and exit status."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import swiprctl
from tests.daemon import CHELSEA, SWIPRCTL, Daemon, wait_until
from tests.peer import Behaviour, Peer, closes_without_answer, error, never_answers, replies
from tests.tasks import interruptible

NOT_IMAGE = Path(__file__).parent / "fastai" / "45_not_image.jpg"
UGLY = "two\nlines\r\x1b[31m\u2028\u202e.png"
"""A file name that would break a line, or steer a terminal."""


def environment(**changes: str) -> dict[str, str]:
    """Return the environment without settings for swiprctl, and with ``changes``."""
    kept = {k: v for k, v in os.environ.items() if k not in ("SWIPR_SOCKET", "XDG_RUNTIME_DIR")}
    return {**kept, **changes}


def run(*args: str | bytes | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run swiprctl to its end."""
    return subprocess.run(
        [*SWIPRCTL, *args],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment(**changes),
        timeout=60,
    )


def outcome(*args: str | bytes | Path, **changes: str) -> tuple[int, str]:
    """Run swiprctl and return its exit status and output; what it says must be one clean line."""
    done = run(*args, **changes)
    if done.returncode == 0:
        assert done.stderr == ""
    else:
        assert is_one_message(done.stderr)
    return done.returncode, done.stdout


def is_one_message(text: str) -> bool:
    """Whether ``text`` is one printable line of swiprctl, with a code at its end."""
    return re.fullmatch(r"swiprctl: .+ \([a-z_]+\)\n", text) is not None and text[:-1].isprintable()


@pytest.fixture(scope="module")
def scores(daemon: Daemon) -> str:
    """The scores of the cat, as they should be printed."""
    with daemon.client() as client:
        return ",".join(f"{score:.6f}" for score in client.compute(CHELSEA).scores) + "\n"


# --- answers -------------------------------------------------------------------------------------


def test_compute_prints_the_tuple_and_nothing_else(daemon: Daemon, scores: str) -> None:
    """The scores stand on one line, with six decimals and a comma between them."""
    assert re.fullmatch(r"[01]\.\d{6},[01]\.\d{6}\n", scores)
    assert outcome("--socket", daemon.path, "compute", CHELSEA) == (0, scores)


@pytest.mark.parametrize(
    "args",
    [
        "--socket {socket} --timeout 50 compute {path}",
        "--socket={socket} compute --timeout=50 {path}",
        "--timeout 50 compute {path} --socket {socket}",
        "compute --timeout 50 --socket {socket} {path}",
        "compute {path} --socket {socket} --timeout 50",
        "--socket /nowhere --timeout 0.001 compute --socket {socket} --timeout 50 {path}",
        "--compute {path} --socket {socket} --timeout 50",
        "--socket {socket} --compute={path}",
    ],
)
def test_options_stand_before_or_after_the_command(daemon: Daemon, scores: str, args: str) -> None:
    """Options count on both sides of the command, and the later one wins."""
    filled = args.format(socket=daemon.path, path=CHELSEA).split()
    assert outcome(*filled) == (0, scores)


def test_an_option_before_the_command_is_not_forgotten(folder: Path) -> None:
    """A time-out that stands before the command is the one that is waited for."""
    with Peer(folder, never_answers) as peer:
        done = run("--timeout", "0.25", "ping", "--socket", peer.path)
    assert done.returncode == 3
    assert "within 0.25 s" in done.stderr


def test_ping_prints_pong(daemon: Daemon) -> None:
    """A daemon that answers is one word."""
    assert outcome("ping", "--socket", daemon.path) == (0, "pong\n")


def test_the_socket_is_taken_from_the_environment(daemon: Daemon, scores: str) -> None:
    """SWIPR_SOCKET names the daemon, unless --socket does."""
    assert outcome("compute", CHELSEA, SWIPR_SOCKET=daemon.path) == (0, scores)
    assert outcome("ping", "--socket", daemon.path, SWIPR_SOCKET="/nowhere") == (0, "pong\n")
    assert outcome("ping", SWIPR_SOCKET="/nowhere") == (3, "")


@pytest.mark.parametrize("name", [b"-cat.png", b"--socket", b"caf\xe9.png", os.fsencode(UGLY)])
def test_any_file_name_can_be_given(
    daemon: Daemon, scores: str, folder: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    """After ``--`` a name may begin with a dash; and it need not be text."""
    monkeypatch.chdir(folder)
    shutil.copy(CHELSEA, os.fsdecode(name))
    assert outcome("compute", "--socket", daemon.path, "--", name) == (0, scores)


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--version", f"swiprctl {swiprctl.__version__}"), ("--help", "exit status")],
)
def test_help_and_version_need_no_daemon(flag: str, words: str) -> None:
    """What the command says about itself goes to standard output."""
    done = run(flag, SWIPR_SOCKET="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    assert words in done.stdout


# --- failures ------------------------------------------------------------------------------------


@pytest.fixture(params=["missing", "directory", "fifo", "text"])
def unusable(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, str, str]:
    """A path that cannot be scored, the code it should get, and the script service's number."""
    path = folder / UGLY
    if request.param == "missing":
        return path, "not_found", "-2"
    if request.param == "directory":
        path.mkdir()
    elif request.param == "fifo":
        os.mkfifo(path)
    else:
        shutil.copy(NOT_IMAGE, path)
        return path, "not_an_image", "-3"
    return path, "not_a_file", "-3"


def test_an_image_that_cannot_be_scored_is_told_on_one_line(
    daemon: Daemon, unusable: tuple[Path, str, str]
) -> None:
    """The exit status is 1 and nothing is printed, but one clean line with the path and a code."""
    path, code, _ = unusable
    done = run("compute", path, "--socket", daemon.path)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_message(done.stderr)
    shown = r"two\nlines\r\x1b[31m\u2028\u202e.png"
    assert done.stderr.startswith(f"swiprctl: {path.parent}/{shown}: ")
    assert done.stderr.endswith(f" ({code})\n")


def test_the_script_services_numbers_are_printed(
    daemon: Daemon, unusable: tuple[Path, str, str]
) -> None:
    """With --compute the number stands alone where the scores would, and the reason beside it."""
    path, _, number = unusable
    assert outcome("--compute", path, "--socket", daemon.path) == (1, f"{number}\n")


@pytest.mark.parametrize(
    ("code", "number", "status"),
    [
        ("internal", -1, 1),
        ("bad_request", -1, 1),
        ("worker_died", -3, 1),
        ("on_fire", -1, 1),
        ("timeout", -3, 3),
        ("busy", -1, 3),
        ("unavailable", -1, 3),
        ("shutting_down", -1, 3),
    ],
)
def test_an_error_of_the_daemon_sets_the_exit_status(
    folder: Path, code: str, number: int, status: int
) -> None:
    """What is about the image is 1; what is about the daemon, and may pass, is 3."""
    behave = replies(lambda id_: error(id_, code, number, f"bad\n{UGLY}"))
    with Peer(folder, behave) as peer:
        assert outcome("compute", CHELSEA, "--socket", peer.path) == (status, "")
        assert outcome("--compute", CHELSEA, "--socket", peer.path) == (status, f"{number}\n")


@pytest.mark.parametrize(
    ("behave", "number"),
    [(None, -4), (never_answers, -3), (closes_without_answer, -4)],
    ids=["absent", "silent", "leaving"],
)
def test_without_an_answer_the_exit_status_is_3(
    folder: Path, behave: Behaviour | None, number: int
) -> None:
    """A daemon that is not there, never answers or leaves says nothing about the image."""
    with contextlib.ExitStack() as stack:
        path = str(folder / "none")
        if behave is not None:
            path = stack.enter_context(Peer(folder, behave)).path
        options = ("--socket", path, "--timeout", "0.3")
        assert outcome("ping", *options) == (3, "")
        assert outcome("compute", CHELSEA, *options) == (3, "")
        assert outcome("--compute", CHELSEA, *options) == (3, f"{number}\n")


@pytest.mark.parametrize("command", ["compute", "ping", "status"])
@pytest.mark.parametrize(
    "reply",
    [
        b"garbage\n",
        b'{"id":1}\n',
        b'{"id":1,"status":{}}\n',
        b'{"id":2,"pong":true}\n',
        b'{"id":1,"scores":[1e400,0],"labels":["a","b"],"model":"m","engine":"e","precision":"p","ms":1,"decode_ms":1}\n',
    ],
)
def test_no_reply_brings_a_traceback(folder: Path, command: str, reply: bytes) -> None:
    """Whatever is replied, a command ends with an answer or with one line that says why not."""
    args = [command, CHELSEA] if command == "compute" else [command]
    with Peer(folder, replies(lambda number: reply)) as peer:
        done = run(*args, "--socket", peer.path)
    assert done.returncode in (0, 1)
    assert is_one_message(done.stderr) if done.returncode else done.stderr == ""
    assert command != "compute" or (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    "args",
    [
        "",
        "--timeout 5",
        "frobnicate",
        "ping status",
        "ping ping",
        "compute",
        "compute --files-from",
        "compute - -",
        "compute - --files-from -",
        "compute -0 a",
        "compute --format xml a",
        "compute --top --labels a",
        "compute -x a",
        "report a",
        "report -o r.html",
        "report a -o -",
        "ping -r",
        "status --json --prometheus",
        "status --watch 0",
        "status --watch soon",
        "--compute",
        "--compute a compute b",
        "--compute a ping",
        "ping --sock s",
        "ping --frobnicate",
        "ping --socket",
        "ping --timeout",
        "ping --timeout soon",
        "ping --timeout 0",
        "--timeout -1 ping",
        "ping --timeout nan",
        "ping --timeout inf",
        "ping --timeout 86401",
    ],
)
def test_wrong_usage_is_told_apart(args: str) -> None:
    """A command line that means nothing is exit status 2, with nothing on standard output."""
    done = run(*args.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: swiprctl")
    assert "Traceback" not in done.stderr


def test_a_mistyped_option_is_named_itself() -> None:
    """Not the word after it, which is then taken for a command."""
    done = run("--sokcet", "/x", "compute", "x")
    assert done.returncode == 2
    assert "no option --sokcet, expected one of -h, --help" in done.stderr


def test_wrong_usage_of_a_command_shows_the_usage_of_that_command() -> None:
    """And names its options, not those of others."""
    done = run("compute", "-x")
    assert done.stderr.startswith("usage: swiprctl compute ")
    assert "no option -x, expected one of -h, --help" in done.stderr
    assert "--watch" not in done.stderr
    assert run("report", "-o", "-", "x").stderr.startswith("usage: swiprctl report ")


def test_the_short_way_tells_what_the_other_does(daemon: Daemon, folder: Path) -> None:
    """``ping``, and ``compute`` with one path, are understood without a parser."""
    for args in (("ping",), *(("compute", p) for p in (CHELSEA, NOT_IMAGE, folder, "", "/none"))):
        short = run(*args, SWIPR_SOCKET=daemon.path)
        parsed = run("--socket", daemon.path, *args)
        assert (short.returncode, short.stdout, short.stderr) == (
            parsed.returncode,
            parsed.stdout,
            parsed.stderr,
        )
    assert "-r takes the images in it" in run("compute", folder, SWIPR_SOCKET=daemon.path).stderr


@pytest.mark.parametrize(
    "args", ["ping -r", "status -o f", "compute --watch x", "--socket status compute -x"]
)
def test_an_option_of_another_command_is_told_by_the_command(args: str) -> None:
    """Whatever stands before it."""
    done = run(*args.split())
    command = "compute" if "compute" in args else args.split()[0]
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: swiprctl {command} ")


def test_an_empty_path_is_told_as_such() -> None:
    """It comes from a variable that is not set."""
    done = run("compute", "")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "swiprctl: the path is empty (not_found)\n"


# --- streams and signals -------------------------------------------------------------------------


@pytest.mark.parametrize("short", [True, False], ids=["short", "parsed"])
def test_a_reader_that_left_is_not_a_disaster(daemon: Daemon, short: bool) -> None:
    """When nobody reads the answer any more, the command ends like one killed by SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*SWIPRCTL, *([] if short else ["--socket", daemon.path]), "compute", CHELSEA],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            encoding="utf-8",
            env=environment(SWIPR_SOCKET=daemon.path),
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def shell(redirection: str, *args: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run swiprctl with a stream redirected as a shell does it."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *SWIPRCTL, *args],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment(**changes),
    )


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command", ["compute", "--compute", "ping"])
def test_an_answer_that_cannot_be_written_is_a_failure(
    daemon: Daemon, command: str, redirection: str
) -> None:
    """A full disk or a closed standard output is told on one line, and never exit status 0."""
    args = [command] if command == "ping" else [command, CHELSEA]
    for more in ((), ("--socket", daemon.path)):  # the short way, and by the parser
        done = shell(redirection, *args, *more, SWIPR_SOCKET=daemon.path)
        assert done.returncode == 1
        assert re.fullmatch(r"swiprctl: cannot write the answer: .+\n", done.stderr)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("args", "status", "output"),
    [
        (("compute", "/nowhere/cat.png"), 1, ""),
        (("ping", "--socket", "/nowhere/s"), 3, ""),
        (("--compute", "/nowhere/cat.png"), 1, "-2\n"),
        (("--compute", CHELSEA, "--socket", "/nowhere/s"), 3, "-4\n"),
    ],
    ids=["compute", "ping", "script-path", "script-daemon"],
)
def test_a_message_that_cannot_be_written_changes_nothing_else(
    args: tuple[str | Path, ...], status: int, output: str, redirection: str
) -> None:
    """Without a standard error, exit status and output are as ever: no message gets between."""
    done = shell(redirection, *args)
    assert (done.returncode, done.stdout, done.stderr) == (status, output, "")


@pytest.mark.parametrize("short", [True, False], ids=["short", "parsed"])
@pytest.mark.parametrize("command", ["compute", "--compute"])
def test_control_c_ends_the_wait(folder: Path, command: str, short: bool) -> None:
    """Interrupted while it waits, the command says nothing and ends with exit status 130."""
    with Peer(folder, never_answers) as peer, interruptible():
        process = subprocess.Popen(
            [*SWIPRCTL, *([] if short else ["--socket", peer.path]), command, CHELSEA],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment(SWIPR_SOCKET=peer.path),
        )
        with process:
            try:
                wait_until(lambda: bool(peer.requests), "a request", 30)
                process.send_signal(signal.SIGINT)
                output, message = process.communicate(timeout=30)
            finally:
                process.kill()
    assert (process.returncode, output, message) == (130, "", "")


# --- reload --------------------------------------------------------------------------------------


def test_reload_says_that_it_is_done(daemon: Daemon) -> None:
    """One word, when the new model serves."""
    assert outcome("--socket", daemon.path, "reload") == (0, "reloaded\n")


def test_a_reload_that_fails_has_status_1_and_a_reason(folder: Path) -> None:
    """Unlike no answer, which is 3: the daemon is there, and said no."""
    refuses = replies(lambda number: error(number, "reload_failed", message="not that one"))
    with Peer(folder, refuses) as peer:
        done = run("--socket", peer.path, "reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "swiprctl: not that one (reload_failed)\n"


def test_a_reload_is_waited_for_as_long_as_a_model_may_load(folder: Path) -> None:
    """Its usual time-out is its own; a given one counts."""
    with Peer(folder, never_answers) as peer:
        assert outcome("--socket", peer.path, "--timeout", "0.2", "reload") == (3, "")
    assert "and for reload, 150" in " ".join(run("--help").stdout.split())
