"""What swiprd does with models besides serving them: import, compile, show, verify.

Answers go to standard output, progress and failures to standard error. A command that fails leaves
no file behind. No daemon that serves imports this.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Final

from swiprctl.protocol import SwiprError
from swiprd.bundle import BundleError
from swiprd.checkpoint import CheckpointError
from swiprd.commands import compile_, import_, show, verify
from swiprd.commands.output import Commands, tell
from swiprd.compiled import CompiledError
from swiprd.compiler import CompileError
from swiprd.config import ConfigError

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

FAILURES: Final = (
    BundleError,
    CheckpointError,
    CompiledError,
    CompileError,
    SwiprError,
)


def add_to(commands: Commands) -> None:
    """Add all commands."""
    for command in (import_, compile_, show, verify):
        command.add_to(commands)


def run_command(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command that ``argv`` begins with and return the exit status."""
    parser = argparse.ArgumentParser(prog="swiprd", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_to(commands)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[argv[0]].error(f"no option {unknown[0]}")
    args.environment = environment
    try:
        args.run(args)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(argv[0], f"{where}{error.strerror or error}")
        return FAILED
    except ConfigError as error:
        tell(argv[0], str(error))
        return USAGE
    except FAILURES as error:
        tell(argv[0], str(error))
        return FAILED
    except KeyboardInterrupt:
        tell(argv[0], "interrupted")
        return INTERRUPTED
    return DONE
