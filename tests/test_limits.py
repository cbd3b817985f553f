"""Limits of the running daemon: each one is held to at its value, and told one past it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from swiprctl import SwiprError
from swiprd.server import RESERVED
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, SWIPRD, Daemon, exchange, read_lines, wait_until


def ask(connection: socket.socket, **request: Any) -> dict[str, Any]:
    """Send one request and return its reply."""
    connection.sendall(json.dumps(request).encode() + b"\n")
    (line,) = read_lines(connection, 1)
    reply: dict[str, Any] = json.loads(line)
    return reply


def refusal(connection: socket.socket) -> dict[str, Any]:
    """Return the error that the daemon says before it closes the connection."""
    (line,) = read_lines(connection)
    found: dict[str, Any] = json.loads(line)["error"]
    return found


# --- connections ---------------------------------------------------------------------------------


def test_one_connection_too_many_is_busy(start_daemon: StartDaemon) -> None:
    """It is told so, and when to try again; as soon as another one has gone there is room.

    Whoever may reload, as we, has four places more.
    """
    daemon = start_daemon("--max-connections", "1")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(daemon.connect()) for _ in range(1 + RESERVED)]
        assert all(ask(connection, op="ping")["pong"] for connection in held)
        with daemon.connect() as late:
            error = refusal(late)
        assert (error["code"], error["retryable"]) == ("busy", True)
        assert "5 clients are connected, and no more may be (max_connections)" in error["message"]
        assert error["retry_after_ms"] > 0
        held[0].close()
        wait_until(lambda: ping_is_answered(daemon), "room for another")
        assert ask(held[1], op="ping")["pong"]
    assert daemon.log().count("a client of user 0 is refused: 5 clients are connected") == 1


def test_strangers_do_not_keep_an_administrator_out(
    start_daemon: StartDaemon, folder: Path
) -> None:
    """They have all places but four; who may reload can see what is going on, and mend it."""
    if os.geteuid() != 0:
        pytest.skip("only root can ask as somebody else")
    daemon = start_daemon("--max-connections", "2")
    for path in (folder, Path(daemon.path).parent):
        path.chmod(0o755)
    Path(daemon.path).chmod(0o666)
    program = (
        "import os, sys; from swiprctl import Client; os.setuid(65534);"
        "clients = [Client(sys.argv[1]) for _ in range(3)]\n"
        "for client in clients[:2]: client.ping()\n"
        "print('full', flush=True); sys.stdin.read()\n"
        "try: clients[2].ping()\n"
        "except Exception as error: print(error)"
    )
    command = [sys.executable, "-P", "-c", program, daemon.path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as strangers:
        assert strangers.stdout is not None
        assert strangers.stdout.readline() == "full\n"
        assert daemon.status()["connections"] == 3
        said, _ = strangers.communicate()
    assert said.startswith("2 clients are connected, and no more may be")


def test_those_who_are_refused_take_nobodys_place(start_daemon: StartDaemon) -> None:
    """However many there are who do not take the hint: only those who are served count."""
    daemon = start_daemon("--max-per-user", "3")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(daemon.connect()) for _ in range(3)]
        assert all(ask(connection, op="ping")["pong"] for connection in held)
        refused = [stack.enter_context(daemon.connect()) for _ in range(200)]
        assert "user 0 has 3 connections, and" in refusal(refused[0])["message"]
        descriptors = daemon.descriptors()
        assert ask(held[0], op="status")["status"]["connections"] == 3
        assert descriptors < 100  # the others are sent away without a word
        held.pop().close()
        wait_until(lambda: ping_is_answered(daemon), "room for another")


def ping_is_answered(daemon: Daemon) -> bool:
    with daemon.connect() as connection, contextlib.suppress(OSError, ValueError):
        return "pong" in ask(connection, op="ping")
    return False


def test_one_user_cannot_take_all_connections(start_daemon: StartDaemon, folder: Path) -> None:
    """One too many of a user's is refused, another user's are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can ask as somebody else")
    daemon = start_daemon("--max-per-user", "2")
    for path in (folder, Path(daemon.path).parent):
        path.chmod(0o755)
    Path(daemon.path).chmod(0o666)
    with daemon.connect() as one, daemon.connect() as two:
        assert ask(one, op="ping")["pong"]
        assert ask(two, op="ping")["pong"]
        with daemon.connect() as three:
            assert (
                "user 0 has 2 connections, and may have no more (max_per_user)"
                in refusal(three)["message"]
            )
        program = (
            "import os, sys; from swiprctl import Client;"
            "os.setuid(65534); Client(sys.argv[1]).ping()"
        )
        subprocess.run([sys.executable, "-P", "-c", program, daemon.path], check=True)


@pytest.mark.parametrize("sent", [b"", b'{"op":'])
def test_a_client_that_asks_nothing_is_sent_away(start_daemon: StartDaemon, sent: bytes) -> None:
    """After line_timeout it hears why; who has asked once may wait as long as it likes."""
    daemon = start_daemon("--line-timeout", "0.5")
    began = time.monotonic()
    with daemon.connect() as asked, daemon.connect() as silent:
        assert ask(asked, op="ping")["pong"]
        silent.sendall(sent)
        error = refusal(silent)
        assert error["code"] == "timeout"
        assert error["message"] == "no whole request came within 0.5 s"
        assert 0.5 <= time.monotonic() - began < 5
        assert ask(asked, op="ping")["pong"]


def test_a_client_that_takes_no_reply_is_left(start_daemon: StartDaemon) -> None:
    """After reply_timeout its connection is closed, and nobody else has waited for it."""
    daemon = start_daemon("--reply-timeout", "0.5")
    with daemon.connect() as greedy, daemon.client() as client:
        client.ping()
        greedy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                greedy.send(b'{"op":"status"}\n' * 100)
        wait_until(lambda: client.status()["connections"] == 1, "it to be left", 10)


def test_requests_in_flight_are_bounded(start_daemon: StartDaemon) -> None:
    """With one at a time replies come in the order of the requests, ids or not."""
    daemon = start_daemon("--max-in-flight", "1")
    daemon.wait_ready()
    requests = [{"id": 1, "path": str(CHELSEA)}, {"id": 2, "op": "ping"}]
    data = b"".join(json.dumps(request).encode() + b"\n" for request in requests)
    with daemon.connect() as connection:
        assert [json.loads(line)["id"] for line in exchange(connection, data)] == [1, 2]


def test_pictures_of_those_who_do_not_read_are_not_held_open(start_daemon: StartDaemon) -> None:
    """Once the answer is known the picture is closed, whether the answer is taken or not."""
    daemon = start_daemon("--max-queue", "1")
    daemon.wait_ready()
    with daemon.connect() as greedy, CHELSEA.open("rb") as picture:
        greedy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # until no reply is taken any more, and so no request either
                socket.send_fds(greedy, [b"{}\n"], [picture.fileno()])
        wait_until(lambda: daemon.status()["queued"] == 0, "nothing that waits")
        # One may be left, of the request that is read next.
        wait_until(lambda: open_pictures(daemon) <= 1, "the pictures to be closed", 10)


def open_pictures(daemon: Daemon) -> int:
    found = 0
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(link) == str(CHELSEA)
    return found


def test_the_limit_on_open_files_is_raised_as_far_as_clients_need(
    start_daemon: StartDaemon,
) -> None:
    """Where it cannot be, the log says so."""
    program = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    for hard, allowed in ((2000, 1704), (500, 500)):
        limit = f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (300, {hard}));"
        words = ["--socket", "SOCKET", "--max-connections", "500"]
        command = [sys.executable, "-c", limit + program, *SWIPRD, *words]
        daemon = start_daemon(command=command)
        daemon.status()  # its socket is there before the limit is raised
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
        assert re.search(rf"Max open files +{allowed} +{hard} ", limits), limits
        said = f"{hard} open files are allowed, 1704 may be needed: raise LimitNOFILE="
        assert (said in daemon.log()) == (allowed < 1704)


# --- lines ---------------------------------------------------------------------------------------


def padded(length: int) -> bytes:
    line = b'{"op":"ping","x":"' + b"x" * length
    return line[: length - 3] + b'"}\n'


def test_line_and_depth_have_limits_that_can_be_set(start_daemon: StartDaemon) -> None:
    """The longest and the deepest are served, one byte and one level more are not."""
    daemon = start_daemon("--max-line-bytes", "1024", "--max-depth", "3")
    with daemon.connect() as connection:
        assert ask(connection, op="ping", x=[[1]])["pong"]
        assert "nested deeper than 3" in ask(connection, op="ping", x=[[[1]]])["error"]["message"]
        connection.sendall(padded(1024))
        assert json.loads(read_lines(connection, 1)[0])["pong"]
        connection.sendall(padded(1025))
        assert refusal(connection)["code"] == "too_long"


# --- time ----------------------------------------------------------------------------------------


def test_a_request_may_have_a_deadline_of_its_own(start_daemon: StartDaemon) -> None:
    """When it has passed the answer is timeout; nobody else loses anything, the worker least."""
    daemon = start_daemon()
    daemon.wait_ready()
    (worker,) = daemon.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    try:
        with daemon.connect() as first, daemon.connect() as second:
            began = time.monotonic()
            for connection in (first, second):  # one is at the worker, the other waits behind it
                error = ask(connection, path=str(CHELSEA), timeout_ms=300)["error"]
                assert (error["code"], error["number"]) == ("timeout", -3)
                assert "within timeout_ms, 300" in error["message"]
            assert time.monotonic() - began < 5
    finally:
        os.kill(worker, signal.SIGCONT)
    with daemon.client() as client:
        assert client.compute(CHELSEA).scores[1] > 0.9
        assert client.status()["queued"] == 0
    assert daemon.worker_pids() == [worker]


# --- memory --------------------------------------------------------------------------------------


def test_a_worker_without_memory_says_so(start_daemon: StartDaemon) -> None:
    """With too little address space the model cannot be loaded, and the daemon stays."""
    daemon = start_daemon("--max-worker-mib", "1000")
    with daemon.client(timeout=60) as client:
        with pytest.raises(SwiprError) as failure:
            client.compute(CHELSEA)
        assert failure.value.code == "unavailable"
        assert "max_worker_mib" in failure.value.message
        client.ping()


# --- who -----------------------------------------------------------------------------------------


def test_admin_users_may_reload(start_daemon: StartDaemon, folder: Path) -> None:
    """Who is named may, beside root and the daemon's own user."""
    if os.geteuid() != 0:
        pytest.skip("only root can ask as somebody else")
    daemon = start_daemon("--admin-users", "nobody,no-such-user")
    daemon.wait_ready()
    for path in (folder, Path(daemon.path).parent):
        path.chmod(0o755)
    Path(daemon.path).chmod(0o666)
    program = (
        "import os, sys; from swiprctl import Client;"
        "os.setuid(65534); Client(sys.argv[1], timeout=60).reload()"
    )
    subprocess.run([sys.executable, "-P", "-c", program, daemon.path], check=True)
    assert "admin_users: there is no user 'no-such-user'" in daemon.log()
    assert "user 65534, process" in daemon.log()


def test_no_status_tells_what_others_have_scored(start_daemon: StartDaemon, folder: Path) -> None:
    """Neither a path that was computed or refused, nor one that waits; nor does the log."""
    daemon = start_daemon()
    daemon.wait_ready()
    picture = folder / "private-picture.png"
    picture.write_bytes(CHELSEA.read_bytes())
    (worker,) = daemon.worker_pids()
    with daemon.connect() as other, daemon.connect() as asking:
        assert "scores" in ask(other, path=str(picture))
        assert "error" in ask(other, path=str(folder / "private-nothing"))
        os.kill(worker, signal.SIGSTOP)
        try:
            other.sendall(b'{"path":"%s"}\n' % os.fsencode(picture) * 2)
            wait_until(lambda: daemon.status()["queued"] == 1, "one that waits")
            said = json.dumps([ask(asking, op="status"), ask(asking, op="hello")])
        finally:
            os.kill(worker, signal.SIGCONT)
        assert len(read_lines(other, 2)) == 2
    assert "private" not in said
    assert "private" not in daemon.log()


def test_hello_tells_the_limits(start_daemon: StartDaemon) -> None:
    """A program need not find them out by running into them."""
    daemon = start_daemon("--max-connections", "5", "--max-in-flight", "6", "--max-depth", "7")
    with daemon.connect() as connection:
        limits = ask(connection, op="hello")["hello"]["limits"]
    assert (limits["connections"], limits["in_flight"], limits["depth"]) == (5, 6, 7)
    assert (limits["line_seconds"], limits["reply_seconds"], limits["compute_seconds"]) == (
        30,
        30,
        10,
    )


def test_new_limits_hold_for_those_who_are_connected(
    start_daemon: StartDaemon, folder: Path
) -> None:
    """After a reload hello tells the truth on an old connection, too."""
    settings = folder / "settings"
    settings.write_text("max_line_bytes = 1024")
    daemon = start_daemon("--config", str(settings))
    daemon.wait_ready()
    with daemon.connect() as connection:
        assert ask(connection, op="hello")["hello"]["limits"]["line_bytes"] == 1024
        settings.write_text("max_line_bytes = 8192\nmax_depth = 3")
        assert "status" in ask(connection, op="reload")
        assert ask(connection, op="hello")["hello"]["limits"]["line_bytes"] == 8192
        connection.sendall(padded(8192))
        assert json.loads(read_lines(connection, 1)[0])["pong"]
        assert "error" in ask(connection, op="ping", x=[[[1]]])
        connection.sendall(padded(8193))
        assert refusal(connection)["code"] == "too_long"
