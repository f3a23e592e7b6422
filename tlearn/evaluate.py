"""Every sample of a split exactly once, at any number of processes, proved by a count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tlearn.console import progress_bar
from tlearn.data.loader import Loader
from tlearn.metrics import classification_report
from tlearn.runtime import Runtime


def evaluate(runtime: Runtime, net: nn.Module, loader: Loader, classes: Sequence[str]) -> dict[str, Any]:
    """Score a split; the result is the same on every rank.

    Each rank counts its own part into a confusion matrix, which is summed once.

    Args:
        runtime: of the run.
        net: the unwrapped model; left in eval mode.
        loader: over a SequentialOrder.
        classes: names in label order.

    Raises:
        RuntimeError: the number of samples counted is not the number in the index.
    """
    net.eval()
    n_classes = len(classes)
    confusion = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=runtime.device)
    loss_sum = torch.zeros((), dtype=runtime.sum_dtype, device=runtime.device)
    # inference_mode would leave buffers that a later training step may not save for backward
    with (
        torch.no_grad(),
        runtime.accelerator.autocast(),
        loader.steps(0, loader.steps_per_epoch) as steps,
        progress_bar("evaluating", loader.steps_per_epoch) as advance,
    ):
        for micro_batches in steps:
            for batch in micro_batches:
                logits = net(batch.images)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                loss_sum += F.cross_entropy(logits, batch.labels, reduction="sum")
                cells = batch.labels * n_classes + logits.argmax(1)
                confusion.scatter_add_(0, cells, torch.ones_like(cells))
            advance()
    counts = runtime.sum(confusion).cpu().numpy().astype(np.int64).reshape(n_classes, n_classes)
    expected = loader.samples_per_epoch
    if counts.sum() != expected:
        raise RuntimeError(f"{counts.sum()} samples were counted, the index holds {expected}")
    return classification_report(counts, classes, float(runtime.sum(loss_sum)), expected)
