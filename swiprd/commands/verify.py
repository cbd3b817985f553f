"""swiprd verify: whether this machine gives a bundle's golden answers, on every engine."""

from __future__ import annotations

import argparse
import logging

from swiprd.bundle import read_bundle
from swiprd.commands.output import (
    MAX_PIXELS,
    Commands,
    add_cache_flags,
    add_command,
    form_cache,
)
from swiprd.compiled import PRECISIONS
from swiprd.engines import eager
from swiprd.model import Model, compiled_engines


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "verify", "check that this machine gives the golden answers")
    parser.set_defaults(run=_verify)
    parser.add_argument("bundle", metavar="BUNDLE")
    add_cache_flags(parser)


def _verify(args: argparse.Namespace) -> None:
    logging.basicConfig(format="swiprd verify: %(message)s")  # what is not used, and why
    bundle = read_bundle(args.bundle)
    forms = form_cache(args, to_run=True)
    engines = [eager(bundle)]
    if forms is not None:
        engines += compiled_engines(bundle, forms, PRECISIONS)
    count = len(bundle.manifest.golden)
    for engine in engines:
        Model(bundle, engine, max_pixels=MAX_PIXELS).check_golden()
        print(f"{engine.name} {engine.precision}: {count} of {count} golden answers", flush=True)
