"""One life of the daemon: it serves, reloads, tells its service manager how it fares, and stops."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Final

from swiprctl.protocol import SwiprError
from swiprd.config import Config, ConfigError
from swiprd.listen import OwnSocket
from swiprd.log import printable, set_level
from swiprd.process import REAP_TIMEOUT
from swiprd.server import FAREWELL, Server
from swiprd.supervisor import Supervisor, in_brief, shutting_down
from swiprd.systemd import ServiceManager, extend_timeout, reloading

log = logging.getLogger("swiprd")

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
SIGNALS: Final = (*STOP_SIGNALS, signal.SIGHUP)
"""What ``Daemon.run`` takes care of; the caller blocks them until then."""
BEATS: Final = 3
"""How often the watchdog is fed in the time after which it would bite."""
MARGIN: Final = 5.0
"""Seconds beyond what a reload or a stop may take by its own limits."""


class Daemon:
    """Wires signals, server, workers and service manager together.

    Args:
        load_config: reads the settings anew, for a reload; raises ConfigError.
        config: the settings to begin with.
        listeners, own: see ``Server``.
        manager: who is told how we fare.
        log_target: where workers log to; see ``swiprd.log``.
        out_of_service: see ``Supervisor``.
    """

    def __init__(
        self,
        load_config: Callable[[], Config],
        config: Config,
        listeners: Sequence[socket.socket],
        *,
        own: OwnSocket | None,
        manager: ServiceManager,
        log_target: str,
        out_of_service: str | None = None,
    ) -> None:
        self._load_config = load_config
        self._config = config
        self._manager = manager
        self._supervisor = Supervisor(
            config,
            log_target=log_target,
            out_of_service=out_of_service,
            on_change=self._tell_status,
        )
        self._server = Server(
            config, listeners, self._supervisor, own=own, reload=self._reload_for_client
        )
        self._had_terminal = _has_terminal()
        self._stopping = False
        self._said = ""
        self._reloading = asyncio.Lock()
        self._next_reload: asyncio.Task[SwiprError | None] | None = None

    async def run(self) -> None:
        """Serve until a signal or idleness ends it; nothing is left behind afterwards."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._server.stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # before a worker inherits it
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self._supervisor.run())
            serving = self._group.create_task(self._server.run())
            feeding = self._group.create_task(self._feed_watchdog())
            self._manager.tell("READY=1")
            self._tell_status()
            await self._server.stopping()
            self._begin_to_stop()
            await serving
            self._supervisor.stop()
            feeding.cancel()
        self._manager.tell("STATUS=stopped")
        self._manager.close()
        # One more signal changes nothing now; without the loop's handlers it would kill.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _begin_to_stop(self) -> None:
        self._stopping = True
        longest = self._config.drain_timeout + FAREWELL + REAP_TIMEOUT + MARGIN
        self._manager.tell("STOPPING=1", extend_timeout(longest))
        self._tell_status()
        log.info("stopping")
        self._supervisor.give_up_reload()

    # --- what the service manager hears ----------------------------------------------------------

    def _tell_status(self) -> None:
        words = "draining: what was asked is still answered"
        if not self._stopping:
            words = _in_words(self._supervisor)
            if self._reloading.locked():
                words = f"reloading; until then {words}"
        if words != self._said:
            self._said = words
            self._manager.tell(f"STATUS={printable(words)}")

    async def _feed_watchdog(self) -> None:
        if self._manager.watchdog is None:
            return
        while True:
            # A loop that hangs, or a worker that nobody ends, must not look alive.
            if not self._supervisor.overdue():
                self._manager.tell("WATCHDOG=1")
            await asyncio.sleep(self._manager.watchdog / BEATS)

    # --- reload ----------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        if self._stopping:
            return
        if self._had_terminal and not _has_terminal():
            log.info("the terminal is gone")
            self._server.stop()
        else:
            self._begin_reload()

    async def _reload_for_client(self) -> None:
        # A client that leaves takes nothing back.
        failure = await asyncio.shield(self._begin_reload())
        if failure is not None:
            raise failure

    def _begin_reload(self) -> asyncio.Task[SwiprError | None]:
        # One that still waits for its turn will read what is there by then: it does for all.
        if self._next_reload is None:
            self._next_reload = self._group.create_task(self._reload())
        return self._next_reload

    async def _reload(self) -> SwiprError | None:
        async with self._reloading:
            self._next_reload = None
            if self._stopping:
                return shutting_down()
            self._manager.tell(*reloading(), extend_timeout(self._config.load_timeout + MARGIN))
            self._tell_status()
            try:
                config = self._load_config()
                self._manager.tell(extend_timeout(config.load_timeout + MARGIN))
                await self._supervisor.reload(config)
            except ConfigError as error:
                failure = SwiprError("reload_failed", f"everything stays as it was: {error}")
                log.error("not reloaded: %s", failure)
                return failure
            except SwiprError as error:
                log.error("not reloaded: %s", error)
                return error
            except Exception as error:  # the old settings have served until now, and will
                log.exception("not reloaded")
                return SwiprError("internal", f"the reload failed: {type(error).__name__}")
            else:
                await self._use(config)
                return None
            finally:
                self._manager.tell("READY=1")
                asyncio.get_running_loop().call_soon(self._tell_status)  # when the lock is free

    async def _use(self, config: Config) -> None:
        if config.socket != self._config.socket:
            log.warning("another socket is listened at only after a restart")
        set_level(config.log_level)
        self._config = config
        await self._server.reconfigure(config)
        log.info("reloaded")


def _in_words(supervisor: Supervisor) -> str:
    status = supervisor.status()
    match status["state"]:
        case "loading":
            return "loading the model"
        case "ready":
            labels = in_brief(status["labels"])
            return f"ready: {labels}; {status['engine']} {status['precision']}"
        case "idle":
            return "idle: the next image loads the model again"
    return f"no model is being served: {status['reason']}"


def _has_terminal() -> bool:
    """Return whether this process is somebody's in front of a terminal; see tty(4)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
