"""The command swiprd: settings in, sockets and signals wired to the server, exit status out.

The only reader of the command line and, but for what workers inherit, of the environment.
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
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import swiprctl
from swiprctl.defaults import SYSTEM_SOCKET
from swiprd.config import SETTINGS, Config, ConfigError, load_config, usual_cache, usual_file
from swiprd.daemon import SIGNALS, Daemon
from swiprd.detach import DetachError, PidFile, check_syslog, detach, open_log
from swiprd.listen import ListenError, OwnSocket
from swiprd.log import start_logging
from swiprd.process import ENVIRONMENT
from swiprd.systemd import ActivationError, is_journal, listen_fds, service_manager

log = logging.getLogger("swiprd")

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2

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
    file = args.pop("config")
    background = {name: args.pop(name) for name in ("detach", "pid_file", "log_file")}

    def load() -> Config:
        found = file or usual_file(os.environ)
        config = load_config(file=found, environment=os.environ, flags=args)
        if config.cache_dir is None:
            config = dataclasses.replace(config, cache_dir=usual_cache(os.environ))
        return config

    with contextlib.ExitStack() as undo:
        try:
            _refuse_alone(background)
            manager = service_manager(os.environ)
            listeners = listen_fds(os.environ)
            config, fault = _load_or_fault(load, is_activated=bool(listeners))
            # From here to the event loop a signal waits: nothing may be left behind.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            own = None
            if background["detach"]:
                if listeners:
                    raise ConfigError("--detach is not for a daemon that was handed its socket")
                pid_file = PidFile(_pid_path(background["pid_file"], config.socket, os.environ))
                undo.callback(pid_file.remove)
            if not listeners:
                own = open_listener(config.socket, os.environ)
                undo.callback(own.close)
                listeners = [own.socket]
            if background["detach"]:
                log_target = _detach(background["log_file"], pid_file, listeners)
            else:
                log_target = "journal" if is_journal(os.environ, 2) else "terminal"
            start_logging(log_target, config.log_level, "swiprd")
            if fault is not None:
                log.error("there is nothing to serve: %s", fault)
            elif config.socket is not None and own is None:
                log.warning("the setting socket does not count: systemd listens")
        except ConfigError as error:
            return _fail(error, USAGE)
        except (ActivationError, DetachError, ListenError) as error:
            return _fail(error, FAILED)
        log.info("listening at %s", ", ".join(str(sock.getsockname()) for sock in listeners))

        async def serve() -> None:
            await Daemon(
                load,
                config,
                listeners,
                own=own,
                manager=manager,
                log_target=log_target,
                out_of_service=fault,
            ).run()

        asyncio.run(serve())
        log.info("stopped")
    return DONE


def _refuse_alone(background: Mapping[str, str | bool | None]) -> None:
    for name in ("pid_file", "log_file"):
        if background[name] is not None and not background["detach"]:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is for a daemon in the background: add --detach")


def _load_or_fault(load: Callable[[], Config], *, is_activated: bool) -> tuple[Config, str | None]:
    """Return the settings and None, or the defaults and what is wrong with the settings.

    Who was started by a client has somebody to tell it to, who would wait in vain for a daemon
    that is not there; everybody else is told by the exit status.
    """
    try:
        return load(), None
    except ConfigError as error:
        if not is_activated:
            raise
        defaults = load_config(file=os.devnull, environment={}, flags={})
        return defaults, f"{error}; mend it and run swiprctl reload"


def _pid_path(path: str | None, socket_path: str | None, environment: Mapping[str, str]) -> str:
    if path is not None:
        return path
    if socket_path is not None:
        return socket_path + ".pid"
    return os.path.join(_usual_folder(environment), "swiprd.pid")


def _detach(log_file: str | None, pid_file: PidFile, listeners: Sequence[socket.socket]) -> str:
    """Go on in the background and return where log lines go from now on."""
    log_fd = None
    if log_file is None:
        check_syslog()
    else:
        log_fd = open_log(log_file)
    detach(pid_file, [sock.fileno() for sock in listeners], log_fd=log_fd)
    return "syslog" if log_fd is None else "file"


def _run_command(words: Sequence[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that nothing is left behind
    # Torch's threads read it as they are loaded: what compile measures is to be what a worker does.
    os.environ.setdefault("GOMP_SPINCOUNT", ENVIRONMENT["GOMP_SPINCOUNT"])
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
    parser.add_argument(
        "--config", metavar="FILE", help="settings file [/etc/swipr/swiprd.toml]", type=_absolute
    )
    parser.add_argument("--detach", action="store_true", help="go on in the background")
    for flag, help in (
        ("--pid-file", "its process id, with --detach [beside socket]"),
        ("--log-file", "where to log, with --detach [syslog]"),
    ):
        parser.add_argument(flag, metavar="PATH", help=help, type=_absolute)
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


def open_listener(path: str | None, environment: Mapping[str, str]) -> OwnSocket:
    """Return a listener at ``path``, or at the user's usual place when that is None."""
    if path is None:
        path = os.path.join(_usual_folder(environment), "swipr.sock")
    return OwnSocket(path)


def _usual_folder(environment: Mapping[str, str]) -> str:
    """Return where the socket usually is."""
    if os.geteuid() == 0:
        folder = os.path.dirname(SYSTEM_SOCKET)
    else:
        runtime = environment.get("XDG_RUNTIME_DIR")
        if not runtime:
            raise ConfigError("no place to listen: give --socket, or set XDG_RUNTIME_DIR")
        folder = os.path.join(runtime, "swipr")
    # The usual folder is ours to make; others are the user's.
    with contextlib.suppress(OSError):  # which shows at once, when something is put there
        os.makedirs(folder, mode=0o755, exist_ok=True)
    return folder


def _fail(error: Exception, status: int) -> int:
    print(f"swiprd: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    run()
