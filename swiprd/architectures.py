"""The architectures that can be built: ours, and all classifiers of torchvision.

Networks are built without memory for their weights, which come from a file. Torchvision is imported
only when one of its own is asked for: that takes seconds.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swiprd.bundle import MAX_SIDE
from swiprd.efficientnet_lite import EfficientNetLite0

OURS: Final[dict[str, Callable[[], nn.Module]]] = {"efficientnet_lite0": EfficientNetLite0}
RESNEXT101_32X4D: Final = "resnext101_32x4d"
"""Which torchvision has the parts for, but no name (Xie et al., "Aggregated Residual
Transformations", section 5)."""
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    # The auxiliary outputs serve training alone.
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
POSITIONS: Final = "encoder.pos_embedding"
"""The tensor of a vision transformer whose length tells for which size it was trained."""
CACHE_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
FEATURES_END: Final = ("avgpool", "classifier", "fc", "head", "heads")
"""Children with which torchvision's architectures go on after their last feature map."""
FILLERS: Final = frozenset(
    {
        Tensor.fill_,
        Tensor.normal_,
        Tensor.uniform_,
        Tensor.zero_,
        nn.init.constant_,
        nn.init.kaiming_uniform_,
        nn.init.normal_,
        nn.init.uniform_,
    }
)
"""What gives new layers of torch and torchvision their first weights. Where one of
``nn.init`` is called, the tensor's own, which it calls, are not seen."""

Shapes = Mapping[str, Sequence[int]]
"""The shape of each tensor, by its name in a state_dict."""


def architecture_names() -> tuple[str, ...]:
    """Return the names of all that can be built."""
    return (*OURS, *torchvision_names())


def torchvision_models() -> Any:
    """Return the module ``torchvision.models``."""
    # It imports torch's compiler, which makes a folder for itself in /tmp, by a name that others
    # know and may have taken. Nothing is compiled here: what is told is there, and stays empty.
    os.environ.setdefault(CACHE_VARIABLE, "/")
    from torchvision import models

    return models


def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's architectures, and of the one that it has the parts for."""
    models = torchvision_models()
    return (*models.list_models(module=models), RESNEXT101_32X4D)


def torchvision_families() -> list[list[str]]:
    """Return torchvision's names in groups, whose members differ in little but depth and width."""
    models = torchvision_models()
    found: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        found.setdefault(models.get_model_builder(name).__module__, []).append(name)
    found[models.resnet.__name__].append(RESNEXT101_32X4D)
    return list(found.values())


class UnknownArchitectureError(ValueError):
    """There is no such architecture; the message lists those that there are."""


def build(name: str, shapes: Shapes) -> nn.Module:
    """Return the network ``name``, in evaluation mode, its larger tensors without memory.

    Args:
        name: one of ``architecture_names()``.
        shapes: of the weights that it is meant for; what varies within an architecture, as the
            input's size, is taken from them.

    Raises:
        UnknownArchitectureError: there is no such architecture.
    """
    with WithoutMemory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the way in which weights would be initialised
        return _make(name, shapes).eval()


def _make(name: str, shapes: Shapes) -> nn.Module:
    if name in OURS:
        return OURS[name]()
    models = torchvision_models()
    if name == RESNEXT101_32X4D:
        block = models.resnet.Bottleneck
        resnext: nn.Module = models.ResNet(block, [3, 4, 23, 3], groups=32, width_per_group=4)
        return resnext
    if name not in models.list_models(module=models):
        raise UnknownArchitectureError(
            f"no architecture {name!r:.80} is known, expected one of"
            f" {', '.join(architecture_names())}"
        )
    network: nn.Module = models.get_model(name, **OPTIONS.get(name, {}))
    if isinstance(network, models.VisionTransformer) and POSITIONS in shapes:
        length = shapes[POSITIONS][1] if len(shapes[POSITIONS]) == 3 else 0
        side = math.isqrt(max(length - 1, 0)) * network.patch_size
        if 0 < side <= MAX_SIDE:
            network = models.get_model(name, image_size=side)
    return network


def input_side(network: nn.Module) -> int | None:
    """Return the only size, pixels a side, that ``network`` takes; None: it takes many."""
    side = getattr(network, "image_size", None)
    return side if isinstance(side, int) else None


class WithoutMemory(TorchFunctionMode):
    """Within it, layers are made without memory for their weights.

    Not so under ``torch.device("meta")`` alone, where some architectures cannot compute their own
    widths. Nor are such weights filled with numbers, which takes two thirds of the time: of
    recognising an EfficientNet-B7 2.8 of 4.1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif func in FILLERS:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def last_layer(network: nn.Module) -> str:
    """Return the name of the layer that gives the outputs: a Linear, or a Conv2d of 1 x 1."""
    layers = (n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    name: str = list(layers)[-1]
    return name


def set_outputs(network: nn.Module, outputs: int, *, bias: bool) -> None:
    """Give the last layer another width."""
    name = last_layer(network)
    old = network.get_submodule(name)
    with WithoutMemory():
        if isinstance(old, nn.Conv2d):
            network.set_submodule(name, nn.Conv2d(old.in_channels, outputs, 1, bias=bias))
        elif isinstance(old, nn.Linear):
            network.set_submodule(name, nn.Linear(old.in_features, outputs, bias=bias))


def features(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children up to the last feature map, by name, in order."""
    for name, child in network.named_children():
        if name in FEATURES_END:
            return
        yield name, child
