"""From a bundle's architecture, head and weights to a network that is ready to compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from swiprd.architectures import (
    UnknownArchitectureError,
    WithoutMemory,
    build,
    features,
    last_layer,
    set_outputs,
)
from swiprd.bundle import Bundle, BundleError
from swiprd.safetensors import Tensor as StoredTensor

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
POOLS: Final = ("own_pool", "concat_pool", "avg_pool")
HEAD: Final = "head."
"""What the names of the weights of a head begin with."""


def build_network(bundle: Bundle) -> nn.Module:
    """Return the network of ``bundle`` for computing: float32, batch norms folded, channels last.

    Raises:
        BundleError: the architecture is not known, or the weights are not its own, or no numbers.
    """
    images = {golden.image for golden in bundle.manifest.golden}
    state = {name: to_torch(t) for name, t in bundle.tensors.items() if name not in images}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"the bundle's {name!r:.80} holds values that are not finite")
    network = assemble(bundle.manifest.architecture, bundle.manifest.head, state)
    with torch.no_grad():  # not inference_mode, whose tensors cannot be compiled
        _fold_norms(network)
        # Convolutions read pictures fastest with their channels innermost.
        network.to(memory_format=torch.channels_last)
    return network


def assemble(
    architecture: str, head: tuple[str, ...] | None, state: Mapping[str, Tensor]
) -> nn.Module:
    """Return the network with the weights ``state`` as they are, for evaluation.

    Args:
        architecture: a name that ``swiprd.architectures`` knows.
        head: as in ``swiprd.bundle.Manifest``.
        state: all weights by name, of the head as ``head.i.*``.

    Raises:
        BundleError: the architecture is not known, or the weights are not its own.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    try:
        network = build(architecture, shapes)
    except UnknownArchitectureError as error:
        raise BundleError(f"{error}; update swipr") from None
    except (ValueError, RuntimeError, TypeError) as error:  # of a size that it cannot have
        problem = " ".join(str(error).split())
        raise BundleError(f"{architecture} cannot be built: {problem:.200}") from None
    own = last_layer(network)
    weights = dict(state)
    if head is None:
        outputs = next(iter(shapes.get(f"{own}.weight", ())), 0)
        if outputs > 0:
            set_outputs(network, outputs, bias=f"{own}.bias" in shapes)
    elif head[0] in POOLS:
        made = _make_head(head, shapes, own_pool=getattr(network, "avgpool", None))
        network = nn.Sequential(OrderedDict([*features(network), ("head", made)]))
    else:
        child = own.partition(".")[0]
        setattr(network, child, _make_head(head, shapes))
        weights = {_in_child(name, child): tensor for name, tensor in state.items()}
    _load(network, weights)
    return network.eval().requires_grad_(False)


def _in_child(name: str, child: str) -> str:
    return f"{child}.{name.removeprefix(HEAD)}" if name.startswith(HEAD) else name


def _load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    # Its own tensors first, for what torch hangs on them: the versions of the layers' names.
    state = network.state_dict()
    # The counters of training steps may be left out: nothing that is computed here reads them.
    for name in state.keys() - weights.keys():
        if not name.endswith(".num_batches_tracked"):
            del state[name]
    state.update(weights)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise BundleError(f"the weights do not fit: {problem:.300}") from None


class ConcatPool(nn.Module):
    """Largest and mean value of each channel, in this order: (n, c, h, w) to (n, 2c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole picture."""
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


class AvgPool(nn.Module):
    """Mean value of each channel: (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole picture."""
        return x.mean((2, 3))


def _make_head(
    layers: tuple[str, ...],
    shapes: Mapping[str, torch.Size],
    *,
    own_pool: nn.Module | None = None,
) -> nn.Sequential:
    made: list[nn.Module] = []
    with WithoutMemory():
        for index, layer in enumerate(layers):
            shape = tuple(shapes.get(f"{HEAD}{index}.weight", ()))
            wanted = {"batch_norm": 1, "linear": 2}.get(layer)
            if wanted is not None and (len(shape) != wanted or 0 in shape):
                raise BundleError(
                    f"expected '{HEAD}{index}.weight' of {wanted} dimensions, got shape {shape}"
                )
            match layer:
                case "own_pool":
                    made.append(own_pool or nn.Identity())
                case "concat_pool":
                    made.append(ConcatPool())
                case "avg_pool":
                    made.append(AvgPool())
                case "batch_norm":
                    made.append(nn.BatchNorm1d(shape[0]))
                case "linear":
                    bias = f"{HEAD}{index}.bias" in shapes
                    made.append(nn.Linear(shape[-1], shape[0], bias=bias))
                case "relu":
                    made.append(nn.ReLU())
    return nn.Sequential(*made)


def to_torch(stored: StoredTensor) -> Tensor:
    """Return the tensor of a file; numbers that are not whole as float32."""
    dtype = DTYPES[stored.dtype]
    if not stored.data:  # which torch.frombuffer refuses
        return torch.empty(stored.shape, dtype=dtype)
    tensor = torch.frombuffer(stored.data, dtype=dtype).view(stored.shape)
    return tensor.float() if dtype.is_floating_point else tensor


def _fold_norms(module: nn.Module) -> None:
    """Merge each batch norm into the convolution before it.

    Before it means: next to it in a Sequential, or ``conv1`` and ``bn1`` and so on in a block.
    """
    for name, child in list(module.named_children()):
        _fold_norms(child)
        norm = getattr(module, name.replace("conv", "bn"), None)
        if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(child, norm))
            setattr(module, name.replace("conv", "bn"), nn.Identity())
    if not isinstance(module, nn.Sequential):
        return
    layers: list[nn.Module] = []
    for layer in module:
        if layers and isinstance(layer, nn.BatchNorm2d) and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    module._modules = {str(index): layer for index, layer in enumerate(layers)}
