"""What is minimised: a module from a batch to a loss sum, and the weight by which the global batch divides it.

The engine divides by the weight of the global batch, which every rank knows from the index, so that any split of a
batch over processes and micro-batches gives the same gradient. (A mean of per-rank means does not.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from tlearn.config import Distillation as DistillationConfig
from tlearn.config import DomainAdversarial as DomainAdversarialConfig
from tlearn.config import Objective as ObjectiveConfig
from tlearn.data.loader import Batch
from tlearn.data.mixing import neighbours
from tlearn.data.shards import UNLABELLED
from tlearn.data.transforms import Preprocessing
from tlearn.errors import TlearnError
from tlearn.models.build import Model
from tlearn.models.heads import Texts
from tlearn.trained import Trained, load_trained

EFFECTIVE_BETA = 0.999
"""Of `class_weight: effective`: beyond about 1,000 images of a class more of them say little that is new."""


class LossSum(NamedTuple):
    """Sums over the samples of a batch."""

    loss: torch.Tensor
    """Scalar, weighted."""
    correct: torch.Tensor
    """Scalar: samples whose largest logit is their label's; of mixed images the shares of the labels that are hit."""


class Objective(nn.Module):
    """Base class: `forward(batch) -> LossSum`, `weight(labels) -> float`."""

    net: nn.Module
    time: float = 0.0
    """Share of the run that is over, 0 to 1; the engine sets it before every step."""
    rests_on: str = ""
    """Hash of weights that are not the run's own: it goes on with the same only."""

    def weight(self, labels: torch.Tensor) -> float:
        """What the loss sum of samples with these labels, (n,) int64, is divided by."""
        raise NotImplementedError


class Supervised(Objective):
    """Cross-entropy on the labels, with label smoothing (Szegedy et al. 2016), class weights and mixed images.

    Args:
        model: whose net gives (B, classes) logits.
        config: its options.
        class_weight: (classes,) float64, or None: all ones.
    """

    class_weight: torch.Tensor | None

    def __init__(self, model: Model, config: Any, class_weight: torch.Tensor | None) -> None:
        super().__init__()
        self.net, self.label_smoothing = model.net, config.label_smoothing
        self._weight_on_cpu = class_weight  # `weight` must not wait for the device
        on_device = None if class_weight is None else class_weight.to(_dtype(model.net))
        self.register_buffer("class_weight", on_device, persistent=False)

    def forward(self, batch: Batch) -> LossSum:
        """Loss and correct answers, summed."""
        return self.score(_wide(self.net(batch.images)), batch)

    def score(self, logits: torch.Tensor, batch: Batch) -> LossSum:
        """The same of given logits."""
        answers = logits.argmax(1)
        losses, hits = self._losses(logits, batch.labels), (answers == batch.labels).to(logits.dtype)
        if batch.shares is not None:
            others = batch.labels[neighbours(len(batch.labels), batch.labels.device)]
            own = batch.shares.to(logits.dtype)
            losses = own * losses + (1 - own) * self._losses(logits, others)
            hits = own * hits + (1 - own) * (answers == others)
        return LossSum(losses.sum(), hits.sum())

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(b,), weighted; 0 where there is no label."""
        losses = F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.label_smoothing, ignore_index=UNLABELLED
        )
        if self.class_weight is not None:
            # not cross_entropy's own `weight`: with smoothing it also weights the other classes' terms
            losses = losses * self.class_weight[labels.clamp(min=0)].to(losses.dtype)
        return losses

    def weight(self, labels: torch.Tensor) -> float:
        """Sum of the samples' class weights."""
        labels = labels[labels != UNLABELLED]
        if self._weight_on_cpu is None:
            return float(len(labels))
        return float(self._weight_on_cpu[labels].sum())

    def _per_sample(self, batch: Batch) -> float:
        """By what the sum of a term that weighs all samples alike is multiplied, so that its mean is what counts."""
        return self.weight(batch.global_labels) / len(batch.global_labels)


class Distillation(Supervised):
    """A trained network's answers as soft labels (Hinton et al. 2015), its features as hints (FitNets, Romero et al.
    2015): (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student at temperature T) + features * mean square.

    Raises:
        TlearnError: a teacher that cannot be loaded.
    """

    def __init__(self, model: Model, config: DistillationConfig, class_weight: torch.Tensor | None) -> None:
        super().__init__(model, config, class_weight)
        self.alpha, self.temperature, self.features = config.alpha, config.temperature, config.features
        try:
            trained = load_trained(Path(config.teacher))
        except TlearnError as error:
            raise TlearnError(f"objective.teacher: {error}; it is needed to go on, too") from None
        self.rests_on = trained.fingerprint
        # in a tuple: the teacher is no part of this module, so neither checkpoints nor the optimizer know of it
        self._teacher = (_Teacher(trained, model.preprocessing),)
        if self.features:
            self._seen = _Tap(model.net.get_submodule(model.head))
            width, theirs = (_width(net, head) for net, head in ((model.net, model.head), (trained.net, trained.head)))
            model.attach({"projection": nn.Linear(width, theirs)} if width != theirs else {})
            self._projection = (model.beside.get("projection", nn.Identity()),)

    def check(self, classes: tuple[str, ...]) -> None:
        """Raise where the teacher's answers mean something else.

        Raises:
            TlearnError: it knows other classes.
        """
        if self._teacher[0].classes != classes:
            names = ", ".join(self._teacher[0].classes[:5])
            raise TlearnError(f"objective.teacher: knows other classes ({names}, ...); train it on these data")

    def forward(self, batch: Batch) -> LossSum:
        """See `Supervised`."""
        logits = _wide(self.net(batch.images))
        answers, hints = self._teacher[0](batch.images)
        loss, correct = self.score(logits, batch)
        t = self.temperature
        soft = F.kl_div(
            (logits / t).log_softmax(1), (answers.to(logits.dtype) / t).log_softmax(1), reduction="sum", log_target=True
        )
        beside = self.alpha * t * t * soft
        if self.features:
            mine = self._projection[0](self._seen.take())
            beside = beside + self.features * (_wide(mine) - hints).square().mean(1).sum()
        return LossSum((1 - self.alpha) * loss + self._per_sample(batch) * beside, correct)


class DomainAdversarial(Supervised):
    """Features from which labels can be told and domains cannot (DANN, Ganin et al. 2016).

    Samples without a label are of the target. A discriminator tells domains apart by the features; through the reversed
    gradient the network learns to prevent it, by a strength that rises over the run (section 5.2.2 there).
    """

    def __init__(self, model: Model, config: DomainAdversarialConfig, class_weight: torch.Tensor | None) -> None:
        super().__init__(model, config, class_weight)
        self.strength = config.strength
        width = _width(model.net, model.head)
        layers = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))
        model.attach({"discriminator": layers})
        self._discriminator = (layers,)
        self._seen = _Tap(model.net.get_submodule(model.head))

    def forward(self, batch: Batch) -> LossSum:
        """See `Supervised`."""
        loss, correct = self.score(_wide(self.net(batch.images)), batch)
        strength = self.strength * (2 / (1 + math.exp(-10 * self.time)) - 1)
        guesses = _wide(self._discriminator[0](_Reversed.apply(self._seen.take(), strength)))[:, 0]
        labelled = (batch.labels != UNLABELLED).to(guesses.dtype)
        domains = F.binary_cross_entropy_with_logits(guesses, labelled, reduction="sum")
        return LossSum(loss + self._per_sample(batch) * domains, correct)


class _Reversed(torch.autograd.Function):
    """Hands features on and turns their gradient round."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradients[0], None


class _Tap:
    """Holds what went into a layer last."""

    def __init__(self, layer: nn.Module) -> None:
        self._seen: list[torch.Tensor] = []
        layer.register_forward_pre_hook(self._look)

    def _look(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen = [inputs[0]]

    def take(self) -> torch.Tensor:
        """It, and hold it no longer: a graph hangs on it."""
        return self._seen.pop()


class _Teacher:
    """(B, 3, S, S), normalised for the student -> the teacher's logits and features, without gradients."""

    def __init__(self, trained: Trained, student: Preprocessing) -> None:
        self.net, self.classes, self.p, self.student = (
            trained.net,
            trained.card.classes,
            trained.card.preprocessing,
            student,
        )
        self._seen = _Tap(self.net.get_submodule(trained.head))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.net.to(images.device, images.dtype)
        mean, std, theirs, spread = (
            torch.tensor(values, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
            for values in (self.student.mean, self.student.std, self.p.mean, self.p.std)
        )
        images = (images * std + mean - theirs) / spread
        if images.shape[-1] != self.p.size_px:
            images = F.interpolate(images, size=(self.p.size_px, self.p.size_px), mode="bilinear", antialias=True)
        return _wide(self.net(images)), _wide(self._seen.take())


def _wide(x: torch.Tensor) -> torch.Tensor:
    """As float32 at least: losses of half precision are too coarse."""
    return x if x.dtype == torch.float64 else x.float()


def _width(net: nn.Module, head: str) -> int:
    layer = net.get_submodule(head)
    assert isinstance(layer, nn.Linear | Texts)
    return layer.in_features


def _dtype(net: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in net.parameters()), torch.float32)


def build_objective(
    config: ObjectiveConfig, model: Model, classes: tuple[str, ...], per_class: npt.NDArray[np.int64] | None
) -> Objective:
    """The configured objective; layers of its own are attached to the model.

    Args:
        config: `objective` of the run.
        model: what is trained.
        classes: names in label order.
        per_class: (classes,) training samples of each class; None where they are not known.

    Raises:
        TlearnError: a teacher that cannot be loaded, or of other classes.
    """
    weight = None
    if config.class_weight != "none":
        assert per_class is not None
        counts = torch.from_numpy(per_class).double().clamp(min=1)
        weight = CLASS_WEIGHTS[config.class_weight](counts)
    objective = OBJECTIVES[config.name](model, config, weight)
    if isinstance(objective, Distillation):
        objective.check(classes)
    return objective


def _inverse(counts: torch.Tensor) -> torch.Tensor:
    return counts.sum() / (len(counts) * counts)


def _effective(counts: torch.Tensor) -> torch.Tensor:
    """Inverse of the effective number of samples (Cui et al. 2019, equation 4), of mean 1 over the samples."""
    weight = (1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**counts)
    return weight * counts.sum() / (weight * counts).sum()


CLASS_WEIGHTS = {"inverse": _inverse, "effective": _effective}
OBJECTIVES: dict[str, type[Supervised]] = {
    "supervised": Supervised,
    "binary": Supervised,  # its head has one logit
    "distillation": Distillation,
    "domain_adversarial": DomainAdversarial,
}
