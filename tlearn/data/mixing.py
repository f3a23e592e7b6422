"""Mixup and CutMix of neighbours: positions 2k and 2k+1 of a global batch, which are never cut apart.

So the mixture is the same however a batch is split, and no process needs another one's images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from tlearn.data.order import mix


class Mixing(NamedTuple):
    """How much images are mixed; see `data.augment`."""

    mixup: float
    cutmix: float

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def draw(
    mixing: Mixing, key: int, start: int, stop: int, batch: int, size_px: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each image keeps of itself.

    Args:
        mixing: the strengths.
        key: of the global batch.
        start, stop: positions in it, the first one even.
        batch: its size; of an odd one the last image stays as it is.
        size_px: of the images.

    Returns:
        (b,) float32 shares, and (b, 4) int64 boxes (x0, y0, x1, y1), px, that come from the neighbour; empty for mixup.
    """
    shares, boxes = np.ones(stop - start, dtype=np.float32), np.zeros((stop - start, 4), dtype=np.int64)
    for first in range(start, min(stop, batch - 1), 2):
        rng = np.random.default_rng(mix(key, first))
        cuts = mixing.cutmix > 0 and (mixing.mixup == 0 or rng.random() < 0.5)
        strength = mixing.cutmix if cuts else mixing.mixup
        share, pair = float(rng.beta(strength, strength)), slice(first - start, first - start + 2)
        if cuts:
            side = round(size_px * math.sqrt(1 - share))
            x, y = rng.integers(0, size_px - side, size=2, endpoint=True)
            boxes[pair] = x, y, x + side, y + side
            share = 1 - side * side / size_px**2  # of whole pixels
        shares[pair] = share
    return torch.from_numpy(shares), torch.from_numpy(boxes)


def mixed(images: torch.Tensor, shares: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) with their neighbours' parts; `shares` and `boxes` as `draw` gives them, on the images' device."""
    rows = torch.arange(images.shape[2], device=images.device).view(1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, -1)
    x0, y0, x1, y1 = (side.view(-1, 1, 1) for side in boxes.unbind(1))
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    cut = x1 > x0
    own = torch.where(cut, (~inside).to(images.dtype), shares.to(images.dtype).view(-1, 1, 1)).unsqueeze(1)
    return (own * images + (1 - own) * images[neighbours(len(images), images.device)]).contiguous(
        memory_format=torch.channels_last
    )


def neighbours(n: int, device: torch.device) -> torch.Tensor:
    """(n,) int64: with whom each image is mixed."""
    return (torch.arange(n, device=device) ^ 1).clamp(max=n - 1)
