"""The last layer of a classifier, and what can be put around the whole."""

from __future__ import annotations

import torch
from torch import nn


class OneLogit(nn.Linear):
    """A head for two classes with one logit z, handed on as (0, z): its softmax is (1 - sigmoid(z), sigmoid(z)), its
    cross-entropy the binary one, and the larger of the two that of probability above 0.5."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, features) -> (B, 2)."""
        logit = super().forward(features)
        return torch.cat([torch.zeros_like(logit), logit], dim=-1)


def zero_head(features: int, classes: int, *, one_logit: bool) -> nn.Linear:
    """A head that says nothing yet: the first loss is ln(classes)."""
    new = OneLogit(features) if one_logit else nn.Linear(features, classes)
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
