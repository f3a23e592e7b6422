"""Encoded image bytes -> upright RGB. The one place that turns files into pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tlearn.errors import TlearnError

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
"""Formats that are read (by content, not by name), and their ending inside shards."""
_PLUGINS = tuple(name for name in FORMATS if name != "MPO")  # a JPEG with more behind it: the JPEG plug-in opens it
BACKGROUND = (255, 255, 255)
"""RGB that shows through transparent pixels, and fills the border of `data.fit: pad`."""
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


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
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=_PLUGINS)
    except UnidentifiedImageError:
        raise UnreadableImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"too large: {error}") from None
    except Exception as error:  # a malformed header raises whatever its plug-in happens to raise
        raise UnreadableImageError(f"broken header: {error or type(error).__name__}") from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in px once the EXIF orientation is applied."""
    return image.size[::-1] if _orientation(image) in _ROTATED else image.size


def load_rgb(image: Image.Image, cover: tuple[float, float] | None = None) -> Image.Image:
    """Decode an opened image to upright RGB, transparency over BACKGROUND.

    Args:
        image: what `open_image` returned; used up.
        cover: upright (width, height) in px that is enough: a JPEG is decoded at the smallest DCT scale that is
            not below it (1/1, 1/2, 1/4, 1/8), which is several times faster for large photos.

    Raises:
        UnreadableImageError: truncated or broken pixel data.
    """
    orientation = _orientation(image)
    try:
        if cover is not None:
            width, height = cover[::-1] if orientation in _ROTATED else cover
            image.draft(None, (max(1, int(width)), max(1, int(height))))
        image.load()
        rgb = _to_rgb(image)
    except Exception as error:  # a malformed file raises whatever its plug-in happens to raise
        raise UnreadableImageError(f"cannot be decoded: {error or type(error).__name__}") from None
    if orientation != 1:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF blocks are common and do not make the pixels unreadable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
