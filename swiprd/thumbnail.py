"""A small copy of a picture, for people to look at."""

from __future__ import annotations

import base64
import io
from typing import Final

from PIL import Image

from swiprctl.protocol import Thumbnail

QUALITY: Final = 80
"""Of the JPEG: at 160 pixels some 5 KB, with no blocks to be seen."""


def make_thumbnail(picture: Image.Image, side: int) -> Thumbnail:
    """Return a copy of ``picture``, mode RGB, that has at most ``side`` pixels on a side."""
    scale = min(1.0, side / max(picture.size))
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    # In two steps, of which the first takes the mean of whole pixels: large pictures are slow else.
    small = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return Thumbnail(base64.b64encode(file.getvalue()).decode("ascii"), width, height)
