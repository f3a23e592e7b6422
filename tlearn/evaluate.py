"""Every sample of a split exactly once, at any number of processes, proved by a count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tlearn.console import progress_bar
from tlearn.data.loader import Steps
from tlearn.errors import TlearnError
from tlearn.metrics import BINS, Counts, classification_report
from tlearn.runtime import Runtime


def evaluate(runtime: Runtime, net: nn.Module, loader: Steps, classes: Sequence[str]) -> dict[str, Any]:
    """Score a split; the result is the same on every rank.

    Each rank sums up its own part; the sums are added once, at the end.

    Args:
        runtime: of the run.
        net: the unwrapped model; left in eval mode.
        loader: gives every sample once.
        classes: names in label order.

    Raises:
        StoppedBySignalError: a signal came to one of the ranks, which then left out what it had not yet evaluated.
        TlearnError: the number of samples counted is not the number in the index.
    """
    net.eval()
    n_classes = len(classes)
    confusion = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=runtime.device)
    top5 = torch.zeros((), dtype=torch.int64, device=runtime.device)
    loss = torch.zeros((), dtype=runtime.sum_dtype, device=runtime.device)
    confidence = torch.zeros(BINS, 3, dtype=runtime.sum_dtype, device=runtime.device)
    # inference_mode would leave buffers that a later training step may not save for backward
    with (
        torch.no_grad(),
        runtime.accelerator.autocast(),
        loader.steps(0, loader.steps_per_epoch) as steps,
        progress_bar("evaluating", loader.steps_per_epoch) as advance,
    ):
        for batch in chain.from_iterable(steps):
            if runtime.stop:
                break
            if not len(batch.labels):  # fewer images than processes
                continue
            logits = net(batch.images)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum")
            answers = logits.topk(min(5, n_classes), dim=1).indices
            correct = answers == batch.labels[:, None]
            cells = batch.labels * n_classes + answers[:, 0]
            confusion.scatter_add_(0, cells, torch.ones_like(cells))
            top5 += correct.sum()
            share = logits.softmax(dim=1).amax(dim=1).to(runtime.sum_dtype)
            bins = (share * BINS).long().clamp(0, BINS - 1)
            confidence.index_add_(0, bins, torch.stack([torch.ones_like(share), correct[:, 0].to(share), share], dim=1))
            advance()
    if runtime.sum(torch.tensor(float(bool(runtime.stop)), device=runtime.device)):
        raise runtime.stop.error()
    counts = Counts(
        runtime.sum(confusion).cpu().numpy().astype(np.int64).reshape(n_classes, n_classes),
        int(runtime.sum(top5)),
        float(runtime.sum(loss)),
        runtime.sum(confidence).cpu().numpy().astype(np.float64),
    )
    n, expected = counts.confusion.sum(), loader.samples_per_epoch
    if n != expected:
        raise TlearnError(
            f"{n:,} images were evaluated instead of the {expected:,} that index.json (or data.stream.val_samples) says"
        )
    return classification_report(counts, classes, expected)
