"""Encoded image bytes -> upright RGB. The one place that turns files into pixels."""

from __future__ import annotations

import io
import warnings
from enum import IntEnum
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from tlearn.errors import TlearnError

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif"}
"""Formats that are read (by content, not by name), and their ending inside shards."""
_PLUGINS = tuple(name for name in FORMATS if name != "MPO")  # a JPEG with more behind it: the JPEG plug-in opens it
BACKGROUND = (255, 255, 255)
"""RGB that shows through transparent pixels, and fills the border of `data.fit: pad`."""
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height."""


class TiffTag(IntEnum):
    """Of TIFF 6.0 (Adobe, 1992), section 8."""

    SUBFILE_TYPE = 254
    BITS = 258
    PHOTOMETRIC = 262


class UnreadableImageError(TlearnError):
    """The bytes are no image that can be decoded; the message is the reason."""


def open_image(data: bytes) -> Image.Image:
    """Read the header: size and format are known, pixels are not decoded yet.

    Raises:
        UnreadableImageError: not an image, another format, or more pixels than Pillow's decompression-bomb limit.
    """
    if not data:
        raise UnreadableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on tags that do not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_PLUGINS)
            if _tag(image, TiffTag.SUBFILE_TYPE, 0) & 1:
                raise UnreadableImageError("begins with a preview, as raw files of cameras do; export it as JPEG")
            return image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"too large: {error}") from None
    except Exception as error:  # a malformed header raises whatever its plug-in happens to raise
        raise UnreadableImageError(f"broken header: {error or type(error).__name__}") from None


def frames_of(data: bytes) -> int:
    """How many pictures a file holds, of which the first is decoded; those behind a broken one are not counted.

    Raises:
        UnreadableImageError: as `open_image`.
    """
    image = open_image(data)
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # looking for them meets whatever a damaged file holds
        return 1


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is left to apply; 1 where there is none or it makes no sense."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow decodes these upright, and says so in their size
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF blocks are common and do not make the pixels unreadable
        return 1
    return orientation if orientation in TO_UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in px once the EXIF orientation is applied."""
    return image.size[::-1] if orientation_of(image) in SIDEWAYS else image.size


def load_rgb(image: Image.Image, cover: tuple[float, float] | None = None) -> Image.Image:
    """Decode an opened image to upright RGB, transparency over BACKGROUND; arguments and errors as `load_as_stored`."""
    orientation = orientation_of(image)
    if cover is not None and orientation in SIDEWAYS:
        cover = cover[::-1]
    rgb = load_as_stored(image, cover)
    upright = rgb.transpose(TO_UPRIGHT[orientation]) if orientation in TO_UPRIGHT else rgb
    upright.info.clear()  # nobody shall turn it once more
    return upright


def load_as_stored(image: Image.Image, cover: tuple[float, float] | None = None) -> Image.Image:
    """Decode an opened image to RGB, transparency over BACKGROUND, in the orientation in which it is stored.

    Args:
        image: what `open_image` returned; used up.
        cover: (width, height) in px that is enough: a JPEG is decoded at the smallest DCT scale that is not below it
            (1/1, 1/2, 1/4, 1/8), which is several times faster for large photos.

    Raises:
        UnreadableImageError: truncated or broken pixel data.
    """
    try:
        if cover is not None:
            image.draft(None, (max(1, int(cover[0])), max(1, int(cover[1]))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on tags that do not matter here
            image.load()
        return _to_rgb(image)
    except Exception as error:  # a malformed file raises whatever its plug-in happens to raise
        raise UnreadableImageError(f"cannot be decoded: {error or type(error).__name__}") from None


def as_bmp(image: Image.Image) -> bytes:
    """The bytes of a file for a picture that comes without one: RGB or grey, transparency over BACKGROUND.

    Not compressed: every version of every library gives the same bytes, so that splits by their hash stay as they are.
    """
    buffer = io.BytesIO()
    (image if image.mode == "L" else _to_rgb(image)).save(buffer, "BMP")
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        white = 2 ** int(np.max(_tag(image, TiffTag.BITS, 16))) - 1
        grey = np.asarray(image).astype(np.int64).clip(0, white) * 255 // white
        if _tag(image, TiffTag.PHOTOMETRIC, 1) == 0:  # white is zero; of 16 bits Pillow takes no notice of it
            grey = 255 - grey
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("signed, 32-bit or floating-point values of an unknown range; convert them to 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def _tag(image: Image.Image, tag: TiffTag, default: int) -> Any:
    """What a TIFF file says; other formats have the default."""
    return image.tag_v2.get(tag, default) if isinstance(image, TiffImagePlugin.TiffImageFile) else default
