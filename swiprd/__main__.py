"""The command swiprd: settings in, sockets and signals wired to the server, exit status out.

The only reader of the environment and the command line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import swiprctl
from swiprctl.client import SYSTEM_SOCKET
from swiprd.config import SETTINGS, Config, ConfigError, load_config, usual_cache
from swiprd.listen import ListenError, OwnSocket
from swiprd.server import Server
from swiprd.supervisor import Supervisor
from swiprd.systemd import ActivationError, listen_fds, notify

log = logging.getLogger("swiprd")

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
COMMANDS: Final = ("import", "compile", "show", "verify")
"""What swiprd does instead of serving when it is the first word; see swiprd.commands."""
PATHS: Final = ("model", "cache_dir", "socket")
"""Settings that may be relative to the current folder when they are given as flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon in the foreground and return its exit status."""
    _fill_standard_descriptors()
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] and words[0] in COMMANDS:
        return _run_command(words)
    if words[:1] and not words[0].startswith("-"):
        expected = ", ".join(COMMANDS)
        return _fail(ValueError(f"no command {words[0]!r:.60}, expected one of {expected}"), USAGE)
    args = vars(_parser().parse_args(argv))
    notify_address = os.environ.pop("NOTIFY_SOCKET", None)  # not for the workers
    try:
        config = load_config(file=args.pop("config"), environment=os.environ, flags=args)
        if config.cache_dir is None:
            config = dataclasses.replace(config, cache_dir=usual_cache(os.environ))
        _log_to_stderr(config.log_level)
        inherited = listen_fds(os.environ)
        # From here to the event loop a signal waits: nothing that is bound may be left behind.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        own = None if inherited else open_listener(config.socket, os.environ)
    except ConfigError as error:
        return _fail(error, USAGE)
    except (ActivationError, ListenError) as error:
        return _fail(error, FAILED)
    listeners = [own.socket] if own else inherited
    log.info("listening at %s", ", ".join(str(sock.getsockname()) for sock in listeners))
    try:
        asyncio.run(_serve(config, listeners, own=own, notify_address=notify_address))
    finally:
        if own is not None:
            own.close()
    log.info("stopped")
    return DONE


def _run_command(words: Sequence[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that nothing is left behind
    try:
        # Only now: these import torch, which the daemon's front never does.
        from swiprd.commands import run_command
    except ModuleNotFoundError as error:
        hint = "install swipr without --no-deps"
        return _fail(ImportError(f"{error.name} is not installed; {hint}"), FAILED)
    return run_command(words, os.environ)


def run() -> None:
    """Run ``main`` and leave. What the console script calls."""
    status = _flushed(main())
    logging.shutdown()
    # A thread that hangs in an open() on a dead file system would keep sys.exit() waiting.
    os._exit(status)


def _flushed(status: int) -> int:
    if sys.stdout is None:  # it was closed when we were started
        return status
    try:
        sys.stdout.flush()
    except OSError as error:
        return _fail(OSError(f"cannot write to standard output: {error.strerror}"), FAILED)
    return status


def _fill_standard_descriptors() -> None:
    # Where they are closed, the next sockets would take their numbers, and whatever a library
    # prints would go to a client.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


async def _serve(
    config: Config,
    listeners: Sequence[socket.socket],
    *,
    own: OwnSocket | None,
    notify_address: str | None,
) -> None:
    supervisor = Supervisor(config)
    server = Server(config, listeners, supervisor, own=own)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, server.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # before a worker inherits it
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        serving = group.create_task(server.run())
        notify(notify_address, "READY=1")
        await server.stopping()
        notify(notify_address, "STOPPING=1")
        log.info("stopping")
        await serving
        supervisor.stop()
    # One more signal changes nothing now; without the loop's handlers it would kill.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swiprd",
        usage="swiprd [--config FILE] [--SETTING VALUE ...]\n"
        f"       swiprd {'|'.join(COMMANDS)} --help",
        description="Keep an image classifier warm and answer over a Unix socket.",
        epilog="[Default.] Also in the file (idle_timeout = 300) and in variables"
        " (SWIPRD_IDLE_TIMEOUT=300). Flags win over variables, variables over the file.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=80),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"swiprd {swiprctl.__version__}")
    parser.add_argument("--config", metavar="FILE", help="settings file [/etc/swipr/swiprd.toml]")
    for setting in SETTINGS:
        parser.add_argument(
            setting.flag,
            metavar=setting.metavar,
            help=setting.help,
            type=_absolute if setting.name in PATHS else str,
        )
    return parser


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""  # which is no path, and is refused as such


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(format="swiprd: %(message)s", level=level.upper(), stream=sys.stderr)


def open_listener(path: str | None, environment: Mapping[str, str]) -> OwnSocket:
    """Return a listener at ``path``, or at the user's usual place when that is None."""
    if path is None:
        path = _usual_socket(environment)
        # In the usual places the folder is ours; elsewhere it is the user's to make.
        with contextlib.suppress(OSError):  # which shows at once, when the socket is bound
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    return OwnSocket(path)


def _usual_socket(environment: Mapping[str, str]) -> str:
    if os.geteuid() == 0:
        return SYSTEM_SOCKET
    runtime = environment.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise ConfigError("no place to listen: give --socket, or set XDG_RUNTIME_DIR")
    return os.path.join(runtime, "swipr", "swipr.sock")


def _fail(error: Exception, status: int) -> int:
    print(f"swiprd: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    run()
