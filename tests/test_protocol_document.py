"""PROTOCOL.md: every example is run against the real daemon, and every table is the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from swiprctl import protocol
from swiprd.bundle import read_bundle
from swiprd.config import DEFAULT_BUNDLE
from tests.daemon import PICTURES, Daemon, read_lines

DOCUMENT = (Path(__file__).parent.parent / "PROTOCOL.md").read_text()
DIGEST = read_bundle(DEFAULT_BUNDLE).digest
EXAMPLES = [
    block.replace("/srv/pictures", str(PICTURES)).replace("sha256:DIGEST", DIGEST)
    for block in re.findall(r"^```wire\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
]
VARYING = {
    "bundle",
    "connections",
    "data",
    "decode_ms",
    "height",
    "idle_in",
    "images",
    "latency",
    "memory",
    "ms",
    "pid",
    "replies",
    "scores",
    "uptime",
}
"""Fields whose values differ from run to run, by their key."""


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_what_the_daemon_answers(daemon: Daemon, example: str) -> None:
    """Sent as documented, each example gets the documented bytes, but for what must vary."""
    sent = [line[2:] for line in example.splitlines() if line.startswith("> ")]
    expected = [line[2:].encode() for line in example.splitlines() if line.startswith("< ")]
    with daemon.connect() as connection:
        connection.sendall("".join(line + "\n" for line in sent).encode())
        received = read_lines(connection, len(expected))
    assert [_settled(*pair) for pair in zip(received, expected, strict=True)] == expected


def test_there_are_examples_of_every_op() -> None:
    """No operation goes without an example."""
    shown = "".join(EXAMPLES)
    assert set(re.findall(r'"op":"(\w+)"', shown)) == set(protocol.OPS) - {"compute"}
    assert '> {"path"' in shown


def test_the_table_of_errors_is_the_codes() -> None:
    """Each code that the daemon may send stands in the table, with its number and retryable."""
    rows = re.findall(r"^\| `(\w+)` \| (-\d) \| (yes|no) \|", DOCUMENT, re.MULTILINE)
    documented = {code: (int(number), retry == "yes") for code, number, retry in rows}
    sent = protocol.CODES.keys() - protocol.CLIENT_CODES
    assert documented == {
        code: (protocol.CODES[code].number, protocol.CODES[code].retryable) for code in sent
    }


def _settled(received: bytes, expected: bytes) -> bytes:
    """Return ``received`` with the documented values where values vary, encoded anew."""
    got, want = json.loads(received), json.loads(expected)
    assert protocol.encode(got) == received + b"\n", (
        "the daemon encodes as the protocol module does"
    )
    if "scores" in want:
        assert got["scores"] == pytest.approx(want["scores"], abs=1e-4)
    _settle(got, want)
    return protocol.encode(got)[:-1]


def _settle(got: Any, want: Any) -> None:
    pairs: Any = ()
    if isinstance(want, dict):
        for key in VARYING & want.keys() & got.keys():
            assert type(got[key]) is type(want[key])
            got[key] = want[key]
        pairs = [(got.get(key), value) for key, value in want.items()]
    elif isinstance(want, list):
        pairs = zip(got, want, strict=True)
    for inner_got, inner_want in pairs:
        _settle(inner_got, inner_want)
