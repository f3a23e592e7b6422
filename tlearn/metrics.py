"""Measures as pure functions of a confusion matrix: the same at any number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BINS = 15
"""Of confidence, for the calibration error (as in Guo et al. 2017)."""


class Counts(NamedTuple):
    """What evaluation sums up over samples, and then over ranks."""

    confusion: npt.NDArray[np.int64]
    """(classes, classes); rows are labels, columns predictions."""
    top5: int
    """Samples whose label is among the five largest logits."""
    loss: float
    """Sum of the cross-entropy."""
    confidence: npt.NDArray[np.float64]
    """(BINS, 3): samples, correct answers and sum of confidences, by the confidence of the answer."""


def classification_report(counts: Counts, classes: Sequence[str], n_expected: int) -> dict[str, Any]:
    """Accuracy and per-class measures.

    What is not finite is reported as None. The calibration error is the mean distance between confidence
    and accuracy in BINS equal bins of confidence (Naeini et al. 2015).

    Args:
        counts: of all samples.
        classes: names in label order.
        n_expected: samples that should have been counted.
    """
    confusion = counts.confusion
    n = int(confusion.sum())
    hits = np.diag(confusion)
    actual, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    recall, precision = _ratio(hits, actual), _ratio(hits, predicted)
    f1 = _ratio(2 * hits, actual + predicted)
    low, high = wilson_interval(int(hits.sum()), n)
    present = actual > 0
    in_bin, correct, confidence = counts.confidence.T
    return {
        "top1": int(hits.sum()) / n if n else 0.0,
        "top1_interval95": [low, high],
        "top5": counts.top5 / n if n else 0.0,
        "loss": _finite(counts.loss / n) if n else None,
        "macro_precision": float(precision[present].mean()) if n else 0.0,
        "macro_recall": float(recall[present].mean()) if n else 0.0,
        "macro_f1": float(f1[present].mean()) if n else 0.0,
        "calibration_error": _finite(float(np.abs(correct - confidence).sum()) / n if n else 0.0),
        "n": n,
        "n_expected": n_expected,
        "per_class": {
            name: {"n": int(actual[i]), "precision": precision[i], "recall": recall[i], "f1": f1[i]}
            for i, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
        "confidence_bins": {"n": in_bin.astype(int).tolist(), "correct": correct.astype(int).tolist()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
