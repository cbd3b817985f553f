"""A client that means harm: what it sends holds up itself and nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from swiprctl.protocol import MAX_LINE, MAX_MARKS, MAX_PATH_BYTES
from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, Daemon, exchange, read_lines, wait_until

LINGER = 3
"""Seconds that the socket of an attacker takes to be closed."""
AT_ONCE = 1.0
"""Seconds in which everybody else is answered."""


@contextlib.contextmanager
def slow_to_close() -> Iterator[int]:
    """Give a descriptor of a socket with unsent data, whose last close waits for ``LINGER``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        with peer, contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            linger = struct.pack("ii", 1, LINGER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            yield sock.fileno()
            undo.pop_all()
            sock.close()  # not the last one, when a daemon has it
            time.sleep(0.3)


def beside_a_ping(sock: socket.socket, fd: int) -> None:
    socket.send_fds(sock, [b'{"op":"ping"}\n'], [fd])


def beside_a_compute(sock: socket.socket, fd: int) -> None:
    socket.send_fds(sock, [b"{}\n"], [fd])


def after_too_long_a_line(sock: socket.socket, fd: int) -> None:
    sock.sendall(b"x" * (MAX_LINE + 10))
    socket.send_fds(sock, [b"x"], [fd])


def many_at_once(sock: socket.socket, fd: int) -> None:
    socket.send_fds(sock, [b'{"op":"ping"}\n'], [fd] * 253)


def unread(sock: socket.socket, fd: int) -> None:
    socket.send_fds(sock, [b"{", b'"op"'], [fd])
    sock.close()


@pytest.mark.parametrize(
    "send", [beside_a_ping, beside_a_compute, after_too_long_a_line, many_at_once, unread]
)
def test_a_descriptor_that_is_slow_to_close_holds_up_nobody(
    send: Callable[[socket.socket, int], None], start_daemon: StartDaemon
) -> None:
    """Not the event loop, and not those who send descriptors of their own."""
    daemon = start_daemon()
    daemon.wait_ready()
    before = daemon.descriptors_at_rest()
    for _ in range(3):
        with daemon.connect() as attacker:
            with slow_to_close() as fd:
                send(attacker, fd)
            began = time.monotonic()
            with daemon.client() as client:
                client.ping()
            assert time.monotonic() - began < AT_ONCE
    with daemon.client() as client:
        assert client.compute(CHELSEA).scores[1] > 0.9
    wait_until(lambda: daemon.descriptors_at_rest() == before, "all descriptors to be closed", 20)


def test_long_lines_of_many_clients_take_turns_with_the_rest(start_daemon: StartDaemon) -> None:
    """Sixteen connections with the costliest lines there are: a ping is still answered."""
    daemon = start_daemon()
    costly = b'{"x":[' + b"{}," * (MAX_MARKS // 2 - 10) + b"0]}"
    costly += b" " * (MAX_LINE - 1 - len(costly)) + b"\n"
    enough = threading.Event()

    def flood() -> None:
        with daemon.connect() as sock, contextlib.suppress(OSError):
            while not enough.is_set():
                sock.sendall(costly)
                sock.recv(65536)

    threads = [threading.Thread(target=flood) for _ in range(16)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        taken = []
        for _ in range(10):
            began = time.monotonic()
            with daemon.client() as client:
                client.ping()
            taken.append(time.monotonic() - began)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert sorted(taken)[5] < AT_ONCE, taken


@pytest.mark.parametrize("more", [0, 1])
def test_a_request_has_so_many_values_and_no_more(more: int, daemon: Daemon) -> None:
    """At the limit it is served, one past it refused before it is parsed."""
    line = b'{"op":"ping","x":[' + b"0," * (MAX_MARKS - 3 + more) + b"0]}\n"
    with daemon.connect() as sock:
        reply = json.loads(exchange(sock, line)[0])
    if more:
        wanted = f"more than {MAX_MARKS} brackets, braces and commas in one request"
        assert reply["error"]["message"] == wanted
    else:
        assert reply["pong"]


@pytest.mark.parametrize("more", [0, 1])
def test_a_path_has_so_many_bytes_and_no_more(more: int, daemon: Daemon) -> None:
    """In UTF-8, as a file system counts them, with a descriptor or without."""
    path = (
        "/" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * ((MAX_PATH_BYTES - 2) // 2) + "x" * (1 + more)
    )
    assert len(path.encode()) == MAX_PATH_BYTES + more
    with daemon.connect() as sock:
        reply = json.loads(exchange(sock, json.dumps({"path": path}).encode() + b"\n")[0])
    assert reply["error"]["code"] == ("bad_request" if more else "not_a_file")


def test_a_connection_that_holds_its_own_end_goes(start_daemon: StartDaemon) -> None:
    """Its client is gone and no end of the stream can ever come: the begun line's time runs out."""
    daemon = start_daemon("--line-timeout", "0.5")
    before = daemon.descriptors_at_rest()
    for _ in range(10):
        with daemon.connect() as sock:
            sock.sendall(b'{"op":"ping"}\n')
            read_lines(sock, 1)
            socket.send_fds(sock, [b"{"], [sock.fileno()])
    with daemon.client() as client:
        assert client.status()["connections"] == 11
    wait_until(lambda: daemon.descriptors_at_rest() == before, "them to go", 10)


def test_a_line_that_is_begun_must_be_finished(start_daemon: StartDaemon) -> None:
    """The client hears why; what it has asked before is answered."""
    daemon = start_daemon("--line-timeout", "0.5")
    with daemon.connect() as sock:
        sock.sendall(b'{"op":"ping","id":1}\n')
        assert json.loads(read_lines(sock, 1)[0])["pong"]
        time.sleep(1)  # between two lines it may take its time
        sock.sendall(b'{"op":"ping","id":2}\n{"op":')
        first, second = map(json.loads, read_lines(sock))
    assert first == {"id": 2, "pong": True}
    assert second["error"]["message"] == "no whole request came within 0.5 s"


def test_the_memory_that_is_held_for_those_who_do_not_read_is_bounded(
    start_daemon: StartDaemon,
) -> None:
    """Replies that are not taken do not hold the requests that they answer."""
    daemon = start_daemon()
    path = "/" + "\N{GRINNING FACE}" * 15_000  # four bytes each, on the wire and in memory
    fields = json.dumps({"path": path}, ensure_ascii=False).encode() + b"\n"
    before = resident(daemon)
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            sock = stack.enter_context(daemon.connect())
            sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                while True:  # until the daemon reads no more
                    sock.sendall(fields)
        assert daemon.status()["connections"] == 17
        gained = resident(daemon) - before
    assert gained < 30 * 2**20, f"{gained >> 20} MiB"


def resident(daemon: Daemon) -> int:
    with open(f"/proc/{daemon.pid}/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
