"""The filters that scale a picture, each to the last digit as the system that it comes from.

``area``, ``linear`` and ``grid`` give floats. Each is a weighted sum over rows, then the same
over columns, so one representation serves all three: ``Taps``. The others are pillow's, on bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import struct
from dataclasses import dataclass
from typing import Final, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from swiprd.geometry import Axis

STRIP_BYTES: Final = 2**20
"""Source pixels that are worked on at a time, in bytes; what they are summed to is floats."""
CHANNELS: Final = 4
"""Of a pixel while it is worked on. The fourth has no meaning; pillow keeps pixels so, and four
floats can be moved as one number."""
ROW_END: Final = torch.frombuffer(bytearray(struct.pack("=2f", 1, 0)), dtype=torch.uint8)
"""Ends each row of bytes that torch sums: what they are multiplied by, and what is added then."""
WIDTH_STEP: Final = 64
"""Rows of more pixels are as long as a multiple of this: for each length torch makes machine code,
in half a millisecond, and keeps it."""
MAX_TAPS: Final = 2**16
"""Source rows that are looked at for one piece of the output, about."""
MAX_SCALED: Final = 2**25
"""Pixels of a scaled picture up to which pillow scales it whole."""

PILLOW: Final = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
REACH: Final = 3
"""How far pillow's widest filter reaches, in output pixels, or input pixels when enlarging."""


def resample(image: Image.Image, columns: Axis, rows: Axis, filter: str) -> Tensor:
    """Return what is kept of ``image``: float32, (rows, columns, 3), from 0 to 255.

    Args:
        image: mode RGB.
        columns: what is scaled of the picture's width, to what, and what is kept.
        rows: the same of its height.
        filter: one of ``swiprd.bundle.RESAMPLES``.
    """
    if filter in PILLOW:
        return _by_pillow(image, columns, rows, PILLOW[filter])
    between = _averaged(columns, rows) if filter == "grid" else (0, 0)
    # Rows are summed first. Where a picture is squished, the side that shrinks more must be, or
    # what lies between would be larger than the picture.
    if columns.source * rows.scaled > 2 * rows.source * columns.scaled:
        turned = _by_sums(image, rows, columns, filter, between[::-1], turn=True)
        return turned.transpose(0, 1)
    return _by_sums(image, columns, rows, filter, between, turn=False)


# --- pillow --------------------------------------------------------------------------------------


def _by_pillow(image: Image.Image, columns: Axis, rows: Axis, filter: Image.Resampling) -> Tensor:
    part = image.crop((columns.begin, rows.begin, columns.end, rows.end))
    if columns.scaled * rows.scaled <= MAX_SCALED:
        scaled = part.resize((columns.scaled, rows.scaled), filter)
        kept = scaled.crop((columns.start, rows.start, columns.stop, rows.stop))
    else:
        kept = _window(part, columns, rows, filter)
    pixels = torch.frombuffer(bytearray(kept.tobytes()), dtype=torch.uint8)
    return pixels.view(kept.height, kept.width, 3).float()


def _window(part: Image.Image, columns: Axis, rows: Axis, filter: Image.Resampling) -> Image.Image:
    """Scale a ribbon, whole too large, only as far as it is kept.

    Pillow holds the window's borders in single precision: a value may differ by one.
    """
    spans = [_span(axis) for axis in (columns, rows)]
    (left, right, *across), (top, bottom, *down) = spans
    box = (across[0], down[0], across[1], down[1])
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return part.crop((left, top, right, bottom)).resize(size, filter, box)


def _span(axis: Axis) -> tuple[int, int, float, float]:
    """Return the source pixels that the kept part may look at, and the kept part within them."""
    factor = axis.source / axis.scaled
    reach = math.ceil(REACH * max(factor, 1)) + 1
    begin, end = axis.start * factor, axis.stop * factor
    first = max(math.floor(begin) - reach, 0)
    stop = min(math.ceil(end) + reach, axis.source)
    return first, stop, begin - first, min(end - first, stop - first)


# --- weighted sums -------------------------------------------------------------------------------


def _by_sums(
    image: Image.Image,
    columns: Axis,
    rows: Axis,
    filter: str,
    between: tuple[int, int],
    *,
    turn: bool,
) -> Tensor:
    """Do what ``resample`` does; with ``turn``, to the picture whose columns are these rows."""
    across = _remembered(columns, filter, between[0])
    count = rows.stop - rows.start
    # Made before all else: small results between large pieces would keep the heap from shrinking.
    summed = torch.empty(count, len(across) * CHANNELS)
    done = 0
    for piece in _pieces(rows):
        down = _remembered(piece, filter, between[1])
        for strip in _strips(down, across):
            pixels = _pixels(image, strip, across, turn=turn)
            columns_as_rows = _transposed(strip.sum_bytes(pixels))
            summed[done : done + len(strip)] = _transposed(across.sum(columns_as_rows))
            done += len(strip)
    return summed.view(count, len(across), CHANNELS)[:, :, :3].contiguous()


def _transposed(pixels: Tensor) -> Tensor:
    """Return (rows, columns * 4) as (columns, rows * 4): a pixel is moved as one number."""
    turned = pixels.view(torch.complex128).t()
    # Not contiguous(), which leaves a single row as it is, with strides that cannot be viewed.
    return turned.clone(memory_format=torch.contiguous_format).view(torch.float32)


def _pieces(axis: Axis) -> list[Axis]:
    """Cut what is kept of ``axis`` into parts whose taps are not too many to be in memory."""
    looked_at = (axis.stop - axis.start) * axis.source // axis.scaled
    size = math.ceil((axis.stop - axis.start) / (looked_at // MAX_TAPS + 1))
    return [
        dataclasses.replace(axis, start=start, stop=min(start + size, axis.stop))
        for start in range(axis.start, axis.stop, size)
    ]


def _strips(rows: Taps, columns: Taps) -> list[Taps]:
    """Cut ``rows`` into parts that stay in the processor's cache, before and after the sums."""
    height = max(rows.stop - rows.first, len(rows))
    width = max(_width(columns), len(columns))
    count = math.ceil(height * width * CHANNELS / STRIP_BYTES)
    return rows.split(math.ceil(len(rows) / count))


def _pixels(image: Image.Image, rows: Taps, columns: Taps, *, turn: bool) -> Tensor:
    """Return the part that is looked at: uint8 (rows, bytes), its end ROW_END in each row.

    What lies beyond the picture is black.
    """
    stop = columns.first + _width(columns)
    if turn:
        part = image.crop((rows.first, columns.first, rows.stop, stop))
        part = part.transpose(Image.Transpose.TRANSPOSE)
    else:
        part = image.crop((columns.first, rows.first, stop, rows.stop))
    pixels = torch.frombuffer(bytearray(part.tobytes("raw", "RGBX")), dtype=torch.uint8)
    pixels = pixels.view(part.height, -1)
    pixels[:, -len(ROW_END) :] = ROW_END
    return pixels


def _width(columns: Taps) -> int:
    """Return the length in pixels of the rows that are worked on, with room for ROW_END."""
    needed = columns.stop - columns.first + len(ROW_END) // CHANNELS
    return needed if needed <= WIDTH_STEP else math.ceil(needed / WIDTH_STEP) * WIDTH_STEP


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

    def __len__(self) -> int:
        return len(self.offsets)

    def sum(self, rows: Tensor) -> Tensor:
        """Return the weighted sums: float32 (source rows, n) to (outputs, n)."""
        return functional.embedding_bag(
            self.indexes, rows, self.offsets, mode="sum", per_sample_weights=self.weights
        )

    def sum_bytes(self, rows: Tensor) -> Tensor:
        """Return what ``sum`` would of the bytes as floats, which are never made.

        Args:
            rows: uint8 (source rows, n + 8), each ended by ROW_END.

        Returns:
            float32 (outputs, n).
        """
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            rows, self.indexes, self.offsets, per_sample_weights=self.weights
        )
        return cast(Tensor, sums)

    def split(self, size: int) -> list[Taps]:
        """Return taps for ``size`` outputs at a time, in order."""
        if size >= len(self):
            return [self]
        starts = range(0, len(self), size)
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


def _remembered(axis: Axis, filter: str, between: int) -> Taps:
    """Return the taps, which are made anew only for the few pictures that need many."""
    if axis.source > MAX_TAPS:
        return taps(axis, filter, between=between)
    return _cached(axis, filter, between)


@functools.lru_cache(maxsize=128)
def _cached(axis: Axis, filter: str, between: int) -> Taps:
    return taps(axis, filter, between=between)


def taps(axis: Axis, filter: str, *, between: int = 0) -> Taps:
    """Return the taps that scale ``axis`` and keep what is kept of it.

    Args:
        axis: of one side.
        filter: ``area``, ``linear`` or ``grid``.
        between: with the filter ``grid``, the length to which areas are averaged first.
    """
    outputs = torch.arange(axis.start, axis.stop)
    match filter:
        case "area" if axis.scaled <= axis.source:
            rows, weights = _area(outputs, axis.source, axis.scaled)
        case "area":
            rows, weights = _stretched(outputs, axis.source, axis.scaled)
        case "linear":
            rows, weights = _linear(outputs, axis.source, axis.scaled)
        case _:
            rows, weights = _grid(outputs, axis.source, axis.scaled, between)
    used = weights > 0
    lengths = used.sum(1)
    indexes = rows[used] + axis.begin
    first, last = int(indexes.min()), int(indexes.max())
    return Taps(
        first, last + 1, indexes - first, lengths.cumsum(0) - lengths, weights[used].float()
    )


def _area(outputs: Tensor, source: int, scaled: int) -> tuple[Tensor, Tensor]:
    """Return rows and weights, (outputs, most): the mean of the rows that each output covers.

    Border rows are counted by the fraction covered: OpenCV's INTER_AREA when shrinking.
    """
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


def _stretched(outputs: Tensor, source: int, scaled: int) -> tuple[Tensor, Tensor]:
    """Return the two taps of OpenCV's INTER_AREA when enlarging."""
    # In its own arithmetic: a product that just misses a whole number decides for the row before.
    factor = scaled / source
    below = (outputs.double() * (1 / factor)).long().clamp(max=source - 1)
    fraction = ((outputs + 1) - (below + 1).double() * factor).float().clamp(min=0)
    return _pair(below, fraction - fraction.floor(), source)


def _linear(outputs: Tensor, source: int, scaled: int) -> tuple[Tensor, Tensor]:
    """Return the two taps of OpenCV's INTER_LINEAR, whose pixels are centred; nothing is averaged.

    Positions are rounded to single precision before their fraction is taken, as OpenCV does it.
    """
    position = ((outputs.double() + 0.5) * (source / scaled) - 0.5).float().clamp(0, source - 1)
    return _pair(position.long(), position - position.floor(), source)


def _pair(below: Tensor, fraction: Tensor, source: int) -> tuple[Tensor, Tensor]:
    """Return two neighbouring rows for each output and their weights, the last one's alone."""
    fraction = fraction.masked_fill(below == source - 1, 0)  # it has no next row
    return torch.stack([below, below + 1], 1), torch.stack([1 - fraction, fraction], 1)


def _averaged(columns: Axis, rows: Axis) -> tuple[int, int]:
    """Return to which lengths fast.ai 1 averages areas before it interpolates.

    It leaves about twice the pixels that are wanted, by one factor for both sides
    (vision.image._grid_sample).
    """
    factor = min(rows.source / rows.scaled, columns.source / columns.scaled) / 2
    if factor <= 1:
        return columns.source, rows.source
    # As torch's interpolate computes its output's size from a scale factor.
    return math.floor(columns.source * (1 / factor)), math.floor(rows.source * (1 / factor))


def _grid(outputs: Tensor, source: int, scaled: int, between: int) -> tuple[Tensor, Tensor]:
    """Return rows and weights of torch's adaptive mean followed by its grid_sample.

    The corners are aligned; coordinates are single precision, as they are there.
    """
    if source == scaled:
        return outputs[:, None], torch.ones(len(outputs), 1)
    position = ((_coordinates(outputs, scaled) + 1) * ((between - 1) / 2)).clamp(0, between - 1)
    averages, parts = _pair(position.long(), position - position.floor(), between)
    averages.clamp_(max=between - 1)
    begin = averages * source // between
    end = -(-(averages + 1) * source // between)
    rows = begin[:, :, None] + torch.arange(int((end - begin).max()))
    inside = rows < end[:, :, None]
    weights = inside * (parts / (end - begin))[:, :, None]
    return rows.flatten(1), weights.flatten(1)


def _coordinates(outputs: Tensor, scaled: int) -> Tensor:
    """Return ``torch.linspace(-1, 1, scaled)[outputs]``, however long that would be."""
    if scaled <= MAX_SCALED:
        return torch.linspace(-1, 1, scaled)[outputs]
    return (outputs.double() * (2 / (scaled - 1)) - 1).float()
