"""A bundle brought to life: picture bytes in, scores out. Runs in the worker."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from swiprctl import protocol
from swiprctl.protocol import Result, SwiprError
from swiprd.bundle import Bundle, BundleError
from swiprd.compiled import PRECISIONS, CompiledError, FormCache
from swiprd.decode import decode
from swiprd.engines import Engine, compiled, eager
from swiprd.preprocess import preprocess

log = logging.getLogger("swiprd")

TOLERANCES: Final = {"fp32": 1e-4, "bf16": 0.02}
"""Largest difference from a golden score, by precision; see ``difference``. In fp32 processors
differ by a hundredth of it."""


class Model:
    """A model that is ready to score, one picture at a time.

    One picture, one forward pass: the same bytes give the same scores, whatever else goes on.

    Attributes:
        labels: names of the scores, in order.
        digest: the bundle's digest.
        engine: name of what computes, as ``status`` reports it.
        precision: of the computation.
    """

    def __init__(self, bundle: Bundle, engine: Engine, *, max_pixels: int) -> None:
        """Take ``engine`` for ``bundle``.

        Raises:
            BundleError: the labels are too many or too long for a reply.
        """
        _check_reply_fits(bundle)
        self._manifest = bundle.manifest
        self._max_pixels = max_pixels
        self._run = engine.run
        self._golden = [
            (bytes(bundle.tensors[golden.image].data), golden.scores)
            for golden in bundle.manifest.golden
        ]
        self.labels = bundle.manifest.labels
        self.digest = bundle.digest
        self.engine = engine.name
        self.precision = engine.precision

    def compute(self, data: bytes) -> tuple[float, ...]:
        """Return one score per label for the picture in ``data``, an image file's bytes.

        Raises:
            SwiprError: ``not_an_image``, ``too_many_pixels``, or ``internal`` where the network
                gives no finite answer.
        """
        return self.score(self.prepare(self.decode(data)))

    def decode(self, data: bytes) -> Image.Image:
        """Return the picture in ``data`` as the model sees it, whole.

        Raises:
            SwiprError: ``not_an_image`` or ``too_many_pixels``.
        """
        return decode(data, self._manifest.preprocessing, max_pixels=self._max_pixels)

    def prepare(self, picture: Image.Image) -> Tensor:
        """Return the network's input for ``picture``: float32 (1, 3, crop, crop)."""
        with torch.inference_mode():
            return preprocess(picture, self._manifest.preprocessing)

    def score(self, inputs: Tensor) -> tuple[float, ...]:
        """Return one score per label for what ``prepare`` made of a picture.

        Raises:
            SwiprError: ``internal`` where the network gives no finite answer.
        """
        return self._scores(self._outputs(inputs))

    def check_golden(self) -> None:
        """Score the bundle's golden pictures and compare.

        Raises:
            BundleError: a score is off by more than the precision's tolerance, or there are not as
                many outputs as the labels need.
        """
        tolerance = TOLERANCES[self.precision]
        for index, (data, expected) in enumerate(self._golden):
            try:
                outputs = self._outputs(self.prepare(self.decode(data)))
                self._check_count(len(outputs))
                got = self._scores(outputs)
            except BundleError:
                raise
            except Exception as error:  # whatever a layer thinks of an input that is not its own
                problem = " ".join(str(error).split())
                raise BundleError(
                    f"golden picture {index} cannot be scored: {problem:.300}"
                ) from None
            if not difference(got, expected) <= tolerance:
                raise BundleError(
                    f"golden picture {index} scores {_tuple(got)}, expected {_tuple(expected)}"
                    f" within {tolerance:g}: the weights are damaged, or this machine computes"
                    " wrongly"
                )

    def _outputs(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._run(inputs)[0]

    def _check_count(self, count: int) -> None:
        ranges = self._manifest.outputs
        if ranges is None:
            fits, needed = count == len(self.labels), len(self.labels)
        else:
            needed = max(end for parts in ranges for _, end in parts)
            fits = count >= needed
        if not fits:
            raise BundleError(f"the network has {count} outputs, the bundle's labels need {needed}")

    def _scores(self, outputs: Tensor) -> tuple[float, ...]:
        match self._manifest.activation:
            case "softmax":
                activated = outputs.float().softmax(0)
            case "sigmoid":
                activated = outputs.float().sigmoid()
            case _:
                activated = outputs.float()
        if self._manifest.outputs is None:
            scores = tuple(activated.tolist())
        else:
            summable = activated.double()
            scores = tuple(
                sum(float(summable[begin:end].sum()) for begin, end in ranges)
                for ranges in self._manifest.outputs
            )
        if not all(map(math.isfinite, scores)):
            raise SwiprError("internal", "the model gave no finite scores for this picture")
        return scores


def difference(got: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest difference of any score, relative where a score is larger than 1."""
    pairs = zip(got, expected, strict=True)
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def _check_reply_fits(bundle: Bundle) -> None:
    # The longest id and engine, and numbers with as many digits as there can be.
    longest = -sys.float_info.min
    labels = bundle.manifest.labels
    result = Result(
        scores=(longest,) * len(labels),
        labels=labels,
        model=bundle.digest,
        engine="compiled",
        precision="fp32",
        ms=longest,
        decode_ms=longest,
    )
    size = len(protocol.encode_result("\0" * protocol.MAX_ID_BYTES, result))
    if size > protocol.MAX_LINE:
        raise BundleError(
            f"the bundle has too many or too long labels: a reply would have {size} bytes,"
            f" expected at most {protocol.MAX_LINE}"
        )


def best_model(
    bundle: Bundle, forms: FormCache | None, precision: str, *, max_pixels: int
) -> Model:
    """Return the fastest model of ``bundle`` that is there and gives the golden answers.

    A compiled form that cannot be used costs one line in the log, and never the service.

    Args:
        bundle: as it was read.
        forms: where compiled forms are; None: nowhere.
        precision: ``fp32`` or ``bf16``, or ``auto`` for whatever was compiled, bf16 first. Where
            there is no compiled form, torch computes in fp32.
        max_pixels: of the largest picture that is decoded.

    Raises:
        BundleError: the bundle cannot be served at all.
    """
    if forms is not None:
        wanted = tuple(reversed(PRECISIONS)) if precision == "auto" else (precision,)
        for engine in compiled_engines(bundle, forms, wanted):
            log.debug("the engine is loaded")
            model = Model(bundle, engine, max_pixels=max_pixels)
            try:
                model.check_golden()
            except (BundleError, RuntimeError) as error:
                log.warning("a compiled form is not used: %s", " ".join(str(error).split()))
            else:
                return model
    if precision == "bf16":
        log.warning(
            "no compiled form in bf16 can be used: serving fp32; make one with swiprd compile"
            " --precision bf16"
        )
    engine = eager(bundle)
    log.debug("the engine is loaded")
    model = Model(bundle, engine, max_pixels=max_pixels)
    model.check_golden()
    return model


def compiled_engines(
    bundle: Bundle, forms: FormCache, precisions: Sequence[str]
) -> Iterator[Engine]:
    """Yield the compiled forms of ``bundle`` that can be loaded; the log tells of the others."""
    found = 0
    for precision in precisions:
        try:
            form = forms.find(bundle.digest, precision)
            if form is not None:
                found += 1
                yield compiled(form)
        except CompiledError as error:
            found += 1
            log.warning("a compiled form is not used: %s", error)
    if not found and forms.made_for_others(bundle.digest):
        log.warning(
            "the compiled form in %s is for another torch, processor or number of threads (here"
            " %d); run swiprd compile again",
            forms.folder,
            forms.host.threads,
        )


def _tuple(scores: tuple[float, ...]) -> str:
    return ",".join(f"{score:.6f}" for score in scores)
