"""From the bytes of a picture to its pixels, whatever the bytes are: swiprd.decode."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from swiprctl import SwiprError
from swiprd.bundle import IMAGE_FORMATS
from swiprd.decode import decode
from swiprd.fastai import FASTAI_0_7
from tests.daemon import CHELSEA

RULES = dataclasses.replace(
    FASTAI_0_7, formats=IMAGE_FORMATS, orientation="apply", truncated=False, scale=1.0
)
LIMIT = 1_000_000

EXACT: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}}
EXACT |= {"WEBP": {"lossless": True, "exact": True}, "TIFF": {"compression": "tiff_lzw"}}
"""How a format keeps every pixel, or nearly so."""
EXACT["MPO"] = EXACT["JPEG"] | {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
TOLERANCE = {"JPEG": 6, "MPO": 6}
STORED = dict(enumerate([None, 0, 3, 1, 5, 2, 6, 4], 1))
"""For each EXIF orientation the transposition by which a picture is stored so that it shows it."""


def pixels(data: bytes, *, max_pixels: int = LIMIT, **rules: Any) -> Image.Image:
    """Decode ``data`` and look at what every answer must be."""
    image = decode(data, dataclasses.replace(RULES, **rules), max_pixels=max_pixels)
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= max_pixels
    assert len(image.tobytes()) == 3 * image.width * image.height
    return image


def refusal(data: bytes, *, max_pixels: int = LIMIT, **rules: Any) -> str:
    """Return the code with which ``data`` is refused, in one line that says something."""
    with pytest.raises(SwiprError) as caught:
        decode(data, dataclasses.replace(RULES, **rules), max_pixels=max_pixels)
    message = caught.value.message
    assert message.isprintable()
    assert not message.endswith((":", ": ", "."))
    return caught.value.code


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **{**EXACT.get(format, {}), **options})
    return file.getvalue()


def assert_same(got: Image.Image, wanted: Image.Image, tolerance: int = 0) -> None:
    assert got.size == wanted.size
    differences = ImageChops.difference(got, wanted).getextrema()
    assert max(high for _, high in differences) <= tolerance  # type: ignore[misc]


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[274] = value
    return exif.tobytes()


# --- what is served ------------------------------------------------------------------------------

CAT = Image.open(CHELSEA).convert("RGB").resize((90, 60))
COLOUR = Image.frombytes("RGB", CAT.size, CAT.tobytes())  # without all that the file carries
GRAY = COLOUR.convert("L")
HALF = Image.linear_gradient("L").resize(COLOUR.size)
PALETTE = COLOUR.quantize(64)
FEW = PALETTE.convert("RGB")
BLACK_AND_WHITE = GRAY.convert("1")

MODES = {mode: COLOUR.convert(mode) for mode in ("L", "RGB", "RGBX", "CMYK", "YCbCr")}
MODES |= {"1": BLACK_AND_WHITE, "P": PALETTE, "F": GRAY.convert("F")}
RGBA = Image.merge("RGBA", (*COLOUR.split(), HALF))
MODES |= {"LA": Image.merge("LA", (GRAY, HALF)), "RGBA": RGBA}
WRITABLE = {
    "JPEG": ["1", "L", "RGB", "CMYK", "YCbCr"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "WEBP": ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX"],
    "GIF": ["1", "L", "P"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "F"],
}


@pytest.mark.parametrize("format", WRITABLE)
def test_every_mode_of_every_format_gives_its_pixels(format: str) -> None:
    """Gray is replicated, alpha dropped, a palette looked up; nothing is scaled or composited."""
    for mode in WRITABLE[format]:
        rounding = 3 if mode == "YCbCr" else 0  # there and back again
        tolerance = TOLERANCE.get(format, rounding)
        wanted = (GRAY if mode in ("LA", "F") else MODES[mode]).convert("RGB")
        assert_same(pixels(saved(MODES[mode], format)), wanted, tolerance)


def test_alpha_is_dropped_even_where_it_hides_everything() -> None:
    """The colours below are scored, not some background that we would have to choose."""
    hidden = Image.merge("RGBA", (*COLOUR.split(), Image.new("L", COLOUR.size)))
    for format in ("PNG", "WEBP", "TIFF", "BMP"):
        assert_same(pixels(saved(hidden, format)), COLOUR)


KEYED: list[tuple[str, Image.Image, Any]] = [
    *(("PNG", PALETTE, table) for table in (3, bytes(64), bytes(range(0, 256, 4)))),
    *(("GIF", PALETTE, 3), ("PNG", GRAY, 100), ("PNG", COLOUR, (0, 0, 0))),
    ("PNG", BLACK_AND_WHITE, 1),
]


@pytest.mark.parametrize(("alpha", "ground"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_shows_the_ground_where_the_rules_say_so(alpha: str, ground: int, mode: str) -> None:
    """What is transparent becomes the ground, what is opaque stays, and the rest is between."""
    veil = Image.new("L", COLOUR.size, 0)
    veil.paste(255, (0, 0, 45, 60))
    picture = COLOUR.copy()
    picture.putalpha(veil)
    if mode == "P":
        got = pixels(saved(picture.quantize(16), "PNG"), alpha=alpha)
    else:
        got = pixels(saved(picture.convert(mode), "PNG"), alpha=alpha)
    assert got.getpixel((80, 30)) == (ground,) * 3
    if mode == "RGBA":
        assert got.getpixel((10, 30)) == COLOUR.getpixel((10, 30))
    half = Image.new("RGBA", (3, 3), (100, 0, 0, 128))
    red, green, _ = pixels(saved(half, "PNG"), alpha=alpha).getpixel((1, 1))  # type: ignore[misc]
    assert abs(red - (100 + ground) / 2) <= 2
    assert abs(green - ground / 2) <= 2


def test_without_alpha_the_ground_changes_nothing() -> None:
    """An opaque picture is the same with every rule."""
    data = saved(COLOUR, "PNG")
    for alpha in ("drop", "white", "black"):
        assert_same(pixels(data, alpha=alpha), COLOUR)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_samples_are_clipped_where_the_rules_say_so(mode: str) -> None:
    """As pillow does it by itself, and so fast.ai 1 and 2 and torchvision."""
    deep = Image.new("I", (4, 1))
    for x, value in enumerate((0, 200, 300, 40_000)):
        deep.putpixel((x, 0), value)
    format = "PNG" if mode == "I;16" else "TIFF"
    picture = deep if mode == "I" else deep.convert(mode)
    got = pixels(saved(picture, format), deep="clip")
    assert list(got.convert("L").tobytes()) == [0, 200, 255, 255]


# --- scaled while decoded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "size"), [(0, (1600, 1200)), (1, (400, 300)), (1.5, (800, 600)), (5, (1600, 1200))]
)
def test_a_jpeg_is_decoded_smaller_as_far_as_the_margin_lets_it(
    margin: float, size: tuple[int, int]
) -> None:
    """By halves, and never below so many times the size that is wanted; 0 is never."""
    picture = COLOUR.resize((1600, 1200))
    got = pixels(saved(picture, "JPEG"), max_pixels=2_000_000, jpeg_margin=float(margin))
    assert got.size == size


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_the_margin_changes_no_other_format(format: str) -> None:
    """Their decoders cannot scale."""
    data = saved(COLOUR.resize((1600, 1200)), format)
    assert pixels(data, max_pixels=2_000_000, jpeg_margin=1.0).size == (1600, 1200)


def test_a_jpeg_that_is_decoded_smaller_shows_the_same_picture() -> None:
    """Its pixels are means of the ones that it would have had."""
    picture = COLOUR.resize((1600, 1200), Image.Resampling.BICUBIC)
    small = pixels(saved(picture, "JPEG"), max_pixels=2_000_000, jpeg_margin=1.0)
    assert_same(small, picture.resize((400, 300), Image.Resampling.BOX), 8)


def test_a_gray_or_turned_jpeg_may_be_decoded_smaller_too() -> None:
    """Mode and orientation come out as ever."""
    data = saved(GRAY.resize((1200, 1600)), "JPEG", exif=orientation(6))
    assert pixels(data, max_pixels=2_000_000, jpeg_margin=1.0).size == (400, 300)


def test_a_colour_that_counts_as_transparent_keeps_its_colour() -> None:
    """Alpha is dropped in each of the ways in which a file can say it."""
    for format, image, transparency in KEYED:
        data = saved(image, format, transparency=transparency)
        assert "transparency" in Image.open(io.BytesIO(data)).info
        assert_same(pixels(data), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_gray_keeps_its_high_byte(mode: str) -> None:
    """All 65536 values, in either byte order: none is clipped, none is rounded."""
    order = {"I;16": "<H", "I;16B": ">H", "I": "=i"}[mode]
    values = range(65536)
    deep = Image.frombytes(mode, (256, 256), b"".join(struct.pack(order, v) for v in values))
    high = Image.frombytes("L", (256, 256), bytes(value >> 8 for value in values))
    for format in ("TIFF", "PNG") if mode == "I;16" else ("TIFF",):
        assert_same(pixels(saved(deep, format)), high.convert("RGB"))


def test_sixteen_bit_channels_in_png_keep_their_high_byte() -> None:
    """Pillow writes no such file, so it is put together here: gray or colour, alpha or not."""
    for channels, kind, kept in (2, 4, (0, 0, 0)), (3, 2, (0, 1, 2)), (4, 6, (0, 1, 2)):
        words = [(251 * n) & 0xFFFF for n in range(256 * channels)]
        body = b"\0" + struct.pack(f">{len(words)}H", *words)
        got = pixels(png(256, 1, depth=16, kind=kind, body=body))
        high = [words[first + c] >> 8 for first in range(0, len(words), channels) for c in kept]
        assert got.tobytes() == bytes(high)


def test_lab_colours_come_as_the_colours_that_they_mean() -> None:
    """TIFF may hold L*a*b*; white, black and red are still white, black and red."""
    white, black, red = (255, 128, 128), (0, 128, 128), (138, 209, 198)
    for value, wanted in (white, (255,) * 3), (black, (0,) * 3), (red, (255, 0, 0)):
        got = pixels(saved(Image.new("LAB", (4, 4), value), "TIFF"))
        assert_same(got, Image.new("RGB", (4, 4), wanted), 6)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_is_taken(format: str) -> None:
    """An animation or a file of pages is scored by what it begins with."""
    more = [Image.new("RGB", COLOUR.size, colour) for colour in ("red", "lime", "blue")]
    data = saved(FEW, format, save_all=True, append_images=more)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 4
    assert_same(pixels(data), FEW)


@pytest.mark.parametrize("policy", ["apply", "jpeg", "ignore"])
@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_the_rules_say(format: str, policy: str) -> None:
    """Each orientation in each format: turned upright once, or left as stored. MPO is a JPEG."""
    turns = policy == "apply" or (policy == "jpeg" and format in ("JPEG", "MPO"))
    for value, transpose in STORED.items():
        stored = COLOUR if transpose is None else COLOUR.transpose(Image.Transpose(transpose))
        data = saved(stored, format, exif=orientation(value))
        assert Image.open(io.BytesIO(data)).format == format
        wanted = COLOUR if turns else stored
        assert_same(pixels(data, orientation=policy), wanted, TOLERANCE.get(format, 0))


BAD_EXIF = [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x" * 99]


def test_a_broken_exif_block_turns_nothing_and_breaks_nothing() -> None:
    """What a camera's program got wrong there is no reason not to look at the picture."""
    for exif in (*BAD_EXIF, *map(orientation, (0, 9, 65535))):
        for format in ("JPEG", "PNG", "WEBP"):
            got = pixels(saved(COLOUR, format, exif=exif))
            assert_same(got, COLOUR, TOLERANCE.get(format, 0))


def png(width: int, height: int, *, depth: int = 8, kind: int = 0, body: bytes = b"") -> bytes:
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)}
    parts |= {b"IDAT": zlib.compress(body), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts.items()
    )


def jpeg(width: int, height: int) -> bytes:
    data = saved(Image.new("L", (8, 8)), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def gif(width: int, height: int, frame: tuple[int, int] = (1, 1)) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return header + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\2\x44\1\0;"


def gif_frame(width: int, height: int) -> bytes:
    """Small, as its own header says, and with a frame that is not."""
    return gif(1, 1, (width, height))


def bmp(width: int, height: int) -> bytes:
    data = saved(Image.new("RGB", (4, 4)), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def tiff(width: int, height: int, *, tile: tuple[int, int] = (16, 16), body: bytes = b"") -> bytes:
    """8-bit gray in one deflated tile."""
    body = body or zlib.compress(bytes(256))
    longs = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile[0], 323: tile[1]}
    longs |= {324: 8 + 2 + 12 * 10 + 4, 325: len(body)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in longs.items())
    return b"II*\0" + struct.pack("<IH", 8, len(longs)) + entries + bytes(4) + body


def webp(width: int, height: int) -> bytes:
    """A large canvas and one small frame on it."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = saved(Image.new("RGB", (4, 4)), "WEBP")[12:]
    frame = bytes(6) + b"\3\0\0\3\0\0" + b"\x64\0\0\0" + frame
    frame = b"ANIM\6\0\0\0" + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    body = b"WEBPVP8X\x0a\0\0\0\2\0\0\0" + sides + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


HUGE: list[tuple[Callable[[int, int], bytes], int, int]] = [
    *((make, 65500, 65500) for make in (png, jpeg, gif, gif_frame, bmp, tiff, webp)),
    *((png, 2**31 - 1, 2**31 - 1), (bmp, 2**31 - 1, -(2**31)), (tiff, 2**32 - 1, 2**32 - 1)),
    (webp, 16383, 16383),
]
COST = """
import dataclasses, resource, sys, time
from swiprctl import SwiprError
from swiprd.bundle import IMAGE_FORMATS
from swiprd.decode import decode
from swiprd.fastai import FASTAI_0_7
rules = dataclasses.replace(FASTAI_0_7, formats=IMAGE_FORMATS, truncated=False)
max_pixels, memory, *lengths = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
def peak():  # not getrusage, whose peak may be that of the process that started this one
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0])
for length in lengths:
    data = sys.stdin.buffer.read(length)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what is held now: proc(5)
    before, began = peak(), time.monotonic()
    try:
        decode(data, rules, max_pixels=max_pixels)
        result = "decoded"
    except SwiprError as error:
        result = f"{error.code}: {error}"
    print((peak() - before) // 1024, time.monotonic() - began, result)
"""


def script(code: str, *words: object, input: bytes = b"") -> tuple[str, str]:
    """Run ``code`` in a process of its own and return what it writes."""
    command = [sys.executable, "-c", code, *map(str, words)]
    place = Path(__file__).parent.parent
    done = subprocess.run(command, input=input, cwd=place, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout.decode(), done.stderr.decode()


def costs(
    *pictures: bytes, max_pixels: int = LIMIT, memory: int = 2**40
) -> list[tuple[int, float, str]]:
    """Return how many MiB and seconds it takes to decode each of ``pictures``, and how it ends."""
    answer, _ = script(COST, max_pixels, memory, *map(len, pictures), input=b"".join(pictures))
    lines = (line.split(" ", 2) for line in answer.splitlines())
    return [(int(mebibytes), float(seconds), result) for mebibytes, seconds, result in lines]


def test_a_huge_picture_is_refused_before_its_pixels_are_made() -> None:
    """A header that promises gigabytes costs neither memory nor time."""
    found = costs(*(make(width, height) for make, width, height in HUGE))
    for (make, _, _), (mebibytes, seconds, result) in zip(HUGE, found, strict=True):
        assert result.startswith("too_many_pixels: "), make
        assert mebibytes < 20, make
        assert seconds < 1, make
    # What one left behind may serve the next.
    assert sum(mebibytes for mebibytes, _, _ in found) < 20


def test_a_tile_far_larger_than_its_picture_does_not_cost_what_it_unpacks_to() -> None:
    """The limit in pixels holds for what is decoded, not only for what is then cut from it."""
    packer = zlib.compressobj(9)
    megabytes = [packer.compress(bytes(10**6)) for _ in range(100)]
    bomb = tiff(16, 16, tile=(10000, 10000), body=b"".join([*megabytes, packer.flush()]))
    ((mebibytes, _, result),) = costs(bomb)
    assert mebibytes < 20, f"a picture of 16 x 16 pixels took {mebibytes} MiB ({result})"


def test_a_tile_whose_sides_are_no_numbers_is_refused() -> None:
    """A tag may be of any type; text times a number would be a very long text."""
    data = bytearray(tiff(16, 16, tile=(0, 500_000_000)))
    at = data.index(struct.pack("<HHI", 322, 4, 1))
    data[at : at + 12] = struct.pack("<HHI4s", 322, 2, 4, b"AAA\0")
    ((mebibytes, _, result),) = costs(bytes(data))
    assert mebibytes < 20
    assert result == "not_an_image: the size of a tile of the picture is no number"


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("white", [1, 255, 65535, 2**31 - 1])
def test_in_32_bits_white_is_what_no_value_exceeds(mode: str, white: int) -> None:
    """The same picture in each of the usual ranges gives the same pixels."""
    values = [0, white] if mode == "I" and white == 1 else [white * k // 8 for k in range(9)]
    if mode == "F":
        values = [white * k / 8 for k in range(9)]  # type: ignore[misc]
    code = "=i" if mode == "I" else "=f"
    data = b"".join(struct.pack(code, value) for value in values)
    image = Image.frombytes(mode, (len(values), 1), data)
    got = pixels(saved(image, "TIFF")).convert("L").tobytes()
    wanted = [255 * value / white for value in values]
    assert [abs(a - b) <= 1 for a, b in zip(got, wanted, strict=True)] == [True] * len(values)


def test_values_without_a_black_or_white_are_no_picture() -> None:
    """There is nothing that they could be measured by."""
    for value in (1e30, float("inf"), -1.0, float("nan")):
        image = Image.frombytes("F", (1, 1), struct.pack("=f", value))
        assert refusal(saved(image, "TIFF")) == "not_an_image"


def test_a_picture_for_which_there_is_no_memory_is_refused_with_a_reason() -> None:
    """It says nothing about the picture, so it is not called unreadable."""
    ((_, _, result),) = costs(png(50_000, 50_000), max_pixels=2**32, memory=2**29)
    assert (
        result == "internal: there is not enough memory to decode the picture; see max_worker_mib"
    )


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_the_limit_in_pixels_is_exact(format: str) -> None:
    """As many as the limit are decoded, one more than the limit is refused."""
    data = saved(Image.new("RGB", (30, 20), "navy"), format)
    assert pixels(data, max_pixels=600).size == (30, 20)
    with pytest.raises(SwiprError, match=r"has 30 x 20 pixels, expected at most 599$") as caught:
        pixels(data, max_pixels=599)
    assert caught.value.code == "too_many_pixels"


def test_a_picture_without_width_or_height_is_refused() -> None:
    """Nothing could be scored."""
    for make in (png, jpeg, bmp, tiff):
        for size in ((0, 0), (0, 4), (4, 0)):
            assert refusal(make(*size)) == "not_an_image"


OTHERS = {"PPM": "RGB", "ICO": "RGB", "PDF": "RGB", "EPS": "RGB", "TGA": "RGB", "PCX": "RGB",
          "JPEG2000": "RGB", "AVIF": "RGB", "SGI": "RGB", "XBM": "1", "DDS": "RGB",
          "MSP": "1", "SPIDER": "F", "QOI": "RGB", "DIB": "RGB"}  # fmt: skip
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(100)
FLI = bytes(4) + b"\x11\xaf" + bytes(200)


def test_a_format_that_is_not_served_is_refused() -> None:
    """Pillow could read it, but each decoder that strangers reach is one more that may fail."""
    Image.init()  # as if somebody had imported them all
    for format, mode in OTHERS.items():
        data = saved(COLOUR.resize((64, 64)).convert(mode), format)
        assert refusal(data) == "not_an_image", format
    for data in (b"", b"\0", b"Hello, world\n" * 100, b"<svg/>", PSD, FLI):
        assert refusal(data) == "not_an_image", data


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_only_the_formats_of_the_rules_are_served(format: str) -> None:
    """A model that was not trained on GIF can refuse it; the message names what it takes."""
    data = saved(FEW, format)
    others = tuple(other for other in IMAGE_FORMATS if other != format)
    assert pixels(data, formats=(format,)).size == FEW.size
    with pytest.raises(SwiprError, match=f"expected a picture in one of {', '.join(others)}$"):
        pixels(data, formats=others)


# --- damaged pictures ----------------------------------------------------------------------------

WHOLE = {(f, image.mode): saved(image, f) for f in IMAGE_FORMATS for image in (GRAY, COLOUR)}


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_a_picture_that_breaks_off_is_refused(format: str) -> None:
    """Wherever it breaks off before its last pixels, and whether its EXIF is looked at or not."""
    for data in (WHOLE[format, "L"], WHOLE[format, "RGB"]):
        for tenth in range(10):
            part = data[: len(data) * tenth // 10]
            assert refusal(part, orientation="apply") == "not_an_image", f"{tenth}/10"
            assert refusal(part, orientation="ignore") == "not_an_image", f"{tenth}/10"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_picture_that_breaks_off_is_decoded_where_the_rules_say_so(format: str) -> None:
    """With what there is of it: one half is right. The next picture has its own rules."""
    data = saved(FEW, format, interlace=0)
    whole = pixels(data)
    part = data[: len(data) * 3 // 4]
    top = 30 if format == "BMP" else 0  # which begins at its lower end
    half = (0, top, 90, top + 30)
    assert_same(pixels(part, truncated=True).crop(half), whole.crop(half))
    assert refusal(part) == "not_an_image"


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Change a few bytes, often early, where the headers are."""
    bad = bytearray(data)
    for _ in range(chance.choice((1, 2, 8, 40))):
        place = chance.randrange(min(len(bad), chance.choice((40, 300, len(bad)))))
        bad[place] = chance.choice((0, 1, 127, 255, chance.randrange(256), bad[place] ^ 1))
    if chance.random() < 0.2:
        del bad[chance.randrange(len(bad)) :]
    return bytes(bad)


def decoded_or_refused(data: bytes, **rules: Any) -> None:
    with contextlib.suppress(SwiprError):
        pixels(data, **rules)
        return
    assert refusal(data, **rules) in ("not_an_image", "too_many_pixels")


@pytest.mark.parametrize("format", IMAGE_FORMATS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["apply", "jpeg", "ignore"]))
def test_a_damaged_picture_is_a_picture_or_refused(
    format: str, seed: int, truncated: bool, policy: str
) -> None:
    """Whatever the damage, the answer is pixels or a refusal, and the same one twice."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    data = damaged(chance, WHOLE[format, chance.choice(("L", "RGB"))])
    decoded_or_refused(data, truncated=truncated, orientation=policy)


BEGINNINGS = [b"", *(data[:12] for data in WHOLE.values()), b"MM\0*\0\0\0\x08", b"MM\0+", b"BM"]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=400), st.booleans())
def test_random_bytes_are_a_picture_or_refused(begin: bytes, rest: bytes, truncated: bool) -> None:
    """Even where they begin as a picture does."""
    decoded_or_refused(begin + rest, truncated=truncated)


QUIET = """
import random, sys, warnings
from swiprctl import SwiprError
from tests import test_decode as t
warnings.simplefilter("always")
chance = random.Random(1)
many = bytearray(t.tiff(16, 16))
many[many.index(b"\\x15\\x01\\x04\\0") + 8] = 200  # samples a pixel
bad = [many] if "TIFF" in sys.argv else []
for (format, mode), data in t.WHOLE.items():
    if format in sys.argv:
        bad += [t.damaged(chance, data) for _ in range(150)]
for data in bad:
    try:
        t.pixels(bytes(data))
    except SwiprError as error:
        print(error.code)
"""


@pytest.mark.parametrize("formats", ["JPEG PNG WEBP GIF BMP", "TIFF"])
def test_damaged_pictures_write_nothing_to_standard_error(formats: str) -> None:
    """A stranger's picture cannot write to the log, neither through Python nor through C."""
    answer, errors = script(QUIET, *formats.split())
    assert answer.count("not_an_image") > 50
    lines = errors.splitlines()
    assert not lines, f"{len(lines)} lines, among them {sorted(set(lines))[:5]}"
