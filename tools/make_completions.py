"""Write what bash, zsh and fish complete of both commands, from the commands' own parsers::

    python tools/make_completions.py etc/completion

Options, choices and descriptions have no other source. Nothing of ours runs while somebody
completes: swiprd takes seconds for its commands.

zsh knows how options are parsed. In bash and fish, a function walks over the words before the
cursor to find the place of the next one. Places have names: import:--fit is the value of that
option, import:1 the first operand of import, import:- its options, and :0 the command itself.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Final

import swiprctl.arguments
import swiprd.__main__
import swiprd.commands
from swiprd.config import LOG_LEVELS, PRECISIONS

NOTE: Final = "# Made by tools/make_completions.py from the parsers: run that, change nothing here."
CHOICES: Final = {"precision": PRECISIONS, "log_level": LOG_LEVELS}
"""Those of settings, which swiprd's parser leaves to swiprd.config."""
FILES, FOLDERS = "files", "folders"
KINDS: Final = {
    **dict.fromkeys(("PATH", "FILE", "BUNDLE", "IMAGE", "SOURCE"), FILES),
    "DIR": FOLDERS,
}
"""What a value is that is called so."""
NONE, ONE, MAYBE, MANY = "none", "one", "maybe", "many"
COUNTS: Final = {0: NONE, None: ONE, "?": MAYBE, "*": MANY, "+": MANY}
"""How many values there are, by argparse's nargs."""
LONGEST: Final = 70
"""Characters of a description, which shares a line with its option."""


# --- what there is to complete -------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """An option or an operand.

    Attributes:
        names: how the option is written; of an operand, its number.
        about: what it is for, in a few words.
        count: how many values it takes.
        label: what its value is called.
        value: FILES, FOLDERS or the words that it may be; empty: nobody knows.
        is_repeated: it may be given again.
        excluded: what may not be given beside it, as zsh's _arguments wants to be told.
    """

    names: tuple[str, ...]
    about: str
    count: str
    label: str
    value: str
    is_repeated: bool
    excluded: list[str]

    @property
    def is_option(self) -> bool:
        """Whether it is an option."""
        return self.names[0].startswith("-")


@dataclass(frozen=True)
class Program:
    """A command line with commands.

    Attributes:
        name: of the program.
        commands: what each command does.
        items: what each command takes, and under "" the options that stand before a command.
        early: those of the latter that a command may follow. Others stand instead of one.
    """

    name: str
    commands: dict[str, str]
    items: dict[str, list[Item]]
    early: list[str]

    def places(self) -> Iterator[tuple[str, Item]]:
        """Yield each place where an option's value or an operand stands, and whose it is."""
        for command, items in self.items.items():
            for item in items:
                if item.count != NONE:
                    yield from ((f"{command}:{name}", item) for name in item.names)

    def taking(self, count: str) -> list[str]:
        """Return the places where so many words stand; at others, operands stand one by one."""
        places = [(place, item) for place, item in self.places() if item.count == count]
        return [place for place, item in places if item.is_option or count == MANY]


def programs() -> list[Program]:
    """Return both."""
    client, daemon = swiprctl.arguments.make_parser(), swiprd.__main__._parser()
    for action in daemon._actions:
        action.choices = CHOICES.get(action.dest, action.choices)
    swiprd.commands.add_to(daemon.add_subparsers())
    return [program(client, first=False), program(daemon, first=True)]


def program(parser: argparse.ArgumentParser, *, first: bool) -> Program:
    """Return the program of a parser with commands; ``first``: they are its first word."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parsers = {"": parser, **{name: whole(of) for name, of in commands.choices.items()}}
    items = {name: list(items_of(of)) for name, of in parsers.items()}
    # What commands know, too, is about them.
    late = {name for command in commands.choices for item in items[command] for name in item.names}
    return Program(
        name=parser.prog,
        commands={action.dest: clause(action) for action in commands._choices_actions},
        items=items,
        early=[name for item in items[""] for name in item.names if name in late and not first],
    )


def whole(parser: argparse.ArgumentParser | swiprctl.arguments.Command) -> argparse.ArgumentParser:
    """Return the parser of a command, which swiprctl makes only when it is needed."""
    return parser.parser() if isinstance(parser, swiprctl.arguments.Command) else parser


def items_of(parser: argparse.ArgumentParser) -> Iterator[Item]:
    """Yield the options and operands of a parser that it shows."""
    number = 0
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.nargs == argparse.PARSER:
            continue
        names = tuple(action.option_strings)
        number += not names
        is_repeated = isinstance(action, (argparse._AppendAction, argparse._CountAction))
        groups = [group._group_actions for group in parser._mutually_exclusive_groups]
        rivals = [rival for group in groups if action in group for rival in group]
        excluded = [name for a in rivals if a is not action for name in a.option_strings]
        if isinstance(action, (argparse._HelpAction, argparse._VersionAction)):
            excluded = ["-", ":", "*"]  # all
        elif len(names) > 1 and not is_repeated:
            excluded += names
        yield Item(
            names=names or (str(number),),
            about=clause(action),
            count=COUNTS[action.nargs],
            label=str(action.metavar or action.dest),
            value=" ".join(map(str, action.choices or ())) or KINDS.get(str(action.metavar), ""),
            is_repeated=is_repeated,
            excluded=excluded,
        )


def clause(action: argparse.Action) -> str:
    """Return the first clause of an action's help."""
    text = re.split(r"\s*[(\[;:]", (action.help or "") % vars(action))[0]
    while len(text) > LONGEST and ", " in text:
        text = text.rpartition(", ")[0]
    return text


# --- bash ----------------------------------------------------------------------------------------

BASH: Final = r"""
# Set cur to the beginning of what is completed, and at to its place. The caller has early, the
# options that a command may follow, and takes, how many words stand at a place: one or many.
_swipr_look() {
    local command='' place=0 value='' ended='' last='' word
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word == = && $last == -?* ]]; then
            value=$last # readline makes three words of --option=VALUE
        elif [[ $value && $word != -?* || ${takes[$command:$value]-} == one ]]; then
            [[ ${takes[$command:$value]-} == many ]] || value=''
        elif [[ $word == -?* && ! $ended ]]; then
            value=${takes[$command:$word]+$word}
            if [[ $word == -- ]]; then
                ended=1
            elif [[ ! $command && " $early " != *" ${word%%=*} "* ]]; then
                place=1
            fi
        elif ((place == 0)); then
            command=$word place=1
        elif [[ ${takes[$command:$place]-} != many ]]; then
            ((place += 1))
        fi
        last=$word
    done
    cur=${COMP_WORDS[COMP_CWORD]}
    [[ $cur != = || $last != -?* ]] || cur='' value=$last
    at=$command:${value:-$place}
    [[ $cur != -* || $ended || $last == = || ${takes[$at]-} == one ]] || at=$command:-
}

_swipr_words() {
    local IFS=$' \t\n'
    mapfile -t COMPREPLY < <(compgen -W "$*" -- "$cur")
}

# $1 is -f for files and folders, -d for folders alone.
_swipr_files() {
    compopt -o filenames 2>/dev/null # so that readline quotes them, and adds / to folders
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}
"""


def listed(words: str) -> str:
    """Return words of bash or fish in lines of less than 100 characters."""
    lines = textwrap.wrap(words, width=90, break_on_hyphens=False)
    return f" \\\n{' ' * 8}".join(lines)


def bash(program: Program) -> str:
    """Return the part for one program."""
    offers = {":0": " ".join(program.commands)}
    for command, items in program.items.items():
        names = [name for item in items for name in item.names if item.is_option]
        offers[f"{command}:-"] = " ".join(names)
    offers |= {place: item.value for place, item in program.places() if item.value}
    calls = {FILES: "_swipr_files -f", FOLDERS: "_swipr_files -d"}
    cases = ""
    for offer in dict.fromkeys(offers.values()):
        places = " | ".join(place for place in offers if offers[place] == offer)
        call = calls.get(offer, f"_swipr_words {offer}")
        cases += f"    {listed(places)})\n        {listed(call)} ;;\n"
    takes = [f"[{place}]={count}" for count in (ONE, MANY) for place in program.taking(count)]
    name, early = program.name, " ".join(program.early)
    return f"""\
_{name}() {{
    local cur at early='{early}'
    {listed(f"local -A takes=({' '.join(takes)})")}
    COMPREPLY=()
    _swipr_look
    case $at in
{cases}    esac
}}
complete -F _{name} {name}
"""


# --- zsh -----------------------------------------------------------------------------------------

ZSH_SIGNS: Final = {
    NONE: ("", "", ""),
    ONE: ("+", "=", ":"),
    MAYBE: ("-", "=-", "::"),
    MANY: ("+", "=", ":*-*:"),
}
"""What follows a short option and a long one, and what goes before the name of their value."""


def zsh(program: Program) -> str:
    """Return the file for one program."""

    def arguments(command: str) -> str:
        return " \\\n        ".join(
            zsh_spec(item, alone=not command and item.names[0] not in program.early)
            for item in program.items[command]
        )

    abouts = [quote(f"{command}:{about}") for command, about in program.commands.items()]
    commands = "\n    ".join(abouts)
    rest = "".join(
        f"    rest:{command}) _arguments -s -S : \\\n        {arguments(command)} ;;\n"
        for command in program.commands
    )
    return rf"""#compdef {program.name}
{NOTE}

local context state state_descr line
local -A opt_args
local -a commands=(
    {commands}
)

# As commands have options of their own, those of the program end where a command begins.
_arguments -s -S -A '-*' : \
        {arguments("")} \
        '1:command:->command' \
        '*:: :->rest' && return

case $state:$words[1] in
    command:*) _describe command commands ;;
{rest}esac
"""


def zsh_spec(item: Item, *, alone: bool) -> str:
    """Return what _arguments is told of an item; ``alone``: no command stands beside it."""
    calls = {FILES: "_files", FOLDERS: "_files -/", "": " "}
    value = f"{item.label}:{calls.get(item.value, f'({item.value})')}"
    if not item.is_option:
        number = item.names[0]
        return quote({ONE: f"{number}:", MAYBE: f"{number}::", MANY: "*:"}[item.count] + value)
    short, long, colon = ZSH_SIGNS[item.count]
    excluded = " ".join(dict.fromkeys([*item.excluded, *(["1", "*"] if alone else [])]))
    before = (f"({excluded})" if excluded else "") + ("*" if item.is_repeated else "")
    names = [name + (long if name.startswith("--") else short) for name in item.names]
    about = re.sub(r"([]\\])", r"\\\1", item.about)
    after = f"[{about}]{colon}{value if colon else ''}"
    if len(names) == 1:
        return quote(before + names[0] + after)
    return f"{quote(before)}{{{','.join(names)}}}{quote(after)}"


# --- fish ----------------------------------------------------------------------------------------

FISH: Final = r"""
# Whether what is completed stands at this place.
function __{name}_at
    {one}
    {many}
    {early}
    set -l command ''
    set -l place 0
    set -l value ''
    set -l ended ''
    for word in (commandline -opc)[2..]
        if test -n "$value"; and not string match -qr -- '^-.' $word
            or contains -- $command:$value $one
            contains -- $command:$value $many; or set value ''
        else if test -z "$ended"; and string match -qr -- '^-.' $word
            set value ''
            contains -- $command:$word $one $many; and set value $word
            if test $word = --
                set ended yes
            else if test -z "$command"; and not contains -- (string split = -- $word)[1] $early
                set place 1
            end
        else if test $place = 0
            set command $word
            set place 1
        else if not contains -- $command:$place $many
            set place (math $place + 1)
        end
    end
    test -z "$value"; or set place $value
    contains -- $argv $command:- $command:$place
end

# Of --option=VALUE, what looks for folders wants the value.
function __{name}_folders
    __fish_complete_directories (string replace -r '^--[^=]*=' '' -- (commandline -ct))
end

complete -c {name} -f
"""


def fish(program: Program) -> str:
    """Return the file for one program."""
    lines = []

    def add(place: str, how: str, about: str) -> None:
        words = re.sub(r"(['\\])", r"\\\1", about)
        told = f" -d '{words}'" if words else ""
        lines.append(f"complete -c {program.name} -n '__{program.name}_at {place}' {how}{told}\n")

    def offer(item: Item) -> str:
        calls = {FILES: "-F", FOLDERS: f"-fa '(__{program.name}_folders)'", "": "-f"}
        return calls.get(item.value, f"-fa '{item.value}'")

    for command, about in program.commands.items():
        add(":0", f"-fa {command}", about)
    for command, items in program.items.items():
        for item in items:
            if item.is_option:
                how = [f"-l {n[2:]}" if n[1] == "-" else f"-s {n[1:]}" for n in item.names]
                how += ["-r"] if item.count in (ONE, MANY) else []
                how += [offer(item)] if item.count != NONE else []
                add(f"{command}:-", " ".join(how), item.about)
    for place, item in program.places():
        if item.count == MANY or not item.is_option:
            add(place, offer(item), item.about)
    head = FISH.format(
        name=program.name,
        one=listed(" ".join(["set -l one", *program.taking(ONE)])),
        many=listed(" ".join(["set -l many", *program.taking(MANY)])),
        early=listed(" ".join(["set -l early", *program.early])),
    )
    return f"# Completion of {program.name} in fish.\n{NOTE}\n{head}{''.join(lines)}"


def main(folder: Path) -> None:
    """Write all files."""
    both = programs()
    head = "# Completion of swiprctl and swiprd in bash, with or without bash-completion."
    files = {"swipr.bash": "\n".join([f"{head}\n{NOTE}\n{BASH}", *map(bash, both)])}
    for one in both:
        files |= {f"_{one.name}": zsh(one), f"{one.name}.fish": fish(one)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
