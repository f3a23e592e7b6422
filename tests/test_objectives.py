"""A loss sum divided by the weight of the global batch: the same gradient however the batch is split."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tlearn.config import Supervised
from tlearn.data.loader import Batch
from tlearn.data.transforms import Preprocessing
from tlearn.models.build import Model
from tlearn.objectives import Objective, build_objective

CLASSES = 4
NAMES = ("a", "b", "c", "d")
PER_CLASS = np.array([10, 1, 5, 0])


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).to(dtype)


def make_model(net: nn.Module) -> Model:
    return Model(net, "x", "random", "1", [], Preprocessing(2, (0, 0, 0), (1, 1, 1)), True)


def make_batch(labels: torch.Tensor, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    images = torch.randn(len(labels), 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Batch(images, labels, torch.zeros(len(labels), dtype=torch.int64), labels)


def part(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(batch.images[start:stop], batch.labels[start:stop], batch.keys[start:stop], batch.global_labels)


def make(net: nn.Module, *, weighted: bool, smoothing: float) -> Objective:
    config = Supervised(label_smoothing=smoothing, class_weight="inverse" if weighted else "none")
    return build_objective(config, make_model(net), NAMES, PER_CLASS)


def inverse_weights() -> torch.Tensor:
    """N / (C n_c), as scikit-learn's `balanced`; a class without images counts as if it had one."""
    return 17 / (CLASSES * torch.tensor([10, 1, 5, 1], dtype=torch.float64))


LABELS = torch.tensor([0, 0, 1, 2, 2, 3, 0])


def test_class_weights_without_smoothing_are_those_of_cross_entropy() -> None:
    net, batch = make_net(), make_batch(LABELS)
    objective = make(net, weighted=True, smoothing=0.0)

    mean = objective(batch).loss / objective.weight(LABELS)
    weights = torch.tensor([17 / 40, 17 / 4, 17 / 20, 17 / 4], dtype=torch.float64)
    expected = F.cross_entropy(net(batch.images), LABELS, weight=weights)

    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_without_class_weights_it_is_plain_cross_entropy_with_smoothing(smoothing: float) -> None:
    net, batch = make_net(), make_batch(LABELS)
    objective = make(net, weighted=False, smoothing=smoothing)
    expected = F.cross_entropy(net(batch.images), LABELS, label_smoothing=smoothing)

    assert objective.weight(LABELS) == 7.0
    torch.testing.assert_close(objective(batch).loss / 7.0, expected, rtol=1e-12, atol=0)


def test_with_both_a_samples_weight_scales_its_smoothed_loss() -> None:
    net, batch = make_net(), make_batch(LABELS)
    objective = make(net, weighted=True, smoothing=0.2)
    losses = F.cross_entropy(net(batch.images), LABELS, reduction="none", label_smoothing=0.2)
    weights = inverse_weights()[LABELS]

    torch.testing.assert_close(objective(batch).loss, (losses * weights).sum(), rtol=1e-12, atol=0)
    assert objective.weight(LABELS) == pytest.approx(float(weights.sum()), rel=1e-15)


def test_every_class_weighs_the_same_over_the_training_set() -> None:
    objective = make(make_net(), weighted=True, smoothing=0.0)
    labels = torch.arange(CLASSES).repeat_interleave(torch.from_numpy(PER_CLASS))
    per_class = [objective.weight(labels[labels == c]) for c in range(3)]

    assert per_class == pytest.approx([per_class[0]] * 3)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_any_split_of_a_batch_gives_the_same_gradient(
    labels: list[int], cuts: list[int], weighted: bool, smoothing: float
) -> None:
    batch = make_batch(torch.tensor(labels), seed=len(labels))
    edges = [0, *sorted(min(c, len(labels)) for c in cuts), len(labels)]
    gradients, correct = [], []
    for parts in ([(0, len(labels))], list(pairwise(edges))):
        net = make_net()
        objective = make(net, weighted=weighted, smoothing=smoothing)
        total = objective.weight(batch.global_labels)
        hits = 0
        for start, stop in parts:
            out = objective(part(batch, start, stop))
            (out.loss / total).backward()
            hits += int(out.correct)
        gradients.append([p.grad for p in net.parameters()])
        correct.append(hits)

    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert correct[0] == correct[1]


def test_correct_counts_the_samples_whose_largest_logit_is_their_labels() -> None:
    net, batch = make_net(), make_batch(LABELS)
    out = make(net, weighted=True, smoothing=0.1)(batch)

    assert int(out.correct) == sum(int(net(batch.images)[i].argmax()) == int(LABELS[i]) for i in range(7))


def test_the_loss_of_half_precision_logits_is_taken_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :CLASSES].bfloat16()

    batch = make_batch(LABELS, torch.float32)
    loss = make(Half(), weighted=True, smoothing=0.0)(batch).loss

    assert loss.dtype == torch.float32
    logits = batch.images.flatten(1)[:, :CLASSES].bfloat16().double()
    expected = (F.cross_entropy(logits, LABELS, reduction="none") * inverse_weights()[LABELS]).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_float64_stays_float64() -> None:
    assert make(make_net(), weighted=True, smoothing=0.1)(make_batch(LABELS)).loss.dtype == torch.float64


def test_equal_logits_cost_the_logarithm_of_the_classes() -> None:
    net = make_net()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    for smoothing in (0.0, 0.3):
        objective = make(net, weighted=True, smoothing=smoothing)
        mean = float(objective(make_batch(LABELS)).loss.detach()) / objective.weight(LABELS)
        assert mean == pytest.approx(math.log(CLASSES), rel=1e-12)


def test_class_weights_are_no_part_of_a_checkpoint() -> None:
    objective = make(make_net(), weighted=True, smoothing=0.0)

    assert not [name for name in objective.state_dict() if "class_weight" in name]
