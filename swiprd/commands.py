"""What swiprd does with models besides serving them: import, show, verify.

Answers go to standard output, progress and failures to standard error. A command that fails leaves
no file behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from swiprctl.protocol import SwiprError
from swiprd import bundle as bundles
from swiprd.bundle import Bundle, BundleError, Golden, Manifest, read_bundle, write_bundle
from swiprd.checkpoint import CheckpointError, read_checkpoint
from swiprd.fastai import PREPROCESSING, Recognised, recognise
from swiprd.model import Model
from swiprd.network import DTYPES

DONE: Final = 0
FAILED: Final = 1

MAX_PIXELS: Final = 50_000_000
MAX_SIDE: Final = 4096


def run_command(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` begins with and return the exit status."""
    parser = argparse.ArgumentParser(prog="swiprd", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_import(commands)
    _add_show(commands)
    _add_verify(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (BundleError, CheckpointError, SwiprError, OSError) as error:
        print(f"swiprd {argv[0]}: {error}", file=sys.stderr)
        return FAILED
    return DONE


# --- import --------------------------------------------------------------------------------------


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "make a bundle of a fast.ai 0.7 checkpoint (.h5)"
    parser = commands.add_parser("import", help=words, description=words, allow_abbrev=False)
    parser.set_defaults(run=_import)
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint")
    parser.add_argument("-o", "--output", metavar="BUNDLE", required=True, help="file to write")
    parser.add_argument(
        "--labels",
        metavar="A,B,…",
        help="names of the scores, in the order of the classes, which fast.ai sorts by name"
        " (default: 0,1,…)",
    )
    parser.add_argument(
        "--size",
        metavar="N",
        type=_side,
        default=PREPROCESSING.crop,
        help="side of the square that the model was trained on, in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--license", metavar="ID", default="unknown", help="SPDX identifier of the weights' licence"
    )
    parser.add_argument(
        "--check", metavar="IMAGE", nargs="+", default=[], help="print the new bundle's scores"
    )


def _side(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_SIDE):
        raise argparse.ArgumentTypeError(f"expected pixels from 1 to {MAX_SIDE}, got {text!r}")
    return int(text)


def _import(args: argparse.Namespace) -> None:
    tensors = read_checkpoint(args.source)
    try:
        found = recognise(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{args.source}: {error}") from None
    labels = _labels(args.labels, found.classes)
    _say(f"{found.generation}, {found.architecture}, head {' '.join(found.head)}")
    _say(f"{found.classes} classes: {', '.join(labels)}")
    manifest = Manifest(
        name=os.path.basename(args.source),
        architecture=found.architecture,
        head=found.head,
        labels=labels,
        outputs=None,
        activation="softmax",
        preprocessing=dataclasses.replace(PREPROCESSING, short_side=args.size, crop=args.size),
        golden=(),
        source=f"{found.generation} checkpoint {os.path.basename(args.source)}",
        license=args.license,
    )
    model = _write(args.output, manifest, found)
    _say(f"wrote {args.output}, {model.digest}")
    failed = 0
    for path in args.check:
        try:
            with open(path, "rb") as file:
                print(f"{_tuple(model.compute(file.read()))}  {path}", flush=True)
        except (OSError, SwiprError) as error:
            _say(f"{path}: {error}")
            failed += 1
    if failed:
        raise CheckpointError(f"{failed} of {len(args.check)} pictures could not be scored")


def _labels(given: str | None, classes: int) -> tuple[str, ...]:
    if given is None:
        return tuple(map(str, range(classes)))
    labels = tuple(given.split(","))
    if len(labels) != classes or len(set(labels)) != classes or not all(labels):
        raise CheckpointError(
            f"expected {classes} different labels, as the checkpoint has classes, got {given!r}"
        )
    return labels


def _write(path: str, manifest: Manifest, found: Recognised) -> Model:
    """Write the bundle with golden answers of its own, and return its model, checked."""
    weights = {name: _stored(tensor) for name, tensor in found.tensors.items()}
    pictures = [_stored(_golden_picture(turned)) for turned in (False, True)]
    images = {f"golden.{index}": picture for index, picture in enumerate(pictures)}
    unchecked = Model(Bundle(manifest, weights, ""), max_pixels=MAX_PIXELS)
    golden = tuple(
        Golden(name, unchecked.compute(bytes(picture.data))) for name, picture in images.items()
    )
    write_bundle(path, dataclasses.replace(manifest, golden=golden), weights | images)
    model = Model(read_bundle(path), max_pixels=MAX_PIXELS)
    model.check_golden()
    return model


def _stored(tensor: Tensor) -> bundles.Tensor:
    names = {dtype: name for name, dtype in DTYPES.items()}
    if tensor.dtype not in names:
        raise CheckpointError(f"expected tensors of {', '.join(DTYPES)}, got {tensor.dtype}")
    data = bytearray(tensor.nelement() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.flatten())
    return bundles.Tensor(names[tensor.dtype], tuple(tensor.shape), memoryview(data))


def _golden_picture(turned: bool) -> Tensor:
    """Return a PNG of gradients, larger than the input so that it is scaled: uint8, (bytes,)."""
    across, round_ = Image.linear_gradient("L"), Image.radial_gradient("L")
    down = across.transpose(Image.Transpose.ROTATE_90)
    bands = (round_, across, down) if turned else (across, down, round_)
    buffer = io.BytesIO()
    Image.merge("RGB", bands).resize((340, 256)).save(buffer, "PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _say(message: str) -> None:
    print(f"swiprd import: {message}", file=sys.stderr)


def _tuple(scores: Sequence[float]) -> str:
    return ",".join(f"{score:.6f}" for score in scores)


# --- show ----------------------------------------------------------------------------------------


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "print what a bundle holds"
    parser = commands.add_parser("show", help=words, description=words, allow_abbrev=False)
    parser.set_defaults(run=_show)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _show(args: argparse.Namespace) -> None:
    bundle = read_bundle(args.bundle)
    images = {golden.image for golden in bundle.manifest.golden}
    described = dataclasses.asdict(bundle.manifest) | {
        "digest": bundle.digest,
        "bytes": os.stat(args.bundle).st_size,
        "parameters": sum(
            math.prod(tensor.shape)
            for name, tensor in bundle.tensors.items()
            if name not in images and not name.endswith((".running_mean", ".running_var"))
            if not name.endswith(".num_batches_tracked")
        ),
    }
    if args.json:
        print(json.dumps(described))
        return
    width = max(map(len, described))
    for key, value in described.items():
        print(f"{key:<{width}}  {_words(value)}")


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(_words, value))
    return "-" if value is None else str(value)


# --- verify --------------------------------------------------------------------------------------


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "check that this machine gives a bundle's golden answers"
    parser = commands.add_parser("verify", help=words, description=words, allow_abbrev=False)
    parser.set_defaults(run=_verify)
    parser.add_argument("bundle", metavar="BUNDLE")


def _verify(args: argparse.Namespace) -> None:
    bundle = read_bundle(args.bundle)
    model = Model(bundle, max_pixels=MAX_PIXELS)
    model.check_golden()
    count = len(bundle.manifest.golden)
    print(f"{model.engine} {model.precision}: {count} of {count} golden answers")
