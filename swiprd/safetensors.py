"""Safetensors files: named tensors and a little text, read and written. Data, never code; no torch.

The format is that of the safetensors library: 8 bytes of header length, a JSON header, then the raw
little-endian tensors without gaps. Every offset is checked before anything is handed out.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_HEADER: Final = 100_000_000  # the safetensors library's own limit, in bytes
ITEM_SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
"""Bytes of one element, by the names that the format gives to types."""
MAX_DIMENSIONS: Final = 16
MAX_LENGTH: Final = 2**40
"""Longest dimension. Both bound what it costs to multiply a stranger's shape."""


class SafetensorsError(ValueError):
    """The bytes are no safetensors file; the message is one line."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Raw little-endian data: type name of ``ITEM_SIZES``, shape, and the bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class SafetensorsFile:
    """A regular file on its way into memory: its header at first, the rest with ``read``.

    ``close`` must be called.

    Attributes:
        content: where all its bytes will be; it may be written to, for torch wants that.

    Raises:
        OSError: it cannot be read.
        SafetensorsError: no file can have that name, there is not enough memory, or it changes
            meanwhile.
    """

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "rb", opener=open_at_once)  # noqa: SIM115 - see ``close``
        except ValueError:  # a NUL or a lone surrogate
            raise SafetensorsError("no file can have this name") from None
        self.content = memoryview(b"")
        self._size = 0
        try:
            self.content = _memory(os.fstat(self._file.fileno()).st_size)
            self._fill(8)
            self._fill(min(_header_length(self.content), MAX_HEADER))
        except BaseException as error:
            self.close()
            if isinstance(error, MemoryError):
                raise SafetensorsError("there is not enough memory for it") from None
            raise

    def read(self) -> None:
        """Read the rest.

        Raises:
            OSError: it cannot be read.
            SafetensorsError: it has become shorter.
        """
        self._fill(len(self.content))

    def close(self) -> None:
        """Let go of the file, and of the content: its tensors keep what they have of it."""
        self._file.close()
        self.content.release()

    def _fill(self, count: int) -> None:
        wanted = self.content[self._size :][:count]
        if self._file.readinto(wanted) != len(wanted):
            raise SafetensorsError("it changed while it was read")
        self._size += len(wanted)


def _header_length(content: memoryview) -> int:
    return int.from_bytes(content[:8], "little")


def _memory(size: int) -> memoryview:
    if size == 0:
        return memoryview(bytearray())
    # Not a bytearray, which is written to twice, nor in small pages: 100 MB take 100 ms so, 57 in
    # small pages, and 17 in huge ones.
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError from None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def open_at_once(path: str, flags: int) -> int:
    """Open a file, for ``open``'s opener; a pipe in its place would be waited for otherwise."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse(content: memoryview) -> tuple[Any, dict[str, Tensor]]:
    """Return the metadata, whatever it is, and the tensors, which are views of ``content``.

    The header must be there; the tensors' own bytes need not yet.

    Raises:
        SafetensorsError: what is wrong.
    """
    if len(content) < 8:
        raise SafetensorsError(f"expected a safetensors file, got {len(content)} bytes")
    length = _header_length(content)
    if length > min(len(content) - 8, MAX_HEADER):
        raise SafetensorsError(
            "its header is longer than the file; it is cut off or no safetensors file"
        )
    try:
        header = json.loads(str(content[8 : 8 + length], "utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    body = content[8 + length :]
    return metadata, _parse_tensors(header, body)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the JSON object with these members; for ``json.loads``, which would keep the last.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _parse_tensors(header: dict[str, Any], body: memoryview) -> dict[str, Tensor]:
    tensors = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _parse_entry(name, entry)
        if not 0 <= begin <= end <= len(body):
            raise SafetensorsError(f"tensor {name!r:.80} lies outside the file; it is cut off")
        if min(shape, default=0) < 0 or math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
            raise SafetensorsError(
                f"tensor {name!r:.80} of shape {shape!r:.80} does not fit its {end - begin} bytes"
            )
        tensors[name] = Tensor(dtype, shape, body[begin:end])
        spans.append((begin, end))
    expected = 0
    for begin, end in sorted(spans):
        if begin != expected:
            raise SafetensorsError("its tensors overlap or leave a gap")
        expected = end
    if expected != len(body):
        raise SafetensorsError(f"{len(body) - expected} bytes follow its last tensor")
    return tensors


def _parse_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict):
        raise SafetensorsError(f"expected tensor {name!r:.80} to be an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise SafetensorsError(
            f"expected 'dtype' of tensor {name!r:.80} to be one of {', '.join(ITEM_SIZES)}, got"
            f" {dtype!r:.60}"
        )
    for key, count in (("shape", None), ("data_offsets", 2)):
        found = entry.get(key)
        if (
            not isinstance(found, list)
            or not all(type(item) is int for item in found)
            or count not in (None, len(found))
        ):
            raise SafetensorsError(
                f"expected {key!r} of tensor {name!r:.80} to be a list of"
                f" {'' if count is None else f'{count} '}whole numbers, got {found!r:.60}"
            )
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_LENGTH:
        raise SafetensorsError(
            f"expected tensor {name!r:.80} to have at most {MAX_DIMENSIONS} dimensions of at most"
            f" {MAX_LENGTH}, got {shape!r:.60}"
        )
    return dtype, tuple(shape), (begin, end)


def encode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a file, in order; the last ones are the tensors' own bytes.

    The same metadata and tensors always give the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
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
    length = len(encoded).to_bytes(8, "little")
    return [length, encoded, *(tensor.data for tensor in tensors.values())]


def write_whole(
    path: str,
    parts: Iterable[bytes | memoryview],
    *,
    check: Callable[[str], None] | None = None,
) -> None:
    """Write ``parts`` to a file that takes its name ``path`` only once it is safely on disk.

    Args:
        path: of the file; a file that is there is replaced.
        parts: its bytes, in order.
        check: called with the file's temporary name before it takes its own; if it raises, the
            file goes.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = f"{path}.{os.getpid()}.part"
    with open(temporary, "xb") as file:
        try:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            os.rename(temporary, path)
        except BaseException as error:
            os.unlink(temporary)
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say
                error.filename = path
            raise
    _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
