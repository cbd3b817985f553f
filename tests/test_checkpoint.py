"""Files of training systems: every layout is read, and nothing in one is ever run."""

from __future__ import annotations

import argparse
import functools
import io
import lzma
import math
import os
import pickle
import random
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import models

from swiprd import safetensors
from swiprd.bundle import BundleError, read_bundle, write_bundle
from swiprd.checkpoint import read_checkpoint
from swiprd.commands import run_command
from swiprd.commands.import_ import _stored
from swiprd.engines import eager
from swiprd.model import Model
from tests import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "shufflenet_v2_x0_5"


@functools.cache
def small() -> dict[str, Tensor]:
    """Return the weights of a small network."""
    torch.manual_seed(1)
    return dict(models.get_model(SMALL, num_classes=2).state_dict())


# --- layouts -------------------------------------------------------------------------------------


def stream(found: Any, path: Path) -> None:
    torch.save(found, path, _use_new_zipfile_serialization=False)


def as_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    stored = {name: _stored(tensor) for name, tensor in tensors.items()}
    safetensors.write_whole(str(path), safetensors.encode({"format": "pt"}, stored))


def beside_an_optimizer(tensors: dict[str, Tensor], path: Path) -> None:
    """As fast.ai 2 saves: its own list, and numpy's numbers."""
    module = types.ModuleType("fastcore.foundation")

    class L:
        def __init__(self, items: Any) -> None:
            self.items = items

    L.__module__, L.__qualname__ = "fastcore.foundation", "L"
    module.L = L  # type: ignore[attr-defined]
    modules = {"fastcore": types.ModuleType("fastcore"), "fastcore.foundation": module}
    sys.modules |= modules
    try:
        hypers = L([{"lr": np.float64(1e-3), "mom": 0.9}])
        torch.save({"model": tensors, "opt": {"state": [], "hypers": hypers}}, path)
    finally:
        for name in modules:
            del sys.modules[name]


LAYOUTS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "zip": torch.save,
    "stream": stream,
    "safetensors": as_safetensors,
    "module.": lambda t, path: torch.save({f"module.{name}": x for name, x in t.items()}, path),
    "_orig_mod.module.": lambda t, path: stream(
        {f"_orig_mod.module.{name}": x for name, x in t.items()}, path
    ),
    "state_dict": lambda t, path: torch.save({"state_dict": t, "epoch": 3}, path),
    "model_state_dict": lambda t, path: torch.save({"model_state_dict": t, "epoch": 3}, path),
    "model": lambda t, path: stream({"model": t, "args": argparse.Namespace(lr=0.1)}, path),
    "model with optimizer": beside_an_optimizer,
    "cuda": lambda t, path: path.write_bytes(
        _saved(t).getvalue().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    ),
}


def _saved(tensors: dict[str, Tensor]) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=False)
    return buffer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(layout: str, folder: Path) -> None:
    """However the file was written, the same names lead to the same numbers."""
    LAYOUTS[layout](small(), folder / "c")
    found = read_checkpoint(str(folder / "c"))
    assert found.keys() == small().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in small().items())


def test_half_precision_keeps_its_type(folder: Path) -> None:
    """A checkpoint that was trained in it is stored as it is."""
    halves = {name: t.half() if t.is_floating_point() else t for name, t in small().items()}
    torch.save(halves, folder / "c")
    found = read_checkpoint(str(folder / "c"))
    assert all(found[name].dtype == tensor.dtype for name, tensor in halves.items())


def test_the_file_of_fastai_0_7_is_a_stream_for_a_gpu(folder: Path) -> None:
    """And is read all the same."""
    data = checkpoints.unpacked()
    assert data.startswith(bytes.fromhex("80028a0a6cfc9c46f9206aa85019"))
    assert b"cuda:0" in data[:200_000]
    (folder / "c").write_bytes(data)
    assert len(read_checkpoint(str(folder / "c"))) in (277, 332)


# --- what is refused -----------------------------------------------------------------------------


class Evil:
    """Runs code where it is unpickled without care."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("was-here",))


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))


def bundle(path: Path) -> None:
    from swiprd.config import DEFAULT_BUNDLE

    path.write_bytes(Path(DEFAULT_BUNDLE).read_bytes())


def damaged_zip(path: Path) -> None:
    torch.save(small(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is going away
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def numbered_transformer(path: Path) -> None:
    """As if fast.ai could cut a network that has no feature map."""
    children = {"conv_proj": 0, "encoder": 1}
    tensors = {"1.1.weight": torch.zeros(2, 1536)}
    for name, tensor in models.vit_b_32().state_dict().items():
        child, _, rest = name.partition(".")
        if child in children:
            tensors[f"0.{children[child]}.{rest}"] = tensor
    torch.save(tensors, path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "an HDF5 file"),
    "text": (lambda path: path.write_bytes(b"hello"), "got a file that begins with b'hello'"),
    "no zip": (lambda path: path.write_bytes(b"PK\3\4 no zip"), "it is cut off or damaged"),
    "folder": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "nothing": (lambda path: None, "cannot be read: No such file or directory"),
    "list": (lambda path: torch.save([1, 2], path), "expected named tensors, got list"),
    "number": (lambda path: torch.save({"a": 1}, path), "expected named tensors, got int at 'a'"),
    "no names": (lambda path: torch.save({}, path), "expected named tensors, got dict"),
    "one layer": (
        lambda path: torch.save({"fc.weight": torch.ones(1)}, path),
        "of no known architecture: it begins with fc.weight (1,); known are alexnet",
    ),
    "evil pickle": (lambda path: path.write_bytes(pickle.dumps({"a": Evil()})), "a pickle of obj"),
    "evil stream": (lambda path: stream({"a": Evil()}, path), "holds objects of posix.mkdir"),
    "evil zip": (lambda path: torch.save({"a": Evil()}, path), "holds objects of posix.mkdir"),
    "evil beside weights": (
        lambda path: torch.save({"model": small(), "opt": Evil()}, path),
        "save the weights alone, as in learn.save('name', with_opt=False)",
    ),
    "whole model": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "holds objects of torch.nn.modules.linear.Linear, which could run code",
    ),
    "zip bomb": (bomb, "it unpacks to 100000000 bytes"),
    "not finite": (
        lambda path: torch.save({"a": torch.tensor([1.0, float("nan")])}, path),
        "'a' holds values that are not finite",
    ),
    "sparse": (
        lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path),
        "'a' is no dense tensor",
    ),
    "complex": (
        lambda path: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path),
        "'a' is of torch.complex64, expected one of float64",
    ),
    "claims more than it has": (
        lambda path: torch.save({"a": torch.zeros(1).expand(60_000, 60_000)}, path),
        "its tensors have 14400000000 bytes, far more than its own",
    ),
    "nowhere": (
        lambda path: torch.save({"a": torch.zeros(2, device="meta")}, path),
        "'a' is no dense tensor",
    ),
    "eight bits": (
        lambda path: torch.save({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, path),
        "'a' is of torch.float8_e4m3fn, expected one of float64, float32",
    ),
    "booleans": (
        lambda path: torch.save({"a": torch.zeros(2, dtype=torch.bool)}, path),
        "'a' is of torch.bool, expected one of float64",
    ),
    "TorchScript": (
        torchscript,
        "it is TorchScript, which is code; save the weights alone",
    ),
    "compressed": (
        lambda path: path.write_bytes(lzma.compress(b"x")),
        "it is compressed with xz; unpack it first",
    ),
    "pipe": (os.mkfifo, "it is no regular file"),
    "under another name": (
        lambda path: torch.save({"net": small()}, path),
        "got dict at 'net'; save the state_dict alone, or under 'state_dict' or 'model'",
    ),
    "transformer as fast.ai's": (numbered_transformer, "cannot compute with an input of 224 x 224"),
    "bundle": (bundle, "it is a bundle already; serve it"),
    "flipped bit": (damaged_zip, "it is damaged: the checksum of "),
    "safetensors cut off": (
        lambda path: path.write_bytes((20).to_bytes(8, "little") + b'{"a":1}' + bytes(20)),
        "it is no sound safetensors file",
    ),
}


@pytest.fixture
def imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[], tuple[int, str]]]:
    """Import what lies in the folder as "c"; return status and error, all else looked at."""
    monkeypatch.chdir(folder)

    def run() -> tuple[int, str]:
        status = run_command(["import", str(folder / "c"), "-o", "out"], {})
        done = capsys.readouterr()
        assert done.out == ""
        assert {path.name for path in folder.iterdir()} <= ({"c"} if status else {"c", "out"})
        return status, done.err

    yield run
    (folder / "out").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_checkpoint_is_told_on_one_line(
    kind: str, folder: Path, imported: Callable[[], tuple[int, str]]
) -> None:
    """What was found, and what to do; no code is run and no file is written."""
    make, words = REFUSED[kind]
    make(folder / "c")
    status, error = imported()
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith(f"swiprd import: {folder / 'c'}: ")
    assert words in line


# --- damage --------------------------------------------------------------------------------------


def cut(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data[: chance.randrange(len(data))])


def flipped(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 3, 50))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def flipped_in_front(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 2, 5))):
        data[chance.randrange(4000)] ^= 1 << chance.randrange(8)
    return bytes(data)


def erased(data: bytearray, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    data[start : start + chance.randrange(1, 5000)] = bytes(min(5000, len(data) - start))
    return bytes(data)


def spliced(data: bytearray, chance: random.Random) -> bytes:
    start, end = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
    return bytes(data[:start] + data[end:])


DAMAGES = (cut, flipped, flipped_in_front, erased, spliced)


def misshapen(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    name = chance.choice([name for name, tensor in tensors.items() if tensor.ndim > 0])
    tensor = tensors[name]
    other = chance.choice(
        (tensor[:0], tensor[None], tensor.flatten()[:-1], torch.cat([tensor] * 2))
    )
    return tensors | {name: other}


def not_finite(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    name = chance.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
    tensor = tensors[name].clone()
    tensor.view(-1)[chance.randrange(tensor.nelement())] = chance.choice((math.nan, math.inf))
    return tensors | {name: tensor}


def renamed(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    name = chance.choice([n for n in tensors if not n.endswith("num_batches_tracked")])
    return {f"{n}x" if n == name else n: tensor for n, tensor in tensors.items()}


ALTERATIONS = (misshapen, not_finite, renamed)


@pytest.mark.parametrize("layout", ["zip", "stream", "safetensors"])
def test_damage_to_a_checkpoint_is_told_and_leaves_no_file(
    layout: str, folder: Path, imported: Callable[[], tuple[int, str]]
) -> None:
    """Of 200 damaged files none runs code, leaves a part, or raises anything but one clear line.

    A zip file has checksums: what is imported all the same has the weights that it had. The
    others have none: there a changed weight that is still a number cannot be told from another.
    """
    LAYOUTS[layout](small(), folder / "c")
    whole = (folder / "c").read_bytes()
    chance = random.Random(layout)  # noqa: S311 - no secret
    survived = 0
    for number in range(200 if layout == "zip" else 60):
        if number % 8 < 5:
            (folder / "c").write_bytes(DAMAGES[number % 8](bytearray(whole), chance))
        else:
            LAYOUTS[layout](ALTERATIONS[number % 8 - 5](small(), chance), folder / "c")
        status, error = imported()
        if status == 0:
            survived += 1
            assert number % 8 < 5, "an altered network was imported"
            if layout == "zip":
                _assert_unchanged(folder / "out")
            (folder / "out").unlink()
        else:
            assert error.splitlines()[-1].startswith("swiprd import: "), number
            assert "Traceback" not in error
            assert error.splitlines()[-1].isprintable()
    assert survived <= (10 if layout == "zip" else 40)


def _assert_unchanged(path: Path) -> None:
    stored = read_bundle(str(path)).tensors
    for name, tensor in small().items():
        assert bytes(stored[name].data) == bytes(_stored(tensor).data), name


def serve(path: Path) -> None:
    found = read_bundle(str(path))
    Model(found, eager(found), max_pixels=10**6).check_golden()


def test_damage_to_a_bundle_is_told(folder: Path, imported: Callable[[], tuple[int, str]]) -> None:
    """Of 200 damaged bundles none is served: every byte counts in the checksum."""
    torch.save(small(), folder / "c")
    status, error = imported()
    assert status == 0, error
    path = folder / "out"
    whole, good = path.read_bytes(), read_bundle(str(path))
    images = {golden.image for golden in good.manifest.golden}
    weights = [name for name in good.tensors if name not in images]
    chance = random.Random(5)  # noqa: S311 - no secret
    refused = 0
    for number in range(200):
        if number % 8 < 5:
            damaged = DAMAGES[number % 8](bytearray(whole), chance)
            if damaged == whole:
                continue
            path.write_bytes(damaged)
        else:
            # Well-formed, and with a checksum of its own.
            changed = dict(small())
            changed = ALTERATIONS[number % 8 - 5](changed, chance)
            tensors = {n: _stored(t) for n, t in changed.items()}
            tensors |= {name: good.tensors[name] for name in images}
            write_bundle(str(path), good.manifest, tensors)
        with pytest.raises(BundleError) as caught:
            serve(path)
        assert str(caught.value).isprintable()
        refused += 1
    assert refused >= 195
    assert len(weights) > 100


NAMES = [
    "a\nb\x1b[31m",
    "9" * 5000,
    "0.weight\n",
    "1.\u2028.x",
    "",
    ".",
    "1.x.weight",
    "\u0661.weight",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("value", [7, torch.zeros(2), torch.zeros(1, 1, 1, 1)], ids=str)
def test_errors_are_one_line_whatever_the_names_are(
    name: str, value: Any, folder: Path, imported: Callable[[], tuple[int, str]]
) -> None:
    """A tensor's name is a stranger's text."""
    torch.save({name: value, "0.0.weight": torch.zeros(1, 1, 1, 1)}, folder / "c")
    status, error = imported()
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith(f"swiprd import: {folder / 'c'}: ")
    assert line.isprintable()
    assert len(line) < 2500
