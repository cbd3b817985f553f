"""From RGB pixels to the model's input: scale, crop, normalise, as the bundle's manifest says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from swiprd.bundle import Preprocessing
from swiprd.geometry import plan
from swiprd.resample import resample


def preprocess(image: Image.Image, rules: Preprocessing) -> Tensor:
    """Return the input for ``image``: float32, shape (1, 3, crop, crop), channels last in memory.

    ``image`` has the mode RGB. The work does not grow with the scaled picture, of which only the
    crop is computed: a 1 x 300 picture costs what any other does.
    """
    columns, rows = plan(*image.size, rules)
    # Whole rows at a time: a loop over three channels has nothing for vector instructions.
    mean, std = (
        torch.tensor(of_channels).repeat(rules.crop) for of_channels in (rules.mean, rules.std)
    )
    with _one_thread():
        pixels = resample(image, columns, rows, rules.resample)
        normalised = pixels.flatten(1).div_(rules.scale).sub_(mean).div_(std)
    return normalised.view(rules.crop, rules.crop, 3).permute(2, 0, 1).unsqueeze(0)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone.

    Pieces that fit a cache are soon done: with more threads, they wait longer than they work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which takes less than a microsecond
    try:
        yield
    finally:
        torch.set_num_threads(threads)
