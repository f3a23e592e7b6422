"""The last layer of a classifier, and what can be put around the whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Prototypes(NamedTuple):
    """A text per class, as a text tower sees it."""

    features: torch.Tensor
    """(classes, width), of length 1."""
    scale: float
    """Of the cosines between these and the features of images, which makes logits of them."""

    @classmethod
    def blank(cls, classes: int, width: int) -> Prototypes:
        """For a head whose state is known from elsewhere."""
        return cls(torch.zeros(classes, width), 1.0)


class Texts(nn.Module):
    """A head that compares an image's features with those of a text per class (CLIP, Radford et al. 2021).

    Args:
        old: the head in its place; where it gives as many numbers as a text has it is the projection to start from, as
            in the image tower of a CLIP model.
        prototypes: of the classes.

    Attributes:
        is_pretrained: whether the old head's projection is kept.
    """

    prototypes: torch.Tensor

    def __init__(self, old: nn.Linear, prototypes: Prototypes) -> None:
        super().__init__()
        self.in_features, width = old.in_features, prototypes.features.shape[1]
        self.projection = nn.Linear(old.in_features, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(prototypes.scale)))
        self.register_buffer("prototypes", prototypes.features.clone())
        self.is_pretrained = old.out_features == width
        if self.is_pretrained:
            with torch.no_grad():
                self.projection.weight.copy_(old.weight)
                self.projection.bias.copy_(0.0 if old.bias is None else old.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, features) -> (B, classes), cosines times the scale."""
        projected = self.projection(features)
        device = projected.device.type
        # a scale of 100 makes rounded cosines unequal
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            cosines = F.normalize(projected.to(self.prototypes.dtype), dim=-1) @ self.prototypes.T
            logits: torch.Tensor = self.logit_scale.exp() * cosines
        return logits


class OneLogit(nn.Linear):
    """A head for two classes with one logit z, handed on as (0, z): its softmax is (1 - sigmoid(z), sigmoid(z)), its
    cross-entropy the binary one, and the larger of the two that of probability above 0.5."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, features) -> (B, 2)."""
        logit = super().forward(features)
        return torch.cat([torch.zeros_like(logit), logit], dim=-1)


def new_head(old: nn.Linear, classes: int, one_logit: bool, texts: Prototypes | None) -> nn.Module:
    """In place of another one. Without texts it says nothing yet: the first loss is ln(classes)."""
    if texts is not None:
        return Texts(old, texts)
    new = OneLogit(old.in_features) if one_logit else nn.Linear(old.in_features, classes)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    return new


class Mirrored(nn.Module):
    """The mean of a network's logits for an image and for its mirror image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, classes)."""
        logits: torch.Tensor = (self.net(images) + self.net(images.flip(-1))) / 2
        return logits
