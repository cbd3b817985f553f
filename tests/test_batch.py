"""Many images over one connection: order, flow, and what happens when the daemon does not play."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import itertools
import lzma
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from swiprctl import Client, Result, SwiprError
from swiprctl.images import absolute_name
from tests.daemon import CHELSEA, COFFEE, Daemon
from tests.peer import (
    Behaviour,
    Peer,
    Talk,
    closes_without_answer,
    error,
    line,
    never_answers,
    replies,
)

NOT_IMAGE = Path(__file__).parent / "fastai" / "45_not_image.jpg"
REST = {"labels": ["no", "yes"], "model": "", "engine": "e", "precision": "p", "ms": 1}


def scores(id: int, score: float = 0.75) -> bytes:
    """Return a whole reply."""
    return line(id=id, scores=[1 - score, score], decode_ms=1, **REST)


def said(outcomes: Iterable[tuple[object, Result | SwiprError]]) -> list[float | str]:
    """Return the last score of each image, or the code of its error."""
    return [
        outcome.code if isinstance(outcome, SwiprError) else outcome.scores[-1]
        for _, outcome in outcomes
    ]


def collect(
    outcomes: Iterable[tuple[object, Result | SwiprError]], found: list[float], pause: float = 0
) -> None:
    """Add the last score of each image to ``found``; after each, do something else for a while."""
    for _, outcome in outcomes:
        assert isinstance(outcome, Result)
        found.append(outcome.scores[-1])
        time.sleep(pause)


def numbered(folder: Path, count: int) -> list[Path]:
    """Make files that hold their own number."""
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    return paths


def number_in(talk: Talk, index: int) -> int:
    """Return the number in the image of the request that came as ``index``."""
    return int(talk.received[index].images[0])


def answers_with_its_number(talk: Talk) -> None:
    """Give each image a score that is a thousandth of its own number."""
    for request in talk.requests():
        talk.sock.sendall(scores(request["id"], number_in(talk, -1) / 1000))


# --- answers -------------------------------------------------------------------------------------


def test_each_image_gets_its_own_scores_in_order(daemon: Daemon) -> None:
    """As many as one likes, the same as one by one."""
    images = [CHELSEA, COFFEE] * 10
    with daemon.client() as client:
        expected = [client.compute(image).scores for image in images[:2]] * 10
        found = list(client.compute_many(images))
    assert [image for image, _ in found] == images
    assert [outcome.scores for _, outcome in found if isinstance(outcome, Result)] == expected


def test_a_bad_image_costs_its_own_answer_only(daemon: Daemon, folder: Path) -> None:
    """What is wrong with it stands in its place, with its name."""
    images = [CHELSEA, folder / "none.png", NOT_IMAGE, folder, COFFEE]
    with daemon.client() as client:
        found = list(client.compute_many(images))
    codes = said(found)
    assert codes[1:4] == ["not_found", "not_an_image", "not_a_file"]
    assert (float(codes[0]) > 0.9, float(codes[4]) < 0.1) == (True, True)
    for image, outcome in found[1:4]:
        assert str(outcome).count(f"{image}: ") == 1
        assert str(outcome).startswith(f"{image}: ")


def test_without_images_the_daemon_is_not_asked() -> None:
    """Nor need it be there."""
    assert list(Client("/nowhere").compute_many([])) == []


def test_answers_in_another_order_come_out_in_that_of_the_images(folder: Path) -> None:
    """A daemon with several workers answers as they finish."""

    def answer_backwards(talk: Talk) -> None:
        requests = talk.requests()
        while group := list(itertools.islice(requests, 4)):
            count = len(talk.received)
            for index, request in reversed(list(enumerate(group, count - len(group)))):
                talk.sock.sendall(scores(request["id"], number_in(talk, index) / 1000))

    paths = numbered(folder, 12)
    with Peer(folder, answer_backwards) as peer, Client(peer.path) as client:
        found = said(client.compute_many(paths, in_flight=4))
    assert found == [number / 1000 for number in range(12)]


@pytest.mark.parametrize("in_flight", [1, 5])
def test_images_are_sent_ahead_and_no_more_than_that(folder: Path, in_flight: int) -> None:
    """The daemon has something to do while an answer is on its way, and memory stays flat."""
    taken: list[int] = []

    def images() -> Iterator[Path]:
        for number, path in enumerate(numbered(folder, 20)):
            taken.append(number)
            yield path

    with Peer(folder, never_answers) as peer, Client(peer.path) as client:
        with pytest.raises(SwiprError, match="no answer"):
            list(client.compute_many(images(), in_flight=in_flight, timeout=0.3))
        assert len(peer.requests) == len(taken) == in_flight


def test_a_thousand_images_hold_a_handful_of_descriptors(folder: Path) -> None:
    """Each is closed when its answer is there."""
    paths = numbered(folder, 50) * 20
    most = 0
    with Peer(folder, answers_with_its_number) as peer, Client(peer.path) as client:
        before = len(os.listdir("/proc/self/fd"))
        for _ in client.compute_many(paths):
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
        assert peer.connections == 1
    assert most <= 20  # eight images, the connection, and the peer's end of it with what it holds


def test_a_client_can_be_used_while_it_has_a_batch(daemon: Daemon) -> None:
    """The batch has a connection of its own."""
    with daemon.client() as client:
        for image, outcome in client.compute_many([CHELSEA, COFFEE, CHELSEA]):
            assert isinstance(outcome, Result)
            assert client.compute(image).scores == outcome.scores


def test_a_batch_that_is_left_is_over(folder: Path) -> None:
    """With its connection; what is in flight is not waited for."""
    with Peer(folder, answers_with_its_number, answers_with_its_number) as peer:
        with Client(peer.path) as client:
            for _ in client.compute_many(numbered(folder, 20)):
                break
            assert said(client.compute_many(numbered(folder, 3))) == [0, 0.001, 0.002]
        assert peer.connections == 2


@pytest.mark.parametrize(
    "wrong", [{"in_flight": 0}, {"in_flight": 65}, {"timeout": 0.0}, {"timeout": 1e9}]
)
def test_numbers_that_cannot_be_are_refused_at_once(wrong: dict[str, float]) -> None:
    """Not when the first image is asked for."""
    with pytest.raises(ValueError, match="expected"):
        Client("/nowhere").compute_many([CHELSEA], **wrong)  # type: ignore[arg-type]


# --- images that are no paths --------------------------------------------------------------------


def test_an_open_file_is_an_image(daemon: Daemon, folder: Path) -> None:
    """Whatever is left to be read from it; also from memory, and from a pipe."""
    data = CHELSEA.read_bytes()
    behind = folder / "behind"
    behind.write_bytes(b"something else" + data)
    reading, writing = os.pipe()
    feeding = threading.Thread(target=_feed, args=(writing, data))
    feeding.start()
    with daemon.client() as client, CHELSEA.open("rb") as plain, behind.open("rb") as moved:
        moved.seek(len(b"something else"))
        expected = client.compute(CHELSEA).scores
        with open(reading, "rb") as pipe:
            for image in (plain, io.BytesIO(data), moved, pipe):
                assert client.compute(image).scores == expected
    feeding.join()


def _feed(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)


@pytest.mark.parametrize("kind", [gzip, bz2, lzma])
def test_what_a_stream_gives_is_the_image_and_not_what_it_reads(
    daemon: Daemon, folder: Path, kind: ModuleType
) -> None:
    """A stream that unpacks has the descriptor of the packed file."""
    path = folder / "packed"
    path.write_bytes(kind.compress(CHELSEA.read_bytes()))
    with daemon.client() as client, kind.open(path) as file:
        assert client.compute(file).scores == client.compute(CHELSEA).scores


def test_an_object_is_called_by_its_name(daemon: Daemon) -> None:
    """Where it has one; otherwise a dash stands for it."""
    with daemon.client() as client, NOT_IMAGE.open("rb") as file:
        for image, name in ((file, str(NOT_IMAGE)), (io.BytesIO(b"x"), "-")):
            with pytest.raises(SwiprError) as caught:
                client.compute(image)
            assert str(caught.value).startswith(f"{name}: expected a picture")


def test_a_stream_that_cannot_be_read_is_told() -> None:
    """With its name, like a file."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(SwiprError) as caught:
        Client("/nowhere").compute(Broken())
    assert caught.value.code == "not_a_file"
    assert str(caught.value) == "-: cannot be read: Input/output error"


def test_more_bytes_than_any_daemon_takes_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without an end ends somewhere."""

    class Endless(io.RawIOBase):
        read_so_far = 0

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            self.read_so_far += len(buffer)
            return len(buffer)

    monkeypatch.setattr("swiprctl.images.MAX_STREAM", 10 * 2**20)
    endless = Endless()
    with pytest.raises(SwiprError, match="expected at most 10485760 bytes, and more came"):
        Client("/nowhere").compute(endless)  # type: ignore[arg-type]
    assert endless.read_so_far <= 11 * 2**20


# --- a program that fails -------------------------------------------------------------------------


def test_images_that_were_taken_are_answered_when_the_next_cannot_be(folder: Path) -> None:
    """An iterator that raises ends the batch, after all that was in flight."""
    paths = numbered(folder, 5)

    def breaks() -> Iterator[Path]:
        yield from paths
        raise LookupError("no more")

    found: list[float] = []
    peer = Peer(folder, answers_with_its_number)
    with peer, Client(peer.path) as client, pytest.raises(LookupError, match="no more"):
        collect(client.compute_many(breaks()), found)
    assert found == [number / 1000 for number in range(5)]


def test_without_descriptors_the_batch_ends_and_blames_no_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in flight is answered first."""
    paths = numbered(folder, 6)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def uses_up() -> Iterator[Path]:
        for number, path in enumerate(paths):
            if number == 4:
                next_free = os.dup(0)
                os.close(next_free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, limits[1]))
            yield path

    found: list[float] = []
    with Peer(folder, waits_for(4)) as peer, Client(peer.path) as client:
        try:
            with pytest.raises(SwiprError, match="Too many open files") as caught:
                collect(client.compute_many(uses_up()), found)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.code == "busy"
    assert len(found) == 4


def waits_for(count: int) -> Behaviour:
    """Answer the first ``count`` images when all of them are there."""

    def behave(talk: Talk) -> None:
        for request in [next(talk.requests()) for _ in range(count)]:
            talk.sock.sendall(scores(request["id"]))
        next(talk.requests(), None)

    return behave


def test_without_a_working_folder_an_image_is_called_as_it_was_given(folder: Path) -> None:
    """That it is gone says nothing about the daemon; beside a descriptor, any name does."""
    place = folder / "gone"
    place.mkdir()
    with contextlib.chdir(place):
        place.rmdir()
        assert absolute_name("it.png") == "it.png"
        assert absolute_name("/it.png") == "/it.png"


# --- a daemon that does not play -----------------------------------------------------------------


def busy(id: int | None, retry_after_ms: int) -> bytes:
    """Return the reply of a daemon that has too much to do."""
    found = {"code": "busy", "number": -1, "message": "later", "retryable": True}
    return line(id=id, error={**found, "retry_after_ms": retry_after_ms})


def busy_at_first(talk: Talk) -> None:
    """Refuse the first three images once each, then answer."""
    for count, request in enumerate(talk.requests()):
        if count < 3:
            talk.sock.sendall(busy(request["id"], 200))
        else:
            talk.sock.sendall(scores(request["id"], number_in(talk, -1) / 1000))


def test_a_busy_daemon_is_asked_again_when_it_said(folder: Path) -> None:
    """Nothing is lost, nothing is asked before its time, and the order stays."""
    began = time.monotonic()
    with Peer(folder, busy_at_first) as peer, Client(peer.path) as client:
        found = said(client.compute_many(numbered(folder, 10), in_flight=3))
        assert len(peer.requests) == 13
    assert found == [number / 1000 for number in range(10)]
    assert time.monotonic() - began >= 0.2


def test_a_daemon_that_stays_busy_is_given_up(folder: Path) -> None:
    """With its own words, once nothing has come for as long as was to be waited."""
    with (
        Peer(folder, replies(lambda number: busy(number, 50))) as peer,
        Client(peer.path) as client,
    ):
        began = time.monotonic()
        with pytest.raises(SwiprError, match="later") as caught:
            list(client.compute_many(numbered(folder, 3), timeout=0.5))
        assert caught.value.code == "busy"
        assert 0.5 <= time.monotonic() - began < 2


def test_a_daemon_without_room_for_another_client_is_asked_again(folder: Path) -> None:
    """It says so unasked, and hangs up."""

    def no_room(talk: Talk) -> None:
        talk.sock.sendall(busy(None, 100))
        next(talk.requests(), None)

    with Peer(folder, no_room, answers_with_its_number) as peer, Client(peer.path) as client:
        assert said(client.compute_many(numbered(folder, 5))) == [n / 1000 for n in range(5)]
        assert peer.connections == 2


def leaves_after(count: int) -> Behaviour:
    """Answer ``count`` images and leave; what was sent by then gets no answer."""

    def behave(talk: Talk) -> None:
        for _, request in zip(range(count), talk.requests(), strict=False):
            talk.sock.sendall(scores(request["id"], number_in(talk, -1) / 1000))

    return behave


def test_a_daemon_that_is_replaced_gets_what_it_has_not_answered(folder: Path) -> None:
    """Again and again, as long as each answers something."""
    paths = numbered(folder, 20)
    with Peer(folder, leaves_after(6)) as peer, Client(peer.path) as client:
        assert said(client.compute_many(paths)) == [number / 1000 for number in range(20)]
        assert peer.connections >= 4


def test_answers_that_came_are_yielded_when_the_daemon_goes_for_good(folder: Path) -> None:
    """Those that wait for an earlier one's turn, and those that nobody had read yet."""

    def answer_backwards_and_go(talk: Talk) -> None:
        requests = [next(talk.requests()) for _ in range(4)]
        Path(folder / "peer").unlink()
        for index, request in reversed(list(enumerate(requests))):
            talk.sock.sendall(scores(request["id"], number_in(talk, index) / 1000))

    found: list[float] = []
    peer = Peer(folder, answer_backwards_and_go)
    with peer, Client(peer.path) as client, pytest.raises(SwiprError) as caught:
        # Slowly, so that it is gone when the next image is sent.
        collect(client.compute_many(numbered(folder, 20), in_flight=4), found, pause=0.1)
    assert caught.value.code == "cannot_connect"
    assert found == [0, 0.001, 0.002, 0.003]


@pytest.mark.parametrize("retry_after_ms", [0, -1000])
def test_a_daemon_cannot_make_its_clients_spin(folder: Path, retry_after_ms: int) -> None:
    """Between two tries is a pause, whatever it says."""
    behave = replies(lambda number: busy(number, retry_after_ms))
    with Peer(folder, behave) as peer, Client(peer.path) as client:
        with pytest.raises(SwiprError, match="later"):
            list(client.compute_many(numbered(folder, 1), timeout=0.5))
        assert len(peer.requests) <= 12


def test_a_refusal_is_an_answer(folder: Path) -> None:
    """A daemon that is restarted again and again, and says so, has not just hung up."""

    def stop(talk: Talk) -> None:
        request = next(talk.requests())
        talk.sock.sendall(busy(request["id"], 10))

    peer = Peer(folder, stop, stop, stop, answers_with_its_number)
    with peer, Client(peer.path) as client:
        assert said(client.compute_many(numbered(folder, 1))) == [0]


def test_a_daemon_that_only_hangs_up_is_given_up(folder: Path) -> None:
    """At the second time."""
    with Peer(folder, closes_without_answer) as peer, Client(peer.path) as client:
        with pytest.raises(SwiprError, match="twice closed the connection") as caught:
            list(client.compute_many(numbered(folder, 20)))
        assert caught.value.code == "cannot_connect"
        assert peer.connections == 2


def test_a_daemon_that_stops_is_asked_again(folder: Path) -> None:
    """It says so to what it has not begun, and its successor answers."""

    def stop(talk: Talk) -> None:
        for request in itertools.islice(talk.requests(), 3):
            talk.sock.sendall(error(request["id"], "shutting_down"))

    with Peer(folder, stop, answers_with_its_number) as peer, Client(peer.path) as client:
        assert said(client.compute_many(numbered(folder, 5))) == [n / 1000 for n in range(5)]


@pytest.mark.parametrize(
    ("behave", "code"),
    [
        (replies(lambda number: error(number, "unavailable")), "unavailable"),
        (replies(lambda number: scores(number + 1000)), "bad_reply"),
        (replies(lambda number: line(id=number, scores=[])), "bad_reply"),
        (replies(lambda number: b"garbage\n"), "bad_reply"),
        (never_answers, "timeout"),
    ],
)
def test_what_every_image_would_get_ends_the_batch(
    folder: Path, behave: Behaviour, code: str
) -> None:
    """It is not said of each one."""
    with Peer(folder, behave) as peer, Client(peer.path) as client:
        with pytest.raises(SwiprError) as caught:
            list(client.compute_many(numbered(folder, 20), timeout=0.4))
        assert caught.value.code == code


def test_no_daemon_ends_the_batch() -> None:
    """At the first image."""
    with pytest.raises(SwiprError) as caught:
        list(Client("/nowhere/s").compute_many([CHELSEA] * 20))
    assert caught.value.code == "cannot_connect"


def test_what_the_program_does_meanwhile_does_not_count(folder: Path) -> None:
    """Neither its work on an answer nor its search for the next image is the daemon's time."""
    paths = numbered(folder, 4)

    def slowly() -> Iterator[Path]:
        for path in paths:
            time.sleep(0.4)
            yield path

    with Peer(folder, answers_with_its_number) as peer, Client(peer.path) as client:
        for images in (slowly(), iter(paths)):
            for _, outcome in client.compute_many(images, in_flight=2, timeout=0.3):
                assert isinstance(outcome, Result)
                time.sleep(0.4)


def test_a_file_that_is_replaced_meanwhile_was_the_old_one(folder: Path) -> None:
    """An image that has to be sent again is the one that was taken."""
    path = folder / "it.png"
    path.write_text("7")

    def replace_and_leave(talk: Talk) -> None:
        next(talk.requests())
        (folder / "new").write_text("8")
        shutil.move(folder / "new", path)

    peer = Peer(folder, replace_and_leave, answers_with_its_number)
    with peer, Client(peer.path) as client:
        assert said(client.compute_many([path])) == [0.007]
