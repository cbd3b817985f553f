"""Which part of a picture becomes the input, and how large: whole numbers, no pixels.

Systems round here each in their own way, and one pixel shows in the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swiprd.bundle import Preprocessing


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of a picture on its way to the input, in pixels.

    Attributes:
        begin, end: the part of the picture's side that is scaled.
        scaled: how long that part becomes.
        start, stop: the part of ``scaled`` that is kept.
    """

    begin: int
    end: int
    scaled: int
    start: int
    stop: int

    @property
    def source(self) -> int:
        """Pixels that are scaled."""
        return self.end - self.begin


def plan(width: int, height: int, rules: Preprocessing) -> tuple[Axis, Axis]:
    """Return columns and rows of a picture of ``width`` x ``height``, each at least 1."""
    side = rules.short_side
    if rules.fit == "squish":
        return _cropped(0, width, side, rules), _cropped(0, height, side, rules)
    if rules.fit == "square":
        square = _square(min(width, height), side)
        left, top = int(0.5 * (width - square)), int(0.5 * (height - square))
        return _cropped(left, square, side, rules), _cropped(top, square, side, rules)
    shorter = min(width, height)
    return (
        _cropped(0, width, _scaled(width, shorter, rules), rules),
        _cropped(0, height, _scaled(height, shorter, rules), rules),
    )


def _square(shorter: int, side: int) -> int:
    # fast.ai 2.8, vision.augment.Resize: the quotient is rounded, so that the product may miss a
    # whole number.
    return max(int(shorter / side * side), 1)


def _scaled(length: int, shorter: int, rules: Preprocessing) -> int:
    side = rules.short_side
    if length == shorter:
        return side
    match rules.rounding:
        case "floor":  # fast.ai 0.7, transforms.scale_min
            scaled = math.floor(length * (side / shorter))
        case "round":  # fast.ai 1.0, vision.image._get_resize_target
            scaled = round(length / (shorter / side))
        case _:  # torchvision, transforms.functional._compute_resized_output_size
            scaled = int(side * length / shorter)
    return max(scaled, side)


def _cropped(begin: int, source: int, scaled: int, rules: Preprocessing) -> Axis:
    spare = scaled - rules.crop
    # Python's round() takes a half to the even neighbour, as torchvision's center_crop does.
    start = round(spare / 2) if rules.crop_start == "even" else math.ceil(spare / 2)
    return Axis(begin, begin + source, scaled, start, start + rules.crop)
