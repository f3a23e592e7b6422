"""What is minimised: a module from a batch to a loss sum, and the weight by which the global batch divides it.

The engine divides by the weight of the global batch, which every rank knows from the index, so that any split of a
batch over processes and micro-batches gives the same gradient. (A mean of per-rank means does not.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from tlearn.config import Objective as ObjectiveConfig
from tlearn.data.loader import Batch


class LossSum(NamedTuple):
    """Sums over the samples of a batch."""

    loss: torch.Tensor
    """Scalar, weighted."""
    correct: torch.Tensor
    """Scalar: samples whose largest logit is their label's."""


class Objective(nn.Module):
    """Base class: `forward(batch) -> LossSum`, `weight(labels) -> float`."""

    net: nn.Module

    def weight(self, labels: torch.Tensor) -> float:
        """What the loss sum of samples with these labels, (n,) int64, is divided by."""
        raise NotImplementedError


class Supervised(Objective):
    """Cross-entropy on the labels, with label smoothing (Szegedy et al. 2016) and class weights.

    Args:
        net: (B, 3, S, S) -> (B, classes) logits.
        class_weight: (classes,) float64, or None: all ones.
        label_smoothing: share of the target spread over the classes.
    """

    class_weight: torch.Tensor | None

    def __init__(self, net: nn.Module, class_weight: torch.Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        self.net, self.label_smoothing = net, label_smoothing
        self._weight_on_cpu = class_weight  # `weight` must not wait for the device
        on_device = None if class_weight is None else class_weight.to(_dtype(net))
        self.register_buffer("class_weight", on_device, persistent=False)

    def forward(self, batch: Batch) -> LossSum:
        """Loss and correct answers, summed."""
        logits = self.net(batch.images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=self.label_smoothing)
        if self.class_weight is not None:
            # not cross_entropy's own `weight`: with smoothing it also weights the other classes' terms
            losses = losses * self.class_weight[batch.labels].to(losses.dtype)
        return LossSum(losses.sum(), (logits.argmax(1) == batch.labels).sum())

    def weight(self, labels: torch.Tensor) -> float:
        """Sum of the samples' class weights."""
        if self._weight_on_cpu is None:
            return float(len(labels))
        return float(self._weight_on_cpu[labels].sum())


def _dtype(net: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in net.parameters()), torch.float32)


def build_objective(config: ObjectiveConfig, net: nn.Module, per_class: npt.NDArray[np.int64] | None) -> Objective:
    """The configured objective.

    Args:
        config: `objective` of the run.
        net: the model.
        per_class: (classes,) training samples of each class; None where they are not known.
    """
    weight = None
    if config.class_weight == "inverse":
        assert per_class is not None
        counts = torch.from_numpy(per_class).double().clamp(min=1)
        weight = counts.sum() / (len(counts) * counts)
    return OBJECTIVES[config.name](net, weight, config.label_smoothing)


OBJECTIVES = {"supervised": Supervised}
