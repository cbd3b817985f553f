"""What is scored: one ResNeXt-50 in each engine's own form, and pictures of any size."""

from __future__ import annotations

import itertools
import lzma
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Final

import torch
from PIL import Image

from swiprd.bundle import read_bundle
from swiprd.compiled import FormCache, this_host
from swiprd.network import build_network

TESTS: Final = Path(__file__).parent.parent / "tests"
CHECKPOINT: Final = TESTS / "fastai" / "compact.h5.xz"
PHOTOGRAPHS: Final = ("chelsea.png", "coffee.png")
QUALITY: Final = 85
"""Of the JPEG files."""
USUAL: Final = "1080x1350"
"""The picture of all tables that name none."""
LARGE: Final = "12 megapixels"


class Material:
    """Models in a folder; what is there already is not made again.

    Attributes:
        bundle: the checkpoint as ``swiprd import`` makes it.
        cache: folder of its compiled form.
        onnx: the same network for ONNX Runtime and OpenVINO.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.bundle = folder / "resnext50.safetensors"
        self.cache = folder / "cache"
        self.onnx = folder / "resnext50.onnx"

    def make(self, threads: int, precisions: tuple[str, ...]) -> None:
        """Make the models; the compiled forms for ``threads`` and for one."""
        if not self.bundle.exists():
            checkpoint = self._folder / "compact.h5"
            checkpoint.write_bytes(lzma.decompress(CHECKPOINT.read_bytes()))
            words = [str(checkpoint), "-o", str(self.bundle), "--labels", "NO,YES"]
            _swiprd("import", *words)
            checkpoint.unlink()
        digest = read_bundle(str(self.bundle)).digest
        for count, precision in itertools.product(sorted({1, threads}), precisions):
            if FormCache(str(self.cache), this_host(count)).find(digest, precision) is None:
                words = ["--cache-dir", str(self.cache), "--threads", str(count)]
                _swiprd("compile", str(self.bundle), *words, "--precision", precision)
        if not self.onnx.exists():
            network = build_network(read_bundle(str(self.bundle)))
            with warnings.catch_warnings():
                # Its successor needs one more package, and makes the same of this network.
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    network,
                    (torch.zeros(1, 3, 224, 224),),
                    str(self.onnx),
                    dynamo=False,
                    opset_version=17,
                )

    def picture(self, width: int, height: int) -> Path:
        """Return a JPEG of that size: photographs side by side, so that it is as busy as one."""
        path = self._folder / f"{width}x{height}.jpg"
        if not path.exists():
            tiles = [Image.open(TESTS / "pictures" / name).convert("RGB") for name in PHOTOGRAPHS]
            picture = Image.new("RGB", (width, height))
            side_x, side_y = tiles[0].size
            columns, rows = math.ceil(width / side_x), math.ceil(height / side_y)
            for x, y in itertools.product(range(columns), range(rows)):
                tile = tiles[(x + y) % len(tiles)].resize((side_x, side_y))
                picture.paste(tile, (x * side_x, y * side_y))
            picture.save(path, quality=QUALITY)
        return path

    def picture_of(self, megapixels: float) -> Path:
        """Return a JPEG of so many megapixels, in the shape 4 to 3."""
        height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
        return self.picture(round(height * 4 / 3), height)


def _swiprd(*words: str) -> None:
    print("swiprd", words[0], file=sys.stderr)
    subprocess.run(
        [sys.executable, "-P", "-m", "swiprd", *words], check=True, stdout=sys.stderr, cwd="/"
    )
