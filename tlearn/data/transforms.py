"""Encoded bytes -> a square uint8 image, and uint8 batches -> normalised floats.

The crop is chosen from the header, before any pixel is decoded, so that only what the crop needs is decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import v2

from tlearn.data.decode import (
    BACKGROUND,
    SIDEWAYS,
    TO_UPRIGHT,
    load_as_stored,
    open_image,
    orientation_of,
    upright_size,
)
from tlearn.dataconfig import Augment

Fit = Literal["crop", "pad", "squash"]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[float, float, float]
Box = tuple[float, float, float, float]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """How the weights want their input; travels with every trained model."""

    size_px: int
    mean: Colour
    """Of RGB in 0..1."""
    std: Colour
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    """Share of the shorter side that evaluation keeps (fit crop only)."""
    fit: Fit = "crop"
    grey: bool = False
    """Three equal channels."""


class EvalTransform:
    """Bytes -> (3, S, S) uint8, always the same: the centre (crop) or the whole image (pad, squash)."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.p = preprocessing

    def __call__(self, data: bytes, seed: int = 0) -> Pixels:
        """`seed` is not used: nothing is random here."""
        return self.of(open_image(data))

    def of(self, image: Image.Image) -> Pixels:
        """The same of an opened image."""
        width, height = _canvas(upright_size(image), self.p.fit)
        if self.p.fit == "crop":
            side = min(width, height) * self.p.crop_pct
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        else:
            box = (0.0, 0.0, width, height)
        return _crop_and_resize(image, box, self.p)


class TrainTransform:
    """Bytes, seed -> (3, S, S) uint8: a random crop and flip, then changes of colour and shape, then an erased part."""

    def __init__(self, preprocessing: Preprocessing, augment: Augment) -> None:
        self.p, self.a = preprocessing, augment
        policies = {"trivial": [v2.TrivialAugmentWide()], "rand": [v2.RandAugment(2, augment.magnitude)]}
        after: list[Any] = policies.get(augment.policy, [])
        if augment.erase:
            after = [*after, v2.RandomErasing(augment.erase, value=[255 * x for x in preprocessing.mean])]
        self.after = v2.Compose(after) if after else None

    def __call__(self, data: bytes, seed: int) -> Pixels:
        """The same bytes and seed give the same pixels in any process."""
        image = open_image(data)
        draws = torch.rand(_TRIES * 2 + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        flip = draws.pop() < self.a.hflip
        cut = self._moved if self.a.crop == "padded" else self._resized
        pixels = cut(image, draws)
        pixels = np.ascontiguousarray(pixels[:, :, ::-1]) if flip else pixels
        if self.after is None:
            return pixels
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
            torch.manual_seed(seed)
            changed: Pixels = self.after(torch.from_numpy(pixels)).numpy()
            return changed

    def _moved(self, image: Image.Image, draws: list[float]) -> Pixels:
        """The whole image, moved; what comes in from outside is background."""
        pad = self.a.pad_px
        y, x = (int(draws.pop() * (2 * pad + 1)) for _ in range(2))
        whole = EvalTransform(self.p).of(image)
        canvas = np.pad(whole, ((0, 0), (pad, pad), (pad, pad)), constant_values=BACKGROUND[0])
        return np.ascontiguousarray(canvas[:, y : y + self.p.size_px, x : x + self.p.size_px])

    def _resized(self, image: Image.Image, draws: list[float]) -> Pixels:
        """A part of the image, scaled to the square."""
        size = upright_size(image)
        if self.p.fit == "squash":
            # the whole image counts as a square, so crop in unit coordinates and stretch the box
            x0, y0, x1, y1 = self._crop((1.0, 1.0), draws)
            box = (x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1])
        else:
            box = self._crop(_canvas(size, self.p.fit), draws)
        return _crop_and_resize(image, box, self.p)

    def _crop(self, canvas: tuple[float, float], draws: list[float]) -> Box:
        (width, height), scale = canvas, self.a.scale
        y, x = draws.pop(), draws.pop()
        low, high = math.log(self.a.ratio[0]), math.log(self.a.ratio[1])
        while draws:
            area = width * height * (scale[0] + (scale[1] - scale[0]) * draws.pop())
            ratio = math.exp(low + (high - low) * draws.pop())
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                break
        else:  # no try fitted: the largest crop with the closest allowed ratio
            ratio = min(max(width / height, self.a.ratio[0]), self.a.ratio[1])
            w, h = min(width, height * ratio), min(height, width / ratio)
        left, top = x * (width - w), y * (height - h)
        return left, top, left + w, top + h


_TRIES = 10


def normalise(images: torch.Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> torch.Tensor:
    """(B, 3, S, S) uint8 in 0..255 -> `dtype`, channels last, (x / 255 - mean) / std. On the images' device."""
    mean, std = _mean_and_std(preprocessing, dtype, images.device)
    return images.to(dtype, memory_format=torch.channels_last).sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _mean_and_std(p: Preprocessing, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each (1, 3, 1, 1), in 0..255; sent to the device once, not per batch."""
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) * 255 for values in (p.mean, p.std))
    return mean.to(device), std.to(device)


def _canvas(size: tuple[int, int], fit: Fit) -> tuple[float, float]:
    """Width and height in which boxes are measured."""
    width, height = size
    return (max(size), max(size)) if fit == "pad" else (width, height)


def _crop_and_resize(image: Image.Image, box: Box, p: Preprocessing) -> Pixels:
    """Cut the box, measured in the upright image's canvas, and scale it to (3, S, S).

    The box is turned into the stored orientation and the small result upright: only few pixels are ever turned.
    """
    orientation = orientation_of(image)
    box = _as_stored(box, _canvas(upright_size(image), p.fit), orientation)
    width, height = image.size
    # how much larger than needed the crop is: JPEGs are decoded that much smaller
    excess = min(box[2] - box[0], box[3] - box[1]) / p.size_px
    rgb = load_as_stored(image, cover=(width / excess, height / excess) if excess > 1 else None)
    # in powers of two, the last column and row rounded up
    scale = 1 / max(1, round(width / rgb.width))
    x, y = 0.0, 0.0
    if p.fit == "pad":
        rgb, x, y = _padded(rgb, width * scale, height * scale)
    scaled = (
        max(0.0, box[0] * scale + x),
        max(0.0, box[1] * scale + y),
        min(float(rgb.width), box[2] * scale + x),
        min(float(rgb.height), box[3] * scale + y),
    )
    square = rgb.resize((p.size_px, p.size_px), _RESAMPLING[p.interpolation], box=scaled)
    if orientation in TO_UPRIGHT:
        square = square.transpose(TO_UPRIGHT[orientation])
    if p.grey:
        square = square.convert("L").convert("RGB")
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _as_stored(box: Box, canvas: tuple[float, float], orientation: int) -> Box:
    """A box of the upright canvas in the coordinates of the stored one."""
    x0, y0, x1, y1 = box
    width, height = canvas
    if orientation in (2, 3, 6, 7):  # mirrored left to right
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 7, 8):  # mirrored top to bottom
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation in SIDEWAYS else (x0, y0, x1, y1)


def _padded(rgb: Image.Image, width: float, height: float) -> tuple[Image.Image, float, float]:
    """The image on a canvas that holds the square around it, and where that square's corner lies on the canvas.

    The image is pasted at whole pixels, so the corner is a fraction of one off; the axis that fills the square gets no
    border, whose colour would bleed into the edge.
    """
    side = max(width, height)
    offset_x, offset_y = (side - width) / 2, (side - height) / 2
    left, top = math.ceil(offset_x), math.ceil(offset_y)
    canvas = Image.new("RGB", (rgb.width + 2 * left, rgb.height + 2 * top), BACKGROUND)
    canvas.paste(rgb, (left, top))
    # the last column and row reach beyond the image by a share of a pixel: that share is background
    for excess, last in (
        (rgb.width - width, (left + rgb.width - 1, top, left + rgb.width, top + rgb.height)),
        (rgb.height - height, (left, top + rgb.height - 1, left + rgb.width, top + rgb.height)),
    ):
        line = canvas.crop(last)
        canvas.paste(Image.blend(line, Image.new("RGB", line.size, BACKGROUND), excess), last)
    return canvas, left - offset_x, top - offset_y
