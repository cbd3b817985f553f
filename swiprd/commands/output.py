"""How the commands speak: scores on standard output, everything else on standard error."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from swiprctl.protocol import SwiprError
from swiprd.compiled import FormCache, this_host
from swiprd.config import load_config, usual_cache, usual_file
from swiprd.files import open_image, read_image
from swiprd.log import printable

MAX_FILE: Final = 2**30
MAX_PIXELS: Final = 1_000_000_000
"""Limits for pictures that the user of a command names: the highest that can be set."""

Commands = Any  # argparse's own type for the commands of a parser has no public name


def add_command(commands: Commands, name: str, words: str) -> argparse.ArgumentParser:
    """Add the command ``name``, explained by ``words``, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=80),
    )
    return parser


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where compiled forms are and what for, as they do for the daemon."""
    parser.add_argument("--config", metavar="FILE", help="settings file [/etc/swipr/swiprd.toml]")
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=os.path.abspath,
        help="where compiled forms are [the setting cache_dir]",
    )
    parser.add_argument("--threads", metavar="N", help="threads of a worker [the setting threads]")


def form_cache(args: argparse.Namespace, *, to_run: bool = False) -> FormCache | None:
    """Return where compiled forms are, as the daemon's settings say; None: nowhere.

    Args:
        args: of the command.
        to_run: whether this process will run them. Otherwise root sees what the folder's owner
            would: systemd gives the service's folder to the service's user.

    Raises:
        ConfigError: a setting is not acceptable.
    """
    config = load_config(
        file=args.config or usual_file(args.environment),
        environment=args.environment,
        flags={"cache_dir": args.cache_dir, "threads": args.threads},
    )
    folder = config.cache_dir or usual_cache(args.environment)
    if folder is None:
        return None
    user = None
    if not to_run and os.geteuid() == 0 and os.path.isdir(folder):
        user = os.stat(folder).st_uid
    return FormCache(folder, this_host(config.threads_per_worker), user=user)


def tell(command: str, message: str) -> None:
    """Write one line to standard error."""
    print(f"swiprd {command}: {printable(message)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(command: str, what: str) -> Iterator[None]:
    """Tell that something goes on, on a terminal with the seconds that it has taken so far."""
    began = time.monotonic()
    done = threading.Event()
    if not sys.stderr.isatty():
        tell(command, f"{what} …")
        yield
        return

    def count() -> None:
        while True:
            seconds = time.monotonic() - began
            sys.stderr.write(f"\rswiprd {command}: {what} … {seconds:.0f} s")
            sys.stderr.flush()
            if done.wait(1):
                sys.stderr.write("\n")
                return

    counter = threading.Thread(target=count)
    counter.start()
    try:
        yield
    finally:
        done.set()
        counter.join()


def read_picture(path: str) -> bytes:
    """Return the bytes of the picture at ``path``.

    Raises:
        SwiprError: it cannot be read, or is no regular file; the message begins with the path.
    """
    fd = open_image(path)
    try:
        return read_image(fd, max_bytes=MAX_FILE)
    except SwiprError as error:
        raise SwiprError(error.code, f"{path}: {error}") from None
    finally:
        os.close(fd)


def score_tuple(scores: Sequence[float]) -> str:
    """Return the scores as swiprctl prints them."""
    return ",".join(f"{score:.6f}" for score in scores)
