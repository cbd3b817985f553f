"""The daemon as its clients meet it: swiprd.server and swiprd.connection, with a real worker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from swiprctl import Client, SwiprError
from swiprd.config import DEFAULT_BUNDLE
from tests.conftest import StartDaemon
from tests.daemon import (
    CHELSEA,
    COFFEE,
    PICTURES,
    SWIPRD,
    Daemon,
    can_compute,
    code_of,
    exchange,
    read_lines,
    wait_until,
)


def lines(*requests: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def replies(received: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in received]


def unwatched(*command: str) -> subprocess.Popen[bytes]:
    """Start a daemon whose start or end is itself the point."""
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def without_ms(reply: bytes) -> bytes:
    """Return a raw reply up to the one field that differs from time to time."""
    return reply[: reply.index(b'"ms"')]


def open_files(daemon: Daemon) -> list[str]:
    """Return the pictures that the daemon's processes have open."""
    links = [
        link
        for pid in (daemon.pid, *daemon.worker_pids())
        for link in Path(f"/proc/{pid}/fd").iterdir()
    ]
    targets = []
    for link in links:
        with contextlib.suppress(FileNotFoundError):  # closed while we looked
            targets.append(os.readlink(link))
    return [target for target in targets if target.startswith(str(PICTURES))]


# --- the front -----------------------------------------------------------------------------------


def test_ping_is_answered_while_the_model_loads(start_daemon: StartDaemon) -> None:
    """Within half a second of its start the daemon answers, though it has no model yet."""
    taken = []
    for _ in range(3):  # the best of three: the machine may have been busy with something else
        daemon = start_daemon()
        with daemon.client() as client:
            client.ping()
            taken.append(time.monotonic() - daemon.began)
            assert client.status()["state"] == "loading"
    assert min(taken) < 0.5


def test_the_front_loads_nothing_of_the_worker(daemon: Daemon) -> None:
    """The front has no library of torch, numpy or pillow in memory, after work as before."""
    with daemon.client() as client:
        client.compute(CHELSEA)
    mapped = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert not [name for name in ("torch", "numpy", "PIL", "pillow") if f"/{name}" in mapped]


def test_front_modules_import_no_torch() -> None:
    """Importing all that the front is made of brings in none of the worker's packages."""
    program = (
        "import swiprd.__main__, sys;"
        "print([m for m in ('torch', 'torchvision', 'numpy', 'PIL', 'swiprd.worker',"
        " 'swiprd.model', 'swiprd.bundle') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout == b"[]\n"


def test_requests_made_while_the_model_loads_are_answered(start_daemon: StartDaemon) -> None:
    """Nobody is turned away because the model is not there yet."""
    daemon = start_daemon()
    with ThreadPoolExecutor(8) as pool, daemon.client() as status:
        answers = pool.map(lambda _: compute(daemon, CHELSEA), range(8))
        assert status.status()["state"] == "loading"
        assert len({answer.scores for answer in answers}) == 1


def compute(daemon: Daemon, path: Path) -> Any:
    with daemon.client() as client:
        return client.compute(path)


# --- order, sameness, ends -----------------------------------------------------------------------


def test_replies_without_ids_come_in_order(daemon: Daemon) -> None:
    """A ping asked after an image is answered after it, and errors keep their turn too."""
    with daemon.connect() as connection:
        sent = lines({"path": str(CHELSEA)}, {"op": "ping"}, {"path": "/none"}, {"op": "no"})
        got = replies(exchange(connection, sent))
    assert "scores" in got[0]
    assert "pong" in got[1]
    assert [reply["error"]["code"] for reply in got[2:]] == ["not_found", "unknown_op"]


def test_replies_with_ids_come_as_they_finish(daemon: Daemon) -> None:
    """A ping with an id overtakes an image."""
    with daemon.connect() as connection:
        got = replies(
            exchange(connection, lines({"id": 1, "path": str(CHELSEA)}, {"id": 2, "op": "ping"}))
        )
    assert [reply["id"] for reply in got] == [2, 1]


def test_many_pipelined_requests_are_all_answered(daemon: Daemon) -> None:
    """A thousand requests at once, far past what is taken at a time, get a reply each."""
    sent = lines(*({"id": number, "op": "ping"} for number in range(1000)))
    with daemon.connect() as connection:
        sender = threading.Thread(target=connection.sendall, args=(sent,))
        sender.start()
        got = replies(read_lines(connection, 1000))
        sender.join()
    assert sorted(reply["id"] for reply in got) == list(range(1000))


def test_sixteen_clients_get_the_bytes_that_one_gets(daemon: Daemon) -> None:
    """Load changes no digit: neighbours on the same daemon have no influence."""
    request = lines({"path": str(CHELSEA)})

    def ask(_: int) -> bytes:
        with daemon.connect() as connection:
            connection.sendall(request * 4)
            first, *others = map(without_ms, read_lines(connection, 4))
            assert others == [first] * 3
            return first

    alone = ask(0)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) == {alone}


def test_a_half_closed_client_gets_its_replies(daemon: Daemon) -> None:
    """Ending the input, as a pipe into socat does, loses no reply."""
    with daemon.connect() as connection:
        got = replies(exchange(connection, lines(*[{"path": str(COFFEE)}] * 3)))
    assert [len(reply["scores"]) for reply in got] == [2, 2, 2]


def test_an_unfinished_line_is_no_request(daemon: Daemon) -> None:
    """A request that breaks off before its newline is refused, even if it could be read."""
    with daemon.connect() as connection:
        (reply,) = replies(exchange(connection, b'{"op":"ping"}'))
    assert reply["error"]["code"] == "bad_request"


def test_a_client_that_sends_far_too_much_can_read_why(daemon: Daemon) -> None:
    """The connection is not closed under its hands: all is taken, then too_long is there."""
    with daemon.connect() as connection:
        connection.sendall(b"x" * 5_000_000)
        got = replies(read_lines(connection))
    assert [reply["error"]["code"] for reply in got] == ["too_long"]


def test_an_overlong_line_ends_the_connection(daemon: Daemon) -> None:
    """It gets too_long after the replies before it, and its tail is not taken for a message."""
    with daemon.connect() as connection:
        connection.sendall(lines({"op": "ping"}) + b"x" * 65536)
        got = replies(read_lines(connection))
    assert "pong" in got[0]
    assert got[1]["error"]["code"] == "too_long"
    assert len(got) == 2


def test_the_longest_line_is_served(daemon: Daemon) -> None:
    """A request of exactly 65,536 bytes with its newline is an ordinary request."""
    filler = "x" * (65536 - len(lines({"op": "ping", "filler": ""})))
    with daemon.connect() as connection:
        (reply,) = replies(exchange(connection, lines({"op": "ping", "filler": filler})))
    assert reply == {"id": None, "pong": True}


# --- descriptors ---------------------------------------------------------------------------------


def test_a_descriptor_counts_and_the_path_is_a_name(daemon: Daemon) -> None:
    """What is scored is the file sent along, whatever the path says."""
    with daemon.connect() as connection, COFFEE.open("rb") as coffee:
        socket.send_fds(connection, [lines({"path": str(CHELSEA)})], [coffee.fileno()])
        socket.send_fds(connection, [lines({})], [coffee.fileno()])
        got = replies(read_lines(connection, 2))
    assert [reply["scores"][0] > 0.9 for reply in got] == [True, True]


def test_each_descriptor_goes_with_its_own_line(daemon: Daemon) -> None:
    """Pipelined requests with and without descriptors never swap their files."""
    expected = {True: compute(daemon, CHELSEA).scores, False: compute(daemon, COFFEE).scores}
    with daemon.connect() as connection, CHELSEA.open("rb") as cat, COFFEE.open("rb") as coffee:
        connection.sendall(lines({"path": str(COFFEE)}, {"path": str(CHELSEA)}))
        socket.send_fds(connection, [lines({}, {"path": str(COFFEE)})], [cat.fileno()])
        socket.send_fds(connection, [lines({})], [coffee.fileno()])
        got = replies(read_lines(connection, 5))
    kinds = [False, True, True, False, False]
    assert [tuple(reply["scores"]) for reply in got] == [expected[kind] for kind in kinds]


@pytest.mark.parametrize(
    ("request_", "count"), [({"op": "ping"}, 1), ({"path": "/x"}, 2), ({"op": "nonsense"}, 1)]
)
def test_descriptors_that_do_not_belong_are_refused_and_closed(
    daemon: Daemon, request_: dict[str, Any], count: int
) -> None:
    """A descriptor with another op, or a second one, is an error and does not stay open."""
    with daemon.connect() as connection, COFFEE.open("rb") as coffee:
        for _ in range(20):
            socket.send_fds(connection, [lines(request_)], [coffee.fileno()] * count)
        got = replies(read_lines(connection, 20))
        assert {reply["error"]["code"] for reply in got} <= {"bad_request", "unknown_op"}
        wait_until(lambda: open_files(daemon) == [], "the descriptors to be closed")


def test_no_descriptor_is_gained_by_work(daemon: Daemon) -> None:
    """After scores, errors and clients that left, no picture and no connection stays open."""
    for _ in range(10):
        compute(daemon, CHELSEA)
        assert code_of(lambda: compute(daemon, PICTURES)) == "not_a_file"
        with daemon.connect() as connection, COFFEE.open("rb") as coffee:
            socket.send_fds(connection, [lines({}) + b'{"half'], [coffee.fileno()])
    wait_until(lambda: open_files(daemon) == [], "the descriptors to be closed")
    wait_until(lambda: daemon.status()["connections"] == 1, "the connections to be closed")


# --- files by path -------------------------------------------------------------------------------


def test_a_path_is_opened_by_the_daemon(daemon: Daemon, folder: Path) -> None:
    """Without a descriptor the daemon reads the path itself, and says what stands in the way."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    paths = [str(CHELSEA), str(folder / "none"), str(folder), str(fifo), "/dev/zero", __file__]
    with daemon.connect() as connection:
        got = replies(exchange(connection, lines(*({"path": path} for path in paths))))
    assert got[0]["scores"][1] > 0.9
    codes = [reply["error"]["code"] for reply in got[1:]]
    assert codes == ["not_found", "not_a_file", "not_a_file", "not_a_file", "not_an_image"]


def test_file_and_pixel_limits_are_settings(start_daemon: StartDaemon, folder: Path) -> None:
    """One byte and one pixel past what is set are refused with the limit in the message."""
    large = folder / "large.png"
    shutil.copy(COFFEE, large)
    with large.open("ab") as file:
        file.truncate(2**20 + 1)
    daemon = start_daemon("--max-file-mib", "1", "--max-megapixels", "0.15")
    with daemon.client() as client:
        with pytest.raises(
            SwiprError, match="1048577 bytes, expected at most 1048576"
        ) as too_large:
            client.compute(large)
        with pytest.raises(
            SwiprError, match="600 x 400 pixels, expected at most 150000"
        ) as too_many:
            client.compute(COFFEE)  # 240,000 pixels
        assert client.compute(CHELSEA).scores[1] > 0.9  # 135,300 pixels
    assert (too_large.value.code, too_many.value.code) == ("too_large", "too_many_pixels")


# --- workers that die or hang --------------------------------------------------------------------


def test_killing_the_worker_under_load_loses_nothing(start_daemon: StartDaemon) -> None:
    """Kill -9, twice, under eight clients: every request gets its tuple, none another's."""
    daemon = start_daemon()
    daemon.wait_ready()
    expected = {path: compute(daemon, path).scores for path in (CHELSEA, COFFEE)}
    answers: list[tuple[Path, Any]] = []
    stop = threading.Event()

    def ask(path: Path) -> None:
        with daemon.client(timeout=60) as client:
            while not stop.is_set():
                try:
                    answers.append((path, client.compute(path).scores))
                except SwiprError as error:
                    answers.append((path, error.code))

    def wait_for_answers(count: int) -> None:
        wanted = len(answers) + count
        wait_until(lambda: len(answers) >= wanted, f"{count} more answers")

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, path) for path in (CHELSEA, COFFEE) * 4]
        try:
            for _ in range(2):
                wait_for_answers(20)
                os.kill(daemon.worker_pids()[0], signal.SIGKILL)
            wait_for_answers(20)
        finally:
            stop.set()
        for future in asking:
            future.result()
    assert [answer for answer in answers if answer[1] != expected[answer[0]]] == []
    assert daemon.log().count("is replaced") == 2


def test_a_stopped_worker_costs_one_timeout(start_daemon: StartDaemon) -> None:
    """A worker that hangs is replaced at the deadline; the next request is answered."""
    daemon = start_daemon("--compute-timeout", "2")
    daemon.wait_ready()
    (worker,) = daemon.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    with daemon.client() as client:
        assert code_of(lambda: client.compute(CHELSEA)) == "timeout"
        assert 1.9 < time.monotonic() - began < 4
        assert client.compute(CHELSEA).scores[1] > 0.9
    assert daemon.worker_pids() != [worker]
    assert not Path(f"/proc/{worker}").exists()


def test_a_daemon_without_a_model_stays_up(start_daemon: StartDaemon, folder: Path) -> None:
    """It answers pings, and computes with the reason; once the file is there it serves."""
    bundle = folder / "model.safetensors"
    daemon = start_daemon("--model", str(bundle))
    with daemon.client() as client:
        with pytest.raises(SwiprError, match="No such file") as refused:
            client.compute(CHELSEA)
        assert refused.value.code == "unavailable"
        client.ping()
        assert client.status()["state"] == "failed"
        shutil.copy(DEFAULT_BUNDLE, bundle)
        wait_until(lambda: can_compute(client), "the model to be found")


# --- clients that leave, daemons that stop -------------------------------------------------------


def test_a_client_that_leaves_costs_nobody_anything(daemon: Daemon) -> None:
    """Work of clients that are gone is dropped or discarded, and the worker stays the same."""
    workers = daemon.worker_pids()
    for _ in range(20):
        with daemon.connect() as connection:
            connection.sendall(lines(*[{"path": str(CHELSEA)}] * 20))
    assert compute(daemon, COFFEE).scores[0] > 0.9
    assert daemon.worker_pids() == workers
    wait_until(lambda: daemon.status()["queued"] == 0, "the queue to be empty", 2)


def test_sigterm_answers_what_was_asked(start_daemon: StartDaemon) -> None:
    """Requests that reached the daemon before the signal get their scores; then it is gone."""
    daemon = start_daemon()
    daemon.wait_ready()
    with daemon.connect() as connection:
        connection.sendall(lines(*[{"path": str(CHELSEA)}] * 10))
        read_lines(connection, 1)
        (worker,) = daemon.worker_pids()
        daemon.process.send_signal(signal.SIGTERM)
        got = replies(read_lines(connection))
    assert [len(reply["scores"]) for reply in got] == [2] * 9
    assert daemon.stop() == 0
    assert not os.path.exists(daemon.path)
    assert not Path(f"/proc/{worker}").exists()


def test_many_signals_are_as_good_as_one(folder: Path) -> None:
    """An impatient supervisor does not turn a good end into a bad one."""
    path = folder / "s"
    for _ in range(5):
        with unwatched(*SWIPRD, "--socket", str(path)) as daemon:
            wait_until(path.exists, "the socket")
            while daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                time.sleep(0.001)
            assert daemon.returncode == 0


def test_closed_standard_descriptors_are_no_trap(folder: Path) -> None:
    """Neither the front's nor the worker's are then taken by sockets, and pictures are scored."""
    with Image.open(CHELSEA) as chelsea:
        chelsea.save(folder / "chelsea.tiff")  # while a TIFF is decoded, its library is kept silent
    path = folder / "s"
    command = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *SWIPRD, "--socket", str(path)]
    with subprocess.Popen(command) as daemon:
        wait_until(path.exists, "the socket")
        with Client(str(path), timeout=60) as client:
            assert client.compute(folder / "chelsea.tiff").scores[1] > 0.9
            (worker,) = cast(list[dict[str, int]], client.status()["workers"])
        for pid in (daemon.pid, worker["pid"]):
            standard = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)]
            assert standard == ["/dev/null"] * 3
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(60) == 0


def test_sigterm_at_the_very_start_leaves_nothing_behind(folder: Path) -> None:
    """However soon after the socket is there: the daemon ends well and takes it away again."""
    path = folder / "s"
    for _ in range(10):
        with unwatched(*SWIPRD, "--socket", str(path)) as daemon:
            while not path.exists():
                assert daemon.poll() is None
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(60) == 0
        assert not path.exists()


def test_a_daemon_that_drains_is_no_longer_there_for_newcomers(start_daemon: StartDaemon) -> None:
    """Its path is free at once: who comes is told, or finds the successor."""
    daemon = start_daemon("--drain-timeout", "20")
    daemon.wait_ready()
    (worker,) = daemon.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    with daemon.connect() as connection:
        connection.sendall(lines({"path": str(CHELSEA)}))
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not os.path.exists(daemon.path), "the socket's file to go")
        assert code_of(daemon.client().ping) == "cannot_connect"
        successor = start_daemon("--socket", daemon.path)
        with daemon.client() as client:
            assert client.status()["pid"] == successor.pid
        os.kill(worker, signal.SIGCONT)
        (reply,) = replies(read_lines(connection))
    assert len(reply["scores"]) == 2
    assert daemon.stop() == 0
    assert os.path.exists(daemon.path), "the successor's socket"


def test_a_line_cut_off_by_the_daemons_end_is_not_the_clients_fault(
    start_daemon: StartDaemon,
) -> None:
    """A request that was still arriving is told that it may be sent again."""
    daemon = start_daemon()
    with daemon.connect() as connection:
        connection.sendall(lines({"op": "ping"}) + b'{"op":"pi')
        read_lines(connection, 1)
        daemon.process.send_signal(signal.SIGTERM)
        (reply,) = replies(read_lines(connection))
    assert (reply["error"]["code"], reply["error"]["retryable"]) == ("shutting_down", True)


def test_a_drain_that_takes_too_long_says_so(start_daemon: StartDaemon) -> None:
    """What cannot be answered within drain_timeout gets shutting_down, not silence."""
    daemon = start_daemon("--drain-timeout", "0.5")
    daemon.wait_ready()
    os.kill(daemon.worker_pids()[0], signal.SIGSTOP)
    with daemon.connect() as connection:
        connection.sendall(lines(*[{"path": str(CHELSEA)}] * 3))
        wait_until(lambda: daemon.status()["queued"] == 2, "the requests to arrive")
        daemon.process.send_signal(signal.SIGTERM)
        got = replies(read_lines(connection))
    assert [reply["error"]["code"] for reply in got] == ["shutting_down"] * 3
    assert daemon.stop() == 0


def test_a_client_that_never_reads_does_not_hold_up_the_end(start_daemon: StartDaemon) -> None:
    """The daemon stops within its drain's time, whatever its clients do."""
    daemon = start_daemon("--drain-timeout", "0.5")
    with daemon.connect() as connection:
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.sendall(lines({"op": "status"}) * 100_000)
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 5


def test_idle_workers_give_their_memory_back(start_daemon: StartDaemon) -> None:
    """After idle_timeout no worker is left; the next image starts one."""
    daemon = start_daemon("--idle-timeout", "0.3")
    assert compute(daemon, CHELSEA).scores[1] > 0.9
    wait_until(lambda: daemon.worker_pids() == [], "the worker to go")
    assert daemon.status()["state"] == "idle"
    assert compute(daemon, CHELSEA).scores[1] > 0.9


def test_several_workers_serve_side_by_side(start_daemon: StartDaemon) -> None:
    """With --workers 2 there are two, and they give the same digits."""
    daemon = start_daemon("--workers", "2", "--threads", "1")
    daemon.wait_ready()
    wait_until(lambda: len(daemon.worker_pids()) == 2, "two workers")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: compute(daemon, CHELSEA), range(24)))
    assert len({answer.scores for answer in answers}) == 1
