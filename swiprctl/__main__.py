"""The command swiprctl: words in, answers out, an exit status.

What may be said is in ``swiprctl.arguments``; what a command does is in ``swiprctl.commands``,
where it takes more than a line.
"""

from __future__ import annotations

import os
import sys

from swiprctl.client import Client
from swiprctl.protocol import SwiprError
from swiprctl.session import DEFAULT_TIMEOUT, RELOAD_TIMEOUT
from swiprctl.terminal import DONE, INTERRUPTED, NotWritten, in_words, status_of, tell, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Final


def run() -> None:
    """Run ``main`` and leave. What the console script calls."""
    status = main()
    # All is written. To take the interpreter apart takes a tenth of a whole ping.
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except NotWritten as failure:
        if failure.reason is not None:
            tell(f"cannot write the answer: {failure.reason}")
        return failure.status
    except SwiprError as error:
        tell(in_words(error))
        return status_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    # What is asked most is understood without a parser, which takes as long as all the rest.
    if len(words) == 1 and words[0] == "ping":
        with Client() as client:
            return _ping(client)
    if len(words) == 2 and words[0] == "compute" and _is_image(words[1]):
        with Client() as client:
            return _compute_one(client, words[1])
    from swiprctl import arguments

    args = arguments.parse(words)
    timeout = RELOAD_TIMEOUT if args.command == "reload" else DEFAULT_TIMEOUT
    with Client(args.socket, timeout=args.timeout or timeout) as client:
        if args.script_path is not None:
            return _speak_like_the_script(client, args.script_path)
        return COMMANDS[args.command](client, args)


def _is_image(path: str) -> bool:
    # Not an option, not standard input, not a folder, of which more is to be said.
    return not path.startswith("-") and not os.path.isdir(path)


# --- commands ------------------------------------------------------------------------------------


def _speak_like_the_script(client: Client, path: str) -> int:
    try:
        return _compute_one(client, path)
    except SwiprError as error:
        # Its callers parse its number from standard output.
        tell(in_words(error))
        write(f"{error.number}\n")
        return status_of(error)


def _compute_one(client: Client, path: str) -> int:
    scores = client.compute(path).scores
    write(",".join(f"{score:.6f}" for score in scores) + "\n")
    return DONE


def _compute(client: Client, args: argparse.Namespace) -> int:
    is_one = len(args.paths) == 1 and args.files_from is None and _is_image(args.paths[0])
    if is_one and args.format == "tuple" and not args.recursive | args.labels | args.top:
        return _compute_one(client, args.paths[0])
    from swiprctl.commands.compute import compute  # what one image does without

    return compute(client, args)


def _report(client: Client, args: argparse.Namespace) -> int:
    from swiprctl.commands.report import report

    return report(client, args)


def _ping(client: Client, args: argparse.Namespace | None = None) -> int:
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


if __name__ == "__main__":
    run()
