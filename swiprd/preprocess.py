"""From RGB pixels to the model's input: scale, crop, normalise, as the bundle's manifest says.

The filter is OpenCV's INTER_AREA on floats: when shrinking, each output pixel is the mean of the
rectangle that it covers, border pixels counted by the fraction covered, unless that is no more than
a thousandth; when enlarging, a linear filter of two taps. Both are sums over rows of weighted
source rows, then the same over columns, so one representation serves: ``Taps``.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from swiprd.bundle import Preprocessing

STRIP_BYTES: Final = 2**20
"""Source pixels that are worked on at a time, in bytes; as floats four times that."""


def preprocess(image: Image.Image, rules: Preprocessing) -> Tensor:
    """Return the input for ``image``: float32, shape (1, 3, crop, crop), channels last in memory.

    The work does not grow with the scaled picture, of which only the crop is computed: a 1 x 300
    picture costs what any other does.
    """
    width, height = image.size
    ratio = rules.short_side / min(width, height)
    rows = _cropped_taps(height, ratio, rules)
    columns = _cropped_taps(width, ratio, rules)
    scaled = torch.cat(
        [strip.sum(_pixels(image, strip, columns)) for strip in _strips(rows, width)]
    )
    across = scaled.view(rules.crop, -1, 3).transpose(0, 1).flatten(1)
    scaled = columns.sum(across).view(rules.crop, rules.crop, 3)
    mean, std = torch.tensor(rules.mean), torch.tensor(rules.std)
    normalised = (scaled / rules.scale - mean) / std
    return normalised.transpose(0, 1).contiguous().permute(2, 0, 1).unsqueeze(0)


def _strips(rows: Taps, width: int) -> list[Taps]:
    """Cut ``rows`` into parts whose source pixels stay in the processor's cache."""
    outputs = len(rows.offsets)
    count = math.ceil((rows.stop - rows.first) * width * 3 / STRIP_BYTES)
    return rows.split(math.ceil(outputs / count))


def _pixels(image: Image.Image, rows: Taps, columns: Taps) -> Tensor:
    """Return the part of ``image`` that is looked at: float32 (rows, columns * 3)."""
    part = image.crop((columns.first, rows.first, columns.stop, rows.stop))
    pixels = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8)
    return pixels.view(part.height, -1).float()


@dataclass(frozen=True, slots=True)
class Taps:
    """For each output row, which source rows are summed and with which weights.

    Attributes:
        first: the first source row that any output needs; indexes count from it.
        stop: one past the last.
        indexes: int64, the source rows of all outputs, one output after another.
        offsets: int64, where each output's part of ``indexes`` begins.
        weights: float32, as long as ``indexes``.
    """

    first: int
    stop: int
    indexes: Tensor
    offsets: Tensor
    weights: Tensor

    def sum(self, rows: Tensor) -> Tensor:
        """Return the weighted sums: float32 (source rows, n) to (outputs, n)."""
        return functional.embedding_bag(
            self.indexes, rows, self.offsets, mode="sum", per_sample_weights=self.weights
        )

    def split(self, size: int) -> list[Taps]:
        """Return taps for ``size`` outputs at a time, in order."""
        if size >= len(self.offsets):
            return [self]
        starts = range(0, len(self.offsets), size)
        borders = [*self.offsets[::size].tolist(), len(self.indexes)]
        return [
            self._part(slice(begin, end), self.offsets[start : start + size] - begin)
            for start, (begin, end) in zip(starts, itertools.pairwise(borders), strict=True)
        ]

    def _part(self, part: slice, offsets: Tensor) -> Taps:
        indexes = self.indexes[part]
        first, last = int(indexes.min()), int(indexes.max())
        return Taps(
            self.first + first,
            self.first + last + 1,
            indexes - first,
            offsets,
            self.weights[part],
        )


def _cropped_taps(source: int, ratio: float, rules: Preprocessing) -> Taps:
    # fast.ai 0.7: sides are floored, never below the short side, and the crop's start is ceiled.
    scaled = max(math.floor(source * ratio), rules.short_side)
    start = math.ceil((scaled - rules.crop) / 2)
    return taps(source, scaled, start, start + rules.crop)


@functools.lru_cache(maxsize=64)
def taps(source: int, scaled: int, start: int, stop: int) -> Taps:
    """Return the taps for outputs ``start`` to ``stop`` of ``source`` rows scaled to ``scaled``."""
    rule = _area if scaled <= source else _linear
    rows, weights = rule(torch.arange(start, stop), source, scaled)
    used = weights > 0
    lengths = used.sum(1)
    indexes = rows[used]
    first, last = int(indexes.min()), int(indexes.max())
    return Taps(
        first, last + 1, indexes - first, lengths.cumsum(0) - lengths, weights[used].float()
    )


def _area(outputs: Tensor, source: int, scaled: int) -> tuple[Tensor, Tensor]:
    # In whole units of 1/scaled of a source row the borders are exact.
    begin, end = outputs * source, (outputs + 1) * source
    most = -(-source // scaled) + 1
    rows = (begin // scaled)[:, None] + torch.arange(most)
    covered = torch.minimum(end[:, None], (rows + 1) * scaled) - torch.maximum(
        begin[:, None], rows * scaled
    )
    # OpenCV leaves out a row of which an output covers no more than a thousandth.
    covered[covered <= 1e-3 * scaled] = 0
    return rows, covered.double() / source


def _linear(outputs: Tensor, source: int, scaled: int) -> tuple[Tensor, Tensor]:
    # OpenCV's INTER_AREA when enlarging, in its own arithmetic: a product that just misses a whole
    # number decides for the row before.
    factor = scaled / source
    below = (outputs.double() * (1 / factor)).long().clamp(max=source - 1)
    fraction = ((outputs + 1) - (below + 1).double() * factor).float().clamp(min=0)
    fraction -= fraction.floor()
    fraction[below == source - 1] = 0  # it has no next row
    return torch.stack([below, below + 1], 1), torch.stack([1 - fraction, fraction], 1)
