"""Two or more backbones side by side: their features are concatenated in front of one head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from torch import nn

from tlearn.data.transforms import Preprocessing
from tlearn.errors import TlearnError
from tlearn.models.backbones import Backbone, blocks_of, build_backbone, last_linear, replace_head
from tlearn.models.weights import BESIDE


class Renormalise(nn.Module):
    """Images as one backbone's preprocessing gives them, as another one wants them.

    Its numbers are saved with the weights: those of a model's default weights may differ from the ones it began with.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, given: Preprocessing, wanted: Preprocessing) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (given.mean, given.std))
        new_mean, new_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (wanted.mean, wanted.std))
        self.register_buffer("scale", std / new_std)
        self.register_buffer("shift", (mean - new_mean) / new_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> the same shape."""
        return images * self.scale + self.shift


class Join(nn.Module):
    """Concatenation, as a module: what frozen parts give can be stored behind it."""

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        """(B, F1), (B, F2), ... -> (B, F1 + F2 + ...)."""
        return torch.cat(features, dim=1)


class Hybrid(nn.Module):
    """Backbones without their heads, and one head for all.

    Args:
        parts: as their libraries make them.
        dropout: rate before the head.

    Attributes:
        blocks: parameter names; the last block holds the last block of every part, and so on towards the images.
    """

    def __init__(self, parts: Sequence[Backbone], dropout: float) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(Renormalise(parts[0].preprocessing, part.preprocessing) for part in parts)
        self.parts = nn.ModuleList(part.net for part in parts)
        widths: list[int] = []
        blocks: list[list[list[str]]] = []

        def nothing(old: nn.Linear) -> nn.Module:
            widths.append(old.in_features)
            return nn.Identity()

        for i, part in enumerate(parts):
            deep_first = reversed(blocks_of(part.net, last_linear(part.net)))
            replace_head(part.net, nothing)
            blocks.append([[f"parts.{i}.{name}" for name in block] for block in deep_first])
        self.join = Join()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(sum(widths), 1)
        self.blocks = [list(chain(*beside)) for beside in zip_longest(*blocks, fillvalue=[])][::-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, classes)."""
        features = [part(given(images)) for part, given in zip(self.parts, self.inputs, strict=True)]
        logits: torch.Tensor = self.head(self.drop(self.join(*features)))
        return logits


def build_hybrid(name: str, weights: str, size_px: int | None, dropout: float) -> Backbone:
    """Make all parts, each with its weights; the first one's preprocessing counts.

    Args:
        name: of the parts, joined by ` + `.
        weights: of the parts in their order, or one for all.
        size_px: input size; None: the size of the first part's weights.
        dropout: rate before the head.

    Raises:
        TlearnError: another number of weights than of parts, or what `build_backbone` raises.
    """
    names, sources = name.split(BESIDE), weights.split(BESIDE)
    if len(sources) not in (1, len(names)):
        raise TlearnError(
            f"model.weights = {weights!r}: {len(sources)} weights for {len(names)} backbones; name one for all, or one "
            f"for each, joined by {BESIDE.strip()!r} between spaces"
        )
    parts: list[Backbone] = []
    for part, source in zip(names, sources * (len(names) // len(sources)), strict=True):
        parts.append(build_backbone(part, source, size_px, 0.0))
        size_px = size_px or parts[0].preprocessing.size_px
    found = [part.weights for part in parts]
    return Backbone(
        Hybrid(parts, dropout), name, found[0] if len(set(found)) == 1 else BESIDE.join(found), parts[0].preprocessing
    )
