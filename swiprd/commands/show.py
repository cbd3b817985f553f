"""swiprd show: what a bundle holds, and whether a compiled form of it is there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping

from swiprd.bundle import Bundle, read_bundle
from swiprd.commands.output import (
    Commands,
    add_cache_flags,
    add_command,
    form_cache,
)
from swiprd.compiled import PRECISIONS, CompiledError, FormCache
from swiprd.log import printable

NO_PARAMETERS = (".running_mean", ".running_var", ".num_batches_tracked")


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "show", "print what a bundle holds")
    parser.set_defaults(run=_show)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_cache_flags(parser)


def _show(args: argparse.Namespace) -> None:
    bundle = read_bundle(args.bundle)
    described = dataclasses.asdict(bundle.manifest) | {
        "digest": bundle.digest,
        "bytes": os.stat(args.bundle).st_size,
        "parameters": _count_parameters(bundle),
        "compiled": _compiled(bundle.digest, form_cache(args)),
    }
    if args.json:
        print(json.dumps(described))
        return
    width = max(map(len, described))
    for key, value in described.items():
        print(f"{key:<{width}}  {_words(value)}")


def _count_parameters(bundle: Bundle) -> int:
    images = {golden.image for golden in bundle.manifest.golden}
    return sum(
        math.prod(tensor.shape)
        for name, tensor in bundle.tensors.items()
        if name not in images and not name.endswith(NO_PARAMETERS)
    )


def _compiled(digest: str, forms: FormCache | None) -> dict[str, str | None]:
    """Return for each precision the library that fits this host, what is wrong with it, or None."""
    found: dict[str, str | None] = {}
    for precision in PRECISIONS:
        try:
            form = None if forms is None else forms.find(digest, precision)
            found[precision] = None if form is None else form.path
        except CompiledError as error:
            found[precision] = f"not usable: {error}"
    return found


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(_words, value))
    return "-" if value is None else printable(str(value))
