"""The command swiprctl: arguments in, answers out, an exit status.

What a command does is in ``swiprctl.commands``, where it takes more than a line.
"""

from __future__ import annotations

import argparse
import sys

import swiprctl
from swiprctl.client import Client
from swiprctl.protocol import SwiprError
from swiprctl.session import DEFAULT_TIMEOUT, MAX_TIMEOUT, RELOAD_TIMEOUT
from swiprctl.terminal import DONE, INTERRUPTED, NotWritten, in_words, status_of, tell, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

EPILOG: Final = """\
exit status: 0 done; 1 it failed, as when an image cannot be scored; 2 wrong usage;
3 the daemon was not reached, is busy or ran out of time
"""
OPTIONS: Final = (
    *("-h", "--help", "--version", "--socket", "--timeout", "--compute"),
    *("-r", "--recursive", "--files-from", "-0", "--null", "--format", "--labels", "--top"),
    *("-o", "--output", "--json", "--prometheus", "--watch"),
)
FORMATS: Final = ("tuple", "csv", "json", "ndjson")
WATCH_SECONDS: Final = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    _refuse_unknown_options(parser, sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if (args.command is None) == (args.script_path is None):
        parser.error("expected one command: compute, report, ping, status or reload")
    if args.command in ("compute", "report"):
        _check_images(parser, args)
    timeout = RELOAD_TIMEOUT if args.command == "reload" else DEFAULT_TIMEOUT
    try:
        with Client(args.socket, timeout=args.timeout or timeout) as client:
            if args.script_path is not None:
                return _speak_like_the_script(client, args.script_path)
            return args.run(client, args) or DONE
    except NotWritten as failure:
        if failure.reason is not None:
            tell(f"cannot write the answer: {failure.reason}")
        return failure.status
    except SwiprError as error:
        tell(in_words(error))
        return status_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED


# --- what is said on the command line ------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swiprctl",
        description="Ask swiprd for the scores of images.",
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
    commands = parser.add_subparsers(
        dest="command",
        title="commands",
        metavar="COMMAND",
        parser_class=Command,  # type: ignore[type-var] # it is as much of a parser as is asked for
    )
    for name, command in COMMANDS.items():
        commands.add_parser(name, command=command, help=command.help)
    return parser


class Command:
    """A command to argparse, which gets the command's own parser only when that is needed.

    Making one takes longer than all the rest of a ping.

    Args:
        command: what it is.
        prog: what it is called in messages.
    """

    def __init__(self, *, command: _Command, prog: str) -> None:
        self._command = command
        self._prog = prog

    def parse_known_args(self, args: Any, namespace: Any) -> Any:
        """Do what argparse asks a parser for."""
        # Paths may stand before and after options, and behind -- there are only paths.
        at = args.index("--") if "--" in args else len(args)
        found, unknown = self.parser().parse_known_intermixed_args(args[:at], namespace)
        behind = args[at + 1 :]
        if "paths" not in found:
            return found, unknown + behind
        found.paths = [*found.paths, *behind]
        return found, unknown

    def parser(self) -> argparse.ArgumentParser:
        """Return the command's parser."""
        parser = argparse.ArgumentParser(
            prog=self._prog,
            description=self._command.help,
            formatter_class=_formatter,
            allow_abbrev=False,
        )
        parser.set_defaults(run=self._command.run)
        # After the command too; left out there, what stood before it counts.
        _add_common(parser, argparse.SUPPRESS, argparse.SUPPRESS)
        if self._command.add_arguments is not None:
            self._command.add_arguments(parser)
        return parser


def _refuse_unknown_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    # Argparse would blame the word after it: it takes that for the command.
    for word in argv:
        if word == "--":
            return
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if name.startswith("-") and len(name) > 1 and name not in OPTIONS:
            parser.error(f"no option {name}, expected one of {', '.join(OPTIONS)}")


def _formatter(prog: str) -> argparse.HelpFormatter:
    # With a width of its own it need not ask for the terminal's, which costs 5 ms at every start.
    return argparse.RawDescriptionHelpFormatter(prog, width=80)


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
        help="how long to wait for the next answer"
        f" (default: {DEFAULT_TIMEOUT:g}; for several images, and for reload, {RELOAD_TIMEOUT:g})",
    )


def _add_images(parser: argparse.ArgumentParser, operand: str) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="*", help=operand)
    parser.add_argument(
        "--files-from", metavar="FILE", help="take more paths from FILE, one a line; - is stdin"
    )
    parser.add_argument(
        "-0", "--null", action="store_true", help="in FILE, paths end with NUL, not with a newline"
    )


def _add_compute(parser: argparse.ArgumentParser) -> None:
    _add_images(parser, "an image file; - is an image on stdin")
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="take the images in folders and below"
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        choices=FORMATS,
        default="tuple",
        help=f"how to print: {', '.join(FORMATS)} (default: tuple)",
    )
    names = parser.add_mutually_exclusive_group()
    names.add_argument(
        "--labels", action="store_true", help="print the label before each score, as in NO=0.66"
    )
    names.add_argument(
        "--top", action="store_true", help="print only the label with the highest score, and that"
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_images(parser, "an image file, or a folder: the images in it and below")
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="the page to write, as report.html"
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print it as one line of JSON")
    forms.add_argument(
        "--prometheus", action="store_true", help="print it as metrics for Prometheus"
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=WATCH_SECONDS,
        help=f"print it again and again, every SECONDS ({WATCH_SECONDS:g})",
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


def _check_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.paths and args.files_from is None:
        parser.error(f"{args.command}: expected at least one PATH, or --files-from FILE")
    if args.null and args.files_from is None:
        parser.error(f"{args.command}: -0 is for --files-from")
    if args.command == "report" and args.output == "-":
        parser.error("report: expected a file to write, got standard output (-)")
    if [*args.paths, args.files_from].count("-") > 1:
        parser.error(f"{args.command}: standard input (-) can be read only once")


# --- commands ------------------------------------------------------------------------------------


def _speak_like_the_script(client: Client, path: str) -> int:
    try:
        scores = _tuple(client.compute(path).scores)
    except SwiprError as error:
        # Its callers parse its number from standard output.
        tell(in_words(error))
        write(f"{error.number}\n")
        return status_of(error)
    write(f"{scores}\n")
    return DONE


def _compute(client: Client, args: argparse.Namespace) -> int | None:
    is_one_file = len(args.paths) == 1 and args.paths[0] != "-" and args.files_from is None
    if is_one_file and not args.recursive and args.format == "tuple" and not args.labels | args.top:
        write(_tuple(client.compute(args.paths[0]).scores) + "\n")
        return None
    from swiprctl.commands.compute import compute  # what one image does without

    return compute(client, args)


def _report(client: Client, args: argparse.Namespace) -> int:
    from swiprctl.commands.report import report

    return report(client, args)


def _ping(client: Client, args: argparse.Namespace) -> None:
    client.ping()
    write("pong\n")


def _status(client: Client, args: argparse.Namespace) -> None:
    from swiprctl.commands.status import status

    status(client, args)


def _reload(client: Client, args: argparse.Namespace) -> None:
    client.reload()
    write("reloaded\n")


class _Command:
    __slots__ = ("add_arguments", "help", "run")

    def __init__(
        self,
        help: str,
        run: Callable[[Client, argparse.Namespace], int | None],
        add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> None:
        self.help = help
        self.run = run
        self.add_arguments = add_arguments


COMMANDS: Final = {
    "compute": _Command("print the scores of images, as in 0.66,0.33", _compute, _add_compute),
    "report": _Command("write a page that shows images, sorted by score", _report, _add_report),
    "ping": _Command("print pong when the daemon answers", _ping),
    "status": _Command("print what the daemon is doing", _status, _add_status),
    "reload": _Command("let the daemon read its settings and model again", _reload),
}


def _tuple(scores: tuple[float, ...]) -> str:
    return ",".join(f"{score:.6f}" for score in scores)


if __name__ == "__main__":
    sys.exit(main())
