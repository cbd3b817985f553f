"""From a training system's file to named tensors, without running any code that is in it.

What the names mean is not known here; see ``swiprd.recognise``.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Any, Final

import torch
from torch import Tensor

from swiprd import safetensors
from swiprd.bundle import METADATA_KEY
from swiprd.network import DTYPES, to_torch
from swiprd.safetensors import SafetensorsError, SafetensorsFile

WRAPPERS: Final = ("state_dict", "model_state_dict", "model")
"""Keys under which programs put the state_dict that they save."""
PREFIXES: Final = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before each name."""
SHARING: Final = 4
"""How many times a file's size its tensors may have together: some share their memory."""
COMPRESSED: Final = {b"\xfd7zXZ": "xz", b"\x1f\x8b": "gzip", b"BZh": "bzip2"}
ZIP: Final = b"PK"
PICKLE: Final = b"\x80"
MAGIC: Final = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""What follows pickle's version in the files that torch.save wrote before it wrote zip files."""
BYSTANDERS: Final = (
    "fastcore.foundation.L",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "argparse.Namespace",
)
"""Names of classes and functions that stand beside the weights, in the state of an optimizer or
among a script's arguments; each is replaced by an object that does nothing."""
EXPORT_HINT: Final = (
    "save the weights alone, as in learn.save('name', with_opt=False) with fast.ai or"
    " torch.save(model.state_dict(), path)"
)


class CheckpointError(ValueError):
    """The file is no checkpoint that can be imported; the message is one line."""


class _Inert:
    """Stands for whatever ``BYSTANDERS`` names: takes anything, does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return 0


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Return the tensors in the file at ``path``, by name, on the CPU.

    Zip files and the older streams of ``torch.save`` are read, bare or wrapped in ``WRAPPERS``, and
    safetensors files.

    Raises:
        CheckpointError: what was found instead, and what to do.
    """
    try:
        if _is_safetensors(path):
            found = _read_safetensors(path)
        else:
            _look_at(path)
            found = _load(path)
        return _named_tensors(found, os.stat(path).st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _is_safetensors(path: str) -> bool:
    with open(path, "rb", opener=safetensors.open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise CheckpointError("it is no regular file")
        first = file.read(9)
        size = found.st_size
    length = int.from_bytes(first[:8], "little")
    return first[8:] == b"{" and length <= min(size - 8, safetensors.MAX_HEADER)


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        with contextlib.closing(SafetensorsFile(path)) as file:
            file.read()
            metadata, tensors = safetensors.parse(file.content)
    except SafetensorsError as error:
        raise CheckpointError(f"it is no sound safetensors file: {error}") from None
    if isinstance(metadata, dict) and METADATA_KEY in metadata:
        raise CheckpointError("it is a bundle already; serve it with swiprd --model")
    return {name: to_torch(tensor) for name, tensor in tensors.items()}


def _look_at(path: str) -> None:
    with open(path, "rb") as file:
        first = file.read(16)
        size = os.fstat(file.fileno()).st_size
    if not first:
        raise CheckpointError("the file is empty")
    if first.startswith(b"\x89HDF"):
        raise CheckpointError(
            "it is an HDF5 file, as Keras writes; expected a checkpoint of torch or safetensors"
        )
    for magic, program in COMPRESSED.items():
        if first.startswith(magic):
            raise CheckpointError(f"it is compressed with {program}; unpack it first")
    if first.startswith(PICKLE) and first[2 : 2 + len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"it is a pickle of objects, not a checkpoint, and could run code; {EXPORT_HINT}"
        )
    if first.startswith(ZIP):
        try:
            _look_at_zip(path, size)
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"it is cut off or damaged: {error}") from None
    elif not first.startswith(PICKLE):
        raise CheckpointError(
            f"expected a checkpoint of torch or safetensors, got a file that begins with"
            f" {first[:8]!r}"
        )


def _look_at_zip(path: str, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > size and not _is_script(archive):  # torch stores and never compresses
            raise CheckpointError(
                f"it unpacks to {unpacked} bytes, more than its own {size}; torch writes no such"
                " file"
            )
        if _is_script(archive):
            raise CheckpointError(f"it is TorchScript, which is code; {EXPORT_HINT}")
        damaged = archive.testzip()  # which torch does not look at
    if damaged is not None:
        raise CheckpointError(f"it is damaged: the checksum of {damaged!r:.80} is wrong")


def _is_script(archive: zipfile.ZipFile) -> bool:
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load(path: str) -> Any:
    bystanders: list[Any] = [(_Inert, name) for name in BYSTANDERS]
    try:
        with torch.serialization.safe_globals(bystanders), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old layouts, which we know are old
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds objects of {name[1]:.80}" if name else "it is damaged, or holds objects"
        raise CheckpointError(f"{what}, which could run code; {EXPORT_HINT}") from None
    except Exception as error:  # the reader raises anything on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"it is cut off or damaged: {reason:.200}") from None


def _named_tensors(found: Any, size: int) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"expected named tensors, got {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"expected named tensors, got {type(tensor).__name__} at {name!r:.80}; save the"
                " state_dict alone, or under 'state_dict' or 'model'"
            )
    tensors: dict[str, Tensor] = dict(found)
    # Before anything is computed with them: a few bytes may claim to be gigabytes.
    unpacked = sum(tensor.nelement() * tensor.element_size() for tensor in tensors.values())
    if unpacked > SHARING * size:
        raise CheckpointError(f"its tensors have {unpacked} bytes, far more than its own {size}")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{name!r:.80} is no dense tensor")
    if tensor.dtype not in DTYPES.values():
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise CheckpointError(f"{name!r:.80} is of {tensor.dtype}, expected one of {known}")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name!r:.80} holds values that are not finite")
