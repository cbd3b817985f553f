"""From the bytes of an image file to 8-bit RGB pixels. The only importer of pillow's decoders.

Whatever a stranger's bytes make a decoder do ends here, as pixels or as a ``SwiprError``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import cast

# Image.open(formats=…) looks only among the decoders that are imported: these and no others.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from swiprctl.protocol import SwiprError
from swiprd.bundle import Preprocessing

# The limit in pixels is ours, looked at before decoding; pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = None
# Nor is a stranger's picture a reason to write to the log.
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)

_EXIF_ORIENTATION = 0x0112
_TURNS = {  # EXIF 2.32, tag 274: what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_BACK = _TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def decode(data: bytes, rules: Preprocessing, *, max_pixels: int) -> Image.Image:
    """Return the first picture in ``data``: mode RGB, upright as far as ``rules`` say so.

    Gray is replicated. With the rule ``high_byte``, white in 32 bits, whole numbers or not, is
    taken to be the smallest of 1, 255, 2**16 - 1 and 2**31 that no value exceeds: the formats
    leave it open.

    Raises:
        SwiprError: ``not_an_image``, ``too_many_pixels``, or ``internal`` for want of memory.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = rules.truncated
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(data), formats=rules.formats)
            _check_size(opened, max_pixels)
            if rules.jpeg_margin:
                side = math.ceil(rules.jpeg_margin * rules.short_side)
                opened.draft(None, (side, side))  # does nothing to other formats
            with _silent_libtiff() if opened.format == "TIFF" else contextlib.nullcontext():
                turn = _turn(opened, rules)
                image = _to_rgb(opened, rules)
            return image if turn is None else image.transpose(turn)
    except SwiprError:
        raise
    except MemoryError:
        raise SwiprError(
            "internal", "there is not enough memory to decode the picture; see max_worker_mib"
        ) from None
    except UnidentifiedImageError:
        raise SwiprError(
            "not_an_image", f"expected a picture in one of {', '.join(rules.formats)}"
        ) from None
    except Exception as error:  # decoders raise anything on broken files
        raise SwiprError(
            "not_an_image", f"the picture cannot be decoded: {str(error) or type(error).__name__}"
        ) from None


def _check_size(image: Image.Image, max_pixels: int) -> None:
    sizes = {"the picture": image.size}
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile is unpacked whole, however little of it the picture shows.
        sizes["a tile of the picture"] = (
            image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0),
            image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0),
        )
    for what, (width, height) in sizes.items():
        if type(width) is not int or type(height) is not int:  # a tag may be of any type
            raise SwiprError("not_an_image", f"the size of {what} is no number")
        if width * height > max_pixels:
            raise SwiprError(
                "too_many_pixels",
                f"{what} has {width} x {height} pixels, expected at most {max_pixels}",
            )


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    # It writes to standard error, many lines for one damaged file, and pillow offers no way to
    # stop it. The worker decodes in its only thread that writes anything.
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _turn(image: ImageFile.ImageFile, rules: Preprocessing) -> Image.Transpose | None:
    is_jpeg = image.format in ("JPEG", "MPO")
    upright = rules.orientation == "apply" or (rules.orientation == "jpeg" and is_jpeg)
    # Pillow turns a TIFF upright by itself; where that is not wanted, it is turned back.
    turned = image.format == "TIFF"
    if upright == turned:
        return None
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the picture unreadable
        return None
    return (_TURNS if upright else _TURNS_BACK).get(orientation)


def _to_rgb(image: Image.Image, rules: Preprocessing) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if rules.alpha != "drop" and image.has_transparency_data:
        ground = Image.new("RGBA", image.size, rules.alpha)
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return _opaque(image, rules)


def _opaque(image: Image.Image, rules: Preprocessing) -> Image.Image:
    mode = image.mode
    if mode in ("RGBa", "La"):
        return image.convert("RGBA" if mode == "RGBa" else "LA").convert("RGB")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only in-place conversion returns None
        return converted
    if rules.deep == "clip" or not mode.startswith(("I", "F")):
        return image.convert("RGB")
    if mode.startswith("I;16"):
        # Pillow's own conversion clips to 255.
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    scale = _scale(image)
    return image.convert("F").point(lambda value: value * scale).convert("L").convert("RGB")


def _scale(image: Image.Image) -> float:
    lowest, highest = cast(tuple[float, float], image.getextrema())
    for white, scale in ((1, 255.0), (255, 1.0), (2**16 - 1, 2**-8), (2**31, 2**-23)):
        if lowest >= 0 and highest <= white:
            return scale
    raise SwiprError(
        "not_an_image",
        f"the picture has values from {lowest} to {highest}, expected 0 to {2**31}",
    )
