"""The bundle: one file that holds a model whole. Data, never code; no torch here.

The file is a safetensors file, so other tools can open it too. Its metadata carries one string,
``swipr``: the manifest, in JSON. The tensors are the weights, by their names in the architecture's
state_dict; the golden pictures, as encoded image files in U8 tensors named ``golden.0``,
``golden.1``, …; and last ``checksum``, the SHA-256 of all bytes before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from swiprd import safetensors
from swiprd.safetensors import SafetensorsError, SafetensorsFile, Tensor

FORMAT: Final = 1
METADATA_KEY: Final = "swipr"
"""Under which a safetensors file's metadata holds the manifest that makes it a bundle."""
CHECKSUM: Final = "checksum"
CHECKSUM_SIZE: Final = hashlib.sha256().digest_size

IMAGE_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATIONS: Final = ("apply", "jpeg", "ignore")
ALPHAS: Final = ("drop", "white", "black")
DEEP_SAMPLES: Final = ("high_byte", "clip")
FITS: Final = ("short_side", "square", "squish")
ROUNDINGS: Final = ("floor", "round", "truncate")
RESAMPLES: Final = (
    "area",
    "linear",
    "grid",
    "nearest",
    "box",
    "bilinear",
    "hamming",
    "bicubic",
    "lanczos",
)
CROP_STARTS: Final = ("ceil", "even")
ACTIVATIONS: Final = ("softmax", "sigmoid", "none")
HEAD_LAYERS: Final = ("own_pool", "concat_pool", "avg_pool", "batch_norm", "linear", "relu")
MAX_SIDE: Final = 4096
"""Largest input that a bundle may ask for, in pixels a side."""


class BundleError(ValueError):
    """The file is no bundle, or not one that this version can serve; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the model's input: decoded, scaled, cropped, normalised.

    Each system that trains models does this in its own way, and a model scores rightly only with
    the way it was trained with. What a rule does is written here; nothing depends on a system's
    name or version.

    Attributes:
        formats: file formats that are decoded, of ``IMAGE_FORMATS``.
        orientation: whether the EXIF orientation is applied: to all, to JPEG only, or ignored.
        alpha: what becomes of transparency: ``drop`` keeps the colours that lie under it,
            ``white`` and ``black`` put the picture before such a ground.
        deep: what becomes of samples of more than 8 bits: ``high_byte`` scales them down,
            ``clip`` takes all above 255 for 255, as pillow does.
        truncated: whether a file that breaks off is scored with what there is of it.
        jpeg_margin: 0, or at least 1: a JPEG may be scaled down by its decoder, to an eighth at
            the least, as long as its shorter side keeps this many times ``short_side``.
        fit: what is scaled to what. ``short_side``: the whole picture, until its shorter side has
            that length; ``square``: the largest square in its middle; ``squish``: the whole
            picture, to a square, whatever its shape.
        short_side: pixels that the shorter side, or the square's, is scaled to.
        rounding: with the fit ``short_side``, how the longer side becomes a whole number.
            ``floor``: of side · (short_side / shorter side); ``round``: half to even, of
            side / (shorter side / short_side); ``truncate``: of short_side · side / shorter side.
        resample: filter that scales. ``area`` and ``linear``: OpenCV's INTER_AREA and
            INTER_LINEAR on floats; ``grid``: the mean of areas down to twice the size, then two
            taps with the corners aligned, as fast.ai 1 does; the others: pillow's, on bytes.
        crop: pixels a side of the centred square that is kept, at most ``short_side``.
        crop_start: how half a pixel at the crop's start is rounded: ``ceil``, or half to ``even``.
        scale: divisor of the 8-bit values, before normalisation.
        mean: subtracted, a channel (red, green, blue), after ``scale``.
        std: divisor, a channel, after ``mean``.
    """

    formats: tuple[str, ...]
    orientation: str
    alpha: str
    deep: str
    truncated: bool
    jpeg_margin: float
    fit: str
    short_side: int
    rounding: str
    resample: str
    crop: int
    crop_start: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Golden:
    """A picture in the bundle, by the name of its tensor, and the scores it must get."""

    image: str
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of its model.

    Attributes:
        name: short name for people.
        architecture: what to build, by a name that ``swiprd.architectures`` knows.
        head: layers, of ``HEAD_LAYERS``, in place of the architecture's own: after its last
            feature map where they begin with a pool, of which ``own_pool`` is the architecture's;
            otherwise in place of its classifier alone.
            The weights of layer i are the tensors ``head.i.*``. None: the architecture as it is.
        labels: names of the scores, in order.
        outputs: for each label, the half-open ranges of model outputs whose activations are
            summed to its score; None: one output per label.
        activation: what turns outputs into scores; ``none`` leaves them as they are.
        preprocessing: how pictures become inputs.
        golden: pictures and answers by which a worker checks itself.
        source: where the weights come from.
        license: SPDX identifier of the weights' licence.
    """

    name: str
    architecture: str
    head: tuple[str, ...] | None
    labels: tuple[str, ...]
    outputs: tuple[tuple[tuple[int, int], ...], ...] | None
    activation: str
    preprocessing: Preprocessing
    golden: tuple[Golden, ...]
    source: str
    license: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory. ``digest`` is ``sha256:`` and the file's SHA-256 in hexadecimal."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    digest: str

    def release(self) -> None:
        """Free the memory of the tensors; to look at one is a ValueError afterwards.

        Not where torch computes with it: torch would not know.
        """
        for tensor in self.tensors.values():
            tensor.data.release()


class BundleFile:
    """A bundle's file that is open: what it says of the model is checked, its weights are not yet.

    ``close`` must be called.

    Raises:
        BundleError: what is wrong with its header or its manifest, and with which file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with _naming(path):
            self._file = SafetensorsFile(path)
            try:
                self._manifest, self._tensors = _parse(self._file.content)
            except BaseException:
                self.close()
                raise

    def read(self) -> Bundle:
        """Return the bundle: all bytes are read, and their checksum is right. Once only.

        Raises:
            BundleError: it is damaged, or cannot be read.
        """
        with _naming(self._path):
            self._file.read()
            digest = _digest(self._file.content, self._tensors)
        del self._tensors[CHECKSUM]  # it would hold the memory of a bundle that is released
        return Bundle(self._manifest, self._tensors, digest)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def read_bundle(path: str) -> Bundle:
    """Return the bundle in the file at ``path``, every offset and every manifest field checked.

    Raises:
        BundleError: what is wrong with it, and with which file.
    """
    with contextlib.closing(BundleFile(path)) as file:
        return file.read()


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Tell what is wrong as a BundleError that names the file."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"cannot read the bundle {path}: {error.strerror}") from None
    except (BundleError, SafetensorsError) as error:
        raise BundleError(f"{path} is no bundle that can be served: {error}") from None


def _parse(content: memoryview) -> tuple[Manifest, dict[str, Tensor]]:
    # A header's length may begin with the same byte; its text begins with a brace.
    if bytes(content[:2]).startswith((b"PK", b"\x80")) and bytes(content[8:9]) != b"{":
        raise BundleError("it looks like torch's; make a bundle of it with swiprd import")
    metadata, tensors = safetensors.parse(content)
    manifest = _parse_manifest(metadata)
    _check_golden(manifest, tensors)
    checksum = tensors.get(CHECKSUM)
    if checksum is None or (checksum.dtype, checksum.shape) != ("U8", (CHECKSUM_SIZE,)):
        raise BundleError("it has no checksum; make it again")
    return manifest, tensors


def _digest(content: memoryview, tensors: Mapping[str, Tensor]) -> str:
    """Return the file's digest, its checksum looked at on the way."""
    last = content[-CHECKSUM_SIZE:]
    summed = hashlib.sha256(content[:-CHECKSUM_SIZE])
    if tensors[CHECKSUM].data != last or summed.digest() != last:
        raise BundleError("its checksum is wrong: it is damaged; copy or make it again")
    summed.update(last)
    return "sha256:" + summed.hexdigest()


def write_bundle(
    path: str,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    *,
    check: Callable[[str], None] | None = None,
) -> None:
    """Write a bundle to ``path``: whole or not at all, and not if ``check`` raises.

    The same manifest and tensors always give the same bytes. ``check`` is as in ``write_whole``.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    text = json.dumps({"format": FORMAT, **asdict(manifest)})
    checksum = Tensor("U8", (CHECKSUM_SIZE,), memoryview(bytes(CHECKSUM_SIZE)))
    parts = safetensors.encode({METADATA_KEY: text}, {**tensors, CHECKSUM: checksum})
    summed = hashlib.sha256()
    for part in parts[:-1]:
        summed.update(part)
    safetensors.write_whole(path, [*parts[:-1], summed.digest()], check=check)


# --- manifest ------------------------------------------------------------------------------------


def _parse_manifest(metadata: Any) -> Manifest:
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise BundleError("it has no manifest; it holds weights only")
    try:
        found = json.loads(text, object_pairs_hook=safetensors.unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"its manifest is not JSON: {error}") from None
    fields = _Fields(found, "the manifest")
    version = fields.integer("format", 1, 2**31)
    if version != FORMAT:
        raise BundleError(f"its manifest has format {version}, expected {FORMAT}; update swipr")
    labels = fields.strings("labels")
    if not all(label.isprintable() for label in labels):
        raise BundleError(f"expected labels that can be shown on a line, got {labels!s:.80}")
    if len(labels) < 1 or len(set(labels)) != len(labels):
        raise BundleError(f"expected labels that differ from one another, got {labels!s:.80}")
    return Manifest(
        name=fields.string("name"),
        architecture=fields.string("architecture"),
        head=_parse_head(fields),
        labels=labels,
        outputs=_parse_outputs(fields, len(labels)),
        activation=fields.choice("activation", ACTIVATIONS),
        preprocessing=_parse_preprocessing(fields.object("preprocessing")),
        golden=tuple(
            Golden(golden.string("image"), golden.numbers("scores", count=len(labels)))
            for golden in fields.objects("golden")
        ),
        source=fields.string("source"),
        license=fields.string("license"),
    )


def _parse_head(fields: _Fields) -> tuple[str, ...] | None:
    if fields.get("head") is None:
        return None
    layers = fields.strings("head")
    if not layers or not set(layers) <= set(HEAD_LAYERS):
        raise BundleError(
            f"expected 'head' to be layers of {', '.join(HEAD_LAYERS)}, got {layers!s:.80}"
        )
    return layers


def _parse_outputs(fields: _Fields, count: int) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    found = fields.get("outputs")
    if found is None:
        return None
    valid = (
        isinstance(found, list)
        and len(found) == count
        and all(isinstance(ranges, list) and ranges for ranges in found)
        and all(
            isinstance(pair, list)
            and [type(end) for end in pair] == [int, int]
            and 0 <= pair[0] < pair[1]
            for ranges in found
            for pair in ranges
        )
    )
    if not valid:
        raise BundleError(f"expected 'outputs' to be ranges for each of {count} labels")
    return tuple(tuple((begin, end) for begin, end in ranges) for ranges in found)


def _parse_preprocessing(fields: _Fields) -> Preprocessing:
    formats = fields.strings("formats")
    if not formats or not set(formats) <= set(IMAGE_FORMATS):
        raise BundleError(f"expected formats of {', '.join(IMAGE_FORMATS)}, got {formats!s:.80}")
    short_side = fields.integer("short_side", 1, MAX_SIDE)
    mean, std = fields.numbers("mean", count=3), fields.numbers("std", count=3)
    scale = fields.number("scale")
    if 0 in (*std, scale):
        raise BundleError("expected 'scale' and 'std' to be other than 0")
    margin = fields.number("jpeg_margin")
    if margin != 0 and not 1 <= margin <= MAX_SIDE:
        raise BundleError(f"expected 'jpeg_margin' to be 0 or from 1 to {MAX_SIDE}, got {margin:g}")
    return Preprocessing(
        formats=formats,
        orientation=fields.choice("orientation", ORIENTATIONS),
        alpha=fields.choice("alpha", ALPHAS),
        deep=fields.choice("deep", DEEP_SAMPLES),
        truncated=fields.boolean("truncated"),
        jpeg_margin=margin,
        fit=fields.choice("fit", FITS),
        short_side=short_side,
        rounding=fields.choice("rounding", ROUNDINGS),
        resample=fields.choice("resample", RESAMPLES),
        crop=fields.integer("crop", 1, short_side),
        crop_start=fields.choice("crop_start", CROP_STARTS),
        scale=scale,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _check_golden(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    if not manifest.golden:
        raise BundleError("it has no golden answers, so a worker could not check itself")
    for golden in manifest.golden:
        image = tensors.get(golden.image)
        if image is None or image.dtype != "U8" or len(image.shape) != 1:
            raise BundleError(f"its golden picture {golden.image!r} is missing")


class _Fields:
    """Typed access to one JSON object; what is missing or of another type is a BundleError."""

    def __init__(self, found: Any, name: str) -> None:
        if not isinstance(found, dict):
            raise BundleError(f"expected {name} to be an object")
        self._found = found
        self._name = name

    def get(self, key: str) -> Any:
        return self._found.get(key)

    def string(self, key: str) -> str:
        return str(self._typed(key, str, "a string"))

    def boolean(self, key: str) -> bool:
        return bool(self._typed(key, bool, "true or false"))

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._typed(key, int, "a whole number")
        if not low <= value <= high:
            raise BundleError(
                f"expected {key!r} of {self._name} to be from {low} to {high}, got {value}"
            )
        return int(value)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.string(key)
        if value not in choices:
            raise BundleError(
                f"expected {key!r} of {self._name} to be one of {', '.join(choices)}, got"
                f" {value!r:.60}"
            )
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        return tuple(self._list(key, (str,), "strings", None))

    def number(self, key: str) -> float:
        value: Any = self._found.get(key)
        if type(value) not in (int, float) or not _is_finite(value):
            raise BundleError(f"expected {key!r} of {self._name} to be a number, got {value!r:.60}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self._list(key, (int, float), "numbers", count)
        if not all(map(_is_finite, values)):
            raise BundleError(f"expected {key!r} of {self._name} to be finite")
        return tuple(map(float, values))

    def object(self, key: str) -> _Fields:
        return _Fields(self._found.get(key), f"{key!r} of {self._name}")

    def objects(self, key: str) -> list[_Fields]:
        return [
            _Fields(item, f"each of {key!r} of {self._name}")
            for item in self._list(key, (dict,), "objects", None)
        ]

    def _typed(self, key: str, kind: type, words: str) -> Any:
        value = self._found.get(key)
        if type(value) is not kind:
            raise BundleError(f"expected {key!r} of {self._name} to be {words}, got {value!r:.60}")
        return value

    def _list(self, key: str, kinds: tuple[type, ...], words: str, count: int | None) -> list[Any]:
        value = self._found.get(key)
        if (
            not isinstance(value, list)
            or not all(type(item) in kinds for item in value)
            or count not in (None, len(value))
        ):
            many = "" if count is None else f"{count} "
            raise BundleError(
                f"expected {key!r} of {self._name} to be a list of {many}{words}, got {value!r:.60}"
            )
        return value


def _is_finite(value: float) -> bool:
    # Not math.isfinite, which fails on an integer that no float can hold.
    return abs(value) <= sys.float_info.max
