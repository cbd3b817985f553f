"""A socket file of the daemon's own: made, never stolen, and taken away again: swiprd.listen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swiprd.__main__ import open_listener
from swiprd.listen import ListenError, OwnSocket
from tests.conftest import StartDaemon
from tests.daemon import SWIPRD
from tests.tasks import descriptors, unprivileged


@contextlib.contextmanager
def own_socket(path: Path) -> Iterator[OwnSocket]:
    own = OwnSocket(str(path))
    try:
        yield own
    finally:
        own.close()


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def refusal(path: Path) -> str:
    """Return the one line with which ``path`` is refused; nothing may be left open."""
    before = descriptors()
    with pytest.raises(ListenError) as caught:
        OwnSocket(str(path))
    assert descriptors() == before
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot listen at {path}: ")
    return message


def leave_behind(path: Path) -> None:
    """Leave a socket file as a daemon does that was killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()


def is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


# --- what is made --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777], ids=oct)
def test_the_mode_is_0660_whatever_the_umask(mask: int, folder: Path) -> None:
    """Owner and group may connect, others not."""
    path = folder / "s"
    with umask(mask):
        own = OwnSocket(str(path))
    mode = path.stat().st_mode
    own.close()
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_it_listens_and_does_not_block(folder: Path) -> None:
    """Accepting with nobody there returns at once, and clients get in."""
    with own_socket(folder / "s") as own, socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(BlockingIOError):
            own.socket.accept()
        client.connect(own.path)
        served, _ = own.socket.accept()
        with served:
            served.sendall(b"hello")
        assert client.recv(10) == b"hello"


def test_many_clients_may_wait_to_be_accepted(folder: Path) -> None:
    """A burst of a hundred finds room though nobody accepts yet."""
    with own_socket(folder / "s") as own, contextlib.ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect(own.path)


def test_it_is_not_inherited(folder: Path) -> None:
    """A worker that outlived the daemon must not keep the socket alive."""
    with own_socket(folder / "s") as own:
        assert not own.socket.get_inheritable()


def test_a_missing_folder_is_told_and_not_made(folder: Path) -> None:
    """A mistyped path leaves no folder behind."""
    assert "its folder is not there; make it" in refusal(folder / "run" / "s")
    assert list(folder.iterdir()) == []


def test_the_folder_of_the_usual_place_is_made(folder: Path) -> None:
    """Without --socket the daemon looks after its own place in the user's runtime directory."""
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o777)
    runtime.chmod(0o777)
    folder.chmod(0o755)
    with unprivileged(), umask(0o022):
        own = open_listener(None, {"XDG_RUNTIME_DIR": str(runtime)})
        own.close()
    assert own.path == str(runtime / "swipr" / "swipr.sock")
    assert stat.S_IMODE((runtime / "swipr").stat().st_mode) == 0o755


def test_a_folder_that_is_there_stays_as_it_is(folder: Path) -> None:
    """Its mode is its owner's business."""
    folder.chmod(0o710)
    with own_socket(folder / "s"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o710


# --- what stands in the way ----------------------------------------------------------------------


def test_a_socket_file_that_was_left_behind_is_replaced(folder: Path) -> None:
    """A daemon that was killed does not keep its successor from starting."""
    path = folder / "s"
    leave_behind(path)
    assert not is_answered(path)
    with own_socket(path):
        assert is_answered(path)


def test_a_live_socket_is_not_replaced(folder: Path) -> None:
    """The message says that somebody answers there, and that somebody goes on."""
    path = folder / "s"
    with own_socket(path) as own:
        before = path.stat()
        assert refusal(path) == (
            f"cannot listen at {path}: a daemon answers there already, or systemd for one; stop it"
            " (systemctl stop swipr.socket swipr.service) or choose another path"
        )
        assert path.stat().st_ino == before.st_ino
        assert select.select([own.socket], [], [], 0)[0], "the first one was asked"
        served, _ = own.socket.accept()
        served.close()
        assert is_answered(path)


def test_a_live_socket_with_a_full_backlog_is_not_replaced(folder: Path) -> None:
    """A daemon too busy to accept is alive all the same."""
    path = folder / "s"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        refused = 0
        while not refused:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            refused = client.connect_ex(str(path))
        assert refused == errno.EAGAIN
        inode = path.stat().st_ino
        assert "a daemon answers there already" in refusal(path)
        assert path.stat().st_ino == inode


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_file(path: Path) -> None:
    path.with_name("other").write_text("precious")
    path.symlink_to("other")


def make_link_to_dead_socket(path: Path) -> None:
    leave_behind(path.with_name("other"))
    path.symlink_to("other")


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("other")


@pytest.mark.parametrize(
    "make",
    [
        make_file,
        make_folder,
        make_fifo,
        make_link_to_file,
        make_link_to_dead_socket,
        make_link_to_nothing,
    ],
)
def test_what_is_no_socket_is_not_touched(make: Callable[[Path], None], folder: Path) -> None:
    """A slip in the path costs nobody a file, neither there nor where a link leads."""

    def everything() -> list[tuple[str, int, int, int]]:
        found = [(entry.name, entry.lstat()) for entry in sorted(folder.iterdir())]
        return [(name, of.st_ino, of.st_mode, of.st_size) for name, of in found]

    path = folder / "s"
    make(path)
    before = everything()
    assert refusal(path) == (
        f"cannot listen at {path}: something that is no socket stands there; remove it or choose"
        " another path"
    )
    assert everything() == before


def test_a_socket_of_another_kind_is_not_touched(folder: Path) -> None:
    """Somebody's datagram socket is no daemon of ours, and alive."""
    path = folder / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        inode = path.stat().st_ino
        assert "Protocol wrong type for socket" in refusal(path)
        assert path.stat().st_ino == inode


def test_a_folder_without_permission_is_told(folder: Path) -> None:
    """No socket can be made there."""
    folder.chmod(0o555)
    with unprivileged():
        assert refusal(folder / "s").endswith(": Permission denied")
    folder.chmod(0o700)
    assert list(folder.iterdir()) == []


def test_somebody_elses_socket_without_permission_is_not_replaced(folder: Path) -> None:
    """Who may not connect cannot know whether anybody answers, so the file stays."""
    path = folder / "s"
    leave_behind(path)
    path.chmod(0o000)
    folder.chmod(0o777)
    with unprivileged():
        assert refusal(path).endswith(": Permission denied")
    assert path.is_socket()


@pytest.mark.parametrize("place", ["file/s", "file/sub/s"])
def test_a_file_in_place_of_the_folder_is_told(place: str, folder: Path) -> None:
    """It is not replaced by a folder."""
    (folder / "file").write_text("precious")
    refusal(folder / place)
    assert (folder / "file").read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_told(folder: Path) -> None:
    """The configuration refuses it earlier; should one come here, it is an error like others."""
    assert refusal(folder / ("x" * 200)).endswith(": AF_UNIX path too long")


# --- several daemons -----------------------------------------------------------------------------


def test_of_daemons_that_start_at_once_exactly_one_gets_the_path(folder: Path) -> None:
    """Nobody's fresh socket passes for one that was left behind, however close the race."""
    rounds = 3000
    for number in range(0, rounds, 2):
        leave_behind(folder / str(number))
    script = """
import json, multiprocessing, sys
from swiprd.__main__ import open_listener
from swiprd.listen import ListenError, OwnSocket

folder, rounds = sys.argv[1], int(sys.argv[2])
starters = multiprocessing.get_context("fork")

def start(together, winners):
    for number in range(rounds):
        own = None
        together.wait(30)
        try:
            own = OwnSocket(f"{folder}/{number}")
        except ListenError:
            pass
        else:
            with winners.get_lock():
                winners[number] += 1
        together.wait(30)
        if own is not None:
            own.close()

together = starters.Barrier(4)
winners = starters.Array("i", rounds)
processes = [starters.Process(target=start, args=(together, winners)) for _ in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
print(json.dumps(list(winners)))
"""
    command = [sys.executable, "-P", "-c", script, str(folder), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120)
    winners = json.loads(done.stdout)
    assert len(winners) == rounds
    assert {number: count for number, count in enumerate(winners) if count != 1} == {}


def test_a_lock_that_others_can_hold_is_not_waited_for(folder: Path) -> None:
    """In a folder for everybody, a stranger's lock cannot keep the daemon waiting for ever."""
    lock = folder / "s.lock"
    lock.touch()
    lock.chmod(0o666)
    message = refusal(folder / "s")
    assert f"others can hold the lock {lock}; remove it" in message
    assert lock.exists()


def test_the_second_daemon_for_a_path_ends_and_the_first_goes_on(
    start_daemon: StartDaemon,
) -> None:
    """The second says so in one line, with status 1."""
    first = start_daemon()
    second = subprocess.run(
        [*SWIPRD, "--socket", first.path], capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr == (
        f"swiprd: cannot listen at {first.path}: a daemon answers there already, or systemd for"
        " one; stop it (systemctl stop swipr.socket swipr.service) or choose another path\n"
    )
    assert first.status()["pid"] == first.pid


def test_a_killed_daemon_does_not_keep_the_next_from_its_path(start_daemon: StartDaemon) -> None:
    """What it left behind is replaced, and the new one takes its file away when it stops."""
    first = start_daemon()
    first.process.kill()
    first.process.wait()
    first.running.discard(first.pid)
    path = Path(first.path)
    assert path.is_socket()
    second = start_daemon("--socket", first.path)
    assert is_answered(path)
    assert second.stop() == 0
    assert not path.exists()


# --- what is taken away --------------------------------------------------------------------------


def test_remove_takes_the_file_away_and_stops_listening(folder: Path) -> None:
    """Afterwards nothing is left but the folder."""
    own = OwnSocket(str(folder / "s"))
    own.close()
    assert list(folder.iterdir()) == []
    assert own.socket.fileno() == -1


def test_remove_leaves_a_file_that_has_replaced_ours(folder: Path) -> None:
    """Somebody removed ours and another daemon started since: that one stays reachable."""
    path = folder / "s"
    ours = OwnSocket(str(path))
    path.unlink()
    with own_socket(path):
        ours.close()
        assert ours.socket.fileno() == -1
        assert is_answered(path)


def test_remove_leaves_what_is_no_socket_any_more(folder: Path) -> None:
    """A file that somebody put there since is not ours to remove."""
    path = folder / "s"
    own = OwnSocket(str(path))
    path.unlink()
    path.write_text("precious")
    own.close()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("gone", ["the file", "the folder"])
def test_remove_does_not_fail_when_the_file_is_gone(gone: str, folder: Path) -> None:
    """Somebody was faster; the socket is closed all the same."""
    path = folder / "sub" / "s"
    path.parent.mkdir()
    own = OwnSocket(str(path))
    path.unlink()
    if gone == "the folder":
        path.parent.rmdir()
    own.close()
    assert own.socket.fileno() == -1


def test_remove_without_permission_leaves_the_file_but_closes(folder: Path) -> None:
    """A daemon that may not unlink still ends well."""
    path = folder / "s"
    own = OwnSocket(str(path))
    folder.chmod(0o555)
    with unprivileged():
        own.close()
    assert own.socket.fileno() == -1
    assert path.is_socket()
    folder.chmod(0o700)
