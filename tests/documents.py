"""The commands that the documents show, and what they print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.[m1-8]*")))
]
"""All of them: Markdown and manual pages."""


@dataclass
class Example:
    """One command as a document shows it.

    Attributes:
        command: what is typed.
        as_root: whether root types it; ``sudo`` is still there.
        block: which of the document's blocks it stands in; those of one belong together.
        output: the lines that come of it, where the document shows them.
    """

    command: str
    as_root: bool
    block: int
    output: list[str] = field(default_factory=list)


def examples(document: str) -> list[Example]:
    """Return the commands in ``document``, in order.

    In Markdown they are what is indented by four spaces; in a manual page what stands in displays
    behind a prompt. Where there are prompts, the other lines are output.
    """
    found: list[Example] = []
    for number, block in enumerate(_blocks(document)):
        prompts = any(re.match(r"[$#] ", line) for line in block)
        for line in block:
            if line.startswith("> ") and found:
                found[-1].command += "\n" + line[2:]
            elif not prompts or re.match(r"[$#] ", line):
                command = line[2:] if prompts else line
                as_root = line.startswith("# ") or "sudo " in command
                found.append(Example(command, as_root, number))
            else:
                found[-1].output.append(line)
    return found


def _blocks(document: str) -> Iterator[list[str]]:
    text = (ROOT / document).read_text()
    if document.endswith(".md"):
        text = re.sub(r"(?ms)^```.*?^```$", "", text)
        for match in re.finditer(r"(?m)(?:^\n|\A)((?: {4}.*\n)+)", text):
            yield [line[4:] for line in match[1].splitlines()]
        return
    for match in re.finditer(r"(?ms)^\.Bd.*?\n(.*?)^\.Ed$", text):
        block = [line.replace("\\-", "-").replace("\\e", "\\") for line in match[1].splitlines()]
        if any(re.match(r"[$#] ", line) for line in block):
            yield block
