"""Which model some weights are: the system that wrote them, the architecture, the head.

All of it is told by the names and the shapes of the tensors. Several architectures may have the
same names; no two of them have the same shapes too.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from swiprd.architectures import (
    RESNEXT101_32X4D,
    Shapes,
    build,
    features,
    input_side,
    last_layer,
    torchvision_families,
    torchvision_models,
    torchvision_names,
)
from swiprd.bundle import BundleError, Preprocessing
from swiprd.checkpoint import CheckpointError
from swiprd.fastai import (
    FASTAI_1,
    Learner,
    keeps_own_pool,
    read_head,
    read_learner,
    unnormalised_habit,
)
from swiprd.network import assemble

COUNTER: Final = ".num_batches_tracked"
"""What batch norms count in training; older files lack it."""
AUXILIARY: Final = re.compile(r"(aux1|aux2|AuxLogits)\.")
"""Outputs of GoogLeNet and Inception that serve training alone."""
TRANSFORMING: Final = ("googlenet", "inception_v3")
"""Architectures that normalise once more, by 0.5 and 0.5 in the end, with transform_input, which
torchvision sets where it loads published weights."""
OLD_DENSENET: Final = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..+)")
"""Names that torchvision gave before 0.2.2, and still takes."""
SHOWN: Final = 3
"""Names of tensors that are shown of a file that is not recognised."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a checkpoint turned out to be.

    Attributes:
        system: what wrote it.
        architecture: a name that ``swiprd.architectures`` knows.
        head: as in ``swiprd.bundle.Manifest``.
        classes: how many outputs there are.
        preprocessing: what that system does with a picture unless it is told otherwise.
        tensors: the weights under the bundle's names.
        doubt: a habit of the system for which ``preprocessing`` may be wrong; None: there is none.
    """

    system: str
    architecture: str
    head: tuple[str, ...] | None
    classes: int
    preprocessing: Preprocessing
    tensors: dict[str, Tensor]
    doubt: str | None


def recognise(tensors: Mapping[str, Tensor], *, architecture: str | None = None) -> Recognised:
    """Return what the checkpoint with these tensors is.

    Args:
        tensors: the weights by the names that their system gave them.
        architecture: the only one to look for; None: all that are known.

    Raises:
        CheckpointError: it is none that can be served; the message says what was found.
    """
    if architecture is not None and architecture not in torchvision_names():
        raise CheckpointError(
            f"no architecture {architecture!r:.80} is known, expected one of"
            f" {', '.join(torchvision_names())}"
        )
    learner = read_learner(tensors)
    if learner is not None:
        return _recognise_learner(learner, architecture)
    return _recognise_whole(tensors, architecture)


def check_together(found: Recognised, side: int) -> None:
    """Let a network without memory compute once: its parts may fit one by one, and not together.

    Args:
        found: what ``recognise`` returned.
        side: of the input, in pixels.

    Raises:
        CheckpointError: they do not, or not with such an input.
    """
    if found.classes < 1:
        raise CheckpointError("its last layer has no outputs")
    weights = {
        name: tensor.to("meta", torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in found.tensors.items()
    }
    try:
        network = assemble(found.architecture, found.head, weights)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    outputs = _compute_without_memory(network, side)
    if outputs.shape != (1, found.classes):
        raise CheckpointError(f"it gives outputs of shape {tuple(outputs.shape)}, expected a row")


# --- fast.ai -------------------------------------------------------------------------------------


def _recognise_learner(learner: Learner, architecture: str | None) -> Recognised:
    shapes = _shapes(learner.body)
    for name in _candidates(architecture, _numbered_shapes, shapes):
        network = build(name, shapes)
        if _numbered_shapes(network) != shapes:
            continue
        names = [child for child, _ in features(network)]
        body = {_unnumbered(key, names): tensor for key, tensor in learner.body.items()}
        layers, head = read_head(
            learner.head,
            _count_features(network),
            own_pool=keeps_own_pool(learner.generation, name),
        )
        last = f"head.{max(i for i, layer in enumerate(layers) if layer == 'linear')}.weight"
        return Recognised(
            system=learner.generation,
            architecture=name,
            head=layers,
            classes=head[last].shape[0],
            preprocessing=learner.preprocessing,
            tensors=body | head,
            doubt=unnormalised_habit(learner.generation, name),
        )
    raise CheckpointError(
        f"it is of {learner.generation}, but its body is {_not(architecture)}: it begins with"
        f" {_beginning(learner.body)}; fast.ai's own xresnet cannot be served;"
        f" {_known(architecture)}"
    )


def _numbered_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the body's tensors by names that begin with a child's number."""
    return _shapes(
        {
            f"{number}.{key}": tensor
            for number, (_, child) in enumerate(features(network))
            for key, tensor in child.state_dict().items()
        }
    )


def _unnumbered(key: str, names: list[str]) -> str:
    number, _, rest = key.partition(".")
    return f"{names[int(number)]}.{rest}"


def _count_features(network: nn.Module) -> int:
    body = nn.Sequential(*(child for _, child in features(network)))
    return int(_compute_without_memory(body, 224).shape[1])


def _compute_without_memory(network: nn.Module, side: int) -> Tensor:
    try:
        outputs: Tensor = network.to("meta")(torch.empty(1, 3, side, side, device="meta"))
    except Exception as error:  # whatever a layer thinks of an input that is not its own
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"it cannot compute with an input of {side} x {side} pixels: {problem:.200}"
        ) from None
    return outputs


# --- torchvision ---------------------------------------------------------------------------------


def _recognise_whole(tensors: Mapping[str, Tensor], architecture: str | None) -> Recognised:
    tensors = {
        OLD_DENSENET.sub(r"\1\2", name): tensor
        for name, tensor in tensors.items()
        if not AUXILIARY.match(name)
    }
    shapes = _shapes(tensors)
    for name in _candidates(architecture, _whole_shapes, shapes):
        network = build(name, shapes)
        own = last_layer(network)
        wanted = _whole_shapes(network)
        if _without(own, wanted) == _without(own, shapes):
            last = shapes.get(f"{own}.weight", ())
            if len(last) >= 2:
                return _whole(name, None, last[0], tensors, network)
        child = own.partition(".")[0]
        if _without(child, wanted) == _without(child, shapes):
            linear = _only_linear(child, tensors)
            if linear is not None:
                rest = {k: t for k, t in tensors.items() if not _is_below(child, k)}
                return _whole(
                    name, ("linear",), linear["head.0.weight"].shape[0], rest | linear, network
                )
    raise CheckpointError(
        f"its weights are {_not(architecture)}: it begins with {_beginning(tensors)};"
        f" {_known(architecture)}"
    )


def _whole_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return _shapes(network.state_dict())


def _whole(
    name: str,
    head: tuple[str, ...] | None,
    classes: int,
    tensors: dict[str, Tensor],
    network: nn.Module,
) -> Recognised:
    rules = torchvision_preprocessing(name)
    side = input_side(network)
    if side is not None and side != rules.crop:
        rules = resized(rules, side)
    return Recognised("torchvision", name, head, classes, rules, tensors, _doubt(name))


def _is_below(layer: str, name: str) -> bool:
    return name.startswith(f"{layer}.")


def _without(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not _is_below(layer, name)}


def _only_linear(child: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the Linear that stands in place of a classifier, under a bundle's names.

    It may stand in a Sequential, behind Dropouts, which have no weights.
    """
    found = {name: tensor for name, tensor in tensors.items() if _is_below(child, name)}
    weight = next((name for name, tensor in found.items() if tensor.ndim == 2), None)
    if weight is None or not weight.endswith(".weight"):
        return None
    layer = weight.removesuffix(".weight")
    if found.keys() - {weight, f"{layer}.bias"}:
        return None
    return {f"head.0.{name.removeprefix(f'{layer}.')}": tensor for name, tensor in found.items()}


def torchvision_preprocessing(architecture: str) -> Preprocessing:
    """Return what torchvision does with a picture for the first weights that it published.

    Its transforms work on pillow's pictures, opened without regard to EXIF
    (torchvision.transforms._presets.ImageClassification, datasets.folder.pil_loader).
    """
    if architecture == RESNEXT101_32X4D:  # for which there are none
        architecture = "resnext101_32x8d"
    transforms = next(iter(torchvision_models().get_model_weights(architecture))).transforms()
    rules = dataclasses.replace(
        FASTAI_1,
        rounding="truncate",
        resample=transforms.interpolation.value,
        short_side=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        crop_start="even",
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    if architecture in TRANSFORMING:
        return dataclasses.replace(rules, mean=(0.5,) * 3, std=(0.5,) * 3)
    return rules


def _doubt(architecture: str) -> str | None:
    if architecture not in TRANSFORMING:
        return None
    return (
        f"torchvision's {architecture} changes ImageNet's normalisation to this one when it begins"
        " with published weights; if yours did not, import again with --mean 0.485,0.456,0.406"
        " --std 0.229,0.224,0.225"
    )


def resized(rules: Preprocessing, crop: int) -> Preprocessing:
    """Return ``rules`` for another size, the shorter side in proportion."""
    return dataclasses.replace(
        rules, crop=crop, short_side=round(crop * rules.short_side / rules.crop)
    )


# --- both ----------------------------------------------------------------------------------------


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(COUNTER)
    }


def _candidates(
    architecture: str | None, shapes_of: Callable[[nn.Module], Shapes], shapes: Shapes
) -> Iterator[str]:
    """Yield the architectures that are worth building.

    In a family all begin with a tensor of the same name, so one of them speaks for the others.
    """
    if architecture is not None:
        yield architecture
        return
    for first, family in _first_names(shapes_of):
        if first in shapes:
            yield from family


@functools.cache
def _first_names(shapes_of: Callable[[nn.Module], Shapes]) -> list[tuple[str, list[str]]]:
    return [
        (next(iter(shapes_of(build(family[0], {})))), family) for family in torchvision_families()
    ]


def _beginning(tensors: Mapping[str, Tensor]) -> str:
    shown = [f"{name:.60} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    return ", ".join(shown[:SHOWN]) + (", …" if len(shown) > SHOWN else "")


def _not(architecture: str | None) -> str:
    return "of no known architecture" if architecture is None else f"not those of {architecture}"


def _known(architecture: str | None) -> str:
    if architecture is not None:
        return "leave out --arch to have all tried"
    return f"known are {', '.join(torchvision_names())}"
