"""The front's side towards clients: accept them, answer what they ask, stop without losing any."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import swiprctl
from swiprctl import protocol
from swiprctl.protocol import Request, SwiprError
from swiprd.config import Config
from swiprd.connection import Connection
from swiprd.files import EXHAUSTED
from swiprd.listen import OwnSocket
from swiprd.metrics import Latency, memory_of
from swiprd.supervisor import Supervisor
from swiprd.userio import UserIO

log = logging.getLogger("swiprd")

ACCEPT_BATCH: Final = 64
ACCEPT_PAUSE: Final = 1.0
"""Seconds without accepting after the machine ran out of descriptors or memory."""
RESERVED: Final = 4
"""Places beyond ``max_connections`` for those who may reload."""
COMPLAINT_PAUSE: Final = 60.0
"""Seconds between two lines in the log about clients who are refused."""
MAX_REFUSED: Final = 64
"""Clients who are told at a time that they are one too many; to more than that nothing is said."""
RETRY_AFTER: Final = 1000
"""Milliseconds after which whoever found no room may try again, where nothing better is known."""
SPARE_DESCRIPTORS: Final = 512
"""What a front needs beside its clients and their pictures: 253 may come in one message, and there
are listeners, workers, standard ones."""
FAREWELL: Final = 1.0
"""Seconds to send what is left to be said once the drain's time is over."""

_UCRED: Final = struct.Struct("iII")  # of unix(7): process, user, group


class Peer(NamedTuple):
    """Who is at the other end of a connection, as the kernel knows it (SO_PEERCRED)."""

    pid: int
    uid: int


class Server:
    """Serves the clients that come to its listeners until it is stopped, or idle.

    Args:
        listeners: listening, non-blocking sockets; the caller closes them.
        own: the listener that is ours alone. None: somebody else listens on when this process is
            gone, as systemd does. Then ``run`` also returns after ``config.idle_timeout`` without
            a client, and clients who wait to be accepted are left to the successor.
        reload: does what the operation asks for; raises SwiprError.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[socket.socket],
        supervisor: Supervisor,
        *,
        own: OwnSocket | None,
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._config = config
        self._admins = _admins(config)
        _allow_descriptors(config)
        self._listeners = listeners
        self._supervisor = supervisor
        self._own = own
        self._reload = reload
        self._group: asyncio.TaskGroup | None = None
        self._connections: set[Connection] = set()
        self._refused: set[Connection] = set()
        self._of_user: Counter[int] = Counter()
        self._user_io: dict[int, UserIO] = {}  # of each user
        self._all_gone = asyncio.Event()
        self._stopping = asyncio.Event()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._started = time.monotonic()
        self._next_complaint = self._started
        self._replies: Counter[str] = Counter()
        self._latency = Latency()

    async def run(self) -> None:
        """Serve; return when everything that was asked is answered, or the drain's time is over."""
        async with asyncio.TaskGroup() as self._group:
            self._start_accepting()
            self._note_gone()
            await self._stopping.wait()
            self._stop_accepting()
            if self._own is not None:
                # Nobody new can come, who has come is accepted, and a successor may have the path.
                self._own.unlink()
                while self._accept(self._own.socket):
                    pass
                self._own.close()
            await self._drain()
            # Whoever still has a connection open now does not read what it is sent.
            for connection in self._connections | self._refused:
                connection.abandon()
        for io in self._user_io.values():
            io.end()

    def stop(self) -> None:
        """Accept no more clients, answer what has been asked, and let ``run`` return."""
        self._stopping.set()

    async def reconfigure(self, config: Config) -> None:
        """Use ``config`` from now on, for those who are connected, too."""
        # In a thread: where users come from may be slow to answer.
        self._admins = await asyncio.to_thread(_admins, config)
        self._config = config
        _allow_descriptors(config)
        for connection in self._connections:
            connection.reconfigure(config)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._note_gone()

    async def stopping(self) -> None:
        """Return once ``stop`` has been called, or the daemon has been idle for long enough."""
        await self._stopping.wait()

    async def _drain(self) -> None:
        for connection in self._connections:
            connection.stop_reading()
        if not await self._wait_until_gone(self._config.drain_timeout):
            self._supervisor.stop()  # everything unanswered is answered with shutting_down
            await self._wait_until_gone(FAREWELL)

    async def _wait_until_gone(self, seconds: float) -> bool:
        if self._connections:
            self._all_gone.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._all_gone.wait()
            except TimeoutError:
                return False
        return True

    # --- clients ---------------------------------------------------------------------------------

    def _start_accepting(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept a batch of clients; return whether more may be waiting."""
        assert self._group is not None, "run() is not running"
        for _ in range(ACCEPT_BATCH):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                log.error("cannot accept clients: %s", error.strerror)
                self._pause_accepting(listener)
                return False
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            peer = _peer_of(sock)
            log.debug("a client came: user %d, process %d", peer.uid, peer.pid)
            refusal = self._refusal(peer)
            io = self._io_of(peer)
            if refusal is not None and len(self._refused) >= MAX_REFUSED:
                io.close_socket(sock)
                continue
            connection = Connection(sock, partial(self._answer, peer, io), self._config, io)
            if refusal is None:
                self._connections.add(connection)
                self._of_user[peer.uid] += 1
                self._group.create_task(self._serve(connection, peer))
            else:
                self._refused.add(connection)
                self._group.create_task(self._refuse(connection, refusal))
        return True

    def _refusal(self, peer: Peer) -> SwiprError | None:
        """Return why this client is one too many; None: it is not."""
        config = self._config
        places = config.max_connections
        if peer.uid in self._admins:
            places += RESERVED  # to see what is going on, and to change the limits
        if len(self._connections) >= places:
            words = f"{places} clients are connected, and no more may be (max_connections)"
        elif self._of_user[peer.uid] >= config.max_per_user:
            words = (
                f"user {peer.uid} has {config.max_per_user} connections, and may have no more"
                " (max_per_user)"
            )
        else:
            return None
        now = time.monotonic()
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAINT_PAUSE
            log.warning("a client of user %d is refused: %s", peer.uid, words)
        return SwiprError("busy", f"{words}; try again in a moment")

    def _io_of(self, peer: Peer) -> UserIO:
        for uid, io in list(self._user_io.items()):
            # While something hangs it is kept: who comes back finds the threads that are left.
            if uid != peer.uid and not self._of_user[uid] and not io.pending:
                io.end()
                del self._user_io[uid]
        if peer.uid not in self._user_io:
            self._user_io[peer.uid] = UserIO()
        return self._user_io[peer.uid]

    def _pause_accepting(self, listener: socket.socket) -> None:
        # The client stays in the backlog, where the listener would report it again and again.
        loop = asyncio.get_running_loop()
        if loop.remove_reader(listener):
            loop.call_later(ACCEPT_PAUSE, self._resume_accepting, listener)

    def _resume_accepting(self, listener: socket.socket) -> None:
        if not self._stopping.is_set():
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _serve(self, connection: Connection, peer: Peer) -> None:
        try:
            await connection.run()
        except Exception:  # one client's trouble must not become another's
            log.exception("a connection failed")
        finally:
            self._connections.discard(connection)
            self._of_user[peer.uid] -= 1
            self._of_user += Counter()  # forgets whom nobody is connected of
            self._note_gone()

    async def _refuse(self, connection: Connection, refusal: SwiprError) -> None:
        try:
            await connection.refuse(refusal)
        except Exception:
            log.exception("a connection failed")
        finally:
            self._refused.discard(connection)

    def _note_gone(self) -> None:
        if self._connections:
            return
        self._all_gone.set()
        idle = self._config.idle_timeout
        if self._own is None and idle and not self._stopping.is_set():
            self._idle_timer = asyncio.get_running_loop().call_later(idle, self._end_idle)

    def _end_idle(self) -> None:
        # In this order: whoever came before the readers went is looked for, and served; whoever
        # comes afterwards waits in the backlog, which outlives this process.
        self._stop_accepting()
        for listener in self._listeners:
            self._accept(listener)
        if self._connections:
            self._start_accepting()
            return
        log.info("no client for %g s: good-bye", self._config.idle_timeout)
        self.stop()

    # --- requests --------------------------------------------------------------------------------

    async def _answer(self, peer: Peer, io: UserIO, request: Request | SwiprError) -> bytes:
        try:
            if isinstance(request, SwiprError):
                raise request
            reply = await self._perform(request, peer, io)
            self._replies["ok"] += 1
            return reply
        except SwiprError as error:
            failure = error
        except Exception as error:
            log.exception("cannot answer a request")
            failure = SwiprError("internal", f"the daemon failed: {type(error).__name__}")
        failure.id = request.id
        if failure.code == "busy" and failure.retry_after_ms is None:
            failure.retry_after_ms = RETRY_AFTER
        self._replies[failure.code] += 1
        return protocol.encode_error(failure)

    async def _perform(self, request: Request, peer: Peer, io: UserIO) -> bytes:
        match request.op:
            case "compute":
                return await self._compute_in_time(request, io)
            case "ping":
                return protocol.encode({"id": request.id, "pong": True})
            case "hello":
                return protocol.encode({"id": request.id, "hello": self._hello()})
            case "status":
                return protocol.encode({"id": request.id, "status": self._status()})
            case "reload":
                self._check_may_reload(peer)
                await self._reload()
                return protocol.encode({"id": request.id, "status": self._status()})
        raise AssertionError(f"the protocol let {request.op!r} through")

    def _check_may_reload(self, peer: Peer) -> None:
        if peer.uid not in self._admins:
            raise SwiprError(
                "permission_denied",
                "only root, the daemon's own user and admin_users may ask for a reload: sudo"
                f" swiprctl reload (you are user {peer.uid})",
            )
        log.info("user %d, process %d, asks for a reload", peer.uid, peer.pid)

    async def _compute_in_time(self, request: Request, io: UserIO) -> bytes:
        if request.timeout_ms is None:
            return await self._compute(request, io)
        try:
            async with asyncio.timeout(request.timeout_ms / 1000):
                return await self._compute(request, io)
        except TimeoutError:
            raise SwiprError(
                "timeout", f"the image was not scored within timeout_ms, {request.timeout_ms}"
            ) from None

    async def _compute(self, request: Request, io: UserIO) -> bytes:
        began = time.monotonic()
        if request.fd is not None:
            result = await self._supervisor.compute(request.fd, request.thumbnail)
        else:
            assert request.path is not None
            fd = await io.open(request.path, self._config.compute_timeout)
            try:
                result = await self._supervisor.compute(fd, request.thumbnail)
            finally:
                io.close([fd])
        self._latency.note(result, (time.monotonic() - began) * 1000)
        return protocol.encode_result(request.id, result)

    def _hello(self) -> dict[str, Any]:
        config = self._config
        return {
            "server": f"swiprd {swiprctl.__version__}",
            "protocol": [protocol.VERSION, protocol.VERSION],
            "ops": protocol.OPS,
            "limits": {
                "line_bytes": config.max_line_bytes,
                "depth": config.max_depth,
                "id_bytes": protocol.MAX_ID_BYTES,
                "in_flight": config.max_in_flight,
                "connections": config.max_connections,
                "per_user": config.max_per_user,
                "queue": config.max_queue,
                "file_bytes": config.max_bytes,
                "pixels": config.max_pixels,
                "line_seconds": config.line_timeout,
                "reply_seconds": config.reply_timeout,
                "compute_seconds": config.compute_timeout,
            },
            "model": self._supervisor.status()["model"],
        }

    def _status(self) -> dict[str, Any]:
        return {
            "version": swiprctl.__version__,
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._started, 3),
            **self._supervisor.status(),
            "memory": memory_of("self"),
            "connections": len(self._connections),
            "images": self._latency.images,
            "latency": self._latency.summary(),
            "replies": dict(sorted(self._replies.items())),
        }


def _peer_of(sock: socket.socket) -> Peer:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return Peer(pid, uid)


def _admins(config: Config) -> frozenset[int]:
    admins = {0, os.geteuid()}
    for name in filter(None, config.admin_users.split(",")):
        try:
            admins.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            log.warning("admin_users: there is no user %r", name)
    return frozenset(admins)


def _allow_descriptors(config: Config) -> None:
    # A client has its connection and the picture of a line that is still coming; more pictures
    # than wait in the queue are not held.
    needed = 2 * config.max_connections + MAX_REFUSED + config.max_queue + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning(
            "%d open files are allowed, %d may be needed: raise LimitNOFILE= or ulimit -n",
            hard,
            needed,
        )
