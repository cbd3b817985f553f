"""What bash, zsh and fish complete, asked of these shells and held to the parsers."""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import make_completions
import pytest

import swiprctl.arguments
import swiprd.__main__
from tests.parsers import (
    CHOICES,
    PATHS,
    Command,
    both_commands,
    commands_of,
    operands_of,
    options_of,
)

ROOT = Path(__file__).parent.parent
COMPLETION = ROOT / "etc" / "completion"

CONTEXTS: Final = [
    ("swiprctl",),
    *(("swiprctl", name) for name in commands_of(swiprctl.arguments.make_parser())),
    ("swiprd",),
    *(("swiprd", name) for name in swiprd.__main__.COMMANDS),
]
ALL: Final = ["-begins with a dash", "a folder", "two words.png"]
"""What there is in the place."""


@pytest.fixture(scope="module")
def commands() -> dict[str, Command]:
    """Both commands."""
    return both_commands()


@pytest.fixture
def place(folder: Path) -> Path:
    """A folder with two files and a folder in it, all with a space in their names."""
    for name in ("two words.png", "-begins with a dash"):
        (folder / name).touch()
    (folder / "a folder").mkdir()
    return folder


# --- the shells ----------------------------------------------------------------------------------


def found(shell: str) -> str:
    path = shutil.which(shell)
    assert path is not None, f"{shell} is not there; install Debian's {shell}"
    return path


def surroundings(home: Path) -> dict[str, str]:
    """Return the environment of a shell that leaves nothing elsewhere than in ``home``.

    No program can be found, so whoever ran one would be told so.
    """
    places = ("HOME", "ZDOTDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")
    return {
        **dict.fromkeys((*places, "XDG_RUNTIME_DIR"), str(home)),
        "HISTFILE": "",
        "INPUTRC": os.devnull,
        "LC_ALL": "C.UTF-8",
        "PATH": "/nonexistent",
        "PS1": "> ",
        "TERM": "dumb",
    }


class Terminal:
    """A shell that somebody types into. ``close`` must be called."""

    SHELLS: Final = {
        "bash": (["--norc", "--noprofile", "-i"], "PROMPT_COMMAND='printf \"\\001\"'"),
        "zsh": (["-f", "-i"], "zle-line-init() { printf '\\001' }; zle -N zle-line-init"),
    }
    """How each is started, and told to send a byte when it waits for the next line."""

    def __init__(self, shell: str, folder: Path) -> None:
        words, setup = self.SHELLS[shell]
        program = found(shell)
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (200, 1000))  # so that nothing is broken, or asked before
        self._fd = ours
        try:
            self._process = subprocess.Popen(
                [program, *words],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=folder,
                env=surroundings(folder),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        try:
            self.type(f"{setup}\n")
        except BaseException:
            self.close()
            raise

    def type(self, keys: str) -> str:
        """Type a line, its newline included, and return what is shown until it is done."""
        os.write(self._fd, keys.encode())
        data = b""
        deadline = time.monotonic() + 30
        while b"\1" not in data:
            readable, _, _ = select.select([self._fd], [], [], deadline - time.monotonic())
            assert readable, f"waited in vain for an answer to {keys!r}, got {data!r}"
            data += os.read(self._fd, 4096)
        return data.decode()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._fd)


class Shell(Protocol):
    """A shell that has the completions. ``close`` must be called."""

    def __init__(self, home: Path, files: list[Path]) -> None:
        """Start it with these completions, among them those of others."""

    def offered(self, line: str, within: Path = ROOT) -> list[str]:
        """Return in order what is offered at the end of a line, of files only their names."""

    def close(self) -> None:
        """End it."""


class Bash:
    """A bash for each question: its functions are called as it calls them."""

    ASK: Final = r"""
        while [[ $1 != -- ]]; do source "$1" || exit; shift; done
        shift
        read -r _ _ function name < <(complete -p "$1") || exit
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        "$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        ((${#COMPREPLY[@]} == 0)) || printf '%s\0' "${COMPREPLY[@]}"
    """

    def __init__(self, home: Path, files: list[Path]) -> None:
        self._home = home
        self._files = [file for file in files if file.suffix == ".bash"]

    def offered(self, line: str, within: Path = ROOT) -> list[str]:
        """Return what the function offers for the last word."""
        words = re.sub(r"=(?=\S)", "= ", re.sub(r"=", " =", line)).split(" ")  # as readline does
        return self.offered_for(words, within)

    def offered_for(self, words: list[str], within: Path = ROOT) -> list[str]:
        """Return what the function offers for the last of ``words``."""
        start = [found("bash"), "--norc", "--noprofile", "-u", "-c", self.ASK, "bash"]
        done = subprocess.run(
            [*start, *map(str, self._files), "--", *words],
            cwd=within,
            env=surroundings(self._home),
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return sorted(done.stdout.split("\0")[:-1])

    def close(self) -> None:
        """Do nothing: each question's bash has ended."""


class Fish:
    """A fish that answers what a terminal's user would be offered."""

    ASK: Final = r"""
        for file in $argv; source $file; end
        while read -L folder; and read -L line
            builtin cd $folder
            complete -C $line
            printf '\0'
        end
    """

    def __init__(self, home: Path, files: list[Path]) -> None:
        own = [file for file in files if file.suffix == ".fish"]
        self._process = subprocess.Popen(
            [found("fish"), "--no-config", "-c", self.ASK, *map(str, own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=surroundings(home),
            encoding="utf-8",
        )

    def described(self, line: str, within: Path = ROOT) -> dict[str, str]:
        """Return what is offered in no order, with what is said of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{within}\n{line}\n")
        self._process.stdin.flush()
        answer = ""
        while not answer.endswith("\0"):
            more = self._process.stdout.read(1)
            assert more, f"fish ended: {answer}"
            answer += more
        pairs = [line.partition("\t") for line in answer[:-1].splitlines()]
        return {name: words for name, _, words in pairs}

    def offered(self, line: str, within: Path = ROOT) -> list[str]:
        """Return what is offered."""
        head, is_value, _ = line.rpartition(" ")[2].rpartition("=")
        names = [name.removeprefix(head + is_value) for name in self.described(line, within)]
        return sorted(name.removesuffix("/") for name in names)

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


class Zsh:
    """A zsh in a terminal, with a key that notes what compadd adds instead of showing it."""

    SETUP: Final = r"""
        autoload -Uz compinit
        compinit -u -D
        ask() {
            compadd() {
                local -a added
                # Those are no matches yet, but are kept for a later call.
                if ((${@[1,(i)(-|--)][(I)-[OAD]]})); then
                    builtin compadd "$@"
                    return
                fi
                builtin compadd -A added "$@"
                # Options that nobody began to type are offered where nothing else can stand.
                if (($#added)) && [[ $curtag != options || $PREFIX$IPREFIX == -* ]]; then
                    print -rN -- ${(Q)added} >>$answer
                fi
                builtin compadd "$@"
            }
            _main_complete
            unfunction compadd
            compstate[insert]= compstate[list]=
        }
        zle -C ask complete-word ask
        bindkey '^T' ask
    """

    def __init__(self, home: Path, files: list[Path]) -> None:
        self._answer = home / "answer"
        (home / "setup").write_text(self.SETUP)
        self._terminal = Terminal("zsh", home)
        folders = " ".join({shlex.quote(str(file.parent)): None for file in files})
        self._terminal.type(f"fpath=({folders} $fpath) answer={self._answer}; source ./setup\n")

    def described(self, line: str) -> dict[str, str]:
        """Return what is listed for a tab, with what is said of it."""
        lines = [
            re.fullmatch(r"(.+?) +-- (.+?) *", shown)
            for shown in self._terminal.type(f"{line}\t\x15\n").splitlines()
        ]
        pairs = [match.groups() for match in lines if match]
        return {name: words for names, words in pairs for name in names.split()}

    def offered(self, line: str, within: Path = ROOT) -> list[str]:
        """Return what is offered."""
        self._terminal.type(f"builtin cd -q {shlex.quote(str(within))}\n")
        self._answer.write_text("")
        shown = self._terminal.type(f"{line}\x14\x15\n")
        assert "not found" not in shown
        return sorted(set(self._answer.read_text().split("\0")[:-1]))

    def close(self) -> None:
        """End it."""
        self._terminal.close()


def invented() -> argparse.ArgumentParser:
    """Return a parser with all that the commands' own may come to have."""
    parser = argparse.ArgumentParser(prog="invented")
    parser.add_argument("--socket", metavar="PATH")
    commands = parser.add_subparsers()
    compute = commands.add_parser("compute", help="take several: or none")
    compute.add_argument("paths", metavar="PATH", nargs="*")
    compute.add_argument("-r", "--recursive", action="store_true")
    compute.add_argument("--from", metavar="FILE", help=QUOTED)
    compute.add_argument("--format", choices=("csv", "json"))
    compute.add_argument("--top", metavar="N", type=int, help="at most %(metavar)s (all)")
    compute.add_argument("--tag", metavar="NAME", action="append", default=argparse.SUPPRESS)
    compute.add_argument("--hidden", help=argparse.SUPPRESS)
    compute.add_argument("--socket", metavar="PATH")
    status = commands.add_parser("status", help="say how it is")
    ways = status.add_mutually_exclusive_group()
    ways.add_argument("-j", "--json", action="store_true")
    ways.add_argument("--watch", metavar="SECONDS", nargs="?")
    ways.add_argument("--level", nargs="?", choices=("low", "high"))
    report = commands.add_parser("report", help="write")
    report.add_argument("folder", metavar="DIR")
    report.add_argument("how", nargs="?", choices=("long", "short"))
    report.add_argument("-o", "--output", metavar="FILE", required=True)
    return parser


QUOTED: Final = """it's "$HOME" `id` \\ ] \\' * {a,b} %% of"""
"""What no shell may take for its own."""


@pytest.fixture(scope="module", params=[Bash, Fish, Zsh], ids=lambda shell: shell.__name__.lower())
def shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shell]:
    """Each shell, with the completions of both commands and of the invented one."""
    home, others = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("others")
    program = make_completions.program(invented(), first=False)
    (others / "invented.bash").write_text(make_completions.bash(program))
    (others / "_invented").write_text(make_completions.zsh(program))
    (others / "invented.fish").write_text(make_completions.fish(program))
    files = [*sorted(COMPLETION.iterdir()), *others.iterdir()]
    with contextlib.closing(request.param(home, files)) as shell:
        yield shell


# --- the files -----------------------------------------------------------------------------------


def test_the_files_are_those_that_the_parsers_make(folder: Path) -> None:
    """Whoever changes a parser makes them again."""
    make_completions.main(folder)
    made, kept = ({p.name: p.read_text() for p in f.iterdir()} for f in (folder, COMPLETION))
    assert made == kept, "out of date; run python tools/make_completions.py etc/completion"


# --- what is offered -----------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS, ids=" ".join)
def test_the_options_that_the_code_has_are_offered_and_no_others(
    shell: Shell, context: tuple[str, ...], commands: dict[str, Command]
) -> None:
    """After a command, those of the command; behind -- there is none."""
    parser = commands[context[0]].parser(*context[1:])
    line = " ".join(context)
    assert shell.offered(f"{line} -") == sorted(options_of(parser))
    assert shell.offered(f"{line} --hel") == ["--help"]
    assert shell.offered(f"{line} --none") == []
    assert shell.offered(f"{line} -- -") == []


def test_the_commands_that_the_code_has_are_offered_and_no_others(
    shell: Shell, commands: dict[str, Command]
) -> None:
    """Those of swiprd as the first word only; those of swiprctl after options, too."""
    for name, command in commands.items():
        assert shell.offered(f"{name} ") == sorted(command.commands)
        for word in command.commands:
            assert shell.offered(f"{name} {word[:-1]}") == [word]
    for options in ("--socket /s", "--socket=/s --timeout 5", "--timeout=5", "--socket ping"):
        assert shell.offered(f"swiprctl {options} ") == sorted(commands["swiprctl"].commands)
    assert shell.offered("swiprctl --compute x.png ") == []
    assert shell.offered("swiprctl ping ") == []
    assert shell.offered("swiprctl nothing ") == []
    assert shell.offered("swiprd --workers 2 ") == []
    assert shell.offered("swiprd --detach ") == []


def test_bash_takes_an_option_with_its_value_for_one_word_or_three(
    commands: dict[str, Command], folder: Path
) -> None:
    """Which it is depends on COMP_WORDBREAKS, and that is the user's."""
    bash = Bash(folder, [COMPLETION / "swipr.bash"])
    for words in (["--socket=/s"], ["--socket", "=", "/s"]):
        offered = bash.offered_for(["swiprctl", *words, ""])
        assert offered == sorted(commands["swiprctl"].commands)


@pytest.mark.parametrize("context", CONTEXTS, ids=" ".join)
def test_values_of_options_are_offered_as_the_code_takes_them(
    shell: Shell, context: tuple[str, ...], commands: dict[str, Command], place: Path
) -> None:
    """Choices are offered where there are some, files where it is a path, and otherwise nothing."""
    for option, action in options_of(commands[context[0]].parser(*context[1:])).items():
        choices = action.choices
        if context == ("swiprd",):
            choices = CHOICES.get(action.dest)
        if action.nargs == 0:
            continue
        if choices is not None:
            expected = sorted(choices)
        elif action.metavar in PATHS:
            expected = ALL
        else:
            expected = ["a folder"] if action.metavar == "DIR" else []
        line = " ".join([*context, option])
        assert shell.offered(f"{line} ", place) == expected, option
        for word in expected if option.startswith("--") else []:
            assert shell.offered(f"{line}=", place) == expected, option
            assert word in shell.offered(f"{line}={word[:1]}", place)


@pytest.mark.parametrize("context", CONTEXTS, ids=" ".join)
def test_file_names_are_offered_where_a_command_takes_files(
    shell: Shell, context: tuple[str, ...], commands: dict[str, Command], place: Path
) -> None:
    """For each operand, as often as it may be given; and where none is taken, none is offered."""
    if len(context) == 1:  # where a command stands first
        return
    operands = operands_of(commands[context[0]].parser(*context[1:]))
    line = " ".join(context)
    for operand in operands:
        assert operand.metavar in (*PATHS, "DIR")
        expected = ALL if operand.metavar in PATHS else ["a folder"]
        assert shell.offered(f"{line} ", place) == expected
        assert shell.offered(f"{line} -- ", place) == expected
        assert shell.offered(f"{line} -- -", place) == [x for x in expected if x[0] == "-"]
        assert shell.offered(f"{line} two", place) == [x for x in expected if x[0] == "t"]
        line += " x"
    endless = bool(operands) and operands[-1].nargs in ("*", "+")
    assert shell.offered(f"{line} ", place) == (ALL if endless else [])
    assert shell.offered(f"{line} -- x ", place) == (ALL if endless else [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("compute ", ALL),
        ("compute a -r b ", ALL),
        ("compute a -- b -", ["-begins with a dash"]),
        ("compute --from ", ALL),
        ("compute --from=t", ["two words.png"]),
        ("compute --from a b ", ALL),
        ("compute --format ", ["csv", "json"]),
        ("compute --format=c", ["csv"]),
        ("compute --top ", []),
        ("compute --top=", []),
        ("compute --top 5 ", ALL),
        ("compute --hid", []),
        ("--socket compute status ", []),
        ("status --watch=", []),
        ("status --watch", ["--watch"]),
        ("status --level=", ["high", "low"]),
        ("status --level=h", ["high"]),
        ("report ", ["a folder"]),
        ("report -o ", ALL),
        ("report -o x ", ["a folder"]),
        ("report -o - ", ["a folder"]),
        ("report x ", ["long", "short"]),
        ("report x long ", []),
        ("report --output x -- x l", ["long"]),
    ],
)
def test_what_parsers_may_come_to_have_is_completed(
    shell: Shell, line: str, expected: list[str], place: Path
) -> None:
    """Operands without number, optional values and operands, choices, options after operands."""
    assert shell.offered(f"invented {line}", place) == expected


@pytest.mark.parametrize("shell", [Zsh], indirect=True)
@pytest.mark.parametrize(
    ("line", "gone"),
    [
        ("compute", []),
        ("compute -r", ["-r", "--recursive"]),
        ("compute --top 5 a", ["--top"]),
        ("compute --tag a --tag b", []),
        ("status -j", ["-j", "--json", "--watch", "--level"]),
        ("status --watch", ["-j", "--json", "--watch", "--level"]),
        ("status --level=low", ["-j", "--json", "--watch", "--level"]),
    ],
)
def test_zsh_offers_no_option_that_may_not_be_given_any_more(
    shell: Zsh, line: str, gone: list[str]
) -> None:
    """Given options and those that they exclude are left out; what may be repeated is not."""
    before = shell.offered(f"invented {line.split()[0]} -")
    assert sorted([*shell.offered(f"invented {line} -"), *gone]) == before


@pytest.mark.parametrize("shell", [Fish, Zsh], indirect=True)
@pytest.mark.parametrize("context", CONTEXTS, ids=" ".join)
def test_commands_and_options_are_shown_with_the_first_clause_of_their_help(
    shell: Fish | Zsh, context: tuple[str, ...], commands: dict[str, Command]
) -> None:
    """It is short enough to stand on one line with them."""
    for option, action in options_of(commands[context[0]].parser(*context[1:])).items():
        said = shell.described(f"{' '.join(context)} -")[option]
        assert (action.help or "").startswith(said)
        assert 5 < len(said) <= 70
    if len(context) == 1:
        said_of = shell.described(f"{context[0]} ")
        assert all(said_of[command] for command in commands[context[0]].commands)


@pytest.mark.parametrize("shell", [Fish, Zsh], indirect=True)
def test_nothing_in_a_description_is_the_shells(shell: Fish | Zsh) -> None:
    """Quotes, dollars, brackets and backslashes are shown as the parser has them."""
    assert shell.described("invented compute -")["--from"] == QUOTED.replace("%%", "%")
    assert shell.described("invented compute -")["--top"] == "at most N"
    assert shell.described("invented ")["compute"] == "take several"


# --- what is typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("swiprctl compute two\t", ["compute", "two words.png"]),
        ("swiprctl compute 'two w\t", ["compute", "two words.png"]),
        ("swiprctl compute two\\ w\t", ["compute", "two words.png"]),
        ("swiprctl compute -- -\t", ["compute", "--", "-begins with a dash"]),
        ("swiprctl --socket=two\t", ["--socket=two words.png"]),
        ("swiprctl sta\t", ["status"]),
        ("swiprctl --sock\tx", ["--socket", "x"]),
        ("swiprd --cache-dir=\tx", ["--cache-dir=a folder/x"]),
        ("swiprd --log-level=deb\t", ["--log-level=debug"]),
        ("swiprd --prec\tbf\t", ["--precision", "bf16"]),
        ("swiprd --det\t", ["--detach"]),
        ("swiprd show a\ttw\t", ["show", "a folder/twins.png"]),
    ],
)
@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_what_tab_makes_of_a_line_is_what_the_command_gets(
    name: str, keys: str, words: list[str], place: Path
) -> None:
    """Typed into a real shell, names with spaces come out as one word, quoted as need be."""
    (place / "a folder" / "twins.png").touch()
    load = {
        "bash": f"source {COMPLETION}/swipr.bash",
        "zsh": f"fpath=({COMPLETION} $fpath); autoload -Uz compinit; compinit -u -D",
    }
    with contextlib.closing(Terminal(name, place)) as terminal:
        terminal.type(f"{load[name]}\n")
        for command in ("swiprctl", "swiprd"):
            terminal.type(f"{command}() {{ printf '<%s>' \"$@\"; echo; }}\n")
        shown = terminal.type(f"{keys}\n")
    lines = ["".join(f"<{word}>" for word in words)]
    if name == "zsh":  # which joins an option and its value by itself
        lines.append(lines[0].replace("><", "=", 1))
    assert set(lines) & set(shown.splitlines())
