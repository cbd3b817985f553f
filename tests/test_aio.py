"""The client for asyncio: the same answers, many at a time, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import swiprctl
from swiprctl import Result, SwiprError
from swiprctl.aio import AsyncClient
from tests import test_batch
from tests.daemon import CHELSEA, COFFEE, Daemon
from tests.peer import (
    Peer,
    Talk,
    closes_without_answer,
    error,
    full_backlog,
    line,
    never_answers,
    pongs,
    replies,
)
from tests.tasks import run, until
from tests.test_batch import answers_with_its_number, busy_at_first, leaves_after, numbered

NOT_IMAGE = Path(__file__).parent / "fastai" / "45_not_image.jpg"


async def failure_of(call: Coroutine[Any, Any, object]) -> SwiprError:
    """Return the error that ``call`` raises."""
    with pytest.raises(SwiprError) as caught:
        await call
    return caught.value


async def said(client: AsyncClient, images: list[Path], **options: Any) -> list[float | str]:
    """Return the last score of each image, or the code of its error."""
    return [
        outcome.code if isinstance(outcome, SwiprError) else outcome.scores[-1]
        async for _, outcome in client.compute_many(images, **options)
    ]


def test_the_package_does_not_bring_asyncio() -> None:
    """Only who asks for this client pays for it."""
    code = "import sys, swiprctl; sys.exit('asyncio' in sys.modules)"
    folder = str(Path(swiprctl.__file__).parents[1])
    subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, check=True)


# --- answers -------------------------------------------------------------------------------------


def test_all_calls_answer_as_the_blocking_client_does(daemon: Daemon) -> None:
    """To the last digit."""
    with daemon.client() as blocking:
        expected = blocking.compute(CHELSEA)

    async def main() -> None:
        async with AsyncClient(daemon.path) as client:
            await client.ping()
            result = await client.compute(CHELSEA, thumbnail=32)
            assert (result.scores, result.model) == (expected.scores, expected.model)
            assert result.thumbnail is not None
            assert max(result.thumbnail.width, result.thumbnail.height) == 32
            assert (await client.compute(io.BytesIO(CHELSEA.read_bytes()))).scores == result.scores
            assert (await client.status())["pid"] == daemon.pid
            await client.reload()

    run(main())


def test_many_tasks_share_one_connection_and_each_gets_its_own(daemon: Daemon) -> None:
    """However their answers come in."""

    async def main() -> None:
        async with AsyncClient(daemon.path) as client:
            cat, cup = await client.compute(CHELSEA), await client.compute(COFFEE)
            results = await asyncio.gather(*map(client.compute, [CHELSEA, COFFEE] * 10))
            assert [r.scores for r in results] == [cat.scores, cup.scores] * 10
            assert (await client.status())["connections"] == 1

    run(main())


def test_an_error_is_its_own_tasks(daemon: Daemon) -> None:
    """With the image's name; the others are well."""

    async def main() -> None:
        async with AsyncClient(daemon.path) as client:
            calls = map(client.compute, [CHELSEA, NOT_IMAGE, Path("/none"), COFFEE])
            found = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(outcome, "code", "ok") for outcome in found] == [
            "ok",
            "not_an_image",
            "not_found",
            "ok",
        ]
        assert str(found[1]).startswith(f"{NOT_IMAGE}: ")

    run(main())


def test_a_batch_comes_out_in_order(daemon: Daemon, folder: Path) -> None:
    """Errors stand in their places."""

    async def main() -> None:
        images = [CHELSEA, NOT_IMAGE, COFFEE, folder / "none"] * 3
        async with AsyncClient(daemon.path) as client:
            found = [pair async for pair in client.compute_many(images, in_flight=5)]
        assert [image for image, _ in found] == images
        kinds = [getattr(outcome, "code", "ok") for _, outcome in found]
        assert kinds == ["ok", "not_an_image", "ok", "not_found"] * 3

    run(main())


def test_a_batch_sends_ahead_and_no_more_than_that(folder: Path) -> None:
    """Memory and descriptors stay flat."""
    paths = numbered(folder, 20)

    async def main() -> None:
        with Peer(folder, never_answers) as peer:
            async with AsyncClient(peer.path) as client:
                with pytest.raises(SwiprError, match="no answer"):
                    await said(client, paths, in_flight=3, timeout=0.3)
            assert len(peer.requests) == 3

    run(main())


def test_a_batch_that_is_left_leaves_nothing(folder: Path) -> None:
    """No task, and the client goes on."""
    paths = numbered(folder, 20)

    async def main() -> None:
        with Peer(folder, answers_with_its_number) as peer:
            async with AsyncClient(peer.path) as client:
                async with contextlib.aclosing(client.compute_many(paths)) as found:
                    async for _ in found:
                        break
                assert await said(client, paths[:3]) == [0, 0.001, 0.002]
            assert peer.connections == 1

    run(main())


@pytest.mark.parametrize("wrong", [{"in_flight": 0}, {"in_flight": 65}, {"timeout": 0.0}])
def test_numbers_that_cannot_be_are_refused_at_once(wrong: dict[str, float]) -> None:
    """As the blocking client does it."""

    async def main() -> None:
        with pytest.raises(ValueError, match="expected"):
            AsyncClient("/nowhere").compute_many([CHELSEA], **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="timeout"):
            AsyncClient("/nowhere", timeout=-1)

    run(main())


# --- a daemon that does not play -----------------------------------------------------------------


def test_a_busy_daemon_is_asked_again(folder: Path) -> None:
    """When it said, within a batch."""
    paths = numbered(folder, 10)

    async def main() -> None:
        with Peer(folder, busy_at_first) as peer:
            async with AsyncClient(peer.path) as client:
                found = await said(client, paths, in_flight=3)
            assert len(peer.requests) == 13
        assert found == [number / 1000 for number in range(10)]

    run(main())


def test_a_daemon_that_stays_busy_is_given_up(folder: Path) -> None:
    """With its own words."""
    paths = numbered(folder, 3)

    async def main() -> None:
        with Peer(folder, replies(lambda number: test_batch.busy(number, 50))) as peer:
            async with AsyncClient(peer.path) as client:
                with pytest.raises(SwiprError, match="later") as caught:
                    await said(client, paths, timeout=0.3)
        assert caught.value.code == "busy"

    run(main())


def test_a_daemon_that_is_replaced_gets_what_it_has_not_answered(folder: Path) -> None:
    """Its successor answers it."""
    paths = numbered(folder, 20)

    async def main() -> None:
        with Peer(folder, leaves_after(8)) as peer:
            async with AsyncClient(peer.path) as client:
                found = await said(client, paths, in_flight=4)
            assert peer.connections > 1
        assert found == [number / 1000 for number in range(20)]

    run(main())


def test_a_request_that_is_lost_twice_is_given_up(folder: Path) -> None:
    """And the next call is well."""

    async def main() -> None:
        with Peer(folder, closes_without_answer, closes_without_answer, pongs) as peer:
            async with AsyncClient(peer.path) as client:
                error = await failure_of(client.ping())
                assert error.code == "cannot_connect"
                assert "twice closed the connection" in error.message
                await client.ping()

    run(main())


def test_no_daemon_is_told_as_ever() -> None:
    """With what to do about it."""

    async def main() -> None:
        async with AsyncClient("/nowhere/s") as client:
            error = await failure_of(client.ping())
            assert error.code == "cannot_connect"
            assert "there is no such socket; start swiprd" in error.message
            with pytest.raises(SwiprError):
                await said(client, [CHELSEA] * 20)

    run(main())


@pytest.mark.parametrize(
    "behave",
    [
        replies(lambda number: b"garbage\n"),
        replies(lambda number: line(id=number + 9, pong=True)),
        replies(lambda number: b"x" * 70_000 + b"\n"),
    ],
)
def test_a_reply_that_is_not_ours_is_refused(folder: Path, behave: Any) -> None:
    """Whoever waits is told, and the next call connects anew."""

    async def main() -> None:
        with Peer(folder, behave, pongs) as peer:
            async with AsyncClient(peer.path) as client:
                found = await asyncio.gather(*[client.ping()] * 1, return_exceptions=True)
                assert [getattr(failure, "code", None) for failure in found] == ["bad_reply"]
                await client.ping()

    run(main())


def test_an_error_of_the_daemon_comes_through(folder: Path) -> None:
    """As it came."""

    async def main() -> None:
        with Peer(folder, replies(lambda number: error(number, "on_fire", -9, "hot"))) as peer:
            async with AsyncClient(peer.path) as client:
                failure = await failure_of(client.ping())
        assert (failure.code, failure.number, failure.message) == ("on_fire", -9, "hot")

    run(main())


def test_a_call_ends_in_time(folder: Path) -> None:
    """Whatever it waits for; and a late answer is nobody's."""

    def answer_late(talk: Talk) -> None:
        first, second = (next(talk.requests()) for _ in range(2))
        for request in (first, second):
            talk.sock.sendall(line(id=request["id"], status={"id": request["id"]}))
        next(talk.requests(), None)

    async def main() -> None:
        with Peer(folder, answer_late) as peer:
            async with AsyncClient(peer.path, timeout=0.3) as client:
                assert (await failure_of(client.status())).code == "timeout"
                client.timeout = 10
                assert await client.status() == {"id": 2}
            assert peer.connections == 1
        with full_backlog(folder) as path:
            async with AsyncClient(path, timeout=0.3) as client:
                assert (await failure_of(client.ping())).code == "timeout"

    run(main())


def test_a_task_that_is_cancelled_disturbs_nobody(folder: Path) -> None:
    """Its answer is dropped; others get theirs on the same connection."""
    gate = threading.Event()

    def wait_for_all(talk: Talk) -> None:
        requests = talk.requests()
        ids = [next(requests)["id"] for _ in range(3)]
        gate.wait(30)
        for id in ids:
            talk.sock.sendall(line(id=id, status={"id": id}))
        for request in requests:
            talk.sock.sendall(line(id=request["id"], status={"id": request["id"]}))

    async def main() -> None:
        with Peer(folder, wait_for_all) as peer:
            async with AsyncClient(peer.path) as client:
                tasks = [asyncio.create_task(client.status()) for _ in range(3)]
                await until(lambda: len(peer.requests) == 3, "three requests")
                tasks[1].cancel()
                gate.set()
                found = await asyncio.gather(*tasks, return_exceptions=True)
                assert (found[0], found[2]) == ({"id": 1}, {"id": 3})
                assert isinstance(found[1], asyncio.CancelledError)
                assert await client.status() == {"id": 4}
            assert peer.connections == 1

    run(main())


def test_a_client_that_is_closed_tells_who_waits(folder: Path) -> None:
    """It does not connect anew for them; a later call does."""

    async def main() -> None:
        with Peer(folder, never_answers, pongs) as peer:
            client = AsyncClient(peer.path)
            waiting = asyncio.create_task(client.ping())
            await until(lambda: len(peer.requests) == 1, "a request")
            await client.aclose()
            assert "the client was closed" in str(await failure_of(_awaited(waiting)))
            assert peer.connections == 1
            await client.ping()
            await client.aclose()

    run(main())


def test_a_call_that_is_opening_its_file_does_not_connect_any_more(folder: Path) -> None:
    """Once the client is closed, whatever it was at."""
    opening = threading.Event()
    go_on = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            opening.set()
            go_on.wait(30)
            return super().read(size)

    async def main() -> None:
        with Peer(folder, pongs) as peer:
            client = AsyncClient(peer.path)
            waiting = asyncio.create_task(client.compute(Slow(b"x")))
            await until(opening.is_set, "the thread")
            await client.aclose()
            go_on.set()
            with pytest.raises(SwiprError, match="the client was closed"):
                await waiting
            assert peer.connections == 0

    run(main())


def test_images_that_were_taken_are_answered_when_the_next_cannot_be(folder: Path) -> None:
    """As in the blocking client."""
    paths = numbered(folder, 5)

    def breaks() -> Iterator[Path]:
        yield from paths
        raise LookupError("no more")

    async def main() -> None:
        found = []
        with Peer(folder, answers_with_its_number) as peer:
            async with AsyncClient(peer.path) as client:
                try:
                    async for _, outcome in client.compute_many(breaks()):
                        assert isinstance(outcome, Result)
                        found.append(outcome.scores[-1])
                except LookupError:
                    found.append(-1.0)
        assert found == [*(number / 1000 for number in range(5)), -1]

    run(main())


async def _awaited(task: asyncio.Task[None]) -> None:
    await task


def test_requests_that_fill_the_socket_are_sent_whole(folder: Path) -> None:
    """A peer that reads late gets every line, each with its descriptor."""
    name = "x" * 200
    folder_of_many = folder.joinpath(*[name] * 10)
    folder_of_many.mkdir(parents=True)
    paths = numbered(folder_of_many, 150)
    began = threading.Event()

    def read_late(talk: Talk) -> None:
        began.wait(30)
        answers_with_its_number(talk)

    async def main() -> None:
        with Peer(folder, read_late) as peer:
            async with AsyncClient(peer.path) as client:
                loop = asyncio.get_running_loop()
                loop.call_later(0.5, began.set)
                found = await asyncio.gather(*map(client.compute, paths))
        assert [result.scores[-1] for result in found] == [n / 1000 for n in range(150)]

    run(main())


def test_a_file_that_nobody_waits_for_any_more_is_closed(folder: Path) -> None:
    """A slow file system gives a descriptor after its task was cancelled."""
    opened = threading.Event()
    go_on = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            opened.set()
            go_on.wait(30)
            return super().read(size)

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with AsyncClient("/nowhere") as client:
            task = asyncio.create_task(client.compute(Slow(b"x")))
            await until(opened.is_set, "the thread")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await until(lambda: len(os.listdir("/proc/self/fd")) == before, "it to be closed")

    run(main())


def test_results_have_types(daemon: Daemon) -> None:
    """What is yielded is a result or an error, and nothing else."""

    async def main() -> None:
        async with AsyncClient(daemon.path) as client:
            async for image, outcome in client.compute_many([CHELSEA]):
                assert isinstance(image, Path)
                assert isinstance(outcome, Result)

    run(main())
