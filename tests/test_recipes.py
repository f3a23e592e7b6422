"""Every option of a recipe on the one loop: the same at any number of processes, and after a stop."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from test_distributed import rows, weights

from tlearn import checkpoint
from tlearn.config import Config, DomainAdversarial, Quick, Stage
from tlearn.configfile import dump_config, load_config
from tlearn.data.loader import Batch, Share
from tlearn.data.order import BalancedOrder, batch_range, steps_per_epoch
from tlearn.data.prepare import prepare
from tlearn.data.shards import UNLABELLED, read_index
from tlearn.data.source import open_source
from tlearn.data.transforms import Preprocessing
from tlearn.errors import StoppedBySignalError, TlearnError
from tlearn.launch import run_ranks
from tlearn.models.build import Model, build_model
from tlearn.models.heads import OneLogit
from tlearn.objectives import CLASS_WEIGHTS, build_objective
from tlearn.predict import load
from tlearn.run import train
from tlearn.stages import resolve
from tlearn.tracking import Tracker
from tlearn.trained import load_trained

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def two_classes(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared, of 20 and 12 train images."""
    root = tmp_path_factory.mktemp("two")
    for split in ("train", "val"):
        for name, n in (("cat", 20), ("coffee", 12)):
            (root / "pictures" / split / name).mkdir(parents=True)
            for file in sorted((photo_folder / split / name).iterdir())[:n]:
                (root / "pictures" / split / name / file.name).write_bytes(file.read_bytes())
    prepare(root / "pictures", root / "data")
    return root / "data"


@pytest.fixture(scope="session")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network is wider than the students'."""
    options = [f"data.path={photos}", "model={backbone: test_resnet, weights: random}", "data.image_size=40"]
    options += ["precision=fp32", "data.workers=0", "tracking.wandb.mode=disabled", "strategy=full", "epochs=2"]
    train(load_config(None, options), folder := tmp_path_factory.mktemp("teacher") / "run")
    return folder


CONFIGS = {
    str(path.relative_to(ROOT / "configs")): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.name != "auto.yaml"  # it plans first: see test_auto.py
}
TO_TRY = ("data.workers=0", "tracking.wandb.mode=disabled", "run.audit=true", "precision=fp64", "model.weights=random")
NETWORKS = {
    "recipes/hybrid.yaml": "test_efficientnet + test_resnet",
}


def shortened(path: Path, *options: str) -> Config:
    """A config on few small images: a step or two per epoch and stage, exactly repeatable."""
    raw = yaml.safe_load(path.read_text())
    lengths = [f"stages.{i}.epochs=1" for i in range(len(raw["stages"]))] if "stages" in raw else ["epochs=2"]
    views = ["data.augment.views=1"] if raw["data"].get("augment", {}).get("views") else []
    small = ("data.image_size=32", "data.max_train=24", "data.max_val=24", "batch.size=13", "model.batch_norm=frozen")
    return load_config(path, [*TO_TRY, *small, *lengths, *views, *options])


def distinct() -> list[str]:
    """Those that differ by more than rates and by what `--quick` would change."""
    seen: dict[str, str] = {}
    for name, path in CONFIGS.items():
        options = ["data.path=x", f"model.backbone={NETWORKS.get(name, 'test_efficientnet')}"]
        config = shortened(path, *options).model_copy(update={"quick": Quick()})
        seen.setdefault(re.sub(r"\blr: .*", "", dump_config(config)), name)
    return list(seen.values())


TO_TRAIN = distinct()


@pytest.fixture(scope="session")
def recipes(photos: Path, two_classes: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every config, run by one process, and by two that are stopped and go on: NAME/one, NAME/two."""
    root, configs = tmp_path_factory.mktemp("recipes"), {}
    classes = read_index(photos).classes
    np.savez(texts := root / "texts.npz", classes=classes, features=np.eye(len(classes)))
    for name in TO_TRAIN:
        options = [f"data.path={two_classes if 'binary' in name else photos}"]
        options += [f"model.backbone={NETWORKS.get(name, 'test_efficientnet')}"]
        options += [f"objective.teacher={teacher}"] * ("distillation" in name)
        options += [f"model.head.text={texts}"] * ("text" in name)
        options += [f"objective.target={two_classes}", "objective.hidden=8"] * ("two_domains" in name)
        configs[root / name] = shortened(CONFIGS[name], *options)
    for folder, config in configs.items():
        train(config, folder / "one")
    run_ranks(ranks.train_each_with_a_stop, ([(config, folder / "two") for folder, config in configs.items()],), 2)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", TO_TRAIN)
def test_a_recipe_is_the_same_by_two_processes_that_were_stopped(recipes: Path, name: str) -> None:
    first, second = recipes / name / "one", recipes / name / "two"
    one, two = rows(first, "step"), rows(second, "step")
    assert len(one) >= 2
    for key in ("step", "batch_hash", "lr"):
        assert [row[key] for row in one] == [row[key] for row in two]
    assert [row["step"] for row in rows(second, "start")] == [0, 2]
    np.testing.assert_allclose([row["train/loss"] for row in one], [row["train/loss"] for row in two], rtol=1e-9)
    for key in ("train/top1", "val/loss@32"):
        values = ([row[key] for row in rows(folder, "epoch")] for folder in (first, second))
        assert next(values) == pytest.approx(next(values), rel=1e-8)
    kept = [load_file(folder / "best" / "model.safetensors") for folder in (first, second)]
    for key, tensor in kept[0].items():  # of the average, where there is one
        torch.testing.assert_close(tensor, kept[1][key], rtol=1e-8, atol=1e-10)
    a, b = weights(first), weights(second)
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=1e-8, atol=1e-10)
    result = json.loads((second / "result.json").read_text())
    scores = load(second).evaluate()  # without the layers that an objective adds
    assert scores["val"]["confusion"] == result["val"]["confusion"]
    assert any(key.startswith("beside.") for key in a) == ("distillation" in name or "two_domains" in name)
    if "two_domains" in name:
        assert result["target"]["n"] == 24
        assert scores["target"]["confusion"] == result["target"]["confusion"]


def test_mixed_images_are_those_of_their_neighbours_however_the_batch_is_cut(tiny: MakeConfig) -> None:
    config = tiny("data.augment={mixup: 0.5, cutmix: 1.0, hflip: 0}", "data.max_train=31", "data.augment.views=1")
    source, p = open_source(config), Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    plain = open_source(tiny("data.max_train=31"))

    def batches(source: Any, **share: int) -> list[Batch]:
        loader = source.train_loader(p, Share(31, unit=2, **share), torch.device("cpu"), torch.float64, 1)
        with loader.steps(0, 1, 3) as steps:
            return next(iter(steps))

    (whole,), (unmixed,) = batches(source), batches(plain)
    parts = [b for rank in range(3) for b in batches(source, rank=rank, world_size=3, accumulate=2)]
    assert len(parts) == 6
    for name in ("images", "labels", "keys", "shares"):
        assert torch.equal(torch.cat([getattr(b, name) for b in parts]), getattr(whole, name)), name
    assert whole.shares is not None
    assert whole.shares[-1] == 1  # the last one of an odd batch has no neighbour
    assert torch.equal(whole.images[-1], unmixed.images[-1])
    pairs = whole.shares[:-1].view(-1, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    cut = 0
    for i in range(30):
        own, other, got, share = unmixed.images[i], unmixed.images[i ^ 1], whole.images[i], float(whole.shares[i])
        from_own, from_other = (got == own).all(0), (got == other).all(0)
        if bool((from_own | from_other).all()):
            cut += 1
            assert abs(float(from_own.double().mean()) - share) < 0.2  # where both are equal it counts for either
        else:
            torch.testing.assert_close(got, share * own + (1 - share) * other)
    assert 4 < cut < 26


def test_a_balanced_epoch_has_as_many_of_every_class_and_all_have_their_turn() -> None:
    labels = np.repeat([0, 1, 2], [50, 7, 3])
    order = BalancedOrder(labels, seed=3)
    epochs = [order(epoch, 0, 60) for epoch in range(10)]
    for epoch in epochs:
        assert np.bincount(labels[epoch]).tolist() == [20, 20, 20]
    assert epochs[0].tolist() != epochs[1].tolist()
    seen = np.bincount(np.concatenate(epochs), minlength=60)
    for label in range(3):
        counts = seen[labels == label]
        assert counts.max() - counts.min() <= 1
    assert order(4, 11, 17).tolist() == epochs[4][11:17].tolist()


def test_effective_weights_lie_between_none_and_inverse(tiny: MakeConfig) -> None:
    counts = torch.tensor([5.0, 500.0, 50000.0], dtype=torch.float64)
    weight = CLASS_WEIGHTS["effective"](counts)
    expected = (1 - 0.999) / (1 - 0.999**counts)
    torch.testing.assert_close(weight / weight[0], expected / expected[0])
    assert float((weight * counts).sum()) == pytest.approx(float(counts.sum()))
    inverse = CLASS_WEIGHTS["inverse"](counts)
    assert 1 < weight[0] / weight[2] < inverse[0] / inverse[2]


def test_one_logit_answers_the_second_class_above_one_half() -> None:
    head = OneLogit(3)
    x = torch.randn(50, 3)
    out, z = head(x), x @ head.weight[0] + head.bias[0]
    labels = torch.randint(0, 2, (50,))
    torch.testing.assert_close(
        F.cross_entropy(out, labels), F.binary_cross_entropy_with_logits(z, labels.float()), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(out.argmax(1) == 1, z.sigmoid() > 0.5)


def test_binary_needs_two_classes(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TlearnError, match=r"objective\.name = 'binary': the data have 10 classes"):
        train(tiny("objective.name=binary"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_must_know_the_same_classes(
    tiny: MakeConfig, two_classes: Path, teacher: Path, tmp_path: Path
) -> None:
    options = (f"objective={{name: distillation, teacher: {teacher}}}", f"data.path={two_classes}", "batch.size=8")
    with pytest.raises(TlearnError, match=r"objective\.teacher: knows other classes \(astronaut"):
        train(tiny(*options), tmp_path / "run")
    with pytest.raises(TlearnError, match=r"objective\.teacher: nowhere: holds no trained model"):
        train(tiny("objective={name: distillation, teacher: nowhere}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_perfect_student_has_nothing_to_learn_from_its_teacher(tiny: MakeConfig, photos: Path, teacher: Path) -> None:
    trained = load_trained(teacher)
    config = tiny("objective={name: distillation, teacher: X, alpha: 1.0, features: 1.0}".replace("X", str(teacher)))
    net = load_trained(teacher).net.requires_grad_(True)
    model = Model(net, "x", "random", trained.head, [], trained.card.preprocessing, True)
    objective = build_objective(config.objective, model, trained.card.classes, None)
    labels = torch.arange(6)
    batch = Batch(torch.randn(6, 3, 40, 40), labels, labels, labels)
    out = objective.eval()(batch)
    assert float(out.loss.detach()) == pytest.approx(0, abs=1e-4)
    assert model.beside == {}  # equal widths need no projection
    assert not any("teacher" in name for name, _ in objective.named_parameters())
    with torch.no_grad():
        net.get_parameter(f"{trained.head}.weight").mul_(10)
    assert float(objective(batch).loss.detach()) > 0.01


def test_distillation_is_the_formula(tiny: MakeConfig, teacher: Path) -> None:
    options = f"{{name: distillation, teacher: {teacher}, alpha: 0.3, temperature: 2.0, features: 0.5}}"
    config = tiny(f"objective={options}", "objective.class_weight=inverse")
    trained = load_trained(teacher)
    net = load_trained(teacher).net
    with torch.no_grad():
        net.get_parameter(f"{trained.head}.weight").normal_(generator=torch.Generator().manual_seed(0))
        net.get_parameter("conv1.0.weight").mul_(1.5)
    model = Model(net, "x", "random", trained.head, [], trained.card.preprocessing, True)
    objective = build_objective(config.objective, model, trained.card.classes, np.arange(1, 11)).eval()
    labels, images = torch.tensor([0, 3, 9, 9]), torch.randn(4, 3, 40, 40)
    got = objective(Batch(images, labels, labels, labels)).loss / objective.weight(labels)

    seen: list[torch.Tensor] = []
    for network in (net, trained.net):
        network.get_submodule(trained.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mine, theirs = net(images), trained.net(images)
    weight = 55 / (10 * torch.arange(1.0, 11))[labels]
    hard = (F.cross_entropy(mine, labels, reduction="none") * weight).sum() / weight.sum()
    target = (theirs / 2).softmax(1)
    soft = (target * (target.log() - (mine / 2).log_softmax(1))).sum(1).mean()
    hints = (seen[0] - seen[1]).square().mean()
    torch.testing.assert_close(got, 0.7 * hard + 0.3 * 4 * soft + 0.5 * hints, rtol=1e-4, atol=1e-5)
    assert float(hints) > 1e-4


@pytest.mark.parametrize("unit", [1, 2])
def test_no_micro_batch_is_larger_than_was_asked_for(unit: int) -> None:
    for batch, n, world, micro in itertools.product((20, 26, 27), (187, 200), (1, 2, 3), (2, 4, 5, 13)):
        share = Share(batch, 0, world, unit=unit).in_parts_of(micro, n)
        steps = steps_per_epoch(n, batch)
        for step in range(steps):
            start, stop = batch_range(step, n, batch)
            parts = [
                replace(share, rank=rank).part(start, stop, m) for rank in range(world) for m in range(share.accumulate)
            ]
            assert [a for a, _ in parts] == [start, *(b for _, b in parts[:-1])]
            assert parts[-1][1] == stop
            assert max(b - a for a, b in parts) <= min(micro, share.largest_part(n))
            assert min(b - a for a, b in parts) >= share.smallest_part(n) - (unit - 1)


def test_an_image_that_comes_twice_in_an_epoch_is_changed_in_two_ways(tiny: MakeConfig, two_classes: Path) -> None:
    source = open_source(tiny(f"data.path={two_classes}", "data.sampling=balanced"))
    p = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    loader = source.train_loader(p, Share(32), torch.device("cpu"), torch.float32)
    with loader.steps(0, 1) as steps:
        (batch,) = next(iter(steps))
    keys = batch.keys.tolist()
    again = [(keys.index(key), i) for i, key in enumerate(keys) if keys.index(key) < i]
    assert len(again) == 4  # of 12 images on 16 places
    assert not any(torch.equal(batch.images[a], batch.images[b]) for a, b in again)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(12, 4), torch.nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(images.flatten(1)))
        return logits


def test_the_features_of_two_domains_are_pulled_together_as_the_run_goes_on() -> None:
    torch.manual_seed(0)
    net = Small().double()
    model = Model(net, "x", "random", "head", [], Preprocessing(2, (0, 0, 0), (1, 1, 1)), True)
    config = DomainAdversarial(target="t", hidden=5)
    objective = build_objective(config, model, ("a", "b", "c"), None)
    labels = torch.tensor([0, 1, 2, UNLABELLED, UNLABELLED, UNLABELLED])
    batch = Batch(torch.randn(6, 3, 2, 2, dtype=torch.float64), labels, labels, labels)
    assert objective.weight(labels) == 3

    def gradients(time: float) -> dict[str, torch.Tensor]:
        objective.time = time
        objective.zero_grad()
        objective(batch).loss.backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    start, end = gradients(0.0), gradients(1.0)
    assert torch.equal(start["beside.discriminator.0.weight"], end["beside.discriminator.0.weight"])
    assert torch.equal(start["head.weight"], end["head.weight"])  # the head sees labels only
    net.zero_grad()
    F.cross_entropy(net(batch.images)[:3], labels[:3], reduction="sum").backward()
    torch.testing.assert_close(start["body.weight"], net.get_parameter("body.weight").grad)  # no pull at first
    guesses = model.beside["discriminator"](net.body(batch.images.flatten(1)))[:, 0]
    net.zero_grad()
    (F.binary_cross_entropy_with_logits(guesses, (labels != UNLABELLED).double(), reduction="sum") * 3 / 6).backward()
    pushed = net.get_parameter("body.weight").grad
    assert pushed is not None
    torch.testing.assert_close(end["body.weight"] - start["body.weight"], -pushed * (2 / (1 + np.exp(-10.0)) - 1))


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [None, 10, 21])
def test_a_stage_that_gets_no_better_ends_and_the_next_one_follows(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None
) -> None:
    stages = (
        "stages=[{name: still, epochs: 9, train: [['.*', 1.0]], optimizer: {name: sgd, lr: 1.0e-12}, patience: 2},"
        "{name: last, epochs: 2, train: [['.*', 1.0]]}]"
    )
    config, log = tiny(stages, "model.batch_norm=frozen", "ema=0.9"), Tracker.log

    def log_and_stop(self: Tracker, row: dict[str, Any]) -> None:
        log(self, row)
        if row["kind"] == ("epoch" if stop_at == 21 else "step") and row["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    if stop_at is not None:
        with monkeypatch.context() as patch:
            patch.setattr(Tracker, "log", log_and_stop)
            with pytest.raises(StoppedBySignalError):
                train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    epochs = [(row["stage"], row["epoch"]) for row in rows(tmp_path / "run", "epoch")]
    assert epochs == [("still", 0), ("still", 1), ("still", 2), ("last", 9), ("last", 10)]
    if stop_at != 21:  # else it had ended before
        assert "stage still ends: 2 epochs were no better" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_the_average_of_the_weights_is_what_is_scored_and_kept(tiny: MakeConfig, tmp_path: Path) -> None:
    options = (
        "strategy=full",
        "epochs=1",
        "optimizer={name: sgd, lr: 0.05}",
        "keep.checkpoints=9",
        "save_every.steps=1",
    )
    train(tiny(*options, "ema=0.8"), tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), key=lambda path: path.name)
    by_step = {int(f.name[5:13]): load_file(f / "model.safetensors") for f in folders}
    first = load_trained_start(tiny(*options))
    name = "conv_stem.weight"
    average = first[name]
    for step in range(1, 8):
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * by_step[step][name]
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    torch.testing.assert_close(kept[name], average, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(kept[name], by_step[7][name], rtol=1e-3)
    scored = load(tmp_path / "run").evaluate()["val"]["loss"]
    assert rows(tmp_path / "run", "epoch")[0]["val/loss@32"] == pytest.approx(scored, rel=1e-5)


def load_trained_start(config: Config) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in build_model(config, 10).net.state_dict().items()}


def test_rates_fall_from_block_to_block_and_ranges_name_layers() -> None:
    names = ["stem.w", "b.0.w", "b.1.w", "b.2.w", "head.w"]
    blocks = [["stem.w"], ["b.0.w"], ["b.1.w"], ["b.2.w"]]
    stage = Stage(name="s", epochs=1, train=[(".*", 1.0)], layer_decay=0.5)
    assert resolve(stage, names, "head", blocks) == {
        "head.w": 1.0,
        "b.2.w": 0.5,
        "b.1.w": 0.25,
        "b.0.w": 0.125,
        "stem.w": 0.0625,
    }
    ranged = Stage(name="s", epochs=1, train=[("b.0-1", 0.0), ("stem", 0.0), (".*", 1.0)])
    found = resolve(ranged, names, "head", blocks)
    assert {name for name, rate in found.items() if rate} == {"b.2.w", "head.w"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["data.augment.mixup=0.2"], "images are mixed in every step"),
        (["data.eval_flips=true"], "images are evaluated in two ways"),
        (["objective={name: domain_adversarial, target: TARGET}"], "objective domain_adversarial looks at the images"),
    ],
)
def test_what_looks_at_images_is_fed_with_images(
    tiny: MakeConfig, two_classes: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    own = [option.replace("TARGET", str(two_classes)) for option in options]
    with pytest.raises(TlearnError, match=f"features.cache: on: stage head: {reason}"):
        train(tiny(*own, "strategy=feature_extraction", "features.cache=on", "data.augment.views=1"), tmp_path / "run")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_teacher(tiny: MakeConfig, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    options = [f"objective={{name: distillation, teacher: {tmp_path / 'teacher'}}}", "strategy=full"]
    train(tiny(*options, "epochs=1"), tmp_path / "run")
    weights, score = checkpoint.load_best(teacher / "best" / "model.safetensors")
    head = next(name for name in reversed(weights) if name.endswith("bias"))
    weights[head] = weights[head] + 1
    checkpoint.save_best(tmp_path / "teacher" / "checkpoints", weights, score)
    checkpoint.publish_best(tmp_path / "teacher" / "checkpoints", tmp_path / "teacher" / "best", [score])

    with pytest.raises(TlearnError, match=r"objective\.teacher holds other weights than when this run began"):
        train(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run")


def test_a_target_that_is_not_there_is_named_by_its_own_option(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TlearnError, match=r"objective\.target: nowhere: no such folder"):
        train(tiny("objective={name: domain_adversarial, target: nowhere}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_preset_fills_in_what_is_not_given(tiny: MakeConfig) -> None:
    data = tiny("data.preset=medical", "data.augment.scale=[0.5, 1.0]").data
    assert (data.fit, data.grey, data.augment.scale, data.augment.ratio) == ("pad", True, (0.5, 1.0), (0.9, 1.1))
    padded = tiny("data.preset=medical", "data.augment.crop=padded").data
    assert (padded.grey, padded.augment.crop, padded.augment.ratio) == (True, "padded", (0.75, 4 / 3))


@pytest.mark.parametrize(
    ("augment", "complaint"),
    [
        ("{crop: padded, scale: [0.5, 1.0]}", r"augment\.scale has no effect without crop: resized"),
        ("{crop: padded, ratio: [1.0, 1.0]}", r"augment\.ratio has no effect without crop: resized"),
        ("{pad_px: 8}", r"augment\.pad_px has no effect without crop: padded"),
        ("{policy: trivial, magnitude: 5}", r"augment\.magnitude has no effect without policy: rand"),
    ],
)
def test_changes_that_would_not_happen_are_refused(tiny: MakeConfig, augment: str, complaint: str) -> None:
    with pytest.raises(TlearnError, match=complaint):
        tiny(f"data.augment={augment}")


@pytest.mark.slow
def test_grey_and_own_colours_are_what_the_network_is_given(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("data.grey=true", "data.normalise=own", "epochs=3", "data.fit=squash"), tmp_path / "run")
    classifier = load(tmp_path / "run")
    p = classifier.preprocessing
    assert p.mean[0] == p.mean[1] == p.mean[2] != 0.5
    source = open_source(classifier.config)
    loader = source.train_loader(p, Share(200), torch.device("cpu"), torch.float32, 1)
    with loader.steps(0, 1) as steps:
        (batch,) = next(iter(steps))
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert abs(float(batch.images.mean())) < 0.1
    assert 0.7 < float(batch.images.std()) < 1.1
