"""The bundle: one file that holds a model whole. Data, never code; no torch here.

The file is a safetensors file (8 bytes of header length, a JSON header, raw little-endian tensors),
so other tools can open it too. Its header's metadata carries one string, ``swipr``: the manifest,
in JSON. The tensors are the weights, by their names in the architecture's state_dict, and the
golden pictures, as encoded image files in U8 tensors named ``golden.0``, ``golden.1``, …
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

FORMAT: Final = 1
MAX_HEADER: Final = 100_000_000  # the safetensors library's own limit, in bytes
ITEM_SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
"""Bytes of one element, by the names that safetensors gives to types."""

IMAGE_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATIONS: Final = ("apply", "jpeg", "ignore")
RESAMPLES: Final = ("area",)
ACTIVATIONS: Final = ("softmax",)
HEAD_LAYERS: Final = ("concat_pool", "batch_norm", "linear", "relu")


class BundleError(ValueError):
    """The file is no bundle, or not one that this version can serve; the message is one line."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes the model's input.

    Attributes:
        formats: file formats that are decoded, of ``IMAGE_FORMATS``.
        orientation: whether the EXIF orientation is applied: to all, to JPEG only, or ignored.
        truncated: whether a file that breaks off is scored with what there is of it.
        resample: filter that scales the picture.
        short_side: pixels that the shorter side is scaled to.
        crop: pixels a side of the centred square that is kept, at most ``short_side``.
        scale: divisor of the 8-bit values, before normalisation.
        mean: subtracted, a channel (red, green, blue), after ``scale``.
        std: divisor, a channel, after ``mean``.
    """

    formats: tuple[str, ...]
    orientation: str
    truncated: bool
    resample: str
    short_side: int
    crop: int
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
        architecture: what to build, by a name that ``swiprd.network`` knows.
        head: layers, of ``HEAD_LAYERS``, that follow the body in place of the architecture's own;
            the weights of layer i are the tensors ``head.i.*``. None: the architecture as it is.
        labels: names of the scores, in order.
        outputs: for each label, the half-open ranges of model outputs whose activations are
            summed to its score; None: one output per label.
        activation: what turns outputs into scores.
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
class Tensor:
    """Raw little-endian data: type name of ``ITEM_SIZES``, shape, and the bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory. ``digest`` is ``sha256:`` and the file's SHA-256 in hexadecimal."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    digest: str


def read_bundle(path: str) -> Bundle:
    """Return the bundle in the file at ``path``, every offset and every manifest field checked.

    Raises:
        BundleError: what is wrong with it, and with which file.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            # A bytearray, because torch wants memory that it may write to.
            content = bytearray(os.fstat(file.fileno()).st_size)
            size = file.readinto(content)
    except OSError as error:
        raise BundleError(f"cannot read the bundle {path}: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate
        raise BundleError(f"no file can have the name {path!r}") from None
    except MemoryError:
        raise BundleError(f"cannot read the bundle {path}: not enough memory for it") from None
    try:
        if size != len(content):
            raise BundleError("it changed while it was read")
        metadata, tensors = _parse_safetensors(content)
        manifest = _parse_manifest(metadata)
        _check_golden(manifest, tensors)
    except BundleError as error:
        raise BundleError(f"{path} is no bundle that can be served: {error}") from None
    return Bundle(manifest, tensors, "sha256:" + hashlib.sha256(content).hexdigest())


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in its place would be waited for


def write_bundle(path: str, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Write a bundle to ``path``: whole or not at all.

    The same manifest and tensors always give the same bytes.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    header: dict[str, Any] = {
        "__metadata__": {"swipr": json.dumps({"format": FORMAT, **asdict(manifest)})}
    }
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    _write_whole(
        path,
        [len(encoded).to_bytes(8, "little"), encoded, *(t.data for t in tensors.values())],
    )


def _write_whole(path: str, parts: Iterable[bytes | memoryview]) -> None:
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


# --- safetensors ---------------------------------------------------------------------------------


def _parse_safetensors(content: bytearray) -> tuple[Any, dict[str, Tensor]]:
    if len(content) < 8:
        raise BundleError(f"expected a safetensors file, got {len(content)} bytes")
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, MAX_HEADER):
        raise BundleError(
            "its header is longer than the file; it is cut off or no safetensors file"
        )
    try:
        header = json.loads(content[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise BundleError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    body = memoryview(content)[8 + length :]
    return metadata, _parse_tensors(header, body)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _parse_tensors(header: dict[str, Any], body: memoryview) -> dict[str, Tensor]:
    tensors = {}
    spans = []
    for name, entry in header.items():
        fields = _Fields(entry, f"tensor {name!r}")
        dtype = fields.choice("dtype", tuple(ITEM_SIZES))
        shape = fields.integers("shape")
        begin, end = fields.integers("data_offsets", count=2)
        if not 0 <= begin <= end <= len(body):
            raise BundleError(f"tensor {name!r} lies outside the file; it is cut off")
        if min(shape, default=0) < 0 or math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
            raise BundleError(
                f"tensor {name!r} of shape {shape} does not fit its {end - begin} bytes"
            )
        tensors[name] = Tensor(dtype, shape, body[begin:end])
        spans.append((begin, end))
    expected = 0
    for begin, end in sorted(spans):
        if begin != expected:
            raise BundleError("its tensors overlap or leave a gap")
        expected = end
    if expected != len(body):
        raise BundleError(f"{len(body) - expected} bytes follow its last tensor")
    return tensors


# --- manifest ------------------------------------------------------------------------------------


def _parse_manifest(metadata: Any) -> Manifest:
    text = metadata.get("swipr") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise BundleError("it has no manifest; it holds weights only")
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"its manifest is not JSON: {error}") from None
    fields = _Fields(found, "the manifest")
    version = fields.integer("format", 1, 2**31)
    if version != FORMAT:
        raise BundleError(f"its manifest has format {version}, expected {FORMAT}; update swipr")
    labels = fields.strings("labels")
    if len(labels) < 1 or len(set(labels)) != len(labels):
        raise BundleError(f"expected labels that differ from one another, got {labels}")
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
        raise BundleError(f"expected 'head' to be layers of {', '.join(HEAD_LAYERS)}, got {layers}")
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
        raise BundleError(f"expected formats of {', '.join(IMAGE_FORMATS)}, got {formats}")
    short_side = fields.integer("short_side", 1, 4096)
    mean, std = fields.numbers("mean", count=3), fields.numbers("std", count=3)
    scale = fields.number("scale")
    if 0 in (*std, scale):
        raise BundleError("expected 'scale' and 'std' to be other than 0")
    return Preprocessing(
        formats=formats,
        orientation=fields.choice("orientation", ORIENTATIONS),
        truncated=fields.boolean("truncated"),
        resample=fields.choice("resample", RESAMPLES),
        short_side=short_side,
        crop=fields.integer("crop", 1, short_side),
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
                f"expected {key!r} of {self._name} to be one of {', '.join(choices)}, got {value!r}"
            )
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        return tuple(self._list(key, (str,), "strings", None))

    def integers(self, key: str, count: int | None = None) -> tuple[int, ...]:
        return tuple(self._list(key, (int,), "whole numbers", count))

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
