"""Measures as pure functions of a confusion matrix: the same at any number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def classification_report(
    confusion: npt.NDArray[np.int64], classes: Sequence[str], loss_sum: float, n_expected: int
) -> dict[str, Any]:
    """Accuracy and per-class measures.

    Args:
        confusion: (classes, classes) counts; rows are labels, columns predictions.
        classes: names in label order.
        loss_sum: sum of the cross-entropy over the samples; one that is not finite is reported as None.
        n_expected: samples that should have been counted.
    """
    n = int(confusion.sum())
    hits = np.diag(confusion)
    actual, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    recall, precision = _ratio(hits, actual), _ratio(hits, predicted)
    f1 = _ratio(2 * hits, actual + predicted)
    low, high = wilson_interval(int(hits.sum()), n)
    return {
        "top1": int(hits.sum()) / n if n else 0.0,
        "top1_interval95": [low, high],
        "loss": loss_sum / n if n and math.isfinite(loss_sum) else None,
        "macro_f1": float(f1[actual > 0].mean()) if n else 0.0,
        "n": n,
        "n_expected": n_expected,
        "per_class": {
            name: {"n": int(actual[i]), "precision": precision[i], "recall": recall[i], "f1": f1[i]}
            for i, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
    }


def _ratio(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.divide(a, b, out=np.zeros(len(a), dtype=np.float64), where=b > 0)


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): honest for small n and shares near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
