"""A bundle brought to life: picture bytes in, scores out. Runs in the worker."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from swiprctl.protocol import SwiprError
from swiprd.bundle import Bundle, BundleError, Manifest
from swiprd.decode import decode
from swiprd.network import build_network, count_outputs
from swiprd.preprocess import preprocess

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
        self._network = build_network(bundle)
        _check_outputs(self._network, bundle.manifest)
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


def _check_outputs(network: nn.Module, manifest: Manifest) -> None:
    count = count_outputs(network)
    if manifest.outputs is None:
        fits = count == len(manifest.labels)
        needed = len(manifest.labels)
    else:
        needed = max(end for ranges in manifest.outputs for _, end in ranges)
        fits = count >= needed
    if not fits:
        raise BundleError(f"the network has {count} outputs, the bundle's labels need {needed}")


def _tuple(scores: tuple[float, ...]) -> str:
    return ",".join(f"{score:.6f}" for score in scores)
