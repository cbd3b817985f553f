"""A bundle brought to life: picture bytes in, scores out. Runs in the worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from swiprctl.protocol import SwiprError
from swiprd.bundle import Bundle, BundleError
from swiprd.bundle import Tensor as StoredTensor
from swiprd.decode import decode
from swiprd.efficientnet_lite import EfficientNetLite0
from swiprd.preprocess import preprocess

ARCHITECTURES: Final[dict[str, Callable[[], nn.Module]]] = {
    "efficientnet_lite0": EfficientNetLite0,
}
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
GOLDEN_TOLERANCE: Final = 1e-4
"""Largest difference from a golden score; between processors fp32 differs by a hundredth of it."""


class Model:
    """A model that is ready to score, one picture at a time.

    One picture, one forward pass: the same bytes give the same scores, whatever else goes on.

    Attributes:
        labels: names of the scores, in order.
        digest: the bundle's digest.
        engine: what computes, as ``status`` reports it.
        precision: of the computation.
    """

    engine = "eager"
    precision = "fp32"

    def __init__(self, bundle: Bundle, *, max_pixels: int) -> None:
        """Build the network of ``bundle``.

        Raises:
            BundleError: the architecture is not known, or the weights are not its own.
        """
        self._manifest = bundle.manifest
        self._max_pixels = max_pixels
        self._network = _build(bundle)
        self._golden = [
            (bytes(bundle.tensors[golden.image].data), golden.scores)
            for golden in bundle.manifest.golden
        ]
        self.labels = bundle.manifest.labels
        self.digest = bundle.digest

    def compute(self, data: bytes) -> tuple[float, ...]:
        """Return one score per label for the picture in ``data``, an image file's bytes.

        Raises:
            SwiprError: ``not_an_image``, ``too_many_pixels``, or ``internal`` where the network
                gives no finite answer.
        """
        rules = self._manifest.preprocessing
        image = decode(data, rules, max_pixels=self._max_pixels)
        with torch.inference_mode():
            outputs = self._network(preprocess(image, rules))[0]
            scores = self._scores(outputs)
        if not all(map(math.isfinite, scores)):
            raise SwiprError("internal", "the model gave no finite scores for this picture")
        return scores

    def check_golden(self) -> None:
        """Score the bundle's golden pictures and compare.

        Raises:
            BundleError: a score is off by more than ``GOLDEN_TOLERANCE``.
        """
        for index, (data, expected) in enumerate(self._golden):
            try:
                got = self.compute(data)
            except SwiprError as error:
                raise BundleError(f"golden picture {index} cannot be scored: {error}") from None
            off = max(abs(a - b) for a, b in zip(got, expected, strict=True))
            if off > GOLDEN_TOLERANCE:
                raise BundleError(
                    f"golden picture {index} scores {_tuple(got)}, expected {_tuple(expected)}"
                    f" within {GOLDEN_TOLERANCE:g}: the weights are damaged, or this machine"
                    " computes wrongly"
                )

    def _scores(self, outputs: Tensor) -> tuple[float, ...]:
        activated = outputs.float().softmax(0)
        if self._manifest.outputs is None:
            return tuple(activated.tolist())
        summable = activated.double()
        return tuple(
            sum(float(summable[begin:end].sum()) for begin, end in ranges)
            for ranges in self._manifest.outputs
        )


def _build(bundle: Bundle) -> nn.Module:
    manifest = bundle.manifest
    make = ARCHITECTURES.get(manifest.architecture)
    if make is None:
        raise BundleError(
            f"the bundle's architecture {manifest.architecture!r} is not known, expected one of"
            f" {', '.join(ARCHITECTURES)}; update swipr"
        )
    with torch.device("meta"):  # no memory and no random numbers for weights that come from a file
        network = make()
    images = {golden.image for golden in manifest.golden}
    state = {
        name: _to_torch(tensor) for name, tensor in bundle.tensors.items() if name not in images
    }
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
    network.eval()
    with torch.inference_mode():
        _fold_norms(network)
        # Convolutions read pictures fastest with their channels innermost.
        network.to(memory_format=torch.channels_last)
    count = _count_outputs(network)
    needed = (
        len(manifest.labels)
        if manifest.outputs is None
        else max(end for ranges in manifest.outputs for _, end in ranges)
    )
    if count < needed or (manifest.outputs is None and count != needed):
        raise BundleError(f"the network has {count} outputs, the bundle's labels need {needed}")
    return network


def _to_torch(stored: StoredTensor) -> Tensor:
    dtype = DTYPES[stored.dtype]
    if not stored.data:  # which torch.frombuffer refuses
        return torch.empty(stored.shape, dtype=dtype)
    tensor = torch.frombuffer(stored.data, dtype=dtype).view(stored.shape)
    return tensor.float() if dtype.is_floating_point else tensor


def _fold_norms(module: nn.Module) -> None:
    """Merge each batch norm into the convolution before it, in every Sequential below."""
    for child in module.children():
        _fold_norms(child)
    if not isinstance(module, nn.Sequential):
        return
    layers: list[nn.Module] = []
    for layer in module:
        if layers and isinstance(layer, nn.BatchNorm2d) and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    module._modules = {str(index): layer for index, layer in enumerate(layers)}


def _count_outputs(network: nn.Module) -> int:
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    return last.out_features


def _tuple(scores: tuple[float, ...]) -> str:
    return ",".join(f"{score:.6f}" for score in scores)
