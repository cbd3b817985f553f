"""The commands import, show and verify: a checkpoint becomes a bundle that is served."""

from __future__ import annotations

import dataclasses
import getpass
import io
import json
import os
import subprocess
import sys
import tempfile
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
OURS = ("PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR")
"""Variables of the tests that a user does not have: the one flushes each line, the other keeps
torch out of /tmp."""

pytestmark = pytest.mark.usefixtures("one_thread")


def swiprd(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "swiprd", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in OURS}
        | {"SWIPRD_CACHE_DIR": "/nonexistent"}
        | environment,
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


def test_a_picture_to_check_that_is_not_there_is_told_before_the_work(
    compact: Path, folder: Path
) -> None:
    """No bundle is written, which a script would take for a failure of the import."""
    done = swiprd("import", compact, "-o", folder / "b", "--check", folder / "none.jpg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"swiprd import: {folder / 'none.jpg'}: no such file\n"
    assert list(folder.iterdir()) == []


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
        ["--mean", "123,116,103"],
        ["--std", "58,57,57"],
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


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("none/b", "its folder is not there; make it or choose another"),
        ("folder", "something that is no regular file stands there"),
        ("pipe", "something that is no regular file stands there"),
        ("/dev/null", "something that is no regular file stands there"),
        ("same", "that is the checkpoint itself; choose another output"),
        ("link", "that is the checkpoint itself; choose another output"),
    ],
)
def test_an_output_that_will_not_do_is_told_before_the_work(
    output: str, words: str, small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And whatever stands there is left alone."""
    source = folder / "same"
    source.write_bytes(small.read_bytes())
    (folder / "link").symlink_to("same")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    before = sorted(folder.iterdir())
    target = folder / output  # an absolute one stays itself
    assert run_command(["import", str(source), "-o", str(target)], {}) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"swiprd import: {target}: {words}"
    assert sorted(folder.iterdir()) == before
    assert source.read_bytes() == small.read_bytes()


def test_a_link_leads_to_the_file_that_is_written(small: Path, folder: Path) -> None:
    """The link stays one."""
    (folder / "link").symlink_to("b")
    assert run_command(["import", str(small), "-o", str(folder / "link")], {}) == 0
    assert (folder / "link").is_symlink()
    assert read_bundle(str(folder / "b")).manifest.architecture == SMALL


def test_labels_that_no_reply_could_carry_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the bundle would be made, not when the daemon loads it."""
    torch.save(models.get_model(SMALL, num_classes=5000).state_dict(), folder / "c")
    assert run_command(["import", str(folder / "c"), "-o", str(folder / "b")], {}) == 1
    assert "too many or too long labels: a reply would have" in capsys.readouterr().err
    assert not (folder / "b").exists()


@pytest.mark.parametrize("taken", [False, True])
def test_nothing_is_left_in_tmp_nor_looked_for_there(
    taken: bool, small: Path, folder: Path
) -> None:
    """Torch would make a folder whose name others know, and fail where they have taken it."""
    if taken:
        for name in ("root", "nobody", getpass.getuser()):
            (folder / f"torchinductor_{name}").write_text("")
    before = sorted(folder.iterdir())
    with tempfile.TemporaryDirectory() as other:
        done = swiprd("import", small, "-o", f"{other}/b", TMPDIR=str(folder))
        assert done.returncode == 0, done.stderr
        assert swiprd("verify", f"{other}/b", TMPDIR=str(folder)).returncode == 0
    assert sorted(folder.iterdir()) == before


def test_large_numbers_need_not_agree_to_the_fourth_decimal(small: Path, folder: Path) -> None:
    """Where there is no activation, single precision has seven digits and no more."""
    tensors = torch.load(small, weights_only=True)
    tensors["fc.weight"] *= 1e10
    torch.save(tensors, folder / "c")
    words = ["import", str(folder / "c"), "-o", str(folder / "b"), "--activation", "none"]
    assert run_command(words, {}) == 0
    bundle = read_bundle(str(folder / "b"))
    golden = tuple(
        dataclasses.replace(g, scores=tuple(score * (1 + 2e-6) for score in g.scores))
        for g in bundle.manifest.golden
    )
    assert max(abs(score) for g in golden for score in g.scores) > 1000
    manifest = dataclasses.replace(bundle.manifest, golden=golden)
    write_bundle(str(folder / "b"), manifest, bundle.tensors)
    assert run_command(["verify", str(folder / "b")], {"SWIPRD_CACHE_DIR": "/nonexistent"}) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["imprt", "x"],
            "swiprd: no command 'imprt', expected one of import, compile",
        ),
        (["show", "--josn", "x"], "swiprd show: error: no option --josn"),
    ],
)
def test_a_mistyped_word_is_named(words: list[str], message: str) -> None:
    """Not some other word, and not as what it is not."""
    done = swiprd(*words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_an_answer_that_cannot_be_written_is_no_success(imported: Path) -> None:
    """A full disk is told, and is status 1."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "swiprd", "show", str(imported)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
    assert done.returncode == 1
    assert "cannot write to standard output: No space left" in done.stderr


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
    words = ["import", str(small), "-o", str(folder / "b"), "--license", "A\x1b[31m B\nb"]
    assert run_command(words, {}) == 0
    capsys.readouterr()
    assert run_command(["show", str(folder / "b")], {"SWIPRD_CACHE_DIR": "/nonexistent"}) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert "A\\x1b[31m B\\nb" in shown


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
