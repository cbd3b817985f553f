"""From a bundle's architecture, head and weights to a network that is ready to compute.

Torchvision is imported only for its own architectures: that takes seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from swiprd.bundle import Bundle, BundleError
from swiprd.bundle import Tensor as StoredTensor
from swiprd.efficientnet_lite import EfficientNetLite0

OURS: Final[dict[str, Callable[[], nn.Module]]] = {"efficientnet_lite0": EfficientNetLite0}
RESNETS: Final = {
    # name: kind of block, blocks in each layer, groups, channels in each group
    "resnet18": ("basic", (2, 2, 2, 2), 1, 64),
    "resnet34": ("basic", (3, 4, 6, 3), 1, 64),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 1, 64),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 1, 64),
    "resnet152": ("bottleneck", (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": ("bottleneck", (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": ("bottleneck", (3, 4, 23, 3), 32, 4),
    "resnext101_64x4d": ("bottleneck", (3, 4, 23, 3), 64, 4),
}
"""He et al., "Deep Residual Learning", table 1; Xie et al., "Aggregated Residual Transformations",
table 1 and section 5: the bodies that are served with a head of their own."""
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


def build_network(bundle: Bundle) -> nn.Module:
    """Return the network of ``bundle`` for computing: float32, batch norms folded, channels last.

    Raises:
        BundleError: the architecture is not known, or the weights are not its own.
    """
    images = {golden.image for golden in bundle.manifest.golden}
    state = {
        name: _to_torch(tensor) for name, tensor in bundle.tensors.items() if name not in images
    }
    with torch.device("meta"):  # no memory and no random numbers for weights that come from a file
        network = _make(bundle.manifest.architecture, bundle.manifest.head, state)
    # The counters of training steps may be left out: nothing that is computed here reads them.
    wanted = network.state_dict()
    for name in wanted.keys() - state.keys():
        if name.endswith(".num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise BundleError(f"the bundle's weights do not fit: {problem:.300}") from None
    network.eval().requires_grad_(False)
    with torch.no_grad():  # not inference_mode, whose tensors cannot be compiled
        _fold_norms(network)
        # Convolutions read pictures fastest with their channels innermost.
        network.to(memory_format=torch.channels_last)
    return network


def count_outputs(network: nn.Module) -> int:
    """Return how many numbers the network's last layer gives."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    return last.out_features


def _make(
    architecture: str, head: tuple[str, ...] | None, state: Mapping[str, Tensor]
) -> nn.Module:
    if architecture in OURS and head is None:
        return OURS[architecture]()
    if architecture in RESNETS and head is not None:
        return _resnet(architecture, _head(head, state))
    known, having = (OURS, "without") if head is None else (RESNETS, "with")
    raise BundleError(
        f"the bundle's architecture {architecture!r}, {having} a head of its own, is not known,"
        f" expected one of {', '.join(known)}; update swipr"
    )


def _resnet(architecture: str, head: nn.Module) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    kind, layers, groups, width = RESNETS[architecture]
    block = BasicBlock if kind == "basic" else Bottleneck
    whole = ResNet(block, list(layers), groups=groups, width_per_group=width)
    body = (part for part in whole.named_children() if part[0] not in ("avgpool", "fc"))
    return nn.Sequential(OrderedDict([*body, ("head", head)]))


class ConcatPool(nn.Module):
    """Largest and mean value of each channel, in this order: (n, c, h, w) to (n, 2c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the whole picture."""
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


def _head(layers: tuple[str, ...], state: Mapping[str, Tensor]) -> nn.Sequential:
    made: list[nn.Module] = []
    for index, layer in enumerate(layers):
        shape = state[f"head.{index}.weight"].shape if f"head.{index}.weight" in state else (1, 1)
        match layer:
            case "concat_pool":
                made.append(ConcatPool())
            case "batch_norm":
                made.append(nn.BatchNorm1d(shape[0]))
            case "linear":
                made.append(nn.Linear(shape[-1], shape[0], bias=f"head.{index}.bias" in state))
            case "relu":
                made.append(nn.ReLU())
    return nn.Sequential(*made)


def _to_torch(stored: StoredTensor) -> Tensor:
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
