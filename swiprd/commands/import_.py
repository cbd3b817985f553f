"""swiprd import: a checkpoint of a training system becomes a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
from collections.abc import Sequence
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from swiprctl.protocol import SwiprError
from swiprd import safetensors
from swiprd.bundle import (
    ACTIVATIONS,
    FITS,
    MAX_SIDE,
    ORIENTATIONS,
    RESAMPLES,
    Bundle,
    Golden,
    Manifest,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from swiprd.checkpoint import CheckpointError, read_checkpoint
from swiprd.commands.output import (
    MAX_PIXELS,
    Commands,
    add_command,
    read_picture,
    score_tuple,
    tell,
)
from swiprd.engines import eager
from swiprd.model import Model
from swiprd.network import DTYPES
from swiprd.recognise import Recognised, check_together, recognise, resized

WIDEST_MARGIN: Final = 64.0


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "import", "make a bundle of a checkpoint of fast.ai 0.7, 1, 2 or torchvision"
    )
    parser.set_defaults(run=_import)
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint: .h5, .pth, .safetensors")
    parser.add_argument("-o", "--output", metavar="BUNDLE", required=True, help="file to write")
    parser.add_argument(
        "--check", metavar="IMAGE", nargs="+", default=[], help="print the new bundle's scores"
    )
    model = parser.add_argument_group("what no checkpoint says of the model")
    model.add_argument(
        "--labels",
        metavar="A,B,…",
        help="names of the scores, in the order of the classes, which is that of their names"
        " where folders named them [0,1,…]",
    )
    model.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="softmax",
        help="what makes scores of outputs [%(default)s]",
    )
    model.add_argument("--arch", metavar="NAME", help="architecture [told by the tensors]")
    model.add_argument(
        "--license",
        metavar="ID",
        default="unknown",
        help="SPDX identifier of the weights' licence [%(default)s]",
    )
    pictures = parser.add_argument_group(
        "what no checkpoint says of the pictures it was trained with",
        "Left out, each is what the system does unless it is told otherwise.",
    )
    pictures.add_argument("--size", metavar="N", type=_side, help="side of the input in pixels")
    pictures.add_argument(
        "--short-side", metavar="N", type=_side, help="scale to this before cropping to --size"
    )
    pictures.add_argument(
        "--fit",
        choices=FITS,
        help="scale until the shorter side fits, or the middle square, or squish",
    )
    pictures.add_argument(
        "--resample",
        choices=RESAMPLES,
        metavar="FILTER",
        help=f"{', '.join(RESAMPLES)}; fast.ai 0.7 before March 2018: linear",
    )
    pictures.add_argument("--orientation", choices=ORIENTATIONS, help="whether EXIF turns pictures")
    pictures.add_argument("--mean", metavar="R,G,B", type=_means, help="of values from 0 to 1")
    pictures.add_argument("--std", metavar="R,G,B", type=_deviations, help="of values from 0 to 1")
    pictures.add_argument(
        "--jpeg-margin",
        metavar="X",
        type=_margin,
        help="let large JPEGs be decoded smaller, down to X times the shorter side; faster, and"
        " scores differ a little; 0: never [0]",
    )


# --- flags ---------------------------------------------------------------------------------------


def _side(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_SIDE):
        raise argparse.ArgumentTypeError(f"expected pixels from 1 to {MAX_SIDE}, got {text!r}")
    return int(text)


def _channels(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(abs(value) < 1e6 for value in values):
        raise argparse.ArgumentTypeError(f"expected three numbers, as 0.5,0.5,0.5, got {text!r}")
    return values


def _means(text: str) -> tuple[float, ...]:
    values = _channels(text)
    if not all(-1 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"expected means of values from 0 to 1, got {text!r}; divide by 255"
        )
    return values


def _deviations(text: str) -> tuple[float, ...]:
    values = _channels(text)
    if not all(0 < value <= 10 for value in values):
        raise argparse.ArgumentTypeError(
            f"expected deviations of values from 0 to 1, above 0, got {text!r}; divide by 255"
        )
    return values


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != 0 and not 1 <= value <= WIDEST_MARGIN:
        raise argparse.ArgumentTypeError(
            f"expected 0, or from 1 to {WIDEST_MARGIN:g}, got {text!r}"
        )
    return value


def _preprocessing(found: Recognised, args: argparse.Namespace) -> Preprocessing:
    rules = found.preprocessing
    if args.size is not None:
        rules = resized(rules, args.size)
    if args.fit is not None and args.fit != "short_side":
        rules = dataclasses.replace(rules, short_side=rules.crop)
    given = {
        name: value
        for name in ("short_side", "fit", "resample", "orientation", "mean", "std", "jpeg_margin")
        if (value := getattr(args, name)) is not None
    }
    rules = dataclasses.replace(rules, **given)
    if rules.short_side < rules.crop:
        raise CheckpointError(
            f"expected --short-side to be at least the input's side, {rules.crop}, got"
            f" {rules.short_side}"
        )
    return rules


def _labels(given: str | None, classes: int) -> tuple[str, ...]:
    if given is None:
        return tuple(map(str, range(classes)))
    labels = tuple(label.strip() for label in given.split(","))
    if len(labels) != classes or len(set(labels)) != classes or not all(labels):
        raise CheckpointError(
            f"expected {classes} different labels, as the checkpoint has classes, got {given!r}"
        )
    return labels


# --- import --------------------------------------------------------------------------------------


def _import(args: argparse.Namespace) -> None:
    target = _target(args.output, args.source)
    for path in args.check:  # what is not there is told before the work
        read_picture(path)
    tensors = read_checkpoint(args.source)
    try:
        found = recognise(tensors, architecture=args.arch)
        rules = _preprocessing(found, args)
        check_together(found, rules.crop)
        labels = _labels(args.labels, found.classes)
        _describe(found, labels, rules, args)
        manifest = Manifest(
            name=os.path.basename(args.source),
            architecture=found.architecture,
            head=found.head,
            labels=labels,
            outputs=None,
            activation=args.activation,
            preprocessing=rules,
            golden=(),
            source=f"{found.system} checkpoint {os.path.basename(args.source)}",
            license=args.license,
        )
        model = _write(target, manifest, found)
    except CheckpointError as error:
        raise CheckpointError(f"{args.source}: {error}") from None
    tell("import", f"wrote {args.output}, {model.digest}")
    _check(model, args.check)


def _describe(
    found: Recognised, labels: Sequence[str], rules: Preprocessing, args: argparse.Namespace
) -> None:
    head = "its own head" if found.head is None else f"head {' '.join(found.head)}"
    tell("import", f"found: {found.system}, {found.architecture}, {head}, {found.classes} classes")
    tell("import", f"labels {', '.join(labels)}; activation {args.activation}")
    tell(
        "import",
        f"pictures: {rules.fit} to {rules.short_side} by {rules.resample}, crop {rules.crop}, EXIF"
        f" {rules.orientation}, mean {_triple(rules.mean)}, std {_triple(rules.std)}",
    )
    if found.doubt is not None and args.mean is None and args.std is None:
        tell("import", f"note: {found.doubt}")


def _triple(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _write(path: str, manifest: Manifest, found: Recognised) -> Model:
    """Write the bundle with golden answers of its own, and return its model, checked."""
    weights = {name: _stored(tensor) for name, tensor in found.tensors.items()}
    pictures = [_stored(_golden_picture(turned)) for turned in (False, True)]
    images = {f"golden.{index}": picture for index, picture in enumerate(pictures)}
    bundle = Bundle(manifest, weights, "")
    unchecked = Model(bundle, eager(bundle), max_pixels=MAX_PIXELS)
    try:
        golden = tuple(
            Golden(name, unchecked.compute(bytes(picture.data))) for name, picture in images.items()
        )
    except SwiprError as error:
        raise CheckpointError(f"with its weights {error}") from None
    whole = dataclasses.replace(manifest, golden=golden)
    models: list[Model] = []

    def check(written: str) -> None:
        bundle = read_bundle(written)
        models.append(Model(bundle, eager(bundle), max_pixels=MAX_PIXELS))
        models[0].check_golden()

    # Under its own name only once it has been read again and has given its answers.
    write_bundle(path, whole, weights | images, check=check)
    return models[0]


def _target(path: str, source: str) -> str:
    """Return where the bundle goes, looked at before the work: a link's target, a regular file.

    Raises:
        CheckpointError: a bundle cannot or should not go there.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{path}: its folder is not there; make it or choose another")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{path}: no permission to write to its folder")
    if os.path.lexists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{path}: something that is no regular file stands there")
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
        raise CheckpointError(f"{path}: that is the checkpoint itself; choose another output")
    return target


def _stored(tensor: Tensor) -> safetensors.Tensor:
    names = {dtype: name for name, dtype in DTYPES.items()}
    if tensor.dtype not in names:
        raise CheckpointError(f"expected tensors of {', '.join(DTYPES)}, got {tensor.dtype}")
    data = bytearray(tensor.nelement() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.flatten())
    return safetensors.Tensor(names[tensor.dtype], tuple(tensor.shape), memoryview(data))


def _golden_picture(turned: bool) -> Tensor:
    """Return a PNG of gradients, larger than most inputs so that it is scaled: uint8, (bytes,)."""
    across, round_ = Image.linear_gradient("L"), Image.radial_gradient("L")
    down = across.transpose(Image.Transpose.ROTATE_90)
    bands = (round_, across, down) if turned else (across, down, round_)
    buffer = io.BytesIO()
    Image.merge("RGB", bands).resize((340, 256)).save(buffer, "PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _check(model: Model, paths: Sequence[str]) -> None:
    failed = 0
    for path in paths:
        data = None
        try:
            data = read_picture(path)
            print(f"{score_tuple(model.compute(data))}  {path}", flush=True)
        except SwiprError as error:
            tell("import", str(error) if data is None else f"{path}: {error}")
            failed += 1
    if failed:
        raise CheckpointError(f"{failed} of {len(paths)} pictures could not be scored")
