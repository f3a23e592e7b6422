"""Measures of a confusion matrix are scikit-learn's; intervals are Wilson's."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)

from tlearn.metrics import BINS, Counts, classification_report, wilson_interval


def counts(confusion: npt.NDArray[np.int64], loss: float, top5: int = 0) -> Counts:
    """Of answers of which nobody asked how confident they were."""
    return Counts(confusion, top5, loss, np.zeros((BINS, 3)))


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Number of classes, labels, predictions; some classes without either."""
    classes = draw(st.integers(2, 6))
    n = draw(st.integers(1, 40))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return classes, labels, draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))


@settings(max_examples=100, deadline=None)
@given(answers())
def test_measures_are_those_of_scikit_learn(case: tuple[int, list[int], list[int]]) -> None:
    classes, labels, predictions = case
    names = [f"class {i}" for i in range(classes)]
    confusion = confusion_matrix(labels, predictions, labels=range(classes)).astype(np.int64)
    report = classification_report(counts(confusion, loss=3.0), names, n_expected=len(labels))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(classes), zero_division=0
    )

    assert report["top1"] == pytest.approx(accuracy_score(labels, predictions), rel=1e-12)
    assert report["macro_f1"] == pytest.approx(
        f1_score(labels, predictions, labels=sorted(set(labels)), average="macro", zero_division=0), rel=1e-12
    )
    for name in ("precision", "recall"):
        score = {"precision": precision_score, "recall": recall_score}[name]
        expected = score(labels, predictions, labels=sorted(set(labels)), average="macro", zero_division=0)
        assert report[f"macro_{name}"] == pytest.approx(expected, rel=1e-12)
    assert (report["n"], report["n_expected"]) == (len(labels), len(labels))
    assert report["loss"] == pytest.approx(3.0 / len(labels))
    for i, name in enumerate(names):
        own = report["per_class"][name]
        assert own["n"] == support[i]
        measures = (own["precision"], own["recall"], own["f1"])
        assert measures == pytest.approx((precision[i], recall[i], f1[i]), rel=1e-12)


def test_rows_are_labels_and_columns_predictions() -> None:
    confusion = np.array([[3, 1], [0, 6]], dtype=np.int64)
    report = classification_report(counts(confusion, loss=5.0), ["cat", "dog"], n_expected=10)

    assert report["per_class"]["cat"] == {"n": 4, "precision": 1.0, "recall": 0.75, "f1": 6 / 7}
    assert report["per_class"]["dog"] == {"n": 6, "precision": 6 / 7, "recall": 1.0, "f1": 12 / 13}
    assert report["top1"] == 0.9
    assert report["confusion"] == [[3, 1], [0, 6]]


def test_a_report_is_plain_json() -> None:
    confusion = np.array([[3, 1, 0], [0, 6, 0], [0, 0, 0]], dtype=np.int64)
    report = classification_report(counts(confusion, loss=1.0), ["a", "b", "c"], n_expected=10)

    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_what_is_not_finite_is_none_and_still_json() -> None:
    bins = np.full((BINS, 3), math.nan)
    bins[:, :2] = 1
    report = classification_report(Counts(np.eye(2, dtype=np.int64), 2, math.nan, bins), ["a", "b"], n_expected=2)

    assert report["loss"] is None
    assert report["calibration_error"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_nothing_counted_is_nothing_known() -> None:
    report = classification_report(counts(np.zeros((2, 2), dtype=np.int64), loss=0.0), ["a", "b"], n_expected=5)

    assert (report["n"], report["n_expected"], report["top1"]) == (0, 5, 0.0)
    assert report["top1_interval95"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_known_wilson_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 10**7), share=st.floats(0, 1))
def test_a_wilson_interval_ends_where_the_share_is_just_not_rejected(n: int, share: float) -> None:
    hits = round(share * n)
    low, high = wilson_interval(hits, n)

    assert 0.0 <= low <= hits / n + 1e-12
    assert hits / n - 1e-12 <= high <= 1.0
    for end in (low, high):
        if 1e-12 < end < 1.0 - 1e-12:
            z = abs(hits / n - end) / math.sqrt(end * (1 - end) / n)
            assert z == pytest.approx(1.959964, rel=1e-4)


def test_the_interval_of_a_report_is_that_of_its_hits() -> None:
    confusion = np.array([[4, 1], [1, 4]], dtype=np.int64)
    report = classification_report(counts(confusion, loss=1.0), ["a", "b"], n_expected=10)

    assert report["top1_interval95"] == pytest.approx([0.4901625, 0.9433178], abs=1e-6)


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    confusion = np.array([[4, 1], [1, 4]], dtype=np.int64)
    bins = np.zeros((BINS, 3))
    bins[10] = 4, 2, 4 * 0.7  # 4 answers with a confidence of 0.7, half of them right
    bins[14] = 6, 6, 6 * 0.95
    report = classification_report(Counts(confusion, 9, 1.0, bins), ["a", "b"], n_expected=10)

    assert report["calibration_error"] == pytest.approx((4 * 0.2 + 6 * 0.05) / 10)
    assert report["top5"] == 0.9
