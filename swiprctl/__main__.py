"""The command swiprctl: arguments in, one line out, an exit status.

Standard output carries an answer or nothing; every failure is one line on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys

import swiprctl
from swiprctl.client import DEFAULT_TIMEOUT, MAX_TIMEOUT, RELOAD_TIMEOUT, Client
from swiprctl.protocol import Result, SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

DONE: Final = 0
NOT_SCORED: Final = 1
USAGE: Final = 2
NO_ANSWER: Final = 3
"""The daemon was not reached, is busy, or ran out of time: nothing is said about the image."""

NO_ANSWER_CODES: Final = frozenset(
    {"cannot_connect", "busy", "timeout", "unavailable", "shutting_down"}
)

EPILOG: Final = """\
exit status: 0 done; 1 it failed, as when an image cannot be scored; 2 wrong usage;
3 the daemon was not reached, is busy or ran out of time
"""
OPTIONS: Final = ("-h", "--help", "--version", "--socket", "--timeout", "--compute")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    _refuse_unknown_options(parser, sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if (args.command is None) == (args.script_path is None):
        parser.error("expected one command: compute, ping, status or reload")
    timeout = RELOAD_TIMEOUT if args.command == "reload" else DEFAULT_TIMEOUT
    status = DONE
    try:
        with Client(args.socket, timeout=args.timeout or timeout) as client:
            if args.script_path is None:
                output = args.run(client, args)
            else:
                output = _tuple(client.compute(args.script_path))
    except SwiprError as error:
        status = _explain(error)
        if args.script_path is None:
            return status
        # Callers of the script service parse its number from standard output.
        output = str(error.number)
    except KeyboardInterrupt:
        return 130
    return _print(output) or status


def _print(output: str) -> int:
    if sys.stdout is None:
        _tell("cannot write the answer: standard output is closed")
        return NOT_SCORED
    try:
        data = f"{output}\n".encode(sys.stdout.encoding, "backslashreplace")
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except OSError as error:
        # Keep the interpreter from trying to write the rest once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        _tell(f"cannot write the answer: {error.strerror}")
        return NOT_SCORED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swiprctl",
        description="Ask swiprd for the scores of an image.",
        epilog=EPILOG,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"swiprctl {swiprctl.__version__}")
    _add_common(parser, None, None)
    parser.add_argument(
        "--compute",
        metavar="PATH",
        dest="script_path",
        help="speak like the script that swipr replaces: print the scores, or -1 unknown,"
        " -2 no such path, -3 not analyzed, -4 not connected",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    _add(commands, "compute", "print the scores of an image, as in 0.660000,0.340000", _compute)
    commands.choices["compute"].add_argument("path", metavar="PATH", help="the image file")
    _add(commands, "ping", "print pong when the daemon answers", _ping)
    _add(commands, "status", "print what the daemon is doing", _status)
    _add(commands, "reload", "let the daemon read its settings and model again", _reload)
    return parser


def _refuse_unknown_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    # Argparse would blame the word after it: it takes that for the command.
    for word in argv:
        if word == "--":
            return
        name = word.partition("=")[0]
        if name.startswith("-") and len(name) > 1 and name not in OPTIONS:
            parser.error(f"no option {name}, expected one of {', '.join(OPTIONS)}")


def _formatter(prog: str) -> argparse.HelpFormatter:
    # With a width of its own it need not ask for the terminal's, which costs 5 ms at every start.
    return argparse.RawDescriptionHelpFormatter(prog, width=80)


def _add(commands: Any, name: str, help: str, run: Callable[..., str]) -> None:
    parser = commands.add_parser(
        name, help=help, description=help, formatter_class=_formatter, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    # After the command too; left out there, what stood before it counts.
    _add_common(parser, argparse.SUPPRESS, argparse.SUPPRESS)


def _add_common(parser: argparse.ArgumentParser, socket: Any, timeout: Any) -> None:
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=socket,
        help="the daemon's socket (default: $SWIPR_SOCKET, else"
        " $XDG_RUNTIME_DIR/swipr/swipr.sock where it exists, else /run/swipr/swipr.sock)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=timeout,
        help="how long to wait for the answer"
        f" (default: {DEFAULT_TIMEOUT:g}, for reload {RELOAD_TIMEOUT:g})",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"expected seconds, above 0 and up to {MAX_TIMEOUT:g}, got {text!r}"
        )
    return seconds


def _compute(client: Client, args: argparse.Namespace) -> str:
    return _tuple(client.compute(args.path))


def _ping(client: Client, args: argparse.Namespace) -> str:
    client.ping()
    return "pong"


def _status(client: Client, args: argparse.Namespace) -> str:
    status = client.status()
    width = max(map(len, status), default=0)
    return "\n".join(f"{key:<{width}}  {_words(value)}" for key, value in status.items())


def _reload(client: Client, args: argparse.Namespace) -> str:
    client.reload()
    return "reloaded"


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "-"
    return _printable(str(value))


def _tuple(result: Result) -> str:
    return ",".join(f"{score:.6f}" for score in result.scores)


def _explain(error: SwiprError) -> int:
    _tell(f"{_printable(str(error))} ({error.code})")
    return NO_ANSWER if error.code in NO_ANSWER_CODES else NOT_SCORED


def _printable(text: str) -> str:
    # A file name may hold anything: what is shown stays one line and cannot steer a terminal.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _tell(message: str) -> None:
    # Whether or not it can be told, the exit status says the same.
    if sys.stderr is not None:
        line = f"swiprctl: {message}\n".encode(sys.stderr.encoding, "backslashreplace")
        try:  # noqa: SIM105 - contextlib would add to every start
            os.write(sys.stderr.fileno(), line)
        except OSError:
            pass


if __name__ == "__main__":
    sys.exit(main())
