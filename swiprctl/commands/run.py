"""Any command line of swiprctl, by the whole client.

A command that takes more than a line has a module of its own, imported when it is asked for.
"""

from __future__ import annotations

import os

from swiprctl import arguments
from swiprctl.client import Client
from swiprctl.defaults import DEFAULT_TIMEOUT, RELOAD_TIMEOUT
from swiprctl.protocol import SwiprError
from swiprctl.session import SHORTEST_PAUSE
from swiprctl.terminal import DONE, in_words, status_of, tell, write, write_tuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Final


def run(words: Sequence[str], *, spent: float) -> int:
    """Run one command and return its exit status.

    Args:
        words: of the command line.
        spent: seconds of its time that are gone.

    Raises:
        SwiprError: it failed.
        NotWritten: nobody takes its answer.
    """
    args = arguments.parse(words)
    timeout = RELOAD_TIMEOUT if args.command == "reload" else DEFAULT_TIMEOUT
    timeout = args.timeout or timeout
    if spent:
        timeout = max(timeout - spent, SHORTEST_PAUSE)
    with Client(args.socket, timeout=timeout) as client:
        if args.script_path is not None:
            return _speak_like_the_script(client, args.script_path)
        return COMMANDS[args.command](client, args)


def _speak_like_the_script(client: Client, path: str) -> int:
    try:
        return _compute_one(client, path)
    except SwiprError as error:
        # Its callers parse its number from standard output.
        tell(in_words(error))
        write(f"{error.number}\n")
        return status_of(error)


def _compute_one(client: Client, path: str) -> int:
    write_tuple(client.compute(path).scores)
    return DONE


def _compute(client: Client, args: argparse.Namespace) -> int:
    is_one = len(args.paths) == 1 and args.files_from is None and _is_image(args.paths[0])
    if is_one and args.format == "tuple" and not args.recursive | args.labels | args.top:
        return _compute_one(client, args.paths[0])
    from swiprctl.commands.compute import compute  # what one image does without

    return compute(client, args)


def _is_image(path: str) -> bool:
    # Not standard input, not a folder, of which more is to be said.
    return path != "-" and not os.path.isdir(path)


def _report(client: Client, args: argparse.Namespace) -> int:
    from swiprctl.commands.report import report

    return report(client, args)


def _ping(client: Client, args: argparse.Namespace) -> int:
    client.ping()
    write("pong\n")
    return DONE


def _status(client: Client, args: argparse.Namespace) -> int:
    from swiprctl.commands.status import status

    status(client, args)
    return DONE


def _reload(client: Client, args: argparse.Namespace) -> int:
    client.reload()
    write("reloaded\n")
    return DONE


COMMANDS: Final[dict[str, Callable[[Client, argparse.Namespace], int]]] = {
    "compute": _compute,
    "report": _report,
    "ping": _ping,
    "status": _status,
    "reload": _reload,
}
