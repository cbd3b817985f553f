"""From the bytes of an image file to 8-bit RGB pixels. The only importer of pillow's decoders.

Whatever a stranger's bytes make a decoder do ends here, as pixels or as a ``SwiprError``.
"""

from __future__ import annotations

import io
import warnings

# Image.open(formats=…) looks only among the decoders that are imported: these and no others.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from swiprctl.protocol import SwiprError
from swiprd.bundle import Preprocessing

# The limit in pixels is ours, looked at before decoding; pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = None

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


def decode(data: bytes, rules: Preprocessing, *, max_pixels: int) -> Image.Image:
    """Return the first picture in ``data``: mode RGB, upright as far as ``rules`` say so.

    Alpha is dropped, not composited; gray is replicated; 16-bit values keep their high byte.

    Raises:
        SwiprError: ``not_an_image`` or ``too_many_pixels``.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = rules.truncated
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stranger's picture is no reason to write to the log
            opened = Image.open(io.BytesIO(data), formats=rules.formats)
            _check_size(opened, max_pixels)
            turn = _turn(opened, rules)
            image = _to_rgb(opened)
            return image if turn is None else image.transpose(turn)
    except SwiprError:
        raise
    except UnidentifiedImageError:
        raise SwiprError(
            "not_an_image", f"expected a picture in one of {', '.join(rules.formats)}"
        ) from None
    except Exception as error:  # decoders raise anything on broken files
        raise SwiprError(
            "not_an_image", f"the picture cannot be decoded: {error or type(error).__name__}"
        ) from None


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise SwiprError(
            "too_many_pixels",
            f"the picture has {width} x {height} pixels, expected at most {max_pixels}",
        )


def _turn(image: ImageFile.ImageFile, rules: Preprocessing) -> Image.Transpose | None:
    is_jpeg = image.format in ("JPEG", "MPO")
    if rules.orientation == "ignore" or (rules.orientation == "jpeg" and not is_jpeg):
        return None
    try:
        return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not make the picture unreadable
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        image.load()
        return image
    if mode.startswith("I"):
        # Pillow's own conversion clips to 255. I;16 and its kin, and I where pillow widens 16 bits.
        high_byte = image.convert("I").point(lambda value: value / 256)
        return high_byte.convert("L").convert("RGB")
    if mode in ("RGBa", "La"):
        return image.convert("RGBA" if mode == "RGBa" else "LA").convert("RGB")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only in-place conversion returns None
        return converted
    return image.convert("RGB")
