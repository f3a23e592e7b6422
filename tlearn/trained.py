"""A run's best weights as a network that is ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from tlearn import checkpoint
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.errors import TlearnError
from tlearn.files import sha256
from tlearn.folder import RunFolder
from tlearn.modelconfig import Model
from tlearn.models.build import Card, assemble


class Trained(NamedTuple):
    """What a run left."""

    net: nn.Module
    """(B, 3, S, S) normalised images -> (B, classes) logits; in eval mode, frozen, on the CPU."""
    head: str
    """Name of its last layer."""
    card: Card
    config: Config
    fingerprint: str
    """Of the weights."""


def load_trained(run: Path) -> Trained:
    """The best model of a run.

    Raises:
        TlearnError: no run there, or one that has not finished an epoch.
    """
    folder = RunFolder(run)
    if not folder.card.is_file():
        raise TlearnError(f"{run}: holds no trained model (expected {folder.card})")
    state, _ = checkpoint.load_best(folder.best)
    card = Card.read(folder.card)
    config = load_config(folder.config)
    options = Model(backbone=card.backbone, weights="random", stem=card.stem, attention=card.attention)
    size_px, classes, one_logit = card.preprocessing.size_px, len(card.classes), config.objective.name == "binary"
    net, head, *_ = assemble(options, size_px, classes, one_logit=one_logit, texts=card.texts)
    net.load_state_dict(state)
    return Trained(net.requires_grad_(False).eval(), head, card, config, sha256(folder.best))
