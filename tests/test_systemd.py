"""What systemd hands over and hears, without systemd: swiprd.systemd."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from swiprd.systemd import (
    ActivationError,
    ServiceManager,
    extend_timeout,
    is_journal,
    reloading,
    service_manager,
)

RECEIVER: Final = """
import fcntl, json, os, sys
from swiprd.systemd import listen_fds

# Out of the way first: one of them may stand where another is to go.
kept = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 100) for word in sys.argv[1:]]
os.closerange(3, 100)
for place, fd in enumerate(kept, 3):
    os.dup2(fd, place)
    os.close(fd)
pid = os.environ.get("LISTEN_PID")
if pid == "mine":
    os.environ["LISTEN_PID"] = str(os.getpid())
told = {"sockets": [], "error": None}
try:
    found = listen_fds(os.environ)
except Exception as error:
    found = []
    told["error"] = [type(error).__name__, str(error)]
for sock in found:
    told["sockets"].append({
        "fd": sock.fileno(),
        "inode": os.fstat(sock.fileno()).st_ino,
        "path": sock.getsockname(),
        "blocking": os.get_blocking(sock.fileno()),
        "inheritable": os.get_inheritable(sock.fileno()),
    })
told["variables"] = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps(told))
"""


def receive(fds: Sequence[int], variables: dict[str, str]) -> dict[str, Any]:
    """Return what listen_fds makes of ``fds`` as descriptors 3, 4, … of a process of its own.

    "mine" stands for that process's id.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", RECEIVER, *map(str, fds)],
        pass_fds=fds,
        env={**others, **variables},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["variables"] == [], "the variables are gone, whatever came of them"
    return told


def refusal(fds: Sequence[int], variables: dict[str, str]) -> str:
    told = receive(fds, variables)
    assert told["sockets"] == []
    assert told["error"] is not None, "expected a refusal"
    kind, message = told["error"]
    assert (kind, "\n" in message) == ("ActivationError", False), message
    return str(message)


@contextlib.contextmanager
def listening(*paths: Path, kind: int = socket.SOCK_STREAM) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(socket.AF_UNIX, kind)) for _ in paths]
        for sock, path in zip(socks, paths, strict=True):
            sock.bind(str(path))
            sock.listen()
        yield socks


# --- what is taken over --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
def test_listening_sockets_are_taken_over_in_their_order(
    count: int, named: bool, folder: Path
) -> None:
    """They are the very sockets, at the descriptors where they were handed over."""
    paths = [folder / str(number) for number in range(count)]
    variables = {"LISTEN_PID": "mine", "LISTEN_FDS": str(count)}
    if named:
        variables["LISTEN_FDNAMES"] = ":".join(["swipr.socket"] * count)
    with listening(*paths) as socks:
        told = receive([sock.fileno() for sock in socks], variables)
        inodes = [os.fstat(sock.fileno()).st_ino for sock in socks]
    assert told["error"] is None
    assert [sock["fd"] for sock in told["sockets"]] == list(range(3, 3 + count))
    assert [sock["inode"] for sock in told["sockets"]] == inodes
    assert [sock["path"] for sock in told["sockets"]] == list(map(str, paths))


def test_taken_sockets_do_not_block_and_are_not_inherited(folder: Path) -> None:
    """They come blocking and inheritable; the event loop and the workers need them otherwise."""
    with listening(folder / "a", folder / "b") as socks:
        for sock in socks:
            sock.setblocking(True)
        told = receive([sock.fileno() for sock in socks], {"LISTEN_PID": "mine", "LISTEN_FDS": "2"})
    assert [sock["blocking"] for sock in told["sockets"]] == [False, False]
    assert [sock["inheritable"] for sock in told["sockets"]] == [False, False]


def test_only_as_many_as_were_announced_are_taken(folder: Path) -> None:
    """Descriptor 4 is somebody else's when LISTEN_FDS is 1."""
    with listening(folder / "a", folder / "b") as socks:
        told = receive([sock.fileno() for sock in socks], {"LISTEN_PID": "mine", "LISTEN_FDS": "1"})
    assert [sock["fd"] for sock in told["sockets"]] == [3]


def test_a_taken_socket_still_serves_and_its_file_stays(folder: Path) -> None:
    """Taking over ends neither the listening nor the file: they are the service manager's."""
    path = folder / "s"
    with listening(path) as socks:
        before = path.stat()
        receive([socks[0].fileno()], {"LISTEN_PID": "mine", "LISTEN_FDS": "1"})
        after = path.stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDNAMES": "swipr.socket"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "swipr.socket"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "many"},
        {"LISTEN_PID": "1"},
    ],
    ids=["nothing", "names alone", "init's", "our parent's", "malformed, init's", "init's pid"],
)
def test_what_is_meant_for_another_process_is_not_taken(
    variables: dict[str, str], folder: Path
) -> None:
    """Nothing is taken and nothing is wrong, though a listening socket stands at descriptor 3."""
    with listening(folder / "s") as socks:
        told = receive([socks[0].fileno()], variables)
    assert (told["sockets"], told["error"]) == ([], None)


# --- what is refused -----------------------------------------------------------------------------

DIGITS: Final = "9" * 5000
"""More than Python converts to an integer."""


@pytest.mark.parametrize("pid", ["", "-1", "+1", " 1", "1 ", "one", "1.0", "0x1", "٣", "²", DIGITS])
def test_a_malformed_listen_pid_is_refused(pid: str, folder: Path) -> None:
    """It might have meant us, so passing over it would leave clients waiting for ever."""
    with listening(folder / "s") as socks:
        message = refusal([socks[0].fileno()], {"LISTEN_PID": pid, "LISTEN_FDS": "1"})
    assert message == f"expected LISTEN_PID to be a process id, got {pid!r}"


def test_listen_fds_without_listen_pid_is_refused(folder: Path) -> None:
    """Half of the protocol is no protocol."""
    with listening(folder / "s") as socks:
        message = refusal([socks[0].fileno()], {"LISTEN_FDS": "1"})
    assert message == "expected LISTEN_PID to be a process id, got None"


@pytest.mark.parametrize(
    "count",
    ["", "0", "-1", "+1", " 1", "17", "1.0", "one", "0x1", "\u0661", "²", "99999999999", DIGITS],
)
def test_a_malformed_listen_fds_is_refused(count: str, folder: Path) -> None:
    """Only a count from 1 to 16 in ASCII digits is one."""
    with listening(folder / "s") as socks:
        message = refusal([socks[0].fileno()], {"LISTEN_PID": "mine", "LISTEN_FDS": count})
    assert message == f"expected LISTEN_FDS to be a count from 1 to 16, got {count!r}"


def test_listen_pid_without_listen_fds_is_refused(folder: Path) -> None:
    """We were meant, and are not told what for."""
    with listening(folder / "s") as socks:
        message = refusal([socks[0].fileno()], {"LISTEN_PID": "mine"})
    assert message == "expected LISTEN_FDS to be a count from 1 to 16, got None"


@pytest.mark.parametrize(("count", "names"), [(1, "a:b"), (1, ":"), (2, "a"), (2, ""), (2, "::")])
def test_names_of_another_count_are_refused(count: int, names: str, folder: Path) -> None:
    """Somebody counted wrong, and we cannot know who."""
    with listening(*(folder / str(number) for number in range(count))) as socks:
        message = refusal(
            [sock.fileno() for sock in socks],
            {"LISTEN_PID": "mine", "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names},
        )
    assert message == f"expected {count} names in LISTEN_FDNAMES, got {names!r}"


def open_wrong(what: str, folder: Path, stack: contextlib.ExitStack) -> int:
    """Return a descriptor of something that no socket unit of ours hands over."""

    def keep(sock: socket.socket) -> socket.socket:
        return stack.enter_context(sock)

    match what:
        case "a regular file":
            return stack.enter_context(tempfile.TemporaryFile()).fileno()
        case "a pipe":
            ends = os.pipe()
            for fd in ends:
                stack.callback(os.close, fd)
            return ends[0]
        case "a connected Unix socket":
            ours, theirs = socket.socketpair()
            keep(theirs)
            return keep(ours).fileno()
        case "a fresh Unix socket":
            return keep(socket.socket(socket.AF_UNIX)).fileno()
        case "a bound Unix socket that does not listen":
            sock = keep(socket.socket(socket.AF_UNIX))
            sock.bind(str(folder / "bound"))
        case "a Unix datagram socket":
            sock = keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            sock.bind(str(folder / "datagrams"))
        case "a listening Unix packet socket":
            path = folder / "packets"
            return stack.enter_context(listening(path, kind=socket.SOCK_SEQPACKET))[0].fileno()
        case "a UDP socket":
            sock = keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("127.0.0.1", 0))
        case "a listening TCP socket":
            sock = keep(socket.create_server(("127.0.0.1", 0)))
        case _:
            raise AssertionError(what)
    return sock.fileno()


NO_SOCKETS: Final = ["a regular file", "a pipe"]
WRONG_SOCKETS: Final = [
    "a connected Unix socket",
    "a fresh Unix socket",
    "a bound Unix socket that does not listen",
    "a Unix datagram socket",
    "a listening Unix packet socket",
    "a UDP socket",
    "a listening TCP socket",
]


@pytest.mark.parametrize("what", [*NO_SOCKETS, *WRONG_SOCKETS])
@pytest.mark.parametrize("before", [0, 1], ids=["alone", "after a good one"])
def test_a_descriptor_that_is_no_listening_unix_stream_socket_is_refused(
    what: str, before: int, folder: Path
) -> None:
    """The message names the descriptor, also when a good socket came before it."""
    good = [folder / str(number) for number in range(before)]
    with contextlib.ExitStack() as stack:
        fds = [sock.fileno() for sock in stack.enter_context(listening(*good))]
        fds.append(open_wrong(what, folder, stack))
        message = refusal(fds, {"LISTEN_PID": "mine", "LISTEN_FDS": str(len(fds))})
    if what in NO_SOCKETS:
        assert message.startswith(f"descriptor {3 + before} is no socket: ")
    else:
        assert message == f"descriptor {3 + before} is not a listening Unix stream socket"


def test_a_descriptor_that_is_not_open_is_refused(folder: Path) -> None:
    """Two were announced and one came."""
    with listening(folder / "s") as socks:
        message = refusal([socks[0].fileno()], {"LISTEN_PID": "mine", "LISTEN_FDS": "2"})
    assert message == "descriptor 4 is no socket: Bad file descriptor"


# --- what systemd hears --------------------------------------------------------------------------


@contextlib.contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """Listen at ``address`` as systemd does at what it names in $NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.setblocking(False)
        yield sock


def tell(address: str | None, *assignments: str) -> None:
    """Tell a manager once."""
    manager = ServiceManager(address)
    manager.tell(*assignments)
    manager.close()


def address_in(folder: Path, kind: str) -> str:
    return str(folder / "notify") if kind == "path" else f"@{folder}/notify"


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_an_assignment_reaches_the_manager(kind: str, folder: Path) -> None:
    """One call is one datagram, by path as by abstract name."""
    address = address_in(folder, kind)
    with manager(address) as sock:
        tell(address, "READY=1")
        assert sock.recv(4096) == b"READY=1"
        with pytest.raises(BlockingIOError):
            sock.recv(4096)


def test_several_assignments_are_lines_of_one_datagram(folder: Path) -> None:
    """The manager takes them together or not at all."""
    address = address_in(folder, "path")
    with manager(address) as sock:
        tell(address, "READY=1", "STATUS=classé", "WATCHDOG=1")
        assert sock.recv(4096) == "READY=1\nSTATUS=classé\nWATCHDOG=1".encode()


def test_without_a_manager_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is what an unset $NOTIFY_SOCKET reads as; not even a socket is opened for it."""
    monkeypatch.delattr(socket, "socket")
    tell(None, "READY=1")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "@",
        "relative",
        "FOLDER/none",
        "FOLDER/file",
        "FOLDER/dead",
        "FOLDER",
        "@FOLDER/none",
        "FOLDER/" + "x" * 200,
        "@" + "x" * 200,
    ],
)
def test_a_manager_that_cannot_be_reached_raises_nothing(address: str, folder: Path) -> None:
    """No service dies of a manager that is gone, or of an address that is none."""
    (folder / "file").touch()
    with manager(str(folder / "dead")):
        pass
    assert (folder / "dead").is_socket()
    tell(address.replace("FOLDER", str(folder)), "READY=1")


def test_a_value_stays_on_its_line(folder: Path) -> None:
    """Whatever a label or a path holds, it makes no assignment of its own."""
    address = address_in(folder, "path")
    with manager(address) as sock:
        tell(address, "STATUS=a\nSTOPPING=1", "STATUS=\ud800")
        assert sock.recv(4096) == b"STATUS=a STOPPING=1\nSTATUS=\\ud800"


def test_a_stream_socket_is_no_manager(folder: Path) -> None:
    """What listens there may be of the wrong kind; nothing is raised and nothing arrives."""
    with listening(folder / "s") as socks:
        socks[0].setblocking(False)
        tell(str(folder / "s"), "READY=1")
        with pytest.raises(BlockingIOError):
            socks[0].accept()


def test_a_manager_that_does_not_read_is_not_waited_for(folder: Path) -> None:
    """With its queue full the message is lost, at once, and the older ones stay."""
    address = address_in(folder, "path")
    with manager(address) as sock, contextlib.ExitStack() as fillers:
        sent, before = 0, -1
        while sent > before:  # until one that has sent nothing yet cannot send anything, either
            before = sent
            filler = fillers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while sent < 100_000:
                    filler.sendto(b"STATUS=old", address)
                    sent += 1
        assert 0 < sent < 100_000
        began = time.monotonic()
        tell(address, "READY=1")
        assert time.monotonic() - began < 5
        assert [sock.recv(4096) for _ in range(sent)] == [b"STATUS=old"] * sent
        with pytest.raises(BlockingIOError):
            sock.recv(4096)


def test_a_process_without_a_free_descriptor_still_tells(folder: Path) -> None:
    """It has its socket from before: the watchdog does not ask whether there are descriptors."""
    script = """
import os, resource, sys
from swiprd.systemd import ServiceManager

manager = ServiceManager(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
manager.tell("READY=1")
print("alive")
"""
    address = address_in(folder, "path")
    with manager(address) as sock:
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert sock.recv(100) == b"READY=1"
    assert (done.stdout, done.stderr) == ("alive\n", "")


# --- the watchdog, reloads, the journal ----------------------------------------------------------


def test_the_managers_variables_are_taken_and_forgotten() -> None:
    """They are not for our children, who would speak in our name."""
    environment = {
        "NOTIFY_SOCKET": "/n",
        "WATCHDOG_USEC": "20000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/h",
    }
    manager = service_manager(environment)
    assert manager.watchdog == 20
    manager.close()
    assert environment == {"HOME": "/h"}


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "4294967296000000"}, 4294967296),
    ],
)
def test_a_watchdog_waits_for_whom_it_names(
    variables: dict[str, str], seconds: float | None
) -> None:
    """Without WATCHDOG_PID it is this process; with another's, there is none for us."""
    assert service_manager(dict(variables)).watchdog == seconds


@pytest.mark.parametrize("usec", ["", "0", "-1", "1.5", "soon", "9" * 20, "\u0665"])
def test_a_malformed_watchdog_is_refused(usec: str) -> None:
    """Not to feed a watchdog that is there would end the daemon in the middle of its work."""
    with pytest.raises(ActivationError, match="WATCHDOG_USEC"):
        service_manager({"WATCHDOG_USEC": usec})


def test_a_reload_is_announced_with_the_time() -> None:
    """The clock is the one of CLOCK_MONOTONIC, in microseconds."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    word, stamp = reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert word == "RELOADING=1"
    name, _, value = stamp.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= after


def test_more_time_is_asked_for_in_microseconds() -> None:
    """Fractions of a second count, fractions of a microsecond do not."""
    assert extend_timeout(45.5) == "EXTEND_TIMEOUT_USEC=45500000"


def test_the_journal_is_told_by_its_stream(folder: Path) -> None:
    """The variable counts only where it names the very file that the descriptor is."""
    with (folder / "log").open("wb") as log, (folder / "other").open("wb") as other:
        found = os.fstat(log.fileno())
        environment = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert is_journal(environment, log.fileno())
        assert not is_journal(environment, other.fileno())
        assert not is_journal({}, log.fileno())
        assert not is_journal({"JOURNAL_STREAM": str(found.st_dev)}, log.fileno())
    assert not is_journal(environment, 999_999)
