"""What the names in a fast.ai checkpoint mean, and what each fast.ai did with a picture.

A learner is a body, the first children of one of torchvision's architectures, and a head of few
layers. Fast.ai numbers the children and the layers; 0.7 counts on from one to the other, 1 and 2
begin again. Its names are undone here; which architecture the body is, is not known here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from swiprd.bundle import IMAGE_FORMATS, Preprocessing
from swiprd.checkpoint import CheckpointError

GENERATION_0_7: Final = "fast.ai 0.7"
GENERATION_1: Final = "fast.ai 1"
GENERATION_2: Final = "fast.ai 2"

FASTAI_0_7: Final = Preprocessing(
    formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF"),  # OpenCV, which fast.ai read with, knew no GIF
    orientation="jpeg",
    alpha="drop",
    deep="high_byte",
    truncated=True,
    jpeg_margin=0.0,
    fit="short_side",
    short_side=224,
    rounding="floor",
    resample="area",
    crop=224,
    crop_start="ceil",
    scale=255.0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
"""fast.ai 0.7's transforms for validation, tfms_from_model with sz=224."""
FASTAI_1: Final = dataclasses.replace(
    FASTAI_0_7,
    formats=IMAGE_FORMATS,
    orientation="ignore",
    deep="clip",
    truncated=False,
    rounding="round",
    resample="grid",
)
"""fast.ai 1.0's for validation: open_image, then size=224 and imagenet_stats."""
FASTAI_2: Final = dataclasses.replace(FASTAI_1, fit="square", resample="bilinear")
"""fast.ai 2's for validation: PILImage, Resize(224), Normalize."""

NORMALISED_BY_2: Final = re.compile(
    r"resnet(18|34|50|101|152)|squeezenet1_[01]|densenet\d+|vgg\d+_bn|alexnet"
)
"""Pretrained architectures to which fast.ai 2 adds Normalize by itself (vision.learner.model_meta
has their stats)."""
POOLED_BY_1: Final = re.compile(r"vgg\d+_bn|alexnet")
"""Architectures that fast.ai 1 cuts only behind their own pooling, a change at sizes other than 224
(vision.learner.model_meta)."""
_FIRST_HEAD_LAYER: Final = 8  # in 0.7, after the eight children of a ResNet's body
_RESNEXT: Final = {  # a block of 0.7's own resnext: torchvision's name for its parts
    "0.0.0.0": "conv1",  # noqa: S104 - no address
    "0.0.0.1": "bn1",
    "0.0.0.3": "conv2",
    "0.0.0.4": "bn2",
    "0.0.1": "conv3",
    "0.0.2": "bn3",
    "0.1.0": "downsample.0",
    "0.1.1": "downsample.1",
}
_RESNEXT_NAME: Final = re.compile(r"([4-7]\.\d+)\.([\d.]+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Learner:
    """A learner's weights.

    Attributes:
        generation: the system that wrote it.
        preprocessing: what that system did with a picture.
        body: by names that begin with the number of torchvision's child.
        head: by names that begin with the number of a layer, which counts from anywhere.
    """

    generation: str
    preprocessing: Preprocessing
    body: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


def read_learner(tensors: Mapping[str, Tensor]) -> Learner | None:
    """Return the learner with these tensors; None: fast.ai did not give them their names.

    Raises:
        CheckpointError: it is a part of a learner, or its body is of another library.
    """
    if not all(_is_number(name.partition(".")[0]) for name in tensors):
        return None
    if not any(tensor.ndim == 4 for tensor in tensors.values()):
        raise CheckpointError(
            "it holds a head without its body, as fast.ai 0.7 saves with precompute=True; set"
            " learn.precompute = False and save again"
        )
    if any(name.startswith("0.model.") for name in tensors):
        raise CheckpointError(
            "its body is one of timm's, which cannot be served; expected one of torchvision's:"
            " train with vision_learner(dls, resnet50), say"
        )
    if {name.partition(".")[0] for name in tensors} == {"0", "1"}:
        return _read_1_or_2(tensors)
    numbered = "0.weight" in tensors and any(name.startswith("4.0.") for name in tensors)
    return _read_0_7(tensors) if numbered else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 3


def _read_1_or_2(tensors: Mapping[str, Tensor]) -> Learner:
    body = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("0.")}
    head = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("1.")}
    # 2 leaves out the bias of a Linear beside a batch norm; 1 never does (layers.LinBnDrop and
    # layers.bn_drop_lin).
    linears = [name.removesuffix("weight") for name, tensor in head.items() if tensor.ndim == 2]
    if all(f"{name}bias" in head for name in linears):
        return Learner(GENERATION_1, FASTAI_1, body, head)
    return Learner(GENERATION_2, FASTAI_2, body, head)


def _read_0_7(tensors: Mapping[str, Tensor]) -> Learner:
    body, head = {}, {}
    for name, tensor in tensors.items():
        if int(name.partition(".")[0]) >= _FIRST_HEAD_LAYER:
            head[name] = tensor
        else:
            body[_torchvision_name(name)] = tensor
    return Learner(GENERATION_0_7, FASTAI_0_7, body, head)


def _torchvision_name(name: str) -> str:
    found = _RESNEXT_NAME.fullmatch(name)
    if found is None:
        return name
    block, part, field = found.groups()
    return f"{block}.{_RESNEXT.get(part, part)}.{field}"


def keeps_own_pool(generation: str, architecture: str) -> bool:
    """Return whether the system leaves an architecture's own pooling in the body."""
    return generation == GENERATION_1 and POOLED_BY_1.fullmatch(architecture) is not None


def unnormalised_habit(generation: str, architecture: str) -> str | None:
    """Return a warning where the system, left alone, does not normalise; None: it does."""
    if generation != GENERATION_2 or NORMALISED_BY_2.fullmatch(architecture):
        return None
    return (
        f"fast.ai 2 does not normalise pictures for {architecture} unless it is told to; if yours"
        " was not, import again with --mean 0,0,0 --std 1,1,1"
    )


def read_head(
    tensors: Mapping[str, Tensor], features: int, *, own_pool: bool
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the layers of a learner's head and their weights under a bundle's names.

    Dropout and activations have no weights, and dropout is left out where its p is 0, so that the
    numbers shift: what counts is the order and the kind of the layers that have weights. There is
    a ReLU after each Linear but the last (0.7: ConvnetBuilder.get_fc_layers; 1 and 2: create_head).

    Args:
        tensors: the head's, as in ``Learner``.
        features: channels of the body's last feature map.
        own_pool: whether the body ends with the pooling that the architecture has of its own.

    Raises:
        CheckpointError: it is none that fast.ai makes.
    """
    fields: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, field = name.partition(".")
        if not _is_number(layer):
            raise CheckpointError(f"expected a numbered layer in its head, got {name!r:.80}")
        fields.setdefault(int(layer), {})[field] = tensor
    kinds = {number: _kind(number, found) for number, found in sorted(fields.items())}
    last_linear = max((n for n, kind in kinds.items() if kind == "linear"), default=None)
    if last_linear is None:
        raise CheckpointError("its head has no Linear layer")
    layers = ["own_pool"] if own_pool else []
    layers.append(_pool(fields[min(fields)]["weight"].shape[-1], features))
    renamed: dict[str, Tensor] = {}
    for number, kind in kinds.items():
        renamed |= {f"head.{len(layers)}.{key}": t for key, t in fields[number].items()}
        layers.append(kind)
        if kind == "linear" and number != last_linear:
            layers.append("relu")
    return tuple(layers), renamed


def _kind(number: int, fields: Mapping[str, Tensor]) -> str:
    weight = fields.get("weight")
    if weight is not None and weight.ndim == 2 and fields.keys() <= {"weight", "bias"}:
        return "linear"
    if weight is not None and weight.ndim == 1 and "running_mean" in fields:
        return "batch_norm"
    raise CheckpointError(
        f"layer {number} of its head is neither Linear nor BatchNorm; expected a head that fast.ai"
        " makes by itself"
    )


def _pool(inputs: int, features: int) -> str:
    if inputs == 2 * features:
        return "concat_pool"
    if inputs == features:
        return "avg_pool"
    raise CheckpointError(
        f"its head takes {inputs} features, expected {features} or twice as many, as its body gives"
    )
