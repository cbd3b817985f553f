"""What the names in a fast.ai 0.7 checkpoint mean, and what fast.ai did with a picture.

fast.ai 0.7 numbers the layers of its models. In the bundle the body has torchvision's names, and
what fast.ai put in place of torchvision's last layer is ``head.0``, ``head.1`` and so on.
Architecture and head are recognised from names and shapes alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from swiprd.bundle import Preprocessing
from swiprd.checkpoint import CheckpointError
from swiprd.network import RESNETS

GENERATION: Final = "fast.ai 0.7"
PREPROCESSING: Final = Preprocessing(
    formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF"),  # OpenCV, which fast.ai read with, knew no GIF
    orientation="jpeg",
    truncated=True,
    resample="area",
    short_side=224,
    crop=224,
    scale=255.0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
"""fast.ai 0.7's transforms for validation, tfms_from_model with sz=224."""

_FIRST_HEAD_LAYER: Final = 8
_RESNEXT: Final = {  # a block of fast.ai's own resnext: our name for its parts
    "0.0.0.0": "conv1",  # noqa: S104 - no address
    "0.0.0.1": "bn1",
    "0.0.0.3": "conv2",
    "0.0.0.4": "bn2",
    "0.0.1": "conv3",
    "0.0.2": "bn3",
    "0.1.0": "downsample.0",
    "0.1.1": "downsample.1",
}
_BODY: Final = re.compile(r"([4-7])\.(\d+)\.(.+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a checkpoint turned out to be.

    Attributes:
        generation: the system that wrote it.
        architecture: of the body, a key of ``swiprd.network.RESNETS``.
        head: layers of the head, as in ``swiprd.bundle.Manifest``.
        classes: how many scores there are.
        tensors: the weights under the bundle's names.
    """

    generation: str
    architecture: str
    head: tuple[str, ...]
    classes: int
    tensors: dict[str, Tensor]


def recognise(tensors: Mapping[str, Tensor]) -> Recognised:
    """Return what the checkpoint with these tensors is.

    Raises:
        CheckpointError: it is none of fast.ai 0.7, or none that can be served.
    """
    if "0.weight" not in tensors or not any(name.startswith("4.0.") for name in tensors):
        if all(name.split(".")[0].isdigit() for name in tensors):
            raise CheckpointError(
                "it holds a head without its body, as fast.ai 0.7 saves with precompute=True; set"
                " learn.precompute = False and save again"
            )
        names = ", ".join(list(tensors)[:3])
        raise CheckpointError(f"expected the layers of fast.ai 0.7, got {names}, …")
    numbered = {name: tensor for name, tensor in tensors.items() if name.split(".")[0].isdigit()}
    renamed = {_body_name(name): tensor for name, tensor in numbered.items() if not _in_head(name)}
    head, head_tensors = _head({k: v for k, v in numbered.items() if _in_head(k)})
    return Recognised(
        generation=GENERATION,
        architecture=_architecture(renamed),
        head=head,
        classes=head_tensors[f"head.{len(head) - 1}.weight"].shape[0],
        tensors=renamed | head_tensors,
    )


def _in_head(name: str) -> bool:
    return int(name.split(".")[0]) >= _FIRST_HEAD_LAYER


def _body_name(name: str) -> str:
    top, _, rest = name.partition(".")
    if top == "0":
        return f"conv1.{rest}"
    if top == "1":
        return f"bn1.{rest}"
    found = _BODY.fullmatch(name)
    if found is None:
        raise CheckpointError(f"expected a layer of a ResNet or ResNeXt, got {name!r:.80}")
    layer, block, part, field = found.groups()
    return f"layer{int(layer) - 3}.{block}.{_RESNEXT.get(part, part)}.{field}"


def _architecture(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the body with these tensors, by its blocks and its second convolution."""
    blocks = Counter(
        name.split(".")[0]
        for name in tensors
        if re.fullmatch(r"layer[1-4]\.\d+\.conv1\.weight", name)
    )
    layers = tuple(blocks[f"layer{number}"] for number in (1, 2, 3, 4))
    kind = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic"
    second = tensors.get("layer1.0.conv2.weight")
    shape = tuple(second.shape[:2]) if second is not None else ()
    for name, (its_kind, its_layers, groups, width) in RESNETS.items():
        channels = groups * width
        if (kind, layers, shape) == (its_kind, its_layers, (channels, channels // groups)):
            return name
    raise CheckpointError(
        f"a body of {kind} blocks {layers} with second convolutions {shape} is not known, expected"
        f" one of {', '.join(RESNETS)}"
    )


def _head(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the layers of the head and their weights under our names.

    Dropout and activations have no weights, and dropout is left out where its p is 0, so that the
    numbers shift: what counts is the order and the kind of the layers that have weights. There is a
    ReLU after each Linear but the last (fast.ai 0.7, ConvnetBuilder.get_fc_layers).
    """
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    layers = ["concat_pool"]
    renamed: dict[str, Tensor] = {}
    for number in numbers:
        fields = {
            name.split(".", 1)[1]: tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{number}.")
        }
        weight = fields.get("weight")
        if weight is None:
            raise CheckpointError(f"layer {number} of the head has no weight")
        if weight.ndim == 2:
            kind = "linear"
        elif "running_mean" in fields:
            kind = "batch_norm"
        else:
            raise CheckpointError(f"layer {number} of the head is neither Linear nor BatchNorm")
        if layers[-1] == "linear":
            layers.append("relu")
        renamed |= {f"head.{len(layers)}.{field}": tensor for field, tensor in fields.items()}
        layers.append(kind)
    if layers[-1] != "linear":
        raise CheckpointError("the head does not end in a Linear layer")
    return tuple(layers), renamed
