"""swiprd import, show and verify: a fast.ai 0.7 checkpoint becomes a bundle that is served."""

from __future__ import annotations

import dataclasses
import io
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiprd.bundle import read_bundle, write_bundle
from swiprd.checkpoint import CheckpointError, read_checkpoint
from swiprd.fastai import recognise
from swiprd.model import Model
from swiprd.network import RESNETS
from tests.conftest import StartDaemon
from tests.daemon import code_of

FASTAI = Path(__file__).parent / "fastai"
EXPECTED: dict[str, Any] = json.loads((FASTAI / "expected.json").read_text())["images"]
PICTURES = [name for name in EXPECTED if (FASTAI / name).exists()]
SCORED = [name for name in PICTURES if EXPECTED[name]["status"] == "ok"]

pytestmark = pytest.mark.usefixtures("one_thread")


def swiprd(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "swiprd", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, unpacked."""
    path = tmp_path_factory.mktemp("compact") / "compact.h5"
    path.write_bytes(lzma.decompress((FASTAI / "compact.h5.xz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def imported(compact: Path) -> Path:
    """The bundle that the command makes of it."""
    bundle = compact.parent / "compact.safetensors"
    done = swiprd("import", compact, "-o", bundle, "--labels", "NO,YES")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "fast.ai 0.7, resnext50_32x4d, head concat_pool batch_norm linear relu" in done.stderr
    assert "2 classes: NO, YES" in done.stderr
    return bundle


@pytest.fixture(scope="module")
def model(imported: Path) -> Model:
    return Model(read_bundle(str(imported)), max_pixels=10**7)


# --- right to the last digit ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORED)
def test_the_scores_are_fastais(model: Model, name: str) -> None:
    """For each picture that fast.ai scored; CMYK is converted a little otherwise."""
    no, yes = model.compute((FASTAI / name).read_bytes())
    within = 0.02 if "cmyk" in name else 1e-4
    assert yes == pytest.approx(EXPECTED[name]["p_yes"], abs=within)
    assert no + yes == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", sorted(set(PICTURES) - set(SCORED)))
def test_what_fastai_could_not_read_is_no_image(model: Model, name: str) -> None:
    """It gets an error, not a score."""
    assert code_of(lambda: model.compute((FASTAI / name).read_bytes())) == "not_an_image"


def test_the_bundle_is_served(imported: Path, start_daemon: StartDaemon) -> None:
    """The daemon loads it, checks its golden answers, and gives the same digits."""
    daemon = start_daemon("--model", str(imported))
    name = SCORED[0]
    with daemon.client(timeout=60) as client:
        result = client.compute(FASTAI / name)
    assert result.labels == ("NO", "YES")
    assert result.scores[1] == pytest.approx(EXPECTED[name]["p_yes"], abs=1e-4)


def test_check_prints_the_tuples(compact: Path, folder: Path) -> None:
    """One line a picture on standard output; one that cannot be scored is told, and is status 1."""
    good, bad = FASTAI / SCORED[0], FASTAI / "45_not_image.jpg"
    done = swiprd("import", compact, "-o", folder / "b", "--check", bad, good)
    assert done.returncode == 1
    scores, path = done.stdout.split("  ")
    assert path == f"{good}\n"
    assert float(scores.split(",")[1]) == pytest.approx(EXPECTED[SCORED[0]]["p_yes"], abs=1e-4)
    assert f"{bad}: expected a picture" in done.stderr
    assert "2 classes: 0, 1" in done.stderr


# --- show ----------------------------------------------------------------------------------------


def test_show_tells_what_the_bundle_holds(imported: Path) -> None:
    """Manifest, digest, size and parameters, for people and as JSON."""
    done = swiprd("show", imported)
    table = dict(row.split(maxsplit=1) for row in done.stdout.splitlines())
    assert table["architecture"] == "resnext50_32x4d"
    assert table["labels"] == "NO YES"
    found = json.loads(swiprd("show", "--json", imported).stdout)
    assert found["digest"] == table["digest"] == read_bundle(str(imported)).digest
    assert found["bytes"] == imported.stat().st_size
    # torchvision's resnext50_32x4d without its last layer, and the head: 4096·2, 4096·512+512,
    # 512·2, 512·2+2.
    assert found["parameters"] == 22_979_904 + 8192 + 2_097_664 + 1024 + 1026


# --- verify --------------------------------------------------------------------------------------


def test_verify_tells_whether_the_golden_answers_come_out(imported: Path, folder: Path) -> None:
    """One line for the engine; another answer is a failure that says what was got and expected."""
    done = swiprd("verify", imported)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "eager fp32: 2 of 2 golden answers\n"
    bundle = read_bundle(str(imported))
    first, second = bundle.manifest.golden
    wrong = dataclasses.replace(first, scores=first.scores[::-1])
    manifest = dataclasses.replace(bundle.manifest, golden=(wrong, second))
    write_bundle(str(folder / "wrong"), manifest, bundle.tensors)
    done = swiprd("verify", folder / "wrong")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("swiprd verify: golden picture 0 scores ")


# --- layouts -------------------------------------------------------------------------------------


def zipped(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


def streamed(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def prefixed(tensors: dict[str, torch.Tensor], path: Path) -> None:
    zipped({f"module.{name}": tensor for name, tensor in tensors.items()}, path)


def wrapped(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"model": tensors, "opt": None}, path)


def counted(tensors: dict[str, torch.Tensor], path: Path) -> None:
    norms = [name for name in tensors if name.endswith("running_mean")]
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for name in norms
    }
    zipped(tensors | counters, path)


@pytest.mark.parametrize("save", [zipped, streamed, prefixed, wrapped, counted])
def test_every_layout_gives_the_same_weights(
    compact: Path, folder: Path, save: Callable[[dict[str, torch.Tensor], Path], None]
) -> None:
    """However torch wrote the file, the same names lead to the same bytes."""
    tensors = read_checkpoint(str(compact))
    save(tensors, folder / "c")
    found = recognise(read_checkpoint(str(folder / "c")))
    wanted = recognise(tensors)
    assert (found.architecture, found.head, found.classes) == ("resnext50_32x4d", wanted.head, 2)
    same = {
        name: tensor
        for name, tensor in found.tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    assert same.keys() == wanted.tensors.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in wanted.tensors.items())


@pytest.mark.parametrize("architecture", [name for name in RESNETS if name.startswith("resnet")])
def test_resnets_are_recognised(architecture: str) -> None:
    """Their blocks keep torchvision's names below the layer's and the block's number."""
    import torchvision

    theirs = torchvision.models.get_model(architecture).state_dict()
    tensors = OrderedDict[str, torch.Tensor]()
    for name, tensor in theirs.items():
        top, _, rest = name.partition(".")
        if top.startswith("layer"):
            tensors[f"{int(top[5:]) + 3}.{rest}"] = tensor
        elif top != "fc":
            tensors[f"{0 if top == 'conv1' else 1}.{rest}"] = tensor
    features = 2 * theirs["fc.weight"].shape[1]
    tensors["11.weight"] = torch.zeros(3, features)
    found = recognise(tensors)
    assert (found.architecture, found.head, found.classes) == (
        architecture,
        ("concat_pool", "linear"),
        3,
    )
    assert found.tensors.keys() - {"head.1.weight"} == theirs.keys() - {"fc.weight", "fc.bias"}


# --- what is refused -----------------------------------------------------------------------------


class Evil:
    """Runs code where it is unpickled without care."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("was-here",))


def evil(path: Path) -> None:
    path.write_bytes(pickle.dumps({"0.weight": Evil()}, protocol=2))


def evil_zip(path: Path) -> None:
    torch.save({"0.weight": Evil()}, path)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))


def head_alone(path: Path) -> None:
    torch.save({"0.weight": torch.ones(4096), "2.weight": torch.ones(2, 4096)}, path)


def not_finite(path: Path) -> None:
    torch.save({"0.weight": torch.tensor([1.0, float("nan")])}, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "an HDF5 file"),
        (lambda path: path.write_bytes(b"hello"), "got a file that begins with b'hello'"),
        (lambda path: path.write_bytes(b"PK\3\4 no zip"), "cannot be read as a checkpoint"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "No such file or directory"),
        (lambda path: torch.save([1, 2], path), "expected named tensors, got list"),
        (lambda path: torch.save({"a": 1}, path), "expected named tensors, got int at 'a'"),
        (lambda path: torch.save({"fc.weight": torch.ones(1)}, path), "got fc.weight"),
        (evil, "save the weights alone"),
        (evil_zip, "save the weights alone"),
        (bomb, "it unpacks to 100000000 bytes"),
        (head_alone, "set learn.precompute = False"),
        (not_finite, "'0.weight' holds values that are not finite"),
    ],
)
def test_what_is_no_checkpoint_is_told_on_one_line(
    make: Callable[[Path], object], words: str, folder: Path
) -> None:
    """What was found, and what to do; no code is run and no file is written."""
    source, target = folder / "c.h5", folder / "b.safetensors"
    make(source)
    done = swiprd("import", source, "-o", target, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"swiprd import: {source}: ")
    assert words in line
    assert {path.name for path in folder.iterdir()} <= {"c.h5"}


def test_damage_is_told_and_never_raises_anything_else(compact: Path, folder: Path) -> None:
    """Cut off or with bytes flipped: a checkpoint, if it still is one, or one clear line."""
    whole = compact.read_bytes()
    chance = random.Random(7)  # noqa: S311
    refused = []
    for number in range(40):
        data = bytearray(whole[: chance.randrange(200_000)] if number % 2 else whole[:-1])
        for _ in range(5):
            data[chance.randrange(min(len(data), 30_000))] ^= 1 << chance.randrange(8)
        (folder / "c").write_bytes(data)
        try:
            recognise(read_checkpoint(str(folder / "c")))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) >= 20
    assert [message for message in refused if "\n" in message] == []


@pytest.mark.parametrize("labels", ["NO", "NO,YES,MAYBE", "NO,NO", "NO,", ""])
def test_labels_that_do_not_fit_are_refused(compact: Path, folder: Path, labels: str) -> None:
    """There must be as many as classes, all different."""
    done = swiprd("import", compact, "-o", folder / "b", "--labels", labels)
    assert done.returncode == 1
    assert "expected 2 different labels" in done.stderr
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told(compact: Path, folder: Path) -> None:
    """No traceback, and no part of a file."""
    done = swiprd("import", compact, "-o", folder / "none" / "b")
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_golden_answers_come_from_pictures_in_the_bundle(imported: Path) -> None:
    """They differ from one another, so that a model that answers always the same is noticed."""
    bundle = read_bundle(str(imported))
    first, second = bundle.manifest.golden
    assert first.scores != second.scores
    assert io.BytesIO(bundle.tensors[first.image].data).read(4) == b"\x89PNG"
