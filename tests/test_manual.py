"""The manual pages and the template of the settings, held to the code."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import swiprctl.__main__
import swiprctl.terminal
import swiprd.__main__
from swiprctl.defaults import DEFAULT_TIMEOUT, RELOAD_TIMEOUT, SYSTEM_SOCKET
from swiprctl.session import MAX_TIMEOUT
from swiprd.config import (
    DEFAULT_FILE,
    SETTINGS,
    SYSTEM_CACHE,
    Setting,
    load_config,
)
from swiprd.process import ENVIRONMENT
from tests.parsers import CHOICES, Command, both_commands, operands_of, options_of

ROOT = Path(__file__).parent.parent
BY_HAND = ("swiprctl.1", "swiprd.8", "swiprd.toml.5")
PAGES = (*BY_HAND, "swipr-protocol.7")
PAGE_OF = {"swiprctl": "swiprctl.1", "swiprd": "swiprd.8"}
PROTOCOL = ROOT / "PROTOCOL.md"
MAKE_PROTOCOL_PAGE = ROOT / "tools" / "make_protocol_page.py"
TEMPLATE = ROOT / "etc" / "swiprd.toml"

NAMES = [setting.name for setting in SETTINGS]
NOT_IN_TOML = ("model", "cache_dir", "socket")
"""Settings whose default is no value that could stand in a file for everybody."""

MAN = shutil.which("man") or ""
GROFF = shutil.which("groff") or ""

NOTHING = r"\&"
"""What roff takes for a word, and is none."""

needs_man = pytest.mark.skipif(MAN == "", reason="man is not there; install Debian's man-db")
needs_groff = pytest.mark.skipif(
    GROFF == "", reason="groff is not there; install Debian's groff-base"
)


# --- what the code has ---------------------------------------------------------------------------


MODULES: Final = {
    "swiprctl": ("swiprctl.commands.run", "swiprctl.defaults", "swiprctl.commands.progress"),
    "swiprd": (
        "swiprd.__main__",
        "swiprd.commands",
        *(f"swiprd.{path.stem}" for path in sorted((ROOT / "swiprd").glob("[a-z]*.py"))),
    ),
}
"""Where each command reads the environment and returns its exit status."""


@pytest.fixture(scope="module")
def commands() -> dict[str, Command]:
    """Both commands."""
    return both_commands()


def tree_of(module: str) -> ast.Module:
    # Not imported: what runs a worker would begin to.
    path = ROOT.joinpath(*module.split("."))
    return ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    )


NOT_FOR_USERS: Final = {"LD_LIBRARY_PATH"}
"""Variables that are the dynamic linker's, where Swipr reads them, too."""


def variables_of(module: str) -> set[str]:
    """Return the environment variables that ``module`` names.

    They are what is looked up in anything called an environment, and words in capitals that stand
    together in a tuple.
    """
    words: set[str] = set()
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Call(
                func=ast.Attribute(value=where, attr="get" | "pop"),
                args=[ast.Constant(value=str(word)), *_],
            ):
                words |= {word} if "environ" in ast.unparse(where) else set()
            case ast.Subscript(value=where, slice=ast.Constant(value=str(word)), ctx=ast.Load()):
                words |= {word} if "environ" in ast.unparse(where) else set()
            case ast.Tuple(elts=[*elements]):
                texts = [e.value for e in elements if isinstance(e, ast.Constant)]
                if texts and all(re.fullmatch(r"[A-Z]+(_[A-Z]+)+", str(text)) for text in texts):
                    words |= set(map(str, texts))
    return {word for word in words if re.fullmatch("[A-Z][A-Z_]+", word)} - NOT_FOR_USERS


def exit_statuses_of(module: str) -> set[int]:
    """Return the numbers that functions of ``module`` return that return an exit status."""
    loaded = importlib.import_module(module)
    found = {2}  # argparse's own, for wrong usage
    for function in ast.walk(tree_of(module)):
        if (
            not isinstance(function, ast.FunctionDef)
            or ast.unparse(function.returns or function) != "int"
        ):
            continue
        for statement in ast.walk(function):
            if isinstance(statement, ast.Return) and statement.value is not None:
                found |= set(_leaves(statement.value, loaded))
    return found


def _leaves(value: ast.expr, module: Any) -> Iterator[int]:
    match value:
        case ast.Constant(value=int(number)):
            yield number
        case ast.Name(id=name) if type(getattr(module, name, None)) is int:
            yield getattr(module, name)
        case ast.IfExp(body=one, orelse=other):
            yield from _leaves(one, module)
            yield from _leaves(other, module)
        case ast.BoolOp(values=several):
            for one in several:
                yield from _leaves(one, module)
        case ast.Call(func=ast.Name(id="_fail"), args=[_, status]):
            yield from _leaves(status, module)


def expectation_of(setting: Setting, bad: object) -> str | None:
    """Return what the setting says it expects instead of ``bad``; None: it takes that."""
    try:
        setting.check(bad)
    except ValueError as expected:
        return str(expected)
    return None


# --- what a page says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One item of a list: the words at its head, and what is said under it."""

    section: str
    head: str
    body: str

    @property
    def options(self) -> list[str]:
        """The options at the head, dashes included."""
        return re.findall(r"(?:^|, )(--?[a-z0][\w-]*)", self.head)

    @property
    def word(self) -> str:
        """The first word of the head."""
        return self.head.split()[0]


class Page:
    """A page in mdoc(7), without its macros.

    Attributes:
        sections: the text of each, without displays, by its heading.
        items: all items of all lists.
        displays: the lines of all displays.
    """

    def __init__(self, name: str) -> None:
        self.source = (ROOT / "docs" / name).read_text()
        self.sections: dict[str, str] = {}
        self.items: list[Item] = []
        self.displays: list[str] = []
        section = subsection = ""
        in_display = in_item = False
        for line in self.source.replace("\\\n", "").splitlines():
            macro, _, rest = line.partition(" ")
            if macro in (".Bd", ".Ed"):
                in_display = macro == ".Bd"
            elif in_display:
                self.displays.append(unescaped(line))
            elif macro == ".Sh":
                section = subsection = rest.strip('"')
            elif macro == ".Ss":
                subsection = rest.strip('"')
            elif macro == ".It":
                in_item = True
                self.items.append(Item(subsection, plain(f".{rest}"), ""))
            elif macro == ".El":
                in_item = False
            elif macro not in (".Bl", '.\\"') and section:
                words = plain(line)
                self.sections[section] = f"{self.sections.get(section, '')} {words}".strip()
                if in_item:
                    last = self.items[-1]
                    self.items[-1] = Item(last.section, last.head, f"{last.body} {words}".strip())

    def under(self, *headings: str) -> list[Item]:
        """Return the items under these headings, of sections or subsections."""
        return [item for item in self.items if item.section in headings]


def unescaped(text: str) -> str:
    return text.replace("\\-", "-").replace("\\e", "\\")


def plain(line: str) -> str:
    """Return the words of a line, with the dashes that ``Fl`` puts before its own."""
    if line.startswith("."):
        words: list[str] = []
        macro = ""
        for word in line.removeprefix(".").split():
            if re.fullmatch(r"[A-Z][a-z]", word):
                macro = word
            elif macro == "Fl" and word not in (",", ")", "|", ".", ":", ";"):
                words.append(f"-{word}")
            elif macro == "Qq":
                words.append(f'"{word.replace(NOTHING, "")}"')
            elif macro == "Bq":
                words.append(f"[{word}]")
            else:
                words.append(word)
        line = " ".join(words)
    return re.sub(r" ([,.:;)])", r"\1", unescaped(line))


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """All pages, by their names."""
    return {name: Page(name) for name in PAGES}


def rendered(page: str | Path, *options: str, width: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MAN, *options, "-l", str(ROOT / "docs" / page)],
        env={**os.environ, "MANWIDTH": str(width), "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


# --- the pages are sound -------------------------------------------------------------------------


@needs_man
@pytest.mark.parametrize("page", PAGES)
def test_man_shows_the_page_without_a_warning(page: str) -> None:
    """What man-db's own check of a page says is nothing."""
    done = rendered(page, "--warnings")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith(page.rpartition(".")[0].upper())


@needs_man
@pytest.mark.parametrize("page", PAGES)
def test_the_page_fits_a_terminal_of_80_columns(page: str) -> None:
    """No example is cut off or broken where it would be copied from."""
    lines = rendered(page).stdout.splitlines()
    assert max(map(len, lines)) <= 80


@needs_groff
@pytest.mark.parametrize("page", PAGES)
def test_groff_has_no_warning(page: str) -> None:
    """Not with all of its warnings turned on, either."""
    command = [GROFF, "-mdoc", "-ww", "-z", "-Tutf8", str(ROOT / "docs" / page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pages_refer_to_each_other(pages: dict[str, Page]) -> None:
    """Each page names all others where one looks for them."""
    for name, page in pages.items():
        others = [other.rpartition(".")[::2] for other in PAGES if other != name]
        for title, number in others:
            assert f"{title} {number}" in page.sections["SEE ALSO"]


# --- the page that is made -----------------------------------------------------------------------


def make_page(page: Path, source: Path = PROTOCOL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(MAKE_PROTOCOL_PAGE), str(source), str(page)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def unfolded(lines: list[str]) -> list[str]:
    """Return the lines of the wire among ``lines`` as they were before they were folded."""
    found: list[str] = []
    for line in lines:
        if line.startswith(("> ", "< ")):
            found.append(line)
        elif line.startswith("+ "):
            found[-1] += line.removeprefix("+ ")
    return found


def test_the_page_of_the_protocol_is_that_of_today(folder: Path) -> None:
    """What is in docs is what PROTOCOL.md makes."""
    done = make_page(folder / "page")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    made, kept = (folder / "page").read_text(), (ROOT / "docs" / PAGES[-1]).read_text()
    assert made == kept, (
        f"PROTOCOL.md has changed: run python {MAKE_PROTOCOL_PAGE.relative_to(ROOT)}"
    )


@needs_man
def test_the_page_of_the_protocol_has_all_that_is_in_its_source() -> None:
    """Each line of the wire once it is unfolded, each paragraph, each cell, each line of code."""
    source, shown = PROTOCOL.read_text(), rendered(PAGES[-1]).stdout
    lines = [line.strip() for line in shown.splitlines()]
    assert unfolded(lines) == [line for line in source.splitlines() if line[:2] in ("> ", "< ")]
    for pattern, stands_for in (
        (r"(?s)^```wire\n.*?^```$", ""),
        (r"^```.*$", ""),
        (r"^\|.*\n\|[-|]+$", ""),  # titles of columns; most stand at each item
        (r"^(# .*|#+)", ""),
        (r"`(.+?)`", r"'\1'"),
        (r"\[([^]]+)\]\([^)]+\)", r"\1"),
    ):
        source = re.sub(pattern, stands_for, source, flags=re.MULTILINE)
    parts = [squeezed(part) for part in re.split(r"(?m)\n\n|^- |\|", source)]
    assert len(parts) > 100
    # Sections have capitals; what stands at the head of an item has no quotes.
    assert [part for part in parts if part.strip("'").lower() not in squeezed(shown).lower()] == []


def squeezed(text: str) -> str:
    """Return ``text`` without spaces and hyphenation, and with one kind of single quotes."""
    return re.sub(r"\s", "", re.sub(r"\u2010\s+", "", re.sub("[\u2018\u2019]", "'", text)))


SAMPLE: Final = """\
# Title

With (`a`), `x`/`y`'s, *some emphasis* and **more**. A [link](#there); -t 30, "é" ~ ^. 'quoted'
.dot, see swiprd.toml(5): `a "b" \\c - 'd'`.

No is `No`.

## In `code` "and" so on

1. one

   further
2. two
   - inner

### No `op`

| `a` | second | third | last |
|---|---|---|---|
| `No` | `b` | c | the *end* |

    .dot 'x' `x` ~ ^ \\n -t é
"""
SHOWN: Final = """\
With ('a'), 'x'/'y''s, some emphasis and more. A link; -t 30, "é" ~ ^. 'quoted' .dot, see
swiprd.toml(5): 'a "b" \\c - 'd''. No is 'No'.
IN CODE "AND" SO ON 1. one further 2. two • inner
No op No second: 'b'; third: c the end
.dot 'x' `x` ~ ^ \\n -t é
"""


@needs_man
@needs_groff
def test_a_page_is_made_of_all_that_the_source_may_hold(folder: Path) -> None:
    """Nothing in it is taken for a command of roff's, nothing is lost, and nothing gets a space."""
    (folder / "source").write_text(SAMPLE)
    assert make_page(folder / "page.7", folder / "source").returncode == 0
    done = rendered(folder / "page.7", "--warnings")
    assert (done.returncode, done.stderr) == (0, "")
    found = re.sub(r"(?s)Long lines.*between\.", "", re.sub("[\u2018\u2019]", "'", done.stdout))
    assert " ".join(SHOWN.split()) in " ".join(found.split())
    command = [GROFF, "-mdoc", "-ww", "-z", "-Tutf8", str(folder / "page.7")]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize("source", ["# T\n\n> quoted", "# T\n\n#### deep", "# T\n\n<b>x</b>"])
def test_a_page_is_not_made_of_what_has_no_rule(source: str, folder: Path) -> None:
    """It is refused, and not left out."""
    (folder / "source").write_text(source)
    done = make_page(folder / "page.7", folder / "source")
    assert done.returncode == 1
    assert done.stderr.startswith("no rule for ")
    assert not (folder / "page.7").exists()


# --- options and commands ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiprctl", "swiprd"])
def test_the_page_lists_the_options_that_the_code_has_and_no_others(
    name: str, commands: dict[str, Command], pages: dict[str, Page]
) -> None:
    """Each is an item, with the word for its value. What only commands of swiprd take is not."""
    command = commands[name]
    listed = [(option, item) for item in pages[PAGE_OF[name]].items for option in item.options]
    assert len(dict(listed)) == len(listed), "an option is listed twice"
    expected = options_of(command.main)
    if name == "swiprctl":
        for parser in command.commands.values():
            expected |= options_of(parser)
    # Items of swiprd's commands name options that are no items of their own.
    assert dict(listed).keys() == expected.keys()
    for option, item in listed:
        value = expected[option].metavar
        behind = re.sub(r"^, --[\w-]+", "", item.head.partition(option)[2])
        assert behind.strip() == (value or "")


@pytest.mark.parametrize("name", ["swiprctl", "swiprd"])
def test_the_page_mentions_no_option_that_the_code_has_not(
    name: str, commands: dict[str, Command], pages: dict[str, Page]
) -> None:
    """Neither in its text nor in its synopsis, nor at the head of an item."""
    known = {
        name for command in commands.values() for p in command.parsers for name in options_of(p)
    }
    page = pages[PAGE_OF[name]]
    text = [*page.sections.values(), *(item.head for item in page.items)]
    mentioned = {word for part in text for word in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", part)}
    assert mentioned
    assert mentioned <= known


def test_the_page_of_settings_mentions_no_option_that_the_code_has_not(
    pages: dict[str, Page],
) -> None:
    """The two examples of options in it are the daemon's."""
    mentioned = re.findall(
        r"(?<![\w-])--?[a-z][\w-]*", pages["swiprd.toml.5"].sections["DESCRIPTION"]
    )
    assert mentioned
    assert set(mentioned) <= options_of(swiprd.__main__._parser()).keys()


@pytest.mark.parametrize("name", ["swiprctl", "swiprd"])
def test_the_page_lists_the_commands_that_the_code_has_and_no_others(
    name: str, commands: dict[str, Command], pages: dict[str, Page]
) -> None:
    """Each is an item, with its operands, and stands in the synopsis."""
    command = commands[name]
    page = pages[PAGE_OF[name]]
    found = [item for item in page.under("DESCRIPTION", "Commands") if item.word.isalpha()]
    assert [item.word for item in found if item.word not in command.commands] == []
    assert sorted(item.word for item in found) == sorted(command.commands)
    for item in found:
        operands = [str(action.metavar) for action in operands_of(command.commands[item.word])]
        assert [word for word in operands if word not in item.head] == []
        assert item.word in page.sections["SYNOPSIS"].replace("|", " ").split()


def test_the_commands_of_swiprd_are_those_that_it_looks_for(commands: dict[str, Command]) -> None:
    """What tests here take for its commands is what it takes for them."""
    assert tuple(commands["swiprd"].commands) == swiprd.__main__.COMMANDS


def test_the_page_of_swiprctl_tells_how_long_it_waits(pages: dict[str, Page]) -> None:
    """Both defaults and the limit are the code's."""
    (item,) = [item for item in pages["swiprctl.1"].items if "--timeout" in item.options]
    assert f"up to {MAX_TIMEOUT:g}. " in item.body
    assert (
        f"is {DEFAULT_TIMEOUT:g}; for several images, and for reload, it is {RELOAD_TIMEOUT:g},"
        in item.body
    )


def test_the_page_of_swiprd_names_the_choices(pages: dict[str, Page]) -> None:
    """Where a setting takes one of a few words, its option says which."""
    items = {item.options[0]: item for item in pages["swiprd.8"].under("Settings")}
    for name, choices in CHOICES.items():
        *first, last = choices
        body = items["--" + name.replace("_", "-")].body
        assert body.endswith(f": {', '.join(first)} or {last}")


EXAMPLE: Final = re.compile(r"^(?:[$#>] +)?(?:sudo )?(swiprctl|swiprd) (.*)")


@pytest.mark.parametrize("page", BY_HAND)
def test_examples_are_command_lines_that_the_code_takes(
    page: str, commands: dict[str, Command], pages: dict[str, Page]
) -> None:
    """An example that is copied is not refused, whatever it does then."""
    found = [match for line in pages[page].displays if (match := EXAMPLE.match(line.strip()))]
    assert found
    for match in found:
        words = shlex.split(re.split(r" (?:\|\|?|&&|;|>)", match[2])[0])
        command = commands[match[1]]
        parser = command.main
        if match[1] == "swiprd" and words[0] in command.commands:
            parser = command.commands[words.pop(0)]
        try:
            parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"refused: {match[0]}")


# --- environment, files, exit status -------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiprctl", "swiprd"])
def test_the_page_lists_the_variables_that_the_code_reads_and_no_others(
    name: str, pages: dict[str, Page]
) -> None:
    """Those of the settings too, each by its name."""
    expected = {variable for module in MODULES[name] for variable in variables_of(module)}
    if name == "swiprd":
        expected |= {setting.variable for setting in SETTINGS} | set(ENVIRONMENT)
    items = pages[PAGE_OF[name]].under("ENVIRONMENT")
    listed = [word for item in items for word in item.head.split(", ")]
    assert sorted(listed) == sorted(expected)


@pytest.mark.parametrize("name", ["swiprctl", "swiprd"])
def test_the_page_lists_the_exit_statuses_that_the_code_returns_and_no_others(
    name: str, pages: dict[str, Page]
) -> None:
    """Each is a number at the head of an item."""
    mains = [module for module in MODULES[name] if module.endswith(("__main__", ".commands"))]
    expected = {status for module in mains for status in exit_statuses_of(module)}
    if name == "swiprctl":  # whose statuses have names
        expected |= {value for value in vars(swiprctl.terminal).values() if type(value) is int}
    listed = [int(item.head) for item in pages[PAGE_OF[name]].under("EXIT STATUS")]
    assert listed == sorted(expected)


def test_the_numbers_of_the_script_service_are_all_there(pages: dict[str, Page]) -> None:
    """They are those that the codes of the protocol have."""
    numbers = {kind.number for kind in swiprctl.protocol.CODES.values()}
    listed = [
        item.head for item in pages["swiprctl.1"].under("DESCRIPTION") if item.head[1:].isdigit()
    ]
    assert sorted(map(int, listed)) == sorted(numbers)


def test_the_pages_name_the_files_that_the_code_uses(pages: dict[str, Page]) -> None:
    """At the places where the code looks."""
    heads = {page: " ".join(item.head for item in pages[page].under("FILES")) for page in PAGES}
    for path in (DEFAULT_FILE, SYSTEM_SOCKET, SYSTEM_CACHE, "/run/swipr/swiprd.pid"):
        assert path in heads["swiprd.8"].replace(",", " ").split()
    assert DEFAULT_FILE in heads["swiprd.toml.5"].split()
    assert SYSTEM_SOCKET in heads["swiprctl.1"].split()


# --- settings ------------------------------------------------------------------------------------


def test_the_page_of_settings_has_each_of_them_in_order(pages: dict[str, Page]) -> None:
    """And none that is not there."""
    found = [item.word for item in pages["swiprd.toml.5"].items if " = " in item.head]
    assert found == NAMES


@pytest.fixture(scope="module")
def explained(pages: dict[str, Page]) -> dict[str, Item]:
    """What swiprd.toml(5) says of each setting, by its name."""
    return {item.word: item for item in pages["swiprd.toml.5"].items if " = " in item.head}


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_a_setting_is_explained_with_its_default(
    setting: Setting, explained: dict[str, Item]
) -> None:
    """It stands at the head, as it would in the file; in brackets what is no value."""
    head = explained[setting.name].head
    if setting.name in NOT_IN_TOML:
        assert re.fullmatch(rf"{setting.name} = \[.+\]", head)
    else:
        assert tomllib.loads(head) == {setting.name: setting.default}


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_a_setting_is_explained_with_its_type_range_and_unit(
    setting: Setting, explained: dict[str, Item]
) -> None:
    """In the words with which the daemon refuses a bad value."""
    body = explained[setting.name].body
    for bad in (object(), "/" + "x" * 4000):
        expected = expectation_of(setting, bad)
        assert expected is None or expected.lower() in body.lower()
    is_text = setting.default is None or isinstance(setting.default, str)
    assert is_text == ("A string" in body)
    for ending, unit in (("_timeout", "In seconds"), ("_mib", "In MiB"), ("_megapixels", "pixels")):
        assert setting.name.endswith(ending) <= (unit in body)


def test_the_range_of_a_setting_is_looked_for_as_a_whole(explained: dict[str, Item]) -> None:
    """The test above would not take a page that says 1 to 640 for one that says 1 to 64."""
    for setting in SETTINGS:
        expected = expectation_of(setting, object())
        assert expected is not None
        at = explained[setting.name].body.lower().index(expected.lower())
        rest = explained[setting.name].body[at + len(expected) :]
        assert re.match(r"\.(\s|$)|[,;] | of at most", rest), rest


def test_only_a_setting_that_needs_a_restart_says_so(explained: dict[str, Item]) -> None:
    """All others are taken over by a reload."""
    assert [name for name, item in explained.items() if "Needs a restart" in item.body] == [
        "socket"
    ]


# --- the template --------------------------------------------------------------------------------


def uncommented(text: str) -> str:
    """Return the template as somebody has it who takes each # before a setting away."""
    return re.sub(r"(?m)^#(?=[a-z_]+ = )", "", text)


def test_the_template_changes_nothing() -> None:
    """As it is installed it leaves every default."""
    assert load_config(file=str(TEMPLATE), environment={}, flags={}) == load_config(
        file=os.devnull, environment={}, flags={}
    )


def test_the_template_has_each_setting_in_order_with_one_comment() -> None:
    """Each is a line of its own that ends with words about it; all else is prose."""
    lines = [line for line in TEMPLATE.read_text().splitlines() if line]
    settings = [line for line in lines if not re.match(r"#( |$)", line)]
    assert [line.partition(" ")[0] for line in settings] == [f"#{name}" for name in NAMES]
    for line in settings:
        assert re.fullmatch(r"#[a-z_]+ = \S+ +# .*[\w\"]", line)
    assert max(map(len, lines)) <= 100


def test_the_template_shows_the_defaults(folder: Path) -> None:
    """With each # taken away it still is the default, as far as a file can say it."""
    file = folder / "swiprd.toml"
    file.write_text(uncommented(TEMPLATE.read_text()))
    config = load_config(file=str(file), environment={}, flags={})
    assert tomllib.loads(file.read_text()).keys() == set(NAMES)
    for setting in SETTINGS:
        if setting.name not in NOT_IN_TOML:
            assert getattr(config, setting.name) == setting.default
    # For root and the service, the usual places; the model has none, and is an example.
    assert config.cache_dir == SYSTEM_CACHE
    assert config.socket == SYSTEM_SOCKET
    assert config.model.startswith("/var/lib/swipr/")
    (line,) = [x for x in TEMPLATE.read_text().splitlines() if x.startswith("#model")]
    assert "without this line" in line


def test_the_template_names_the_choices() -> None:
    """One does not have to look them up."""
    for name, choices in CHOICES.items():
        (line,) = [x for x in TEMPLATE.read_text().splitlines() if x.startswith(f"#{name} ")]
        assert ", ".join(choices) in line
