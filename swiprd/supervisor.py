"""The front's hold on its workers: it starts them, hands them work, and ends them.

A worker is a process of its own (``swiprd.worker``), reached over a socket pair; nothing of it is
imported here. Each worker has one slot, and each slot one task that goes round and round::

    idle ──work──▶ loading ──loaded──▶ ready ──nothing to do──▶ idle
                   │     ▲               │
                 failed  └── died, or killed past a deadline
                   │
                 failed ──a while, then work──▶ loading

While every slot has failed, requests are answered ``unavailable`` with the reason. Otherwise work
waits in one queue for whichever worker is free. What was on a worker that died is tried once more;
what was on it past the deadline is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from swiprctl import protocol
from swiprctl.protocol import Result, SwiprError
from swiprd.channel import Channel
from swiprd.config import Config

log = logging.getLogger("swiprd")

# -P: the folder that the daemon was started in is no place to import from.
WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "swiprd.worker")
ATTEMPTS: Final = 2
"""How often a request is given to a worker: its own death may have been another's fault."""
PATIENCE: Final = 3
"""Starts in a row that may die without a word before the slot counts as failed."""
MAX_BACKOFF: Final = 30.0
"""Longest time in seconds that a failed slot refuses work."""
DESCRIPTION: Final = frozenset({"model", "labels", "engine", "precision"})
"""What a worker says of its model when it is ready."""
REAP_TIMEOUT: Final = 10.0
"""Seconds that a killed process is given to disappear."""


class WorkerDied(Exception):
    """The worker went away, or broke the protocol, in the middle of something."""


class Supervisor:
    """Workers, and the queue before them.

    ``run`` must be running while ``compute`` is called.
    """

    def __init__(self, config: Config, *, command: tuple[str, ...] = WORKER_COMMAND) -> None:
        self.config = config
        self.command = command
        self.queue: deque[_Job] = deque()
        self.description: dict[str, Any] | None = None
        self._stopping = asyncio.Event()
        self._slots = [_Slot(self) for _ in range(config.workers)]

    async def run(self) -> None:
        """Keep the workers until ``stop``; none is left afterwards, and nothing waits."""
        async with asyncio.TaskGroup() as group:
            slots = [group.create_task(slot.run()) for slot in self._slots]
            await self._stopping.wait()
            for slot in slots:
                slot.cancel()

    def stop(self) -> None:
        """Let ``run`` return. Whatever is not answered by now is answered with shutting_down."""
        self._stopping.set()
        self._fail_queued(_shutting_down())

    async def compute(self, fd: int) -> Result:
        """Return the scores of the image behind ``fd``, which must stay open until then.

        Raises:
            SwiprError: ``busy``, ``unavailable``, ``timeout``, ``worker_died``, or what the worker
                says of the picture.
        """
        self._admit()
        job = _Job(fd)
        self.queue.append(job)
        self.wake()
        try:
            return await job.answer
        finally:
            if job in self.queue:  # the client has gone
                self.queue.remove(job)

    def _admit(self) -> None:
        if self._stopping.is_set():
            raise _shutting_down()
        if self._is_hopeless():
            raise _unavailable(self._slots[0].failure)
        if len(self.queue) >= self.config.max_queue:
            raise SwiprError(
                "busy", f"{len(self.queue)} images are waiting already; try again in a moment"
            )

    def wake(self) -> None:
        """Let every slot look again at what there is to do."""
        for slot in self._slots:
            slot.changed.set()

    def fail_if_hopeless(self) -> None:
        """Answer everything that waits when no slot is left that could work."""
        if self._is_hopeless():
            self._fail_queued(_unavailable(self._slots[0].failure))

    def _fail_queued(self, error: SwiprError) -> None:
        while self.queue:
            self.queue.popleft().fail(error)

    def _is_hopeless(self) -> bool:
        return all(slot.refuses for slot in self._slots)

    def status(self) -> dict[str, Any]:
        """Return the workers' part of the daemon's status."""
        states = [slot.state for slot in self._slots]
        # The best of them is what a client would meet.
        state = next(s for s in ("ready", "loading", "idle", "failed") if s in states)
        reason = next((slot.failure for slot in self._slots if slot.failure), None)
        described = self.description or {}
        return {
            "state": state,
            "reason": reason,
            "model": described.get("model"),
            "labels": described.get("labels"),
            "engine": described.get("engine"),
            "precision": described.get("precision"),
            "queued": len(self.queue),
            "workers": [{"pid": slot.pid, "state": slot.state} for slot in self._slots],
        }


def _unavailable(reason: str | None) -> SwiprError:
    return SwiprError("unavailable", f"no model is being served: {reason}")


def _shutting_down() -> SwiprError:
    return SwiprError("shutting_down", "the daemon is stopping; try again")


class _Job:
    """One image on its way through the queue."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.attempts = 0
        self.answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    def succeed(self, result: Result) -> None:
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: SwiprError) -> None:
        if not self.answer.done():
            self.answer.set_exception(SwiprError(error.code, error.message))


class _Slot:
    """The place of one worker, and the task that keeps it filled.

    Attributes:
        state: ``idle``, ``loading``, ``ready`` or ``failed``.
        failure: why the last start failed; None once one has succeeded.
        refuses: whether no work is taken, because a start failed a moment ago.
        changed: set whenever there may be something to do.
        pid: the worker's process; None when there is none.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._config = supervisor.config
        self._failed_starts = 0  # in a row
        self._died_loading = False  # the last one, without a word
        self.state = "loading"  # what run() begins with
        self.failure: str | None = None
        self.refuses = False
        self.changed = asyncio.Event()
        self.pid: int | None = None

    async def run(self) -> None:
        while True:
            self.state = "loading"
            if await self._serve_with_one_worker():
                continue
            if self.refuses:
                await self._cool_down()
            else:
                self.state = "idle"
            await self._wait_for_work()

    async def _serve_with_one_worker(self) -> bool:
        """Start a worker and feed it until it ends; return whether to replace it at once."""
        try:
            worker = _Worker(self._supervisor.command, on_exit=self.changed.set)
        except OSError as error:
            return self._note_failed_start(f"no worker can be started: {error.strerror}")
        self.pid = worker.pid
        try:
            try:
                await self._load(worker)
            except SwiprError as error:
                # It said why. Patience is for those that die without a word.
                self._died_loading = False
                self._failed_starts = max(self._failed_starts, PATIENCE - 1)
                return self._note_failed_start(error.message)
            except WorkerDied as death:
                self._died_loading = True
                return self._note_failed_start(str(death))
            try:
                await self._work(worker)
            except WorkerDied as death:
                log.warning("worker %d is replaced: %s", worker.pid, death)
                return True
            return False
        finally:
            self.pid = None
            await worker.end()

    def _note_failed_start(self, reason: str) -> bool:
        self._failed_starts += 1
        self.failure = reason
        self.refuses = self._failed_starts >= PATIENCE
        if self.refuses:
            self.state = "failed"
            self._supervisor.fail_if_hopeless()
        again = "; it is tried again when an image comes" if self.refuses else ""
        log.error("the model cannot be served: %s%s", reason, again)
        return not self.refuses

    async def _cool_down(self) -> None:
        await asyncio.sleep(min(2.0 ** (self._failed_starts - PATIENCE), MAX_BACKOFF))
        self.refuses = False

    async def _wait_for_work(self) -> None:
        while not self._supervisor.queue:
            self.changed.clear()
            await self.changed.wait()

    async def _load(self, worker: _Worker) -> None:
        config = self._config
        cache_dir = config.cache_dir
        if self._died_loading and cache_dir is not None:
            # A compiled form may be what killed the last one, in a way that nobody can catch.
            log.warning("worker %d starts without compiled forms", worker.pid)
            cache_dir = None
        settings = {
            "model": config.model,
            "precision": config.precision,
            "cache_dir": cache_dir,
            "threads": config.threads_per_worker,
            "max_bytes": config.max_bytes,
            "max_pixels": config.max_pixels,
            "log_level": config.log_level,
        }
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(config.load_timeout):
                description = await worker.load(settings)
        except TimeoutError:
            raise WorkerDied(
                f"the model was not loaded within load_timeout, {config.load_timeout:g} s"
            ) from None
        self._supervisor.description = description
        self._failed_starts = 0
        self._died_loading = False
        self.failure = None
        self.state = "ready"
        log.info(
            "worker %d is ready after %.1f s: %s, %s %s, labels %s",
            worker.pid,
            asyncio.get_running_loop().time() - began,
            description["model"],
            description["engine"],
            description["precision"],
            ",".join(description["labels"]),
        )

    async def _work(self, worker: _Worker) -> None:
        """Serve from the queue; return when there was nothing to do for ``idle_timeout``."""
        queue = self._supervisor.queue
        idle = self._config.idle_timeout or None
        while True:
            if worker.exited:
                raise WorkerDied("the worker died while it was waiting for work")
            if queue:
                await self._compute(worker, queue.popleft())
                continue
            self.changed.clear()
            try:
                async with asyncio.timeout(idle):
                    await self.changed.wait()
            except TimeoutError:
                log.info("worker %d ends after %g s without work", worker.pid, idle)
                return

    async def _compute(self, worker: _Worker, job: _Job) -> None:
        if job.answer.done():  # nobody waits for it any more
            return
        job.attempts += 1
        limit = self._config.compute_timeout
        try:
            async with asyncio.timeout(limit):
                job.succeed(await worker.compute(job.fd))
        except SwiprError as error:
            job.fail(error)
        except TimeoutError:
            job.fail(SwiprError("timeout", f"the image was not scored within {limit:g} s"))
            raise WorkerDied(f"an image took longer than compute_timeout, {limit:g} s") from None
        except asyncio.CancelledError:
            job.fail(_shutting_down())
            raise
        except WorkerDied:
            if job.attempts >= ATTEMPTS:
                job.fail(
                    SwiprError("worker_died", f"the worker died {ATTEMPTS} times on this image")
                )
            elif not job.answer.done():
                self._supervisor.queue.appendleft(job)
                self._supervisor.wake()
            raise


class _Worker:
    """One worker process and the socket to it. ``end`` must be awaited."""

    def __init__(self, command: tuple[str, ...], on_exit: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # whatever a library prints belongs into the log
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self.pid = self._process.pid
            self._pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self._channel = Channel(ours, max_line=protocol.MAX_LINE)
        self._last_id = 0
        self.exited = False
        self._exit: asyncio.Future[None] = loop.create_future()
        self._on_exit = on_exit
        loop.add_reader(self._pidfd, self._note_exit)

    def _note_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._process.wait()
        self.exited = True
        self._exit.set_result(None)
        self._on_exit()

    async def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Send the settings and return what the worker says of its model once it is ready."""
        reply = await self._call(protocol.encode(settings), None)
        described = reply.get("ready")
        if not isinstance(described, dict) or described.keys() != DESCRIPTION:
            raise _broken("no proper 'ready'")
        return described

    async def compute(self, fd: int) -> Result:
        """Return the scores of the image behind ``fd``."""
        self._last_id += 1
        reply = await self._call(protocol.encode({"id": self._last_id}), fd)
        if reply.get("id") != self._last_id:
            raise _broken("it answered another request than it was asked")
        try:
            return protocol.decode_result(reply)
        except SwiprError as error:
            raise _broken(error.message) from None

    async def _call(self, line: bytes, fd: int | None) -> dict[str, Any]:
        try:
            await self._channel.send(line, fd)
            reply = await self._channel.receive()
        except OSError as error:
            raise WorkerDied(f"the worker is gone: {error.strerror}") from None
        except SwiprError as error:
            raise _broken(error.message) from None
        if reply is None:
            raise WorkerDied("the worker died")
        if reply.fd is not None:
            os.close(reply.fd)
            raise _broken("it sent a descriptor")
        try:
            return protocol.decode_reply(reply.data, max_depth=protocol.MAX_DEPTH)
        except SwiprError as error:
            if error.code in protocol.CLIENT_CODES:
                raise _broken(error.message) from None
            raise

    async def end(self) -> None:
        """Kill the process, if it still runs, and leave nothing of it behind."""
        self._channel.close()
        if not self.exited:
            self._process.kill()
        try:
            await self._wait_for_exit()
        except asyncio.CancelledError:  # the daemon stops, but not before its worker is gone
            await self._wait_for_exit()
            raise
        finally:
            if not self.exited:
                asyncio.get_running_loop().remove_reader(self._pidfd)
                log.error("worker %d cannot be killed; it is left behind", self.pid)
            os.close(self._pidfd)

    async def _wait_for_exit(self) -> None:
        await asyncio.wait([self._exit], timeout=REAP_TIMEOUT)


def _broken(how: str) -> WorkerDied:
    return WorkerDied(f"the worker broke the protocol: {how}")
