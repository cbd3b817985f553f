"""What may stand on the command line of swiprctl, and what it means.

Imported only where it is needed: argparse, and the making of a parser, take as long as all the
rest of a ping.
"""

from __future__ import annotations

import argparse

import swiprctl
from swiprctl.defaults import DEFAULT_TIMEOUT, RELOAD_TIMEOUT
from swiprctl.session import MAX_TIMEOUT

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


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return what ``words`` ask for, or leave with status 2 and what is wrong with them.

    Its ``command`` is one of ``COMMANDS``, or None where ``script_path`` is set.
    """
    parser = make_parser()
    _refuse_unknown_options(parser, words)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        own = parser if args.command is None else _parser_of(args.command)
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    if (args.command is None) == (args.script_path is None):
        parser.error("expected one command: compute, report, ping, status or reload")
    if args.command in ("compute", "report"):
        _check_images(args)
    return args


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
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
    for name, (help, _) in COMMANDS.items():
        commands.add_parser(name, command=name, help=help)
    return parser


class Command:
    """A command to argparse, which gets the command's own parser only when that is needed.

    Args:
        command: of ``COMMANDS``.
        prog: what it is called in messages.
    """

    def __init__(self, *, command: str, prog: str) -> None:
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
        help, add_arguments = COMMANDS[self._command]
        parser = argparse.ArgumentParser(
            prog=self._prog,
            description=help,
            formatter_class=_formatter,
            allow_abbrev=False,
        )
        # After the command too; left out there, what stood before it counts.
        _add_common(parser, argparse.SUPPRESS, argparse.SUPPRESS)
        if add_arguments is not None:
            add_arguments(parser)
        return parser


def _refuse_unknown_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    # Argparse would blame the word after it: it takes that for the command.
    command = _command_in(argv)
    for word in argv:
        if word == "--":
            return
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if name.startswith("-") and len(name) > 1 and name not in OPTIONS:
            own = parser if command is None else _parser_of(command)
            known = [option for action in own._actions for option in action.option_strings]
            own.error(f"no option {name}, expected one of {', '.join(known)}")


def _command_in(argv: Sequence[str]) -> str | None:
    words = iter(argv)
    for word in words:
        if word in ("--socket", "--timeout", "--compute"):
            next(words, None)
        elif not word.startswith("-"):
            return word if word in COMMANDS else None
    return None


def _parser_of(name: str) -> argparse.ArgumentParser:
    return Command(command=name, prog=f"swiprctl {name}").parser()


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
        "-r", "--recursive", action="store_true", help="as for compute; here it is always so"
    )
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


def _check_images(args: argparse.Namespace) -> None:
    problem = None
    if not args.paths and args.files_from is None:
        problem = "expected at least one PATH, or --files-from FILE"
    elif args.null and args.files_from is None:
        problem = "-0 is for --files-from"
    elif args.command == "report" and args.output == "-":
        problem = "expected a file to write, got standard output (-)"
    elif [*args.paths, args.files_from].count("-") > 1:
        problem = "standard input (-) can be read only once"
    if problem is not None:
        _parser_of(args.command).error(problem)


COMMANDS: Final[dict[str, tuple[str, Callable[[argparse.ArgumentParser], None] | None]]] = {
    "compute": ("print the scores of images, as in 0.66,0.33", _add_compute),
    "report": ("write a page that shows images, sorted by score", _add_report),
    "ping": ("print pong when the daemon answers", None),
    "status": ("print what the daemon is doing", _add_status),
    "reload": ("let the daemon read its settings and model again", None),
}
"""What each command is for, and what adds its own arguments; None: it has none."""
