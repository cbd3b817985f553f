"""SECURITY.md: every claim names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCUMENT = (TESTS.parent / "SECURITY.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+)`", DOCUMENT)))


def existing() -> set[str]:
    return {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_tests_that_are_named_are_there() -> None:
    """A claim whose test has gone is a claim no more."""
    assert len(NAMED) > 40
    assert set(NAMED) <= existing()


@pytest.mark.parametrize(
    "claim", re.findall(r"^- (.*?)(?=^- |^$)", DOCUMENT, re.MULTILINE | re.DOTALL)
)
def test_every_claim_in_a_list_names_a_test(claim: str) -> None:
    """None is only words."""
    assert "`test_" in claim
