"""From a training system's file to named tensors, without running any code that is in it.

What the names mean is not known here; see ``swiprd.fastai``.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Any, Final

import torch
from torch import Tensor

WRAPPERS: Final = ("state_dict", "model")
"""Keys under which programs put the state_dict that they save."""
STREAM: Final = b"\x80\x02"
"""Beginning of what torch.save wrote before it wrote zip files: pickle's protocol 2."""
PREFIX: Final = "module."
"""What torch's DataParallel puts before each name."""


class CheckpointError(ValueError):
    """The file is no checkpoint that can be imported; the message is one line."""


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Return the tensors in the file at ``path``, by name, on the CPU.

    Zip files and the older streams of ``torch.save`` are read, bare or wrapped in ``WRAPPERS``.

    Raises:
        CheckpointError: what was found instead, and what to do.
    """
    try:
        _look_at(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old layouts, which we know are old
            found = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{path}: it is damaged, or holds more than tensors, which could run code; save the"
            " weights alone, as in torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # the readers raise anything on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: it cannot be read as a checkpoint: {reason:.200}") from None
    return _named_tensors(path, found)


def _look_at(path: str) -> None:
    with open(path, "rb") as file:
        first = file.read(8)
        size = os.fstat(file.fileno()).st_size
    if not first:
        raise CheckpointError(f"{path}: the file is empty")
    if first.startswith(b"\x89HDF"):
        raise CheckpointError(
            f"{path}: it is an HDF5 file, as Keras writes; expected a checkpoint of torch"
        )
    if not first.startswith((b"PK", STREAM)):
        raise CheckpointError(
            f"{path}: expected a checkpoint of torch, got a file that begins with {first!r}"
        )
    if first.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > size:  # torch stores and never compresses
            raise CheckpointError(
                f"{path}: it unpacks to {unpacked} bytes, more than its own {size}; torch writes no"
                " such file"
            )


def _named_tensors(path: str, found: Any) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: expected named tensors, got {type(found).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: expected named tensors, got {type(tensor).__name__} at {name!r:.80}"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"{path}: {name!r:.80} is no dense tensor of real numbers")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name!r:.80} holds values that are not finite")
        tensors[name] = tensor
    if all(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return tensors
