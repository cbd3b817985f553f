"""swiprd compile: make a bundle's compiled form for this host, and keep it if it is right."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from swiprctl.protocol import SwiprError
from swiprd.bundle import Bundle, read_bundle
from swiprd.commands.output import (
    MAX_PIXELS,
    Commands,
    add_cache_flags,
    add_command,
    form_cache,
    progress,
    read_picture,
)
from swiprd.compiled import PRECISIONS, Form
from swiprd.compiler import CompileError, check_compiler, compile_network, workspace
from swiprd.engines import Engine, compiled, eager
from swiprd.model import TOLERANCES, Model, difference
from swiprd.network import build_network

MOST_RUNS: Final = 25
MEASURE_SECONDS: Final = 10.0
SLOWER: Final = 0.95
"""Speed, against eager, below which a compiled form has no use; less than 1 for a noisy machine."""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compile",
        "compile a bundle for this machine; the daemon takes the result from its next worker on",
    )
    parser.set_defaults(run=_compile)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="*", help="more pictures whose scores must not drift"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="bf16 is faster where the processor has it; scores may differ by"
        f" {TOLERANCES['bf16']:g} [%(default)s]",
    )
    add_cache_flags(parser)


def _compile(args: argparse.Namespace) -> None:
    bundle = read_bundle(args.bundle)
    forms = form_cache(args)
    if forms is None:
        raise CompileError("there is no place for compiled forms; name one with --cache-dir")
    if args.precision == "bf16" and not forms.host.computes_bf16:
        raise CompileError(
            "this processor does not compute in bf16, for which it needs avx512_bf16 or amx_bf16;"
            " fp32 is faster here"
        )
    forms.prepare()
    torch.set_num_threads(forms.host.threads)
    with workspace() as folder:
        reference = eager(bundle)
        model = Model(bundle, reference, max_pixels=MAX_PIXELS)
        model.check_golden()
        pictures = _pictures(bundle, model, args.images)
        check_compiler()
        threads = "one thread" if forms.host.threads == 1 else f"{forms.host.threads} threads"
        with progress("compile", f"compiling in {args.precision} for {threads}, about a minute"):
            library = compile_network(
                build_network(bundle), bundle.manifest.preprocessing.crop, args.precision, folder
            )
        engine = compiled(Form(library, args.precision))
        with progress("compile", "comparing"):
            drift = _drift(bundle, reference, engine, pictures)
            speed = _speed(bundle, reference, engine, pictures[0])
        print(speed.words)
        print(_drift_words(drift, len(bundle.manifest.golden), len(args.images), args.precision))
        _refuse_useless(drift, speed, args.precision)
        form = forms.keep(library, bundle.digest, args.precision)
    print(f"kept as {form.path}, {os.stat(form.path).st_size / 1e6:.1f} MB", flush=True)


def _pictures(bundle: Bundle, model: Model, paths: Sequence[str]) -> list[bytes]:
    """Return the golden pictures' bytes, then those of the files at ``paths``, which must do."""
    found = [bytes(bundle.tensors[golden.image].data) for golden in bundle.manifest.golden]
    for path in paths:
        found.append(read_picture(path))
        try:
            model.compute(found[-1])
        except SwiprError as error:
            raise CompileError(f"{path}: {error}") from None
    return found


# --- what is asked of it -------------------------------------------------------------------------


def _drift(bundle: Bundle, before: Engine, after: Engine, pictures: Sequence[bytes]) -> float:
    """Return the largest difference of any score."""
    models = [Model(bundle, engine, max_pixels=MAX_PIXELS) for engine in (before, after)]
    return max(
        difference(*(model.compute(picture) for model in reversed(models))) for picture in pictures
    )


class _Speed:
    """Median seconds of one forward pass, of both engines in turn."""

    def __init__(self, before: Engine, after: Engine, x: Tensor) -> None:
        self._engines = (before, after)
        seconds: tuple[list[float], list[float]] = ([], [])
        with torch.inference_mode():
            for engine in self._engines:
                engine.run(x)  # what is done once
            deadline = time.perf_counter() + MEASURE_SECONDS
            while len(seconds[0]) < MOST_RUNS and time.perf_counter() < deadline:
                for engine, taken in zip(self._engines, seconds, strict=True):
                    began = time.perf_counter()
                    engine.run(x)
                    taken.append(time.perf_counter() - began)
        self.before, self.after = map(statistics.median, seconds)

    @property
    def ratio(self) -> float:
        """How many times as fast the second is."""
        return self.before / self.after

    @property
    def words(self) -> str:
        """One line for people."""
        times = ", ".join(
            f"{engine.name} {engine.precision} {seconds * 1000:.1f} ms"
            for engine, seconds in zip(self._engines, (self.before, self.after), strict=True)
        )
        return f"{times}: {self.ratio:.2f} times as fast"


def _speed(bundle: Bundle, before: Engine, after: Engine, picture: bytes) -> _Speed:
    model = Model(bundle, before, max_pixels=MAX_PIXELS)
    return _Speed(before, after, model.prepare(model.decode(picture)))


def _drift_words(drift: float, golden: int, given: int, precision: str) -> str:
    return (
        f"largest difference of a score {drift:.2g}, over {golden} golden pictures and {given}"
        f" given; at most {TOLERANCES[precision]:g}"
    )


def _refuse_useless(drift: float, speed: _Speed, precision: str) -> None:
    if not drift <= TOLERANCES[precision]:
        raise CompileError(
            f"not kept: a score differs by {drift:.2g}, expected at most {TOLERANCES[precision]:g}"
            + ("; use fp32" if precision == "bf16" else "")
        )
    if speed.ratio < SLOWER:
        raise CompileError(f"not kept: it is slower than torch itself here ({speed.words})")
