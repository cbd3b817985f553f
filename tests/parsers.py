"""The parsers of both commands, for what must say the same as they do."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final

from make_completions import whole

import swiprctl.arguments
import swiprd.__main__
from swiprd.config import LOG_LEVELS, PRECISIONS

PATHS: Final = ("PATH", "FILE", "BUNDLE", "IMAGE", "SOURCE")
"""What options and operands that are files call their values; DIR is a folder."""
CHOICES: Final = {"precision": PRECISIONS, "log_level": LOG_LEVELS}
"""Those of settings, which are not the parser's."""


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {name: whole(parser) for name, parser in action.choices.items()}
    return {}


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


def operands_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
    ]


@dataclass(frozen=True)
class Command:
    """A command as its parsers describe it.

    Attributes:
        main: the parser without a command.
        commands: the parser of each command.
    """

    main: argparse.ArgumentParser
    commands: dict[str, argparse.ArgumentParser]

    @property
    def parsers(self) -> list[argparse.ArgumentParser]:
        """All parsers."""
        return [self.main, *self.commands.values()]

    def parser(self, *words: str) -> argparse.ArgumentParser:
        """Return the parser of a command line that begins with ``words``."""
        return self.commands[words[0]] if words and words[0] in self.commands else self.main


def both_commands() -> dict[str, Command]:
    """Return both. Those of swiprd import torch, so they are not asked for without need."""
    from swiprd.commands import add_to

    of_swiprd = argparse.ArgumentParser()
    add_to(of_swiprd.add_subparsers())
    of_swiprctl = swiprctl.arguments.make_parser()
    return {
        "swiprctl": Command(of_swiprctl, commands_of(of_swiprctl)),
        "swiprd": Command(swiprd.__main__._parser(), commands_of(of_swiprd)),
    }
