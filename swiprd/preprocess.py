"""From RGB pixels to the model's input: scale, crop, normalise, as the bundle's manifest says."""

from __future__ import annotations

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
    pixels = resample(image, columns, rows, rules.resample)
    mean, std = torch.tensor(rules.mean), torch.tensor(rules.std)
    normalised = (pixels / rules.scale - mean) / std
    return normalised.contiguous().permute(2, 0, 1).unsqueeze(0)
