"""The model's file: what is written reads back, and whatever else is refused: swiprd.bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiprd.bundle import (
    IMAGE_FORMATS,
    BundleError,
    BundleFile,
    Golden,
    Manifest,
    Preprocessing,
    read_bundle,
    write_bundle,
)
from swiprd.config import DEFAULT_BUNDLE
from swiprd.safetensors import ITEM_SIZES, Tensor
from tests.tasks import PATIENCE, unprivileged

PREPROCESSING = Preprocessing(
    formats=("JPEG", "PNG"),
    orientation="jpeg",
    alpha="white",
    deep="clip",
    truncated=True,
    jpeg_margin=1.5,
    fit="square",
    short_side=256,
    rounding="round",
    resample="bicubic",
    crop=224,
    crop_start="even",
    scale=255.0,
    mean=(0.5, 0.25, -0.125),
    std=(1.0, -2.0, 0.5),
)
MANIFEST = Manifest(
    name="café",
    architecture="some_net",
    head=None,
    labels=("YES", "N O", "née"),
    outputs=(((0, 3), (7, 8)), ((3, 7),), ((8, 1000),)),
    activation="softmax",
    preprocessing=PREPROCESSING,
    golden=(Golden("golden.0", (0.5, 0.25, 0.25)), Golden("picture", (1.0, 0.0, 0.0))),
    source="made for a test",
    license="MIT",
)


def tensor(dtype: str, *shape: int, data: bytes) -> Tensor:
    return Tensor(dtype, shape, memoryview(data))


TENSORS = {
    "golden.0": tensor("U8", 5, data=b"GIF89"),
    "picture": tensor("U8", 0, data=b""),
    "weights": tensor("F32", 2, 3, data=bytes(range(24))),
    "scalar": tensor("I64", data=b"12345678"),
    "half": tensor("F16", 3, data=b"abcdef"),
    "née": tensor("BF16", 1, 1, 1, 1, data=b"xy"),
    "double": tensor("F64", 1, data=b"abcdefgh"),
}


def written(folder: Path) -> Path:
    path = folder / "model.safetensors"
    write_bundle(str(path), MANIFEST, TENSORS)
    return path


def joined(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def refusal(path: str | os.PathLike[str]) -> str:
    """Return the message of the BundleError; nothing else may be raised, and nothing read."""
    with pytest.raises(BundleError) as caught:
        read_bundle(os.fspath(path))
    message = str(caught.value)
    assert type(caught.value) is BundleError
    assert os.fspath(path) in message
    assert message.isprintable(), "expected one line"
    assert not message.endswith((".", " "))
    return message


@pytest.fixture
def refused(folder: Path) -> Callable[[bytes], str]:
    """Return the message with which a file of this content is refused."""

    def refused(content: bytes) -> str:
        path = folder / "bad.safetensors"
        path.write_bytes(content)
        return refusal(path)

    return refused


@pytest.fixture
def edited(folder: Path, refused: Callable[[bytes], str]) -> Callable[..., str]:
    """Return the message with which a good bundle is refused once its header was edited."""
    content = written(folder).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    def edited(edit: Callable[[dict[str, Any], dict[str, Any]], object], more: bytes = b"") -> str:
        tensors = json.loads(content[8:end])
        manifest = json.loads(tensors["__metadata__"]["swipr"])
        edit(tensors, manifest)
        tensors["__metadata__"]["swipr"] = json.dumps(manifest)
        return refused(joined(json.dumps(tensors).encode(), content[end:] + more))

    return edited


# --- written and read ----------------------------------------------------------------------------


def test_a_written_bundle_reads_back_the_same(folder: Path) -> None:
    """Every field of the manifest and every tensor survives the file."""
    bundle = read_bundle(str(written(folder)))
    assert bundle.manifest == MANIFEST
    assert bundle.tensors == TENSORS
    assert list(bundle.tensors) == list(TENSORS)
    assert sorted(tensor.dtype for tensor in TENSORS.values()) == sorted([*ITEM_SIZES, "U8"])


@pytest.mark.parametrize("label", ["a\nSTATUS=b", "\x1b[31m", "\ud800", "\u202e"])
def test_labels_that_cannot_be_shown_are_refused(edited: Callable[..., str], label: str) -> None:
    """They stand in logs, on terminals and in what the service manager is told."""

    def edit(header: dict[str, Any], manifest: dict[str, Any]) -> None:
        manifest["labels"][0] = label

    assert "labels that can be shown on a line" in edited(edit)


def test_a_header_of_any_length_is_read(folder: Path) -> None:
    """Also one whose length begins as a pickle does, which a header in 32 does."""
    path = folder / "model.safetensors"
    begun = set()
    for length in range(0, 256, 8):
        manifest = dataclasses.replace(MANIFEST, source="x" * (length + 1))
        write_bundle(str(path), manifest, TENSORS)
        begun.add(path.read_bytes()[0])
        assert read_bundle(str(path)).manifest == manifest
    assert 0x80 in begun


def test_a_bundle_without_outputs_has_one_output_a_label(folder: Path) -> None:
    """None is kept as None, which is how it is told from ranges."""
    path = str(folder / "model")
    write_bundle(path, dataclasses.replace(MANIFEST, outputs=None), TENSORS)
    assert read_bundle(path).manifest.outputs is None


def test_the_digest_is_that_of_the_bytes_of_the_file(folder: Path) -> None:
    """Sha256sum of the file says the same, so that a reply can be traced to its model."""
    path = written(folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_bundle(str(path)).digest == f"sha256:{digest}"
    write_bundle(str(path), dataclasses.replace(MANIFEST, name="other"), TENSORS)
    assert read_bundle(str(path)).digest != f"sha256:{digest}"


@pytest.mark.parametrize("place", [-1, -32, -33, -40, 300, 8, 9])
def test_a_changed_byte_anywhere_is_noticed(place: int, folder: Path) -> None:
    """In a weight too, where nothing else would tell."""
    path = written(folder)
    changed = bytearray(path.read_bytes())
    changed[place] ^= 1
    path.write_bytes(changed)
    assert "is no bundle that can be served" in refusal(path)


def test_a_bundle_without_a_checksum_is_refused(folder: Path) -> None:
    """Nothing would tell whether it is whole."""
    path = written(folder)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["checksum"]
    path.write_bytes(joined(json.dumps(header).encode(), content[end:-32]))
    assert refusal(path).endswith("it has no checksum; make it again")


def test_the_same_model_always_gives_the_same_bytes(folder: Path) -> None:
    """A bundle made again has the digest that it had."""
    path = written(folder)
    content = path.read_bytes()
    assert written(folder).read_bytes() == content


def test_the_tensors_may_be_written_to_and_are_aligned(folder: Path) -> None:
    """Torch makes tensors of this memory without a copy, and warns when it is read-only."""
    path = written(folder)
    assert not any(tensor.data.readonly for tensor in read_bundle(str(path)).tensors.values())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_bundle_is_what_the_safetensors_library_reads(folder: Path) -> None:
    """The library finds the same names, types, shapes and bytes, and the manifest as metadata."""
    import safetensors

    path = written(folder)
    found = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    assert found.keys() == TENSORS.keys() | {"checksum"}
    for name, tensor in TENSORS.items():
        assert found[name]["dtype"] == tensor.dtype
        assert tuple(found[name]["shape"]) == tensor.shape
        assert bytes(found[name]["data"]) == tensor.data


@pytest.mark.parametrize("place", ["none/model", "taken", "file/model"])
def test_a_bundle_that_cannot_be_written_leaves_nothing_behind(place: str, folder: Path) -> None:
    """A missing folder, a folder in its place or a file for a folder: OSError, and no new file."""
    (folder / "taken").mkdir()
    (folder / "taken" / "in it").touch()
    (folder / "file").touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(OSError, match=place):
        write_bundle(str(folder / place), MANIFEST, TENSORS)
    assert sorted(folder.rglob("*")) == before


def test_a_bundle_is_replaced_whole(folder: Path) -> None:
    """Whoever has the old file open still reads the old bundle, to its end."""
    path = written(folder)
    with path.open("rb") as old:
        content = path.read_bytes()
        write_bundle(str(path), dataclasses.replace(MANIFEST, name="new"), TENSORS)
        assert old.read() == content
    assert read_bundle(str(path)).manifest.name == "new"


def test_importing_the_bundle_brings_no_torch() -> None:
    """What is no bundle is told at once, not after seconds of loading."""
    code = "import sys, swiprd.bundle; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_default_bundle_is_small_and_says_what_it_is() -> None:
    """It has at most 10 MB, names its source and licence, and gives the labels of the README."""
    assert Path(DEFAULT_BUNDLE).stat().st_size <= 10_000_000
    manifest = read_bundle(DEFAULT_BUNDLE).manifest
    assert manifest.labels == ("other", "animal")
    assert manifest.license == "Apache-2.0"
    assert "EfficientNet-Lite0" in manifest.source
    assert manifest.preprocessing.formats == IMAGE_FORMATS
    assert len(manifest.golden) >= 2


def test_a_bundle_cut_off_anywhere_is_refused(
    folder: Path, refused: Callable[[bytes], str]
) -> None:
    """Every length short of the whole is told from the whole, and one byte more is too."""
    content = written(folder).read_bytes()
    for length in range(len(content)):
        assert "cut off" in refused(content[:length]) or length < 8
    assert "1 bytes follow its last tensor" in refused(content + b"\0")


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 40)


def change_a_weight(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"?")


@pytest.mark.parametrize(
    ("change", "problem"),
    [(cut_off, "it changed while it was read"), (change_a_weight, "its checksum is wrong")],
)
def test_what_happens_to_an_open_bundle_is_noticed(
    change: Callable[[Path], None], problem: str, folder: Path
) -> None:
    """Its manifest was sound, and its weights are what the checksum says or are not served."""
    path = folder / "large.safetensors"  # larger than what comes along with the header
    write_bundle(str(path), MANIFEST, {**TENSORS, "more": tensor("U8", 2**20, data=bytes(2**20))})
    with contextlib.closing(BundleFile(str(path))) as file:
        change(path)
        with pytest.raises(BundleError, match=problem) as caught:
            file.read()
    assert str(path) in str(caught.value)


def test_a_released_bundle_has_no_memory(folder: Path) -> None:
    """Whoever still holds it, and the file that it came from; what it would give is an error."""
    with contextlib.closing(BundleFile(str(written(folder)))) as file:
        bundle = file.read()
    data = bundle.tensors["weights"].data
    memory = weakref.ref(data.obj)
    assert memory() is not None
    bundle.release()
    assert memory() is None
    with pytest.raises(ValueError, match="released"):
        bytes(data)


NO_BUNDLES = [
    *(b"", b"\0", b"\0" * 7, b"\0" * 8, b"\0" * 4096, b"\xff" * 100, b"PK\x03\x04" * 100),
    *(length.to_bytes(8, "little") + b"{}" for length in (3, 2**31, 2**63, 2**64 - 1)),
    *map(joined, (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}")),
    *map(joined, (b'"\xff"', b'{"a":1,"a":1}', b'{"a":' + b"9" * 10_000 + b"}")),
    *map(joined, (b"[" * 100_000, b'{"a":' * 100_000)),
    *map(joined, (b'{"__metadata__":1}', b'{"__metadata__":{}}', b'{"__metadata__":{"swipr":1}}')),
]
NO_MANIFESTS = ("", "{", "[]", "{}", "1", '{"format":1}', "[" * 100_000, '{"a":1,"a":1}')


def test_what_is_no_bundle_is_refused(refused: Callable[[bytes], str]) -> None:
    """Whatever stands in the file, the answer is one BundleError that names it."""
    metadata = [{"__metadata__": {"swipr": text}} for text in NO_MANIFESTS]
    for content in NO_BUNDLES + [joined(json.dumps(header).encode()) for header in metadata]:
        assert "is no bundle that can be served: " in refused(content), content[:60]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 8))
def test_a_damaged_header_is_refused_or_still_a_header(seed: int, flips: int) -> None:
    """Bytes changed at random give a BundleError or a bundle, never another exception."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    with tempfile.NamedTemporaryFile() as file:
        write_bundle(file.name + "x", MANIFEST, TENSORS)
        os.rename(file.name + "x", file.name)
        content = bytearray(Path(file.name).read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        for _ in range(flips):
            content[chance.randrange(end)] = chance.choice((chance.randrange(256), *b'"{}[],:0-9'))
        Path(file.name).write_bytes(content)
        try:
            digest = read_bundle(file.name).digest
        except BundleError:
            assert "no bundle that can be served" in refusal(file.name)
        else:
            assert digest == "sha256:" + hashlib.sha256(content).hexdigest()


def test_a_missing_bundle_and_a_directory_are_refused(folder: Path) -> None:
    """The message says which it is."""
    path = folder / "none"
    assert refusal(path) == f"cannot read the bundle {path}: No such file or directory"
    assert refusal(folder) == f"cannot read the bundle {folder}: Is a directory"


def test_a_bundle_without_permission_is_refused(folder: Path) -> None:
    """The message says so; it is the operator's to change."""
    path = written(folder)
    folder.chmod(0o755)
    path.chmod(0)
    with unprivileged():
        assert refusal(path) == f"cannot read the bundle {path}: Permission denied"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/proc/version", "/proc/self/mem"])
def test_a_file_without_a_size_is_no_bundle(path: str) -> None:
    """Devices and files that the kernel makes up say that they have no bytes, and are believed."""
    assert "expected a safetensors file" in refusal(path)


def test_a_pipe_is_no_bundle_and_is_not_waited_for(folder: Path) -> None:
    """A pipe that nobody writes to is refused, where waiting would look like slow loading."""
    path = folder / "pipe"
    os.mkfifo(path)
    messages: list[str] = []
    reader = threading.Thread(target=lambda: messages.append(refusal(path)))
    reader.start()
    reader.join(1)
    waits = reader.is_alive()
    if waits:
        os.close(os.open(path, os.O_WRONLY))  # lets it go
    reader.join(PATIENCE)
    assert not waits
    (message,) = messages
    assert "expected a safetensors file, got 0 bytes" in message


def test_a_bundle_larger_than_the_memory_is_refused(folder: Path) -> None:
    """A file of which one can only hold a part is refused as any other, not with a MemoryError."""
    path = folder / "large"
    path.touch()
    os.truncate(path, 2**36)  # without a block on the disk
    code = (
        "import resource, sys\n"
        "from swiprd.bundle import BundleError, read_bundle\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        "try:\n    read_bundle(sys.argv[1])\nexcept BundleError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(path) in done.stdout
    assert done.stdout.endswith("there is not enough memory for it\n")


def test_a_path_that_no_file_can_have_is_refused() -> None:
    """A NUL or half a character in the path is a bundle that cannot be read, like any other."""
    for path in ("/in\0valid", "/in\ud800valid"):
        with pytest.raises(BundleError):
            read_bundle(path)


# --- manifests and tensors that are wrong --------------------------------------------------------


def replaced(*path: str | int, value: Any) -> Callable[[Any, Any], None]:
    """Return an edit that puts ``value`` at ``path`` in the manifest."""

    def edit(_: Any, manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return edit


FIELDS: dict[tuple[str, ...], list[Any]] = {
    ("format",): [0, 2, -1, 2**31, 2**40, 10**400, 1.0, "1", True],
    ("name",): [1, ["a"]],
    ("architecture",): [1, {}],
    ("labels",): [[], ["a", "a", "b"], [1, 2, 3], ["a", None, "b"], "abc", {"a": 1}, ["a"]],
    ("activation",): ["", "tanh", "Softmax", 1, ["softmax"]],
    ("preprocessing",): [[], "area", 1],
    ("golden",): [[], {}, [1], [[]], "golden.0"],
    ("source",): [1, {}],
    ("license",): [0, ["MIT"]],
    ("preprocessing", "formats"): [[], ["PSD"], ["jpeg"], ["JPEG", 1], "JPEG", {"JPEG": 1}],
    ("preprocessing", "orientation"): ["", "rotate", 1, True],
    ("preprocessing", "truncated"): [0, 1, "true", []],
    ("preprocessing", "alpha"): ["", "grey", 0],
    ("preprocessing", "deep"): ["", "low_byte", 16],
    ("preprocessing", "jpeg_margin"): [0.5, -1, 4097, "2", True, float("inf"), 10**400],
    ("preprocessing", "fit"): ["", "long_side", 1],
    ("preprocessing", "rounding"): ["", "ceil", None, 1],
    ("preprocessing", "crop_start"): ["", "floor", 0],
    ("preprocessing", "resample"): ["trilinear", 3],
    ("preprocessing", "short_side"): [0, -1, 223, 4097, 10**400, 256.0, "256", True],
    ("preprocessing", "crop"): [0, -1, 257, 10**400, 1.5, "1", False],
    ("preprocessing", "scale"): [0, 0.0, -0.0, float("inf"), float("nan"), "1", True, 10**400],
    ("preprocessing", "mean"): [[], [0, 0], [0] * 4, [0, 0, "0"], [0, 0, True], 0, [0, 0, 10**400]],
    ("preprocessing", "std"): [[1, 1, 0], [1, 1, 0.0], [1, 1], [1, 1, float("inf")], [1, 1, None]],
}


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_of_the_wrong_kind_is_refused(
    path: tuple[str, ...], edited: Callable[..., str]
) -> None:
    """Each field has a type and a range; the message says what was expected instead."""
    for value in [None, *FIELDS[path]]:
        wanted = "no golden answers" if (path, value) == (("golden",), []) else "expected"
        assert wanted in edited(replaced(*path, value=value)), value


@pytest.mark.parametrize("path", [*FIELDS, ("golden", 0, "image"), ("golden", 0, "scores")])
def test_a_missing_field_is_refused_by_name(
    path: tuple[str | int, ...], edited: Callable[..., str]
) -> None:
    """No field has a default that somebody would have to know of."""

    def edit(_: Any, manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    assert f"'{path[-1]}'" in edited(edit)


OUTPUTS: list[Any] = [
    0, "0-3", {}, [], [[[0, 1]]], [[[0, 1]]] * 4, [[[0, 1]], [[1, 2]], []], [[0, 1]] * 3,
    [[[0]]] * 3, [[[0, 1, 2]]] * 3, [[[1, 1]]] * 3, [[[2, 1]]] * 3, [[[-1, 1]]] * 3,
    [[[0, 1.0]]] * 3, [[[False, True]]] * 3, [[["0", "1"]]] * 3, [[None]] * 3,
]  # fmt: skip


def test_outputs_that_are_no_ranges_for_each_label_are_refused(edited: Callable[..., str]) -> None:
    """A range is two whole numbers from 0 up, the first the smaller; each label has one or more."""
    for value in OUTPUTS:
        assert "expected 'outputs' to be ranges" in edited(replaced("outputs", value=value)), value


GOLDEN: dict[str, list[Any]] = {
    "image": [None, 0, "none", "weights", "half"],
    "scores": [None, [], [1, 0], [1, 0, 0, 0], [1, 0, "0"], [1, 0, float("nan")], [1, 0, 10**400]],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_answers_that_cannot_be_checked_are_refused(
    key: str, edited: Callable[..., str]
) -> None:
    """Each has a picture among the tensors, as bytes, and a finite score for each label."""
    for value in GOLDEN[key]:
        message = edited(replaced("golden", 1, key, value=value))
        assert f"{key!r} of each of 'golden'" in message or "its golden picture" in message, value


ENTRIES: dict[str, list[Any]] = {
    "dtype": ["F8", "f32", "", 1, None, ["F32"], "I32", "F64"],
    "shape": [[2, 2], [6, 1, 2], [-2, -3], [2, 3.0], [True, 6], "23", None, 6, [10**400], [0],
              [9] * 300_000, [1] * 17, [2**41, 0]],
    "data_offsets": [
        [5, 28], [6, 30], [4, 28], [0, 24], [29, 5], [-19, 5], [5], [5, 29, 29], [5.0, 29], None,
        ["5", "29"], [5, 10**400], [10**400, 5], [2**64 + 5, 2**64 + 29], [5, 2**63], {}, [],
    ],
}  # fmt: skip


@pytest.mark.parametrize("key", ENTRIES)
def test_a_tensor_that_does_not_fit_is_refused(key: str, edited: Callable[..., str]) -> None:
    """Type, shape and place must agree with one another and with the length of the file."""
    for value in ENTRIES[key]:
        change = {key: value}
        message = edited(lambda tensors, _, change=change: tensors["weights"].update(change))
        assert "tensor" in message.partition(": ")[2], value


@pytest.mark.parametrize("value", [None, [], 1, "F32", {}, {"dtype": "U8"}], ids=repr)
def test_an_entry_that_describes_no_tensor_is_refused(
    value: Any, edited: Callable[..., str]
) -> None:
    """Each name in the header but the metadata's is a tensor's."""
    message = edited(lambda tensors, _: tensors.update({"more": value}))
    assert "expected" in message
    assert "'more'" in message


def test_tensors_may_neither_overlap_nor_leave_a_gap(edited: Callable[..., str]) -> None:
    """Every byte of the file belongs to one tensor, so nothing hides in it."""
    twin = {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}
    assert "overlap" in edited(lambda tensors, _: tensors.update(twin=twin))
    assert "gap" in edited(lambda tensors, _: tensors.pop("weights"))
    assert "3 bytes follow" in edited(lambda *_: None, b"abc")
