"""Lines and descriptors over real socket pairs: swiprd.channel."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiprctl.protocol import MAX_LINE, Line, LineReader, SwiprError
from swiprd.channel import Channel
from swiprd.channel import receive as receive_once
from tests.tasks import descriptors, run, until

MORE = "more than one descriptor came with the request, expected at most one"


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


@contextlib.contextmanager
def files(count: int) -> Iterator[list[IO[bytes]]]:
    """Open files that can be told apart, by their inodes, wherever their descriptors turn up."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


@dataclass(frozen=True)
class Got:
    """One line as it was received, and the file that came with it."""

    data: bytes
    file: int | None = None
    fault: str | None = None


def take(line: Line) -> Got:
    """Close the line's descriptor and return what there is to know of it."""
    if line.fd is None:
        return Got(line.data, None, line.fd_fault.message if line.fd_fault else None)
    found = inode(line.fd)
    os.close(line.fd)
    return Got(line.data, found, line.fd_fault.message if line.fd_fault else None)


def receive(sock: socket.socket, reader: LineReader) -> bool:
    """Receive once, and close what is not wanted."""
    unwanted: list[int] = []
    try:
        return receive_once(sock, reader, unwanted)
    finally:
        for fd in unwanted:
            os.close(fd)


def receive_all(sock: socket.socket, reader: LineReader | None = None) -> list[Got]:
    """Return all lines that arrive on ``sock`` until nothing more is there, or its end."""
    reader = LineReader(max_line=MAX_LINE) if reader is None else reader
    lines = []
    with contextlib.suppress(BlockingIOError):
        while receive(sock, reader):
            while (line := reader.next_line()) is not None:
                lines.append(take(line))
    return lines


def send(sock: socket.socket, data: bytes, *sent: IO[bytes]) -> None:
    assert socket.send_fds(sock, [data], [file.fileno() for file in sent]) == len(data)


# --- receive: whose descriptor is it -------------------------------------------------------------


def test_a_descriptor_is_not_taken_for_the_line_before_its_own() -> None:
    """Both lines wait when the first is read, and the kernel would hand them out as one."""
    with pair() as (ours, theirs), files(1) as [file]:
        send(theirs, b"without\n")
        send(theirs, b"with\n", file)
        assert receive_all(ours) == [Got(b"without"), Got(b"with", inode(file.fileno()))]


def test_a_descriptor_sent_with_several_lines_is_the_first_ones() -> None:
    """It rides with the first byte; the lines behind it came without."""
    with pair() as (ours, theirs), files(1) as [file]:
        send(theirs, b"first\nsecond\nthird\n", file)
        assert receive_all(ours) == [
            Got(b"first", inode(file.fileno())),
            Got(b"second"),
            Got(b"third"),
        ]


def test_each_line_of_a_burst_gets_its_own_descriptor() -> None:
    """Lines with and without are told apart though they are read late and together."""
    with pair() as (ours, theirs), files(3) as [a, b, c]:
        send(theirs, b"a\n", a)
        send(theirs, b"none\n")
        send(theirs, b"b\nnone too\n", b)
        send(theirs, b"c\n", c)
        assert receive_all(ours) == [
            Got(b"a", inode(a.fileno())),
            Got(b"none"),
            Got(b"b", inode(b.fileno())),
            Got(b"none too"),
            Got(b"c", inode(c.fileno())),
        ]


@pytest.mark.parametrize("late", [False, True], ids=["as they come", "all at once"])
def test_a_descriptor_belongs_to_its_line_in_however_many_pieces(late: bool) -> None:
    """It came with the first byte, and is there when the last one has come."""
    with pair() as (ours, theirs), files(1) as [file]:
        reader = LineReader(max_line=MAX_LINE)
        lines: list[Got] = []
        for number, byte in enumerate(b"pieces\nnext\n"):
            send(theirs, bytes([byte]), *([file] if number == 0 else []))
            if not late:
                lines += receive_all(ours, reader)
        lines += receive_all(ours, reader)
        assert lines == [Got(b"pieces", inode(file.fileno())), Got(b"next")]


@pytest.mark.parametrize("length", [4094, 4095, 4096, 4097, 10_000, MAX_LINE - 1])
def test_a_descriptor_belongs_to_a_line_of_any_length(length: int) -> None:
    """Also where a line, or its newline alone, takes one more read."""
    with pair() as (ours, theirs), files(2) as [a, b]:
        send(theirs, b"x" * length + b"\n", a)
        send(theirs, b"next\n", b)
        assert receive_all(ours) == [
            Got(b"x" * length, inode(a.fileno())),
            Got(b"next", inode(b.fileno())),
        ]


def test_one_call_takes_no_byte_of_the_next_line() -> None:
    """What is behind the newline stays in the socket."""
    with pair() as (ours, theirs):
        theirs.sendall(b"first\nsecond\n")
        reader = LineReader(max_line=MAX_LINE)
        assert receive(ours, reader)
        assert ours.recv(100, socket.MSG_PEEK) == b"second\n"


def test_a_received_descriptor_is_not_inherited() -> None:
    """It is close-on-exec from its first moment: no worker gets another client's file."""
    with pair() as (ours, theirs), files(1) as [file]:
        send(theirs, b"mine\n", file)
        reader = LineReader(max_line=MAX_LINE)
        assert receive(ours, reader)
        line = reader.next_line()
        assert line is not None
        assert line.fd is not None
        inheritable = os.get_inheritable(line.fd)
        os.close(line.fd)
        assert not inheritable


def test_the_end_of_the_stream_is_told_from_nothing_there_yet() -> None:
    """Nothing there raises; the end returns False, again and again, whole line or not."""
    with pair() as (ours, theirs):
        reader = LineReader(max_line=MAX_LINE)
        with pytest.raises(BlockingIOError):
            receive(ours, reader)
        theirs.sendall(b"cut off")
        theirs.close()
        assert receive(ours, reader)
        assert not receive(ours, reader)
        assert not receive(ours, reader)
        assert reader.unfinished == len(b"cut off")


@dataclass(frozen=True)
class Sent:
    """One line of a generated stream."""

    data: bytes
    has_fd: bool


LINES = st.lists(
    st.builds(
        Sent,
        st.one_of(
            st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"|")),
            st.integers(0, 9000).map(lambda size: b"x" * size),
        ),
        st.booleans(),
    ),
    max_size=10,
)


@settings(max_examples=300, deadline=None)
@given(lines=LINES, data=st.data())
def test_every_line_gets_exactly_its_own_descriptor(lines: list[Sent], data: st.DataObject) -> None:
    """However the stream is cut into sends, and whenever it is read, nothing is mixed or lost."""
    stream = b"".join(line.data + b"\n" for line in lines)
    starts = {}  # of the lines with a descriptor: only there can one ride
    position = 0
    for number, line in enumerate(lines):
        if line.has_fd:
            starts[position] = number
        position += len(line.data) + 1
    cuts = data.draw(st.sets(st.integers(0, len(stream)), max_size=20), label="cuts")
    edges = sorted({*cuts, *starts, 0, len(stream)})
    pauses = data.draw(st.sets(st.sampled_from(edges)), label="read before these")

    before = descriptors()
    with pair() as (ours, theirs), files(len(lines)) as sent:
        reader = LineReader(max_line=MAX_LINE)
        got: list[Got] = []
        for begin, end in itertools.pairwise(edges):
            if begin in pauses:
                got += receive_all(ours, reader)
            send(theirs, stream[begin:end], *([sent[starts[begin]]] if begin in starts else []))
        theirs.close()
        got += receive_all(ours, reader)
        assert got == [
            Got(line.data, inode(file.fileno()) if line.has_fd else None)
            for line, file in zip(lines, sent, strict=True)
        ]
    assert descriptors() == before


# --- receive: descriptors that cannot be used ----------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 5, 20, 253])
def test_too_many_descriptors_are_a_fault_and_none_is_kept(count: int) -> None:
    """253 is the most that the kernel carries; the next line is as good as ever."""
    with pair() as (ours, theirs), files(1) as [file]:
        before = descriptors()
        send(theirs, b"greedy\n", *[file] * count)
        send(theirs, b"modest\n", file)
        assert receive_all(ours) == [
            Got(b"greedy", None, MORE),
            Got(b"modest", inode(file.fileno())),
        ]
        assert descriptors() == before


@pytest.mark.parametrize("second", [1, 5])
def test_a_second_descriptor_within_a_line_is_a_fault(second: int) -> None:
    """The first one is closed too: nobody can tell which was meant."""
    with pair() as (ours, theirs), files(2) as [a, b]:
        before = descriptors()
        send(theirs, b"one ", a)
        send(theirs, b"line\n", *[b] * second)
        send(theirs, b"next\n", b)
        assert receive_all(ours) == [
            Got(b"one line", None, MORE),
            Got(b"next", inode(b.fileno())),
        ]
        assert descriptors() == before


def test_a_descriptor_there_is_no_room_for_marks_its_line() -> None:
    """In a process without a free descriptor the line comes without one and says so."""
    script = """
import json, os, resource, socket
from swiprctl.protocol import LineReader
from swiprd.channel import receive

ours, theirs = socket.socketpair()
reader = LineReader(max_line=100)
socket.send_fds(theirs, [b"lost\\n"], [0])
theirs.sendall(b"none\\n")
socket.send_fds(theirs, [b"whole\\n"], [0])
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
lines = []
for number in range(3):
    if number == 2:
        os.close(held.pop())
    assert receive(ours, reader, [])
    line = reader.next_line()
    lines.append([line.data.decode(), line.fd is not None, line.fd_fault and line.fd_fault.code])
print(json.dumps(lines))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == [
        ["lost", False, "busy"],
        ["none", False, None],
        ["whole", True, None],
    ]


# --- Channel -------------------------------------------------------------------------------------


@contextlib.contextmanager
def channels(max_line: int = MAX_LINE) -> Iterator[tuple[Channel, Channel]]:
    """Return the two ends of one connection; both are closed afterwards."""
    socks = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends = [Channel(sock, max_line=max_line) for sock in socks]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


@contextlib.contextmanager
def channel(max_line: int = MAX_LINE) -> Iterator[tuple[Channel, socket.socket]]:
    """Return a channel and the bare socket at its other end."""
    with pair() as (ours, theirs):
        end = Channel(ours, max_line=max_line)
        try:
            yield end, theirs
        finally:
            end.close()


async def received(end: Channel) -> Got | None:
    line = await end.receive()
    return None if line is None else take(line)


async def waiting(task: asyncio.Task[Any]) -> None:
    """Return once ``task`` has gone as far as it gets without anything from outside."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


def test_lines_and_descriptors_go_both_ways() -> None:
    """What one end sends is what the other receives, in its order."""

    async def main() -> None:
        with channels() as (a, b), files(1) as [file]:
            for sender, receiver in ((a, b), (b, a)):
                await sender.send(b"one\n")
                await sender.send(b"two\nthree\n", file.fileno())
                assert await received(receiver) == Got(b"one")
                assert await received(receiver) == Got(b"two", inode(file.fileno()))
                assert await received(receiver) == Got(b"three")
            os.fstat(file.fileno())  # sending has not closed it

    run(main())


def test_receive_waits_until_a_whole_line_has_come() -> None:
    """Half a line wakes it up and is not handed out; unfinished tells how much there is."""

    async def main() -> None:
        with channel() as (end, peer):
            task = asyncio.create_task(received(end))
            await waiting(task)
            peer.sendall(b"half")
            await until(lambda: end.unfinished == 4, "half a line")
            await waiting(task)
            peer.sendall(b" whole\n")
            assert await task == Got(b"half whole")
            assert end.unfinished == 0

    run(main())


def test_the_end_of_the_stream_is_none_each_time() -> None:
    """What came before it is handed out first."""

    async def main() -> None:
        with channel() as (end, peer):
            peer.sendall(b"last\ncut off")
            peer.close()
            assert await received(end) == Got(b"last")
            assert await received(end) is None
            assert await received(end) is None
            assert end.unfinished == len(b"cut off")

    run(main())


def test_an_overlong_line_is_an_error_each_time_but_not_for_the_lines_before() -> None:
    """The stream cannot be followed any further, and what came until then counts."""

    async def main() -> None:
        with channel(max_line=10) as (end, peer):
            peer.sendall(b"123456789\n" + b"1234567890\n" + b"fine\n")
            assert await received(end) == Got(b"123456789")
            for _ in range(2):
                with pytest.raises(SwiprError) as caught:
                    await end.receive()
                assert caught.value.code == "too_long"

    run(main())


def test_a_broken_connection_is_an_error_for_both_directions() -> None:
    """A peer that closes with unread data resets; it is no proper end of the stream."""

    async def main() -> None:
        with channel() as (end, peer):
            await end.send(b"never read\n")
            peer.close()
            with pytest.raises(ConnectionResetError):
                await end.receive()
            with pytest.raises(BrokenPipeError):
                await end.send(b"too late\n")

    run(main())


def test_more_than_the_socket_holds_is_sent_whole_to_a_slow_reader() -> None:
    """The sender waits for room, and the descriptor is still there only once."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        data = os.urandom(400_000).replace(b"\n", b"|") + b"\n"
        with channel() as (end, peer), files(1) as [file]:
            peer.setblocking(False)
            task = asyncio.create_task(end.send(data, file.fileno()))
            await waiting(task)
            first, fds, flags, _ = socket.recv_fds(peer, 1000, 10)
            assert [inode(fd) for fd in fds] == [inode(file.fileno())]
            assert not flags & socket.MSG_CTRUNC
            os.close(fds[0])
            parts = [first]
            while sum(map(len, parts)) < len(data):
                parts.append(await loop.sock_recv(peer, 3000))
            await task
            assert b"".join(parts) == data
            with pytest.raises(BlockingIOError):
                peer.recv(1)

    run(main())


def test_lines_of_concurrent_senders_never_mix() -> None:
    """Each line is larger than the socket holds, so every sender has to wait in its middle."""

    async def main() -> None:
        size = 300_000
        letters = b"abcdefgh"
        with channels(max_line=size + 1) as (a, b), files(len(letters)) as sent:
            async with asyncio.TaskGroup() as group:
                for letter, file in zip(letters, sent, strict=True):
                    group.create_task(a.send(bytes([letter]) * size + b"\n", file.fileno()))
                got = [await received(b) for _ in letters]
            assert {(one.data, one.file) for one in got if one is not None} == {
                (bytes([letter]) * size, inode(file.fileno()))
                for letter, file in zip(letters, sent, strict=True)
            }

    run(main())


def test_both_ends_may_send_more_than_the_socket_holds_at_once() -> None:
    """Sending does not keep from receiving."""

    async def main() -> None:
        size = 300_000
        with channels(max_line=size + 1) as (a, b):
            async with asyncio.TaskGroup() as group:
                group.create_task(a.send(b"a" * size + b"\n"))
                group.create_task(b.send(b"b" * size + b"\n"))
                at_b = group.create_task(received(b))
                at_a = group.create_task(received(a))
            assert at_b.result() == Got(b"a" * size)
            assert at_a.result() == Got(b"b" * size)

    run(main())


# --- Channel: ends -------------------------------------------------------------------------------


def test_stop_receiving_hands_out_what_has_arrived_and_ends() -> None:
    """Lines in the socket count as arrived; half a line stays unfinished."""

    async def main() -> None:
        with channel() as (end, peer), files(1) as [file]:
            send(peer, b"one\n", file)
            peer.sendall(b"two\nhalf")
            end.stop_receiving()
            assert await received(end) == Got(b"one", inode(file.fileno()))
            assert await received(end) == Got(b"two")
            assert await received(end) is None
            assert await received(end) is None
            assert end.unfinished == len(b"half")

    run(main())


def test_stop_receiving_ends_a_receive_that_waits() -> None:
    """Nothing has arrived, so there is nothing more to wait for."""

    async def main() -> None:
        with channel() as (end, _):
            task = asyncio.create_task(received(end))
            await waiting(task)
            end.stop_receiving()
            end.stop_receiving()
            assert await task is None

    run(main())


def test_a_line_that_came_just_before_stop_receiving_is_handed_out() -> None:
    """The receive that waits has not seen it yet, but it had arrived."""

    async def main() -> None:
        with channel() as (end, peer):
            task = asyncio.create_task(received(end))
            await waiting(task)
            peer.sendall(b"just in time\n")
            end.stop_receiving()
            assert await task == Got(b"just in time")
            assert await received(end) is None

    run(main())


def test_after_stop_receiving_one_can_still_send() -> None:
    """The answers to what has arrived have to go out."""

    async def main() -> None:
        with channel() as (end, peer):
            end.stop_receiving()
            await end.send(b"answer\n")
            assert peer.recv(100) == b"answer\n"

    run(main())


def test_a_cancelled_receive_leaves_the_channel_usable() -> None:
    """Neither half a line nor its descriptor is lost with the one who waited for the rest."""

    async def main() -> None:
        with channel() as (end, peer), files(1) as [file]:
            send(peer, b"half", file)
            task = asyncio.create_task(received(end))
            await until(lambda: end.unfinished == 4, "half a line")
            await waiting(task)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            peer.sendall(b" whole\n")
            assert await received(end) == Got(b"half whole", inode(file.fileno()))

    run(main())


def test_a_cancelled_send_that_has_not_begun_sends_nothing() -> None:
    """Who waits for its turn and gives up leaves no trace in the stream."""

    async def main() -> None:
        size = 300_000
        with channels(max_line=size + 1) as (a, b):
            first = asyncio.create_task(a.send(b"1" * size + b"\n"))
            second = asyncio.create_task(a.send(b"2" * size + b"\n"))
            third = asyncio.create_task(a.send(b"3" * size + b"\n"))
            await waiting(second)
            second.cancel()
            assert await received(b) == Got(b"1" * size)
            assert await received(b) == Got(b"3" * size)
            await first
            await third
            with pytest.raises(asyncio.CancelledError):
                await second

    run(main())


def keep_open(peer: socket.socket) -> None:
    peer.sendall(b"hello\n")


def end_sending(peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)


def send_and_end_sending(peer: socket.socket) -> None:
    peer.sendall(b"hello\n")
    peer.shutdown(socket.SHUT_WR)


def close(peer: socket.socket) -> None:
    peer.close()


def send_and_close(peer: socket.socket) -> None:
    peer.sendall(b"hello\n")
    peer.close()


@pytest.mark.parametrize(
    ("act", "gone"),
    [
        (keep_open, False),
        (end_sending, False),
        (send_and_end_sending, False),
        (close, True),
        (send_and_close, True),
    ],
)
def test_a_peer_that_is_gone_is_told_from_one_that_only_ended_sending(
    act: Callable[[socket.socket], None], gone: bool
) -> None:
    """The one still reads its answers, the other never will."""

    async def main() -> None:
        with channel() as (end, peer):
            assert not end.peer_is_gone()
            act(peer)
            assert end.peer_is_gone() is gone
            if not gone:
                await end.send(b"answer\n")
                assert peer.recv(100) == b"answer\n"

    run(main())


def test_close_closes_a_descriptor_that_nobody_claimed() -> None:
    """Its line never became whole, or nobody asked for it."""

    async def main() -> None:
        with files(1) as [file]:
            before = descriptors()
            with channel() as (end, peer):
                send(peer, b"cut off", file)
                task = asyncio.create_task(received(end))
                await until(lambda: end.unfinished > 0, "half a line")
                assert len(descriptors()) == len(before) + 3, "two sockets and the file"
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            # The loop has made nothing meanwhile that would stay open.
            assert descriptors() == before

    run(main())
