"""The default bundle is what its script makes: tools/make_default_bundle.py."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from swiprd.bundle import Bundle, read_bundle
from swiprd.config import DEFAULT_BUNDLE

ROOT = Path(__file__).parent.parent


def without_scores(bundle: Bundle) -> object:
    golden = tuple(dataclasses.replace(golden, scores=()) for golden in bundle.manifest.golden)
    return dataclasses.replace(bundle.manifest, golden=golden)


def test_the_script_makes_the_bundle_again(folder: Path) -> None:
    """Anyone can run it: same manifest, same bytes of every tensor, same golden answers."""
    path = folder / "again.safetensors"
    subprocess.run(
        [sys.executable, ROOT / "tools" / "make_default_bundle.py", path],
        env={"PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    again, shipped = read_bundle(str(path)), read_bundle(DEFAULT_BUNDLE)
    assert without_scores(again) == without_scores(shipped)
    assert {name: (t.dtype, t.shape, bytes(t.data)) for name, t in again.tensors.items()} == {
        name: (t.dtype, t.shape, bytes(t.data)) for name, t in shipped.tensors.items()
    }
    for ours, theirs in zip(again.manifest.golden, shipped.manifest.golden, strict=True):
        # Rounded to six decimals, after sums whose order depends on the processor.
        assert ours.scores == pytest.approx(theirs.scores, abs=5e-6)
