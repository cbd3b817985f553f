"""From pixels to the input, held against exact arithmetic and fast.ai: swiprd.preprocess."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import swiprd.preprocess
from swiprd.bundle import Preprocessing
from swiprd.decode import decode
from swiprd.fastai import PREPROCESSING as RULES
from swiprd.preprocess import preprocess, taps
from tests.daemon import CHELSEA, PICTURES

FASTAI = Path(__file__).parent / "fastai"
EXPECTED = json.loads((FASTAI / "expected.json").read_text())
SCORED = {name: found for name, found in EXPECTED["images"].items() if found["status"] == "ok"}

EXACT = 2e-5
"""Largest difference that single precision may make, in units of the model's input."""

sides = st.integers(1, 300)
several = settings(max_examples=60, deadline=None, derandomize=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def rule_sets(draw: st.DrawFn) -> Preprocessing:
    short_side = draw(st.integers(1, 64))
    return dataclasses.replace(RULES, short_side=short_side, crop=draw(st.integers(1, short_side)))


@functools.cache
def noise(width: int, height: int) -> Image.Image:
    """Return a picture in which no two pixels have anything to do with one another."""
    data = random.Random(width * 100_003 + height).randbytes(width * height * 3)  # noqa: S311
    return Image.frombytes("RGB", (width, height), data)


def overlaps(source: int, scaled: int, start: int, count: int) -> Tensor:
    """Return how much of each output pixel is covered by each of ``source`` pixels.

    All ``scaled`` outputs and all source pixels divide the same length evenly; little more is
    needed, whether the picture shrinks or grows. OpenCV leaves out what is covered by a thousandth.
    """
    outputs = torch.arange(start, start + count, dtype=torch.float64)[:, None]
    pixels = torch.arange(source, dtype=torch.float64)
    width = source / scaled
    begin = torch.maximum(outputs * width, pixels)
    end = torch.minimum((outputs + 1) * width, pixels + 1)
    covered = (end - begin).clamp(min=0)
    if scaled <= source:
        covered[covered < 1e-3 + 1e-9] = 0
    return covered / width


def scaled_and_start(side: int, image: Image.Image, rules: Preprocessing) -> tuple[int, int]:
    scaled = max(math.floor(side * (rules.short_side / min(image.size))), rules.short_side)
    return scaled, math.ceil((scaled - rules.crop) / 2)


def reference(image: Image.Image, rules: Preprocessing) -> Tensor:
    """Do the same slowly, in double precision, and with every pixel: (3, crop, crop)."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    rows, columns = (
        overlaps(side, *scaled_and_start(side, image, rules), rules.crop)
        for side in (height, width)
    )
    scaled_rows = (rows @ pixels.double().view(height, -1)).view(rules.crop, width, 3)
    result = torch.einsum("cw,rwk->krc", columns, scaled_rows) / rules.scale
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (rules.mean, rules.std))
    return (result - mean[:, None, None]) / std[:, None, None]


def certain(image: Image.Image, rules: Preprocessing) -> Tensor:
    """Return for which outputs the area is beyond doubt: bool (crop, crop).

    An enlarged pixel that begins exactly on a border may be given to either side of it, where
    floating point does not hit the border; OpenCV gives it to the wrong one.
    """
    found = []
    for side in reversed(image.size):
        scaled, start = scaled_and_start(side, image, rules)
        found.append(
            torch.tensor(
                [
                    scaled <= side or math.floor(d * (1 / (scaled / side))) == d * side // scaled
                    for d in range(start, start + rules.crop)
                ]
            )
        )
    rows, columns = found
    return rows[:, None] & columns


def difference(image: Image.Image, rules: Preprocessing) -> float:
    got, expected = preprocess(image, rules), reference(image, rules)
    assert got.shape == (1, *expected.shape)
    off = (got[0].double() - expected).abs()
    return float((off * certain(image, rules)).max())


# --- against fast.ai -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORED)
def test_the_input_is_what_fastai_made_of_the_same_file(name: str) -> None:
    """Sampled values, means and deviations agree; CMYK is converted a little otherwise."""
    within = 0.02 if "cmyk" in name else 2e-5
    expected: dict[str, Any] = SCORED[name]
    image = decode((FASTAI / name).read_bytes(), RULES, max_pixels=10**6)
    got = preprocess(image, RULES)[0].double()
    channels, rows, columns = torch.tensor(EXPECTED["sample_positions_chw"]).T
    samples = torch.tensor(expected["samples"], dtype=torch.float64)
    assert len(samples) == 96
    assert float((got[channels, rows, columns] - samples).abs().max()) <= within
    assert got.mean((1, 2)).tolist() == pytest.approx(expected["mean"], abs=within)
    assert got.std((1, 2), correction=0).tolist() == pytest.approx(expected["std"], abs=within)


def test_fastai_has_an_answer_for_many_kinds_of_pictures() -> None:
    """The table of expectations is whole: what it says is scored lies beside it."""
    assert len(SCORED) >= 12
    assert all((FASTAI / name).is_file() for name in SCORED)


# --- against exact arithmetic --------------------------------------------------------------------


@given(width=sides, height=sides, rules=rule_sets())
@example(width=1, height=1, rules=RULES)
@example(width=2, height=1, rules=RULES)
@example(width=1, height=300, rules=RULES)
@example(width=300, height=1, rules=RULES)
@example(width=223, height=225, rules=RULES)
@example(width=224, height=224, rules=RULES)
@example(width=225, height=224, rules=RULES)
@example(width=448, height=672, rules=RULES)
@example(width=453, height=301, rules=RULES)
@several
def test_every_output_is_the_mean_of_the_area_that_it_covers(
    width: int, height: int, rules: Preprocessing
) -> None:
    """Shrinking and enlarging, any size, short side and crop give the exact area average."""
    image = noise(width, height)
    assert difference(image, rules) <= EXACT


@pytest.mark.parametrize("short_side", [1, 16, 33])
@pytest.mark.parametrize(
    "size", [(1, 30_000), (30_000, 1), (3, 20_000), (20_000, 3), (30, 9_001), (9_001, 30)]
)
def test_a_ribbon_is_scaled_like_any_other_picture(size: tuple[int, int], short_side: int) -> None:
    """However long a picture is, the crop shows its middle, exactly scaled."""
    rules = dataclasses.replace(RULES, short_side=short_side, crop=short_side)
    image = noise(*size)
    assert difference(image, rules) <= EXACT


@pytest.mark.parametrize("size", [(2000, 1500), (1500, 2003)])
def test_a_large_picture_is_as_exact_as_a_small_one(size: tuple[int, int]) -> None:
    """Sums over many pixels, and the strips in which they are made, lose no precision."""
    image = noise(*size)
    assert difference(image, RULES) <= EXACT


@given(width=sides, height=sides, rules=rule_sets(), colour=st.tuples(*[st.integers(0, 255)] * 3))
@example(width=2000, height=1500, rules=RULES, colour=(255, 1, 254))
@example(width=60, height=45, rules=RULES, colour=(255, 1, 254))
@example(width=1, height=1, rules=RULES, colour=(255, 255, 255))
@several
def test_a_picture_of_one_colour_stays_of_that_colour(
    width: int, height: int, rules: Preprocessing, colour: tuple[int, int, int]
) -> None:
    """The weights of every output sum to one, at the borders too."""
    got = preprocess(Image.new("RGB", (width, height), colour), rules)
    for channel in range(3):
        expected = (colour[channel] / rules.scale - rules.mean[channel]) / rules.std[channel]
        assert float((got[0, channel].double() - expected).abs().max()) <= EXACT


@pytest.mark.parametrize("source", [10**6, 10**8, 10**9])
@pytest.mark.parametrize("short_side", [224, 4096])
def test_the_middle_of_the_longest_picture_that_may_be_allowed_is_found(
    source: int, short_side: int
) -> None:
    """A line of a thousand megapixels, the highest limit that can be set, is no exception."""
    scaled = source * short_side
    start = math.ceil((scaled - short_side) / 2)
    found = taps(source, scaled, start, start + short_side)
    assert found.first == start // short_side
    assert found.stop == (start + short_side - 1) // short_side + 1
    assert found.weights.tolist() == [1.0] * short_side


# --- the form of the result ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(451, 300), (60, 45), (1, 1), (3000, 2000)])
@pytest.mark.parametrize("crop", [224, 192, 1])
def test_the_input_is_one_square_of_floats_with_channels_last(
    size: tuple[int, int], crop: int
) -> None:
    """Its form never depends on the picture: that is what the convolutions are fastest with."""
    rules = dataclasses.replace(RULES, crop=crop)
    got = preprocess(Image.new("RGB", size), rules)
    assert got.shape == (1, 3, crop, crop)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.stride()[1:] == (1, 3 * crop, 3)
    assert not got.requires_grad


def test_channels_are_red_green_blue() -> None:
    """Each channel is normalised with its own mean and deviation, red first."""
    rules = dataclasses.replace(RULES, scale=1.0, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0))
    got = preprocess(Image.new("RGB", (300, 300), (11, 22, 43)), rules)
    assert got[0, :, 7, 7].tolist() == pytest.approx([5.0, 5.0, 5.0], abs=1e-4)


# --- strips, threads, memory ---------------------------------------------------------------------


@given(width=sides, height=sides, rules=rule_sets(), strip=st.integers(1, 50_000))
@example(width=451, height=300, rules=RULES, strip=1)
@example(width=20_000, height=3, rules=RULES, strip=1)
@example(width=3, height=20_000, rules=RULES, strip=1)
@several
def test_strips_change_no_bit(width: int, height: int, rules: Preprocessing, strip: int) -> None:
    """A picture that is worked on in pieces gives what it gives in one."""
    image = noise(width, height)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiprd.preprocess, "STRIP_BYTES", 2**40)
        whole = preprocess(image, rules)
        patch.setattr(swiprd.preprocess, "STRIP_BYTES", strip)
        assert torch.equal(preprocess(image, rules), whole)


def test_a_large_picture_gives_the_same_bits_in_one_piece() -> None:
    """With the real size of a strip, a picture of many strips is not another picture."""
    image = noise(2000, 1500)
    strips = preprocess(image, RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiprd.preprocess, "STRIP_BYTES", 2**40)
        assert torch.equal(preprocess(image, RULES), strips)


@pytest.mark.parametrize("name", ["chelsea", "large", "tiny", "ribbon"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    """The same pixels give the same input on every machine of a kind, with any setting."""
    with Image.open(CHELSEA) as photograph:
        images = {
            "chelsea": photograph.convert("RGB"),
            "large": noise(2000, 1500),
            "tiny": noise(5, 7),
            "ribbon": noise(20_000, 3),
        }
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(preprocess(images[name], RULES))
    torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_same_pixels_always_give_the_same_bits() -> None:
    """Neither pictures in between nor what is remembered of a size show in the result."""
    with Image.open(PICTURES / "coffee.png") as photograph:
        coffee = photograph.convert("RGB")
    first = preprocess(coffee, RULES)
    for side in range(100, 180):  # more sizes than are remembered
        preprocess(noise(side, 90), dataclasses.replace(RULES, short_side=32, crop=32))
    preprocess(noise(*coffee.size), RULES)
    assert torch.equal(preprocess(coffee, RULES), first)


MEASURE = """
import sys
from pathlib import Path
from PIL import Image
from swiprd.bundle import Preprocessing
from swiprd.preprocess import preprocess

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(key))

ones = (1.0, 1.0, 1.0)
rules = Preprocessing(("PNG",), "apply", False, "area", 224, 224, 1.0, ones, ones)
preprocess(Image.new("RGB", (451, 300)), rules)  # what is needed once
for size in sys.argv[1:]:
    width, height = map(int, size.split("x"))
    image = Image.new("RGB", (width, height), (1, 2, 3))
    before = memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    preprocess(image, rules)
    print(size, before, memory("VmHWM:") - before)
    del image
"""


def test_the_memory_of_a_picture_of_48_megapixels_stays_bounded() -> None:
    """However the pixels lie, less is needed beside them than they take in pillow, 192 MiB; as
    floats they would take 576.
    """
    sizes = ["8000x6000", "6000x8000", "40000x1200", "1200x40000", "48000000x1"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *sizes],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    measured = [line.split() for line in done.stdout.splitlines()]
    assert [size for size, _, _ in measured] == sizes
    for size, before, growth in measured:
        assert int(before) > 180, "the picture itself is not in the measurement"
        assert 0 <= int(growth) <= 192, f"{size} took {growth} MiB"
