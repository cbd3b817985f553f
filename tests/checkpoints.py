"""Checkpoints for tests: the one that fast.ai 0.7 wrote, and the same weights in other layouts."""

from __future__ import annotations

import functools
import io
import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

FASTAI = Path(__file__).parent / "fastai"
PARTS = {
    "0.0.0.0": "conv1",  # noqa: S104 - no address
    "0.0.0.1": "bn1",
    "0.0.0.3": "conv2",
    "0.0.0.4": "bn2",
    "0.0.1": "conv3",
    "0.0.2": "bn3",
    "0.1.0": "downsample.0",
    "0.1.1": "downsample.1",
}
"""What fast.ai 0.7 called the parts of a block, and what torchvision calls them."""
POSITIONS = json.loads((FASTAI / "expected.json").read_text())["sample_positions_chw"]
"""Channel, row and column of each sampled value of an input."""
HEAD = {10: 2, 12: 4, 14: 6, 16: 8}
"""Numbers of the head's layers with weights: in fast.ai 0.7, and in 1 and 2."""


def unpacked() -> bytes:
    """Return the bytes of the checkpoint that fast.ai 0.7 wrote."""
    return lzma.decompress((FASTAI / "compact.h5.xz").read_bytes())


@functools.cache
def fastai_0_7() -> dict[str, Tensor]:
    """Return its tensors."""
    return dict(torch.load(io.BytesIO(unpacked()), map_location="cpu", weights_only=True))


def fastai_1() -> dict[str, Tensor]:
    """Return the same weights as fast.ai 1 would have named them."""
    renamed = {}
    for name, tensor in fastai_0_7().items():
        number, _, field = name.partition(".")
        block = re.fullmatch(r"([4-7]\.\d+)\.([\d.]+)\.(\w+)", name)
        if int(number) in HEAD:
            renamed[f"1.{HEAD[int(number)]}.{field}"] = tensor
        elif block:
            renamed[f"0.{block[1]}.{PARTS[block[2]]}.{block[3]}"] = tensor
        else:
            renamed[f"0.{name}"] = tensor
    return renamed


def fastai_2() -> dict[str, Tensor]:
    """Return them as fast.ai 2 would have: without the Linears' biases, which it does not use."""
    return {k: t for k, t in fastai_1().items() if k not in ("1.4.bias", "1.8.bias")}


def expected(generation: str) -> dict[str, dict[str, Any]]:
    """Return by file name what that fast.ai itself, with these weights, made of each picture."""
    name = {"0.7": "expected.json", "1": "expected_1.json", "2": "expected_2.json"}[generation]
    found: dict[str, dict[str, Any]] = json.loads((FASTAI / name).read_text())["images"]
    return found


def picture(name: str) -> bytes:
    """Return the file of a picture that ``expected`` knows; "300x200.png" is noise of that size."""
    path = FASTAI / name
    return path.read_bytes() if path.exists() else _noise(*map(int, path.stem.split("x")))


def _noise(width: int, height: int) -> bytes:
    data = random.Random(width * 100_003 + height).randbytes(width * height * 3)  # noqa: S311
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), data).save(buffer, "BMP")
    return buffer.getvalue()
