"""From pixels to the input, held against exact arithmetic and torchvision: swiprd.preprocess.

What fast.ai made of pictures is held against in test_fastai.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import random
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

import swiprd.resample
from swiprd.bundle import Preprocessing
from swiprd.decode import decode
from swiprd.fastai import FASTAI_0_7 as RULES
from swiprd.fastai import FASTAI_1
from swiprd.geometry import Axis
from swiprd.preprocess import preprocess
from swiprd.recognise import torchvision_preprocessing
from swiprd.resample import ROW_END, resample, taps
from tests.daemon import CHELSEA, PICTURES

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


def pixels_of(image: Image.Image) -> Tensor:
    """Return float32 (height, width, 3)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).float()


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
    pixels = pixels_of(image).double()
    rows, columns = (
        overlaps(side, *scaled_and_start(side, image, rules), rules.crop)
        for side in (height, width)
    )
    scaled_rows = (rows @ pixels.view(height, -1)).view(rules.crop, width, 3)
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
    found = taps(Axis(0, source, scaled, start, start + short_side), "area")
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
        patch.setattr(swiprd.resample, "STRIP_BYTES", 2**40)
        whole = preprocess(image, rules)
        patch.setattr(swiprd.resample, "STRIP_BYTES", strip)
        assert torch.equal(preprocess(image, rules), whole)


@pytest.mark.parametrize("filter", ["area", "linear", "grid"])
def test_bytes_are_summed_to_the_same_bits_as_floats(filter: str) -> None:
    """Whatever vector instructions there are, and whether or not they divide a row's length."""
    generator = torch.Generator().manual_seed(0)
    for source, scaled, length in itertools.product((9, 300, 1350), (7, 100, 224), (4, 36, 4344)):
        summed = taps(Axis(0, source, scaled, 0, scaled), filter, between=min(source, 2 * scaled))
        pixels = torch.randint(256, (source, length), dtype=torch.uint8, generator=generator)
        ended = torch.cat([pixels, ROW_END.expand(source, -1)], 1)
        assert torch.equal(summed.sum_bytes(ended), summed.sum(pixels.float()))


@pytest.mark.parametrize("size", [(17_000, 3), (3, 17_000), (62, 1), (1, 62), (63, 1), (1, 63)])
@pytest.mark.parametrize("filter", ["area", "linear", "grid"])
def test_what_is_not_scaled_stays_as_it_is(size: tuple[int, int], filter: str) -> None:
    """However wide it is, or high, and where the pixels end that are worked on."""
    image = noise(*size)
    columns, rows = (Axis(0, length, length, 0, length) for length in size)
    assert torch.equal(resample(image, columns, rows, filter), pixels_of(image))


def test_the_longer_side_may_be_any_length_when_the_other_is_summed_first() -> None:
    """A mean of four bytes is exact."""
    image = noise(8, 17_000)
    found = resample(image, Axis(0, 8, 2, 0, 2), Axis(0, 17_000, 17_000, 0, 17_000), "area")
    assert torch.equal(found, pixels_of(image).view(17_000, 2, 4, 3).mean(2))


def test_a_large_picture_gives_the_same_bits_in_one_piece() -> None:
    """With the real size of a strip, a picture of many strips is not another picture."""
    image = noise(2000, 1500)
    strips = preprocess(image, RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiprd.resample, "STRIP_BYTES", 2**40)
        assert torch.equal(preprocess(image, RULES), strips)


@pytest.mark.parametrize("name", ["chelsea", "large", "tiny", "ribbon"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    """The same pixels give the same input with any setting, which is as before afterwards."""
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
        assert torch.get_num_threads() == threads
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
import dataclasses
import sys
from pathlib import Path
from PIL import Image
from swiprd.fastai import FASTAI_0_7 as rules
from swiprd.preprocess import preprocess

squished = dataclasses.replace(rules, fit="squish")

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(key))

preprocess(Image.new("RGB", (451, 300)), rules)  # what is needed once
for size in sys.argv[1:]:
    width, height = map(int, size.split("x"))
    image = Image.new("RGB", (width, height), (1, 2, 3))
    before = memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    preprocess(image, squished if size.startswith("49") else rules)
    print(size, before, memory("VmHWM:") - before)
    del image
"""


def test_the_memory_of_a_picture_of_48_megapixels_stays_bounded() -> None:
    """However the pixels lie, a third of what they take in pillow, 192 MiB, is enough beside them;
    as floats they would take 576.
    """
    sizes = ["8000x6000", "6000x8000", "40000x1200", "1200x40000", "48000000x1", "49000000x1"]
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
        assert 0 <= int(growth) <= 64, f"{size} took {growth} MiB"


# --- against torchvision -------------------------------------------------------------------------

TORCHVISION = torchvision_preprocessing("resnet18")
FILTERS = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@given(
    width=sides,
    height=sides,
    filter=st.sampled_from(FILTERS),
    short_side=st.integers(1, 99),
    spare=st.integers(0, 9),
)
@example(width=451, height=300, filter="bilinear", short_side=256, spare=32)
@example(width=1080, height=1350, filter="bicubic", short_side=232, spare=8)
@example(width=64, height=48, filter="bilinear", short_side=256, spare=31)
@several
def test_pillows_filters_are_torchvisions_to_the_last_bit(
    width: int, height: int, filter: str, short_side: int, spare: int
) -> None:
    """Resize and CenterCrop of torchvision.transforms give the same bytes."""
    crop = max(short_side - spare, 1)
    rules = dataclasses.replace(TORCHVISION, short_side=short_side, crop=crop, resample=filter)
    image = noise(width, height)
    size = [short_side]
    scaled = transforms.resize(image, size, transforms.InterpolationMode(filter))
    wanted = transforms.pil_to_tensor(transforms.center_crop(scaled, [crop])).float() / 255
    wanted = transforms.normalize(wanted, list(rules.mean), list(rules.std))
    assert float((preprocess(image, rules)[0] - wanted).abs().max()) <= 1e-6


@given(width=sides, height=sides, filter=st.sampled_from(FILTERS), side=st.integers(1, 99))
@several
def test_a_picture_may_be_squished(width: int, height: int, filter: str, side: int) -> None:
    """As Resize((side, side)) does, whatever the picture's shape."""
    rules = dataclasses.replace(
        TORCHVISION, fit="squish", short_side=side, crop=side, resample=filter
    )
    image = noise(width, height)
    scaled = transforms.resize(image, [side, side], transforms.InterpolationMode(filter))
    wanted = transforms.normalize(
        transforms.pil_to_tensor(scaled).float() / 255, list(rules.mean), list(rules.std)
    )
    assert float((preprocess(image, rules)[0] - wanted).abs().max()) <= 1e-6


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("size", [(3, 700), (700, 3), (40, 1000), (1000, 1)])
def test_a_ribbon_that_is_scaled_in_part_shows_the_same(
    filter: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte differs by more than the last bit where pillow rounds the window's borders."""
    rules = dataclasses.replace(
        TORCHVISION, short_side=64, crop=64, resample=filter, scale=1.0, std=(1.0, 1.0, 1.0)
    )
    image = noise(*size)
    whole = preprocess(image, rules)
    monkeypatch.setattr(swiprd.resample, "MAX_SCALED", 0)
    part = preprocess(image, rules)
    off = (part - whole).abs()
    # A pixel in the middle between two may go to either with the filter that takes the nearest.
    allowed = 255.0 if filter in ("nearest", "box") else 1.0
    assert float(off.max()) <= allowed
    assert float((off > 0).float().mean()) <= 0.02


@pytest.mark.parametrize("filter", ["bilinear", "grid", "linear", "area"])
@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
def test_the_longest_ribbon_costs_no_more_than_another_picture(
    filter: str, size: tuple[int, int]
) -> None:
    """Scaled whole it would have hundreds of gigabytes."""
    rules = dataclasses.replace(FASTAI_1, resample=filter, rounding="truncate")
    got = preprocess(Image.new("RGB", size, (10, 20, 30)), rules)
    for channel, value in enumerate((10, 20, 30)):
        wanted = (value / 255 - rules.mean[channel]) / rules.std[channel]
        assert float((got[0, channel] - wanted).abs().max()) <= EXACT


@pytest.mark.parametrize("filter", ["grid", "linear", "area", "bilinear"])
@pytest.mark.parametrize("size", [(2_000_000, 1), (1, 2_000_000), (1_000_000, 2), (70_000, 9)])
def test_a_squished_ribbon_keeps_its_colours(filter: str, size: tuple[int, int]) -> None:
    """However much one side shrinks while the other grows, it stays of its colours.

    Sums of ten thousand numbers are a little less exact in single precision.
    """
    rules = dataclasses.replace(FASTAI_1, resample=filter, fit="squish")
    got = preprocess(Image.new("RGB", size, (10, 20, 30)), rules)
    for channel, value in enumerate((10, 20, 30)):
        wanted = (value / 255 - rules.mean[channel]) / rules.std[channel]
        assert float((got[0, channel] - wanted).abs().max()) <= 5 * EXACT


@pytest.mark.parametrize("size", [(300_000, 3), (3, 300_000)])
def test_a_squished_ribbon_is_exact_too(size: tuple[int, int]) -> None:
    """In pieces, and with its sides turned, each output is the mean of its area."""
    rules = dataclasses.replace(
        RULES, fit="squish", short_side=32, crop=32, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    image = noise(*size)
    pixels = pixels_of(image).double()
    rows, columns = (overlaps(side, 32, 0, 32) for side in reversed(image.size))
    summed = torch.einsum("rh,hwk,cw->krc", rows, pixels, columns)
    assert float((preprocess(image, rules)[0].double() - summed / 255).abs().max()) <= EXACT


@given(width=sides, height=sides, side=st.integers(1, 99))
@example(width=451, height=300, side=224)
@several
def test_linear_is_two_taps_between_pixels_whose_centres_are_aligned(
    width: int, height: int, side: int
) -> None:
    """As torch's interpolate without antialiasing, which agrees with OpenCV to single precision."""
    rules = dataclasses.replace(RULES, fit="squish", short_side=side, crop=side, resample="linear")
    rules = dataclasses.replace(rules, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = noise(width, height)
    pixels = transforms.pil_to_tensor(image).float() / 255
    wanted = torch.nn.functional.interpolate(
        pixels[None], (side, side), mode="bilinear", align_corners=False, antialias=False
    )
    assert float((preprocess(image, rules) - wanted).abs().max()) <= 4e-5


# --- speed ---------------------------------------------------------------------------------------


def test_the_area_filter_costs_no_more_than_decoding_the_jpeg() -> None:
    """Of photographs that fill 1080 x 1350, with one thread, both in turn, each at its best."""
    large = Image.new("RGB", (1080, 1350))
    with Image.open(PICTURES / "coffee.png") as photograph:
        for x, y in itertools.product(range(0, 1080, 600), range(0, 1350, 400)):
            large.paste(photograph.convert("RGB"), (x, y))
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=85)
    data = buffer.getvalue()
    decoding, filtering = [], []
    for _ in range(40):
        began = time.perf_counter()
        image = decode(data, RULES, max_pixels=10**7)
        decoded = time.perf_counter()
        preprocess(image, RULES)
        decoding.append(decoded - began)
        filtering.append(time.perf_counter() - decoded)
    assert min(filtering) <= min(decoding)
