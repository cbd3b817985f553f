"""Make the man page swipr-protocol(7) of PROTOCOL.md: ``python tools/make_protocol_page.py``.

Of Markdown it takes what PROTOCOL.md has or may well get; what it has no rule for, it refuses.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

ROOT = Path(__file__).parent.parent
WIDTH = 73
"""Columns of an example: the page has 78, and its margin takes 5."""
PAGE = r""".\" Made from PROTOCOL.md by tools/make_protocol_page.py: change the one, run the other.
.Dd November 24, 2026
.Dt SWIPR\-PROTOCOL 7
.Os Linux
.Sh NAME
.Nm swipr\-protocol
.Nd how programs speak to swiprd
.Sh DESCRIPTION
{introduction}
.Pp
Long lines of the examples are folded here; on the wire each is one.
.Ql +
marks what belongs to the line above, with nothing between.
{sections}
.Sh SEE ALSO
.Xr swiprctl 1 ,
.Xr swiprd.toml 5 ,
.Xr unix 7 ,
.Xr swiprd 8
"""
LISTS = {"bullet_list": "-bullet", "ordered_list": "-enum"}
MACROS = {"inline": "", "link": "", "em": "Em", "strong": "Sy"}
ESCAPES = {"\\": r"\e", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}


def main(source: str = f"{ROOT}/PROTOCOL.md", page: str = f"{ROOT}/docs/swipr-protocol.7") -> None:
    """Write the page."""
    tokens = MarkdownIt("commonmark").enable("table").parse(Path(source).read_text())
    title, *nodes = SyntaxTreeNode(tokens).children
    assert title.tag == "h1", "expected a title first"
    start = next((at for at, node in enumerate(nodes) if node.tag == "h2"), len(nodes))
    introduction, sections = ("\n".join(blocks(part)) for part in (nodes[:start], nodes[start:]))
    Path(page).write_text(PAGE.format(introduction=introduction, sections=sections))


def blocks(nodes: Sequence[SyntaxTreeNode]) -> Iterator[str]:
    """Yield the lines of all that stands one below the other."""
    before = "heading"
    for node in nodes:
        if node.type == "heading" and node.tag in ("h2", "h3"):
            yield f"{'.Sh' if node.tag == 'h2' else '.Ss'} {head(node)}"
        elif node.type == "paragraph":
            yield from [".Pp"] * (before != "heading")
            yield from filled(running(node))
        elif node.type in LISTS:
            yield f".Bl {LISTS[node.type]}"
            for item in node.children:
                yield from (".It", *blocks(item.children))
            yield ".El"
        elif node.type == "table":
            yield from rows(node)
        elif node.type in ("fence", "code_block"):
            fold = folded if node.info == "wire" else broken
            pieces = (piece for line in node.content.splitlines() for piece in fold(line))
            yield from (".Bd -literal", *(literal(piece) for piece in pieces), ".Ed")
        else:
            raise SystemExit(f"no rule for {node.type} {node.tag} {node.content!r}")
        before = node.type


def rows(table: SyntaxTreeNode) -> Iterator[str]:
    """Yield a list of the rows: the first cell, those between as in ``number: -1``, the last."""
    titles, *body = (row.children for part in table.children for row in part.children)
    yield ".Bl -tag -width Ds"
    for first, *between, last in body:
        yield f".It Cm {head(first)}"
        for at, cell in enumerate(between, 1):
            yield from filled(f"{head(titles[at])}: {running(cell)}{';' * (cell != between[-1])}")
        yield from [".br"] * (between != [])
        yield from filled(running(last))
    yield ".El"


def folded(line: str) -> Iterator[str]:
    """Yield a line of the wire in pieces that fit, each but the first with its mark."""
    while len(line) > WIDTH:
        comma, space = (line.rfind(mark, WIDTH // 2, WIDTH) for mark in ", ")
        at = comma + 1 or max(space, 0) or WIDTH
        yield line[:at]
        line = f"+ {line[at:]}"
    yield line


def broken(line: str) -> Iterator[str]:
    """Yield a line of code; where it is too long, as two: the shell allows that after a ``|``."""
    first, bar, rest = line.partition(" | ")
    yield from (f"{first} |", f"    {rest}") if bar and len(line) > WIDTH else (line,)


def running(node: SyntaxTreeNode) -> str:
    """Return running text, escaped, and with macros in marks that it cannot hold: ``«Ql code»``."""
    text = ""
    for child in node.children:
        if child.type == "code_inline":
            text += "«Ql \\%" + literal(child.content).replace(" ", "\\ ") + "»"
        elif child.type in ("text", "softbreak"):
            found = " " if child.type == "softbreak" else escaped(child.content)
            text += re.sub(r"([\w.-]+)\((\d)\)", r"«Xr \1 \2»", found)
        elif child.type in MACROS:
            inner, macro = running(child), MACROS[child.type]
            is_done = macro == "" or "«" in inner  # code in emphasis stays code
            text += inner if is_done else re.sub(r"\S+", rf"«{macro} \\&\g<0>»", inner)
        else:
            raise SystemExit(f"no rule for {child.type} {child.content!r}")
    return text


def filled(text: str) -> Iterator[str]:
    """Yield the lines of running text: each sentence begins one, and each macro is one."""
    sentence: list[str] = []
    for word in [*re.findall(r"(?:«.*?»|\S)+", text), ""]:
        sentence += [guarded(word)] * ("«" not in word)
        if "«" in word or not word or re.search(r"[.?!]\)?$", word):
            yield from textwrap.wrap(" ".join(sentence), 78, break_on_hyphens=False)
            sentence = []
        if "«" in word:
            body = word.rstrip(")].,:;?!")
            end = word[len(body) :]  # is the macro's to put there
            # Ql would take into its quotes what comes after it.
            body = re.sub("«Ql (.*?)»(?=.)", r"«So \1 Sc»", body).replace('"', r"\(dq")
            parts = re.findall("«(.*?)»|([^«]+)", body)
            yield " ".join(("." + " Ns ".join(macro or f"No \\&{x}" for macro, x in parts), *end))


def head(node: SyntaxTreeNode) -> str:
    """Return a title, in capitals where man has it so, or a cell, as words that are no macros."""
    text = "".join(leaf.content for leaf in node.walk() if leaf.type in ("text", "code_inline"))
    text = literal(text.upper() if node.tag == "h2" else text)
    return re.sub(r"\b(?=[A-Z][a-z]\b)", r"\\&", text).replace('"', r"\(dq")


def escaped(text: str) -> str:
    """Return ``text`` in ASCII, and so that roff takes no character for a command."""
    text = "".join(ESCAPES.get(c, c if c.isascii() else f"\\[u{ord(c):04X}]") for c in text)
    return re.sub(r"(?<!\w)-", r"\\-", text)


def literal(text: str) -> str:
    """Return ``text`` so that it comes out byte for byte."""
    return guarded(re.sub(r"(?<!\\)-", r"\\-", escaped(text)).replace("'", r"\(aq"))


def guarded(text: str) -> str:
    """Return ``text`` so that at the head of a line it is no command."""
    return re.sub(r"^(?=[.'])", r"\\&", text)


if __name__ == "__main__":
    main(*sys.argv[1:])
