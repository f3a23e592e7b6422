"""A probe of frozen features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold
from test_cli import image_folder, run

from tlearn import probe as module
from tlearn.config import Config
from tlearn.errors import TlearnError
from tlearn.metrics import wilson_interval
from tlearn.probe import _linear, _sklearn, probe

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))


def clouds(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping clouds in 20 dimensions, of which 17 say nothing."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, 20)) * 3
    x[:, :3] = rng.normal(size=(n, 3)) + 2 * np.eye(3)[y]
    return x.astype(np.float32), y.astype(np.int64)


@pytest.mark.parametrize("batch", [1024, 64])
def test_many_heads_at_once_find_what_scikit_learn_finds(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(module, "BATCH", batch)
    x, y = clouds(150, 0)
    val, truth = clouds(2000, 1)
    splits = list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y))
    found = _linear("linear", x, y, val, splits, 0)
    theirs = np.mean(_sklearn("logreg", x, y, val, splits, 0).predicted == truth)
    assert theirs > 0.7
    assert np.mean(found.predicted == truth) > theirs - 0.03
    assert abs(found.cv_top1 - theirs) < 0.1
    assert found.options["lr"] in module.RATES
    assert found.options["weight_decay"] in module.WEIGHT_DECAYS


def test_what_a_fold_holds_out_does_not_train_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)  # labels by chance: a head that had seen what it is scored on would know them
    x, y = rng.normal(size=(120, 200)).astype(np.float32), rng.integers(0, 4, 120)
    splits = list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y))
    assert _linear("linear", x, y, x, splits, 0).cv_top1 < 0.4
    assert np.mean(_linear("linear", x, y, x, splits, 0).predicted == y) > 0.9


@pytest.mark.parametrize("name", ["logreg", "svm", "knn"])
def test_scikit_learns_classifiers(name: str) -> None:
    x, y = clouds(150, 0)
    val, truth = clouds(1000, 1)
    splits = list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y))
    found = _sklearn(name, x, y, val, splits, 0)
    assert np.mean(found.predicted == truth) > (0.55 if name == "knn" else 0.7)
    assert set(found.options) == {"n_neighbors" if name == "knn" else "C"}


def test_a_probe_from_the_command(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["model.weights=random", "data.image_size=32", "data.workers=0", "precision=fp32"]
    names = ["--backbone", "test_efficientnet", "--backbone", "test_resnet"]
    assert run(monkeypatch, "probe", photos, *options, *names, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["backbone"] for row in rows] == ["timm:test_efficientnet", "timm:test_resnet"]
    for row in rows:
        assert row["val/n"] == 120
        assert row["largest_class"] == 0.1
        assert row["val/top1"] > 0.3  # even random features tell colours apart
        hits = round(row["val/top1"] * 120)
        assert tuple(row["val/top1_interval95"]) == wilson_interval(hits, 120)
    assert run(monkeypatch, "probe", photos, *options, *names, "--classifier", "knn") == 0
    assert "largest class 10.0%" in capsys.readouterr().out


def test_a_class_of_one_image_cannot_be_cross_validated(tiny: MakeConfig, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "few", **{"train/a": 6, "train/b": 1, "val/a": 2, "val/b": 2})
    with pytest.raises(TlearnError, match="a class has 1 train images; cross-validation needs two"):
        probe(tiny(f"data.path={folder}"), "linear")
