"""The commands import, show and verify: a checkpoint becomes a bundle that is served."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from swiprd.bundle import read_bundle, write_bundle
from swiprd.commands import run_command
from tests import checkpoints
from tests.checkpoints import FASTAI, expected
from tests.conftest import StartDaemon

SCORED = [name for name, found in expected("0.7").items() if found["status"] == "ok"]
SMALL = "shufflenet_v2_x0_5"

pytestmark = pytest.mark.usefixtures("one_thread")


def swiprd(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "swiprd", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "SWIPRD_CACHE_DIR": "/nonexistent"},
    )


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that fast.ai 0.7 wrote."""
    path = tmp_path_factory.mktemp("compact") / "compact.h5"
    path.write_bytes(checkpoints.unpacked())
    return path


@pytest.fixture(scope="module")
def imported(compact: Path) -> Path:
    """The bundle that the command makes of it."""
    bundle = compact.parent / "compact.safetensors"
    done = swiprd("import", compact, "-o", bundle, "--labels", "NO,YES")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == (
        "swiprd import: found: fast.ai 0.7, resnext50_32x4d, head concat_pool batch_norm linear"
        " relu batch_norm linear, 2 classes"
    )
    assert lines[1] == "swiprd import: labels NO, YES; activation softmax"
    assert lines[2].startswith("swiprd import: pictures: short_side to 224 by area, crop 224, EXIF")
    assert lines[3] == f"swiprd import: wrote {bundle}, {read_bundle(str(bundle)).digest}"
    return bundle


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of torchvision's that is quick to import."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save(models.get_model(SMALL, num_classes=3).state_dict(), path)
    return path


# --- import --------------------------------------------------------------------------------------


def test_the_bundle_is_served(imported: Path, start_daemon: StartDaemon) -> None:
    """The daemon loads it, checks its golden answers, and gives fast.ai's scores."""
    daemon = start_daemon("--model", str(imported))
    with daemon.client(timeout=60) as client:
        result = client.compute(FASTAI / SCORED[0])
    assert result.labels == ("NO", "YES")
    assert result.scores[1] == pytest.approx(expected("0.7")[SCORED[0]]["p_yes"], abs=1e-4)


def test_check_prints_the_tuples(compact: Path, folder: Path) -> None:
    """One line a picture on standard output; one that cannot be scored is told, and is status 1."""
    good, bad = FASTAI / SCORED[0], FASTAI / "45_not_image.jpg"
    done = swiprd("import", compact, "-o", folder / "b", "--check", bad, good)
    assert done.returncode == 1
    scores, path = done.stdout.split("  ")
    assert path == f"{good}\n"
    wanted = expected("0.7")[SCORED[0]]["p_yes"]
    assert float(scores.split(",")[1]) == pytest.approx(wanted, abs=1e-4)
    assert f"{bad}: expected a picture" in done.stderr
    assert "labels 0, 1;" in done.stderr


def test_golden_answers_come_from_pictures_in_the_bundle(imported: Path) -> None:
    """They differ from one another, so that a model that answers always the same is noticed."""
    bundle = read_bundle(str(imported))
    first, second = bundle.manifest.golden
    assert first.scores != second.scores
    assert io.BytesIO(bundle.tensors[first.image].data).read(4) == b"\x89PNG"


FLAGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "nothing": ([], {"short_side": 256, "crop": 224, "fit": "short_side", "resample": "bilinear"}),
    "size": (["--size", "112"], {"short_side": 128, "crop": 112}),
    "short side": (["--size", "64", "--short-side", "80"], {"short_side": 80, "crop": 64}),
    "squish": (["--fit", "squish"], {"fit": "squish", "short_side": 224, "crop": 224}),
    "square": (["--fit", "square", "--size", "96"], {"fit": "square", "short_side": 96}),
    "filter": (["--resample", "area"], {"resample": "area"}),
    "orientation": (["--orientation", "apply"], {"orientation": "apply"}),
    "mean, std": (
        ["--mean", "0,0,0.5", "--std", "1,1,2"],
        {"mean": (0.0, 0.0, 0.5), "std": (1.0, 1.0, 2.0)},
    ),
    "margin": (["--jpeg-margin", "2"], {"jpeg_margin": 2.0}),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_what_is_not_in_the_file_can_be_said(kind: str, small: Path, folder: Path) -> None:
    """Left out, it is what torchvision does."""
    flags, wanted = FLAGS[kind]
    assert run_command(["import", str(small), "-o", str(folder / "b"), *flags], {}) == 0
    rules = dataclasses.asdict(read_bundle(str(folder / "b")).manifest.preprocessing)
    assert {key: rules[key] for key in wanted} == wanted


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_the_activation_can_be_said(
    activation: str, small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of several labels, each for itself, or numbers as they are."""
    picture = FASTAI / SCORED[0]
    words = ["import", str(small), "-o", str(folder / "b"), "--activation", activation]
    assert run_command([*words, "--check", str(picture)], {}) == 0
    scores = [float(score) for score in capsys.readouterr().out.split("  ")[0].split(",")]
    assert read_bundle(str(folder / "b")).manifest.activation == activation
    assert len(scores) == 3
    assert (abs(sum(scores) - 1) < 1e-5) == (activation == "softmax")
    assert all(0 < score < 1 for score in scores) == (activation != "none")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "A,B"], "expected 3 different labels, as the checkpoint has classes"),
        (["--labels", "A,B,C,D"], "expected 3 different labels"),
        (["--labels", "A,B,B"], "expected 3 different labels"),
        (["--labels", "A,B,"], "expected 3 different labels"),
        (["--labels", ""], "expected 3 different labels"),
        (["--short-side", "100"], "expected --short-side to be at least the input's side, 224"),
        (["--arch", "resnet18"], "not those of resnet18: it begins with conv1.0.weight (24, 3, 3"),
        (["--arch", "resnet19"], "no architecture 'resnet19' is known, expected one of alexnet"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_the_file_is_refused(
    flags: Any, words: str, small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one line that names the file, and nothing is written."""
    assert run_command(["import", str(small), "-o", str(folder / "b"), *flags], {}) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"swiprd import: {small}: ")
    assert words in line
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--size", "0"],
        ["--size", "4097"],
        ["--size", "2.5"],
        ["--mean", "1,2"],
        ["--mean", "a,b,c"],
        ["--std", "1,0,1"],
        ["--std", "nan,1,1"],
        ["--fit", "long"],
        ["--resample", "cubic"],
        ["--activation", "tanh"],
        ["--jpeg-margin", "0.5"],
        ["--jpeg-margin", "inf"],
        ["--lables", "A,B,C"],
    ],
    ids=" ".join,
)
def test_a_flag_that_is_wrong_in_itself_is_wrong_usage(
    flags: list[str], small: Path, folder: Path
) -> None:
    """Before any file is read."""
    with pytest.raises(SystemExit) as caught:
        run_command(["import", str(small), "-o", str(folder / "b"), *flags], {})
    assert caught.value.code == 2
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told(small: Path, folder: Path) -> None:
    """No traceback, and no part of a file."""
    done = swiprd("import", small, "-o", folder / "none" / "b")
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_that_was_there_before_stays_when_the_import_fails(
    small: Path, folder: Path
) -> None:
    """It is replaced at the end, or not at all."""
    (folder / "b").write_text("old")
    assert run_command(["import", str(small), "-o", str(folder / "b"), "--labels", "A"], {}) == 1
    assert (folder / "b").read_text() == "old"
    assert run_command(["import", str(small), "-o", str(folder / "b")], {}) == 0
    assert read_bundle(str(folder / "b")).manifest.architecture == SMALL


def test_show_prints_no_control_characters(
    small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle is a stranger's file; its names cannot steer a terminal."""
    labels = "A\x1b[31m,B\n,C"
    words = ["import", str(small), "-o", str(folder / "b"), "--labels", labels]
    assert run_command(words, {}) == 0
    capsys.readouterr()
    assert run_command(["show", str(folder / "b")], {"SWIPRD_CACHE_DIR": "/nonexistent"}) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert "A\\x1b[31m B\\n C" in shown


# --- show and verify -----------------------------------------------------------------------------


def test_show_tells_what_the_bundle_holds(imported: Path) -> None:
    """Manifest, digest, size and parameters, for people and as JSON."""
    done = swiprd("show", imported)
    table = dict(row.split(maxsplit=1) for row in done.stdout.splitlines())
    assert table["architecture"] == "resnext50_32x4d"
    assert table["labels"] == "NO YES"
    assert table["compiled"] == "fp32 -, bf16 -"
    found = json.loads(swiprd("show", "--json", imported).stdout)
    assert found["digest"] == table["digest"] == read_bundle(str(imported)).digest
    assert found["bytes"] == imported.stat().st_size
    assert found["preprocessing"]["resample"] == "area"
    assert found["compiled"] == {"fp32": None, "bf16": None}
    # torchvision's resnext50_32x4d without its last layer, and the head: 4096·2, 4096·512+512,
    # 512·2, 512·2+2.
    assert found["parameters"] == 22_979_904 + 8192 + 2_097_664 + 1024 + 1026


def test_verify_tells_whether_the_golden_answers_come_out(imported: Path, folder: Path) -> None:
    """One line for the engine; another answer is a failure that says what was got and expected."""
    done = swiprd("verify", imported)
    assert (done.returncode, done.stdout) == (0, "eager fp32: 2 of 2 golden answers\n")
    bundle = read_bundle(str(imported))
    golden = tuple(dataclasses.replace(g, scores=(0.5, 0.5)) for g in bundle.manifest.golden)
    wrong = folder / "wrong"
    write_bundle(str(wrong), dataclasses.replace(bundle.manifest, golden=golden), bundle.tensors)
    done = swiprd("verify", wrong)
    assert (done.returncode, done.stdout) == (1, "")
    assert "golden picture 0 scores " in done.stderr
    assert "expected 0.500000,0.500000 within 0.0001" in done.stderr
