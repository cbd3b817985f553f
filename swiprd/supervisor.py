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

A worker that has grown too much is replaced by one that loads beside it. A reload fills new slots
beside the old ones. When every new worker is ready, and not before, the queue is theirs; an old
worker ends when it has finished what it was at.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from swiprctl.protocol import Result, SwiprError
from swiprd.config import Config
from swiprd.metrics import memory_of
from swiprd.process import WORKER_COMMAND, WorkerDied, WorkerProcess

log = logging.getLogger("swiprd")

ATTEMPTS: Final = 2
"""How often a request is given to a worker: its own death may have been another's fault."""
PATIENCE: Final = 3
"""Starts in a row that may die without a word before the slot counts as failed."""
MAX_BACKOFF: Final = 30.0
"""Longest time in seconds that a failed slot refuses work."""
FEW: Final = 8
"""Labels that are all named in a log line."""
FIRST_PACE: Final = 0.1
"""Seconds that an image is thought to take before one was seen."""
OVERDUE: Final = 5.0
"""Seconds past its deadline in which a worker must be gone."""


class Supervisor:
    """Workers, and the queue before them.

    ``run`` must be running while ``compute`` or ``reload`` is called.

    Args:
        config: the settings that the first workers get.
        log_target: where workers log to; see ``swiprd.log``.
        out_of_service: why there is nothing to serve, until a reload succeeds; None: there is.
        on_change: called whenever ``status`` may tell something else.
        command: what starts a worker; the number of its socket is appended.
    """

    def __init__(
        self,
        config: Config,
        *,
        log_target: str = "terminal",
        out_of_service: str | None = None,
        on_change: Callable[[], None] = lambda: None,
        command: tuple[str, ...] = WORKER_COMMAND,
    ) -> None:
        self.config = config
        self.log_target = log_target
        self.on_change = on_change
        self.command = command
        self.queue: deque[_Job] = deque()
        self.description: dict[str, Any] | None = None
        self.pace = FIRST_PACE
        self._stopping = asyncio.Event()
        self._is_ending = False
        self._out_of_service = out_of_service
        self._slots = [] if out_of_service else self._new_slots(config)
        for slot in self._slots:
            slot.admitted = True
        self._candidates: list[_Slot] = []
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[_Slot, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Keep the workers until ``stop``; none is left afterwards, and nothing waits."""
        async with asyncio.TaskGroup() as self._group:
            for slot in self._slots:
                self._start(slot)
            await self._stopping.wait()
            for task in self._tasks.values():
                task.cancel()

    def stop(self) -> None:
        """Let ``run`` return. Whatever is not answered by now is answered with shutting_down."""
        self._is_ending = True
        self._stopping.set()
        self._fail_queued(shutting_down())

    async def reload(self, config: Config) -> None:
        """Serve with ``config`` as soon as new workers have loaded and checked its model.

        Until then, and when they cannot, everything stays as it was. One call at a time.

        Raises:
            SwiprError: ``reload_failed``, with the reason; ``shutting_down``.
        """
        if self._is_ending:
            raise shutting_down()
        self._candidates = slots = self._new_slots(config)
        tasks = [self._start(slot) for slot in slots]
        try:
            for slot in slots:
                reason = await slot.settled
                if self._is_ending:
                    raise shutting_down()
                if reason is not None:
                    raise SwiprError("reload_failed", f"everything stays as it was: {reason}")
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        finally:
            self._candidates = []
        retired, self._slots, self.config = self._slots, slots, config
        self._out_of_service = None
        for slot in retired:
            self._retire(slot)
        for slot in slots:
            slot.admit()

    def recycle(self, slot: _Slot) -> None:
        """Put a new worker in the place of the one of ``slot`` as soon as it is ready."""
        assert self._group is not None, "run() is not running"
        if not self._is_ending:
            self._group.create_task(self._recycle(slot))

    async def _recycle(self, slot: _Slot) -> None:
        if self._is_ending:  # since then; nobody would end what is started now
            return
        successor = _Slot(self, self.config)
        task = self._start(successor)
        reason = await successor.settled
        if reason is None and slot in self._slots and not self._is_ending:
            self._slots[self._slots.index(slot)] = successor
            self._retire(slot)
            successor.admit()
            return
        task.cancel()
        if reason is not None and not self._is_ending:
            log.warning("the worker that has grown goes on: no other can start: %s", reason)
        slot.stay()

    def _retire(self, slot: _Slot) -> None:
        slot.retired = True
        if not slot.busy and slot in self._tasks:
            self._tasks[slot].cancel()

    def give_up_reload(self) -> None:
        """Let a ``reload`` that is under way end with ``shutting_down``."""
        self._is_ending = True
        for slot in self._candidates:
            slot.settle(None)

    def overdue(self) -> bool:
        """Return whether a worker is past its deadline and not gone."""
        now = asyncio.get_running_loop().time()
        deadlines = [slot.deadline for slot in self._tasks if slot.deadline is not None]
        return any(now > deadline + OVERDUE for deadline in deadlines)

    def _new_slots(self, config: Config) -> list[_Slot]:
        return [_Slot(self, config) for _ in range(config.workers)]

    def _start(self, slot: _Slot) -> asyncio.Task[None]:
        assert self._group is not None, "run() is not running"
        task = self._tasks[slot] = self._group.create_task(slot.run())
        task.add_done_callback(lambda _: self._end(slot))
        return task

    def _end(self, slot: _Slot) -> None:
        del self._tasks[slot]
        slot.settle("its worker is gone")

    async def compute(self, fd: int, thumbnail: int | None = None) -> Result:
        """Return the scores of the image behind ``fd``, which must stay open until then.

        Args:
            fd: read from its start.
            thumbnail: longest side of a small copy that is wanted as well; None: none is.

        Raises:
            SwiprError: ``busy``, ``unavailable``, ``timeout``, ``worker_died``, or what the worker
                says of the picture.
        """
        self._admit()
        job = _Job(fd, thumbnail)
        self.queue.append(job)
        self.wake()
        try:
            return await job.answer
        finally:
            if job in self.queue:  # the client has gone
                self.queue.remove(job)

    def _admit(self) -> None:
        if self._stopping.is_set():
            raise shutting_down()
        if self._is_hopeless():
            raise _unavailable(self._failure())
        if len(self.queue) >= self.config.max_queue:
            busy = SwiprError(
                "busy",
                f"{len(self.queue)} waiting, and no more images may be (max_queue);"
                " try again in a moment",
            )
            busy.retry_after_ms = round(1000 * self.pace * len(self.queue) / self.config.workers)
            raise busy

    def note_pace(self, seconds: float) -> None:
        """Take note of how long an image took; the last ten or so count."""
        self.pace += (seconds - self.pace) / 10

    def wake(self) -> None:
        """Let every slot look again at what there is to do."""
        for slot in self._slots:
            slot.changed.set()

    def fail_if_hopeless(self) -> None:
        """Answer everything that waits when no slot is left that could work."""
        if self._is_hopeless():
            self._fail_queued(_unavailable(self._failure()))

    def _fail_queued(self, error: SwiprError) -> None:
        while self.queue:
            self.queue.popleft().fail(error)

    def _is_hopeless(self) -> bool:
        return all(slot.refuses for slot in self._slots)

    def _failure(self) -> str | None:
        failures = [slot.failure for slot in self._slots if slot.failure]
        return failures[0] if failures else self._out_of_service

    def status(self) -> dict[str, Any]:
        """Return the workers' part of the daemon's status."""
        states = [slot.state for slot in self._slots] or ["failed"]
        # The best of them is what a client would meet.
        state = next(s for s in ("ready", "loading", "idle", "failed") if s in states)
        described = self.description or {}
        return {
            "state": state,
            "reason": self._failure(),
            "bundle": self.config.model,
            "model": described.get("model"),
            "labels": described.get("labels"),
            "engine": described.get("engine"),
            "precision": described.get("precision"),
            "queued": len(self.queue),
            "workers": [
                {
                    "pid": slot.pid,
                    "state": slot.state,
                    "memory": 0 if slot.pid is None else memory_of(slot.pid),
                }
                for slot in self._slots
            ],
            "idle_in": self._idle_in(),
        }

    def _idle_in(self) -> float | None:
        """Return the seconds until the last worker ends for want of work; None: none will."""
        ends = [slot.idle_at for slot in self._slots if slot.pid is not None]
        if not ends or None in ends:
            return None
        last = max(end for end in ends if end is not None)
        return round(max(0.0, last - asyncio.get_running_loop().time()), 3)


def in_brief(labels: Sequence[str]) -> str:
    """Return the labels in a line for people, who do not want to read a thousand."""
    return ",".join(labels) if len(labels) <= FEW else f"{labels[0]} and {len(labels) - 1} more"


def _unavailable(reason: str | None) -> SwiprError:
    return SwiprError("unavailable", f"no model is being served: {reason}")


def shutting_down() -> SwiprError:
    """Return what is said while the daemon stops."""
    return SwiprError("shutting_down", "the daemon is stopping; try again")


class _Job:
    """One image on its way through the queue."""

    def __init__(self, fd: int, thumbnail: int | None) -> None:
        self.fd = fd
        self.thumbnail = thumbnail
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
        admitted: whether it may take work, and speaks for the daemon.
        retired: whether others have taken its place.
        busy: whether its worker is at an image.
        settled: done once the first start has come to an end: None, or why it failed.
        changed: set whenever there may be something to do.
        pid: the worker's process; None when there is none.
        deadline: when, on the loop's clock, the worker must be done with what it is at, or be
            killed; None: it is at nothing, or gone.
        idle_at: when, on the loop's clock, the worker ends if nothing comes; None: it works, or
            stays.
    """

    def __init__(self, supervisor: Supervisor, config: Config) -> None:
        self._supervisor = supervisor
        self._config = config
        self._failed_starts = 0  # in a row
        self._died_loading = False  # the last one, without a word
        self._description: dict[str, Any] | None = None
        self._memory_at_first = 0
        self._is_leaving = False  # a successor is loading
        self._state = "loading"  # what run() begins with
        self.failure: str | None = None
        self.refuses = False
        self.admitted = False
        self.retired = False
        self.busy = False
        self.settled: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()
        self.pid: int | None = None
        self.deadline: float | None = None
        self.idle_at: float | None = None

    @property
    def state(self) -> str:
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self._supervisor.on_change()

    def admit(self) -> None:
        self.admitted = True
        self._supervisor.description = self._description
        self._supervisor.on_change()
        self.changed.set()

    def settle(self, failure: str | None) -> None:
        if not self.settled.done():
            self.settled.set_result(failure)

    def stay(self) -> None:
        """Go on with the worker that was to be replaced, until it has grown as much again."""
        self._memory_at_first = 0
        self._is_leaving = False

    async def run(self) -> None:
        while not self.retired:
            self.state = "loading"
            if await self._serve_with_one_worker() or self.retired:
                continue
            if self.refuses:
                await self._cool_down()
            else:
                self.state = "idle"
            await self._wait_for_work()

    async def _serve_with_one_worker(self) -> bool:
        """Start a worker and feed it until it ends; return whether to replace it at once."""
        try:
            worker = WorkerProcess(self._supervisor.command, on_exit=self.changed.set)
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
            self.deadline = None

    def _note_failed_start(self, reason: str) -> bool:
        self._failed_starts += 1
        self.failure = reason
        self.refuses = self._failed_starts >= PATIENCE
        if self.refuses:
            self.state = "failed"
            self._supervisor.fail_if_hopeless()
        if not self.admitted:
            if self.refuses:
                self.settle(reason)
            return not self.refuses
        again = "; it is tried again when an image comes" if self.refuses else ""
        log.error("the model cannot be served: %s%s", reason, again)
        return not self.refuses

    async def _cool_down(self) -> None:
        await asyncio.sleep(min(2.0 ** (self._failed_starts - PATIENCE), MAX_BACKOFF))
        self.refuses = False

    async def _wait_for_work(self) -> None:
        while not (self._supervisor.queue and self.admitted):
            self.changed.clear()
            await self.changed.wait()

    async def _load(self, worker: WorkerProcess) -> None:
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
            "max_memory": config.max_worker_bytes,
            "log_level": config.log_level,
            "log_target": self._supervisor.log_target,
        }
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(config.load_timeout) as limit:
                self.deadline = limit.when()
                description = await worker.load(settings)
            self.deadline = None
        except TimeoutError:
            raise WorkerDied(
                f"the model was not loaded within load_timeout, {config.load_timeout:g} s"
            ) from None
        self._description = description
        self._memory_at_first = worker.memory()
        self._failed_starts = 0
        self._died_loading = False
        self.failure = None
        if self.admitted:
            self._supervisor.description = description
        self.settle(None)
        self.state = "ready"
        log.info(
            "worker %d is ready after %.1f s: %s, %s %s, labels %s",
            worker.pid,
            asyncio.get_running_loop().time() - began,
            description["model"],
            description["engine"],
            description["precision"],
            in_brief(description["labels"]),
        )

    async def _work(self, worker: WorkerProcess) -> None:
        """Serve from the queue; return when there was nothing to do for ``idle_timeout``."""
        queue = self._supervisor.queue
        idle = self._config.idle_timeout or None
        while not self.retired:
            if worker.exited:
                raise WorkerDied("the worker died while it was waiting for work")
            if queue and self.admitted:
                await self._compute(worker, queue.popleft())
                self._look_at_memory(worker)
                continue
            self.changed.clear()
            try:
                async with asyncio.timeout(idle) as timeout:
                    self.idle_at = timeout.when()
                    await self.changed.wait()
            except TimeoutError:
                log.info("worker %d ends after %g s without work", worker.pid, idle)
                return
            finally:
                self.idle_at = None

    def _look_at_memory(self, worker: WorkerProcess) -> None:
        limit = self._config.recycle_mib * 2**20
        if not limit or self._is_leaving:
            return
        memory = worker.memory()
        self._memory_at_first = self._memory_at_first or memory
        gained = memory - self._memory_at_first
        if gained > limit:
            self._is_leaving = True
            log.info("worker %d has gained %d MiB and is replaced", worker.pid, gained >> 20)
            self._supervisor.recycle(self)

    async def _compute(self, worker: WorkerProcess, job: _Job) -> None:
        if job.answer.done():  # nobody waits for it any more
            return
        job.attempts += 1
        limit = self._config.compute_timeout
        began = asyncio.get_running_loop().time()
        self.busy = True
        try:
            async with asyncio.timeout(limit) as timeout:
                self.deadline = timeout.when()
                job.succeed(await worker.compute(job.fd, job.thumbnail))
            self.deadline = None
            self._supervisor.note_pace(asyncio.get_running_loop().time() - began)
        except SwiprError as error:
            self.deadline = None
            job.fail(error)
        except TimeoutError:
            job.fail(SwiprError("timeout", f"the image was not scored within {limit:g} s"))
            raise WorkerDied(f"an image took longer than compute_timeout, {limit:g} s") from None
        except asyncio.CancelledError:
            job.fail(shutting_down())
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
        finally:
            self.busy = False
