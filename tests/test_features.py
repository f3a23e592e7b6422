"""Frozen layers run once: where a network is cut, what is stored, and that training notices nothing of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from test_distributed import rows
from torch import nn

from tlearn import stagecache
from tlearn.config import Config, Rule, Stage
from tlearn.configfile import load_config
from tlearn.data import store
from tlearn.data.decode import UnreadableImageError
from tlearn.data.loader import Share
from tlearn.data.source import open_source
from tlearn.data.store import Store
from tlearn.data.transforms import EvalTransform, Preprocessing
from tlearn.errors import RankFailedError, StoppedBySignalError, TlearnError
from tlearn.launch import run_ranks
from tlearn.models.build import Model, build_model
from tlearn.models.cut import NoCutError, find_cut, fingerprint, outputs, rest_only
from tlearn.run import train
from tlearn.stagecache import StageCache
from tlearn.stages import resolve
from tlearn.tracking import Tracker

MakeConfig = Callable[..., Config]

HEAD: list[Rule] = [("head", 1.0), (".*", 0.0)]
LAST: list[Rule] = [("head", 1.0), ("last:1", 1.0), (".*", 0.0)]

STAGES = (
    "stages=[{name: head, epochs: 4, train: [[head, 1.0], ['.*', 0]], views: 2},"
    "{name: last, epochs: 4, train: [[head, 1.0], ['last:1', 0.5], ['.*', 0]], views: 3},"
    "{name: all, epochs: 1, train: [['.*', 1.0]]}]"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, and its own for each test."""
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


# the cut


def built(backbone: str, rules: list[Rule], px: int) -> Model:
    torch.manual_seed(0)
    options = ["data.path=x", f"model.backbone={backbone}", "model.weights=random", f"data.image_size={px}"]
    model = build_model(load_config(None, options), 5, None)
    names = [name for name, _ in model.net.named_parameters()]
    model.set_trainable(resolve(Stage(name="s", epochs=1, train=rules), names, model.head, model.blocks))
    return model


@contextmanager
def frozen_layers_that_run(net: nn.Module, names: list[str]) -> Iterator[None]:
    """Collects them; one whose forward was replaced does not run."""

    def hook(name: str, module: nn.Module) -> Callable[..., None]:
        return lambda *_: None if "forward" in vars(module) else names.append(name)

    layers = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(hook(n, m)) for n, m in layers if not any(p.requires_grad for p in m.parameters())]
    yield
    for handle in hooks:
        handle.remove()


@pytest.mark.parametrize(
    ("backbone", "px", "head", "last"),
    [
        ("resnet18", 64, "global_pool", "layer3"),
        ("tf_efficientnet_lite0", 64, "global_pool", "blocks.5"),
        ("test_vit", 160, "head_drop", "blocks.4"),
        ("convnext_atto", 64, "head.drop", "stages.2"),
        pytest.param("densenet121", 64, "head_drop", "features.transition3", marks=pytest.mark.slow),
        pytest.param(
            "xcit_nano_12_p16_224", 224, "head_drop", "cls_attn_blocks.0", marks=pytest.mark.slow
        ),  # lists of layers, and one that gives a tuple
        pytest.param(
            "coatnet_nano_rw_224", 224, "head.drop", "stages.2", marks=pytest.mark.slow
        ),  # a shortcut goes around its last frozen layer
        pytest.param(
            "torchvision:vgg11", 64, "classifier.4", "features.17", marks=pytest.mark.slow
        ),  # dropout in front of the head
        ("torchvision:swin_t", 64, "flatten", "features.6"),  # stochastic depth in what trains
        ("torchvision:mobilenet_v3_small", 64, "classifier.1", "features.11"),
    ],
)
def test_what_is_behind_the_cut_computes_what_the_whole_does(backbone: str, px: int, head: str, last: str) -> None:
    images = torch.randn(3, 3, px, px)
    for rules, expected in ((HEAD, head), (LAST, last)):
        model = built(backbone, rules, px)
        nn.init.normal_(model.net.get_submodule(model.head).weight)
        before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
        cut = find_cut(model, images[:2])
        assert cut.name == expected
        ran: list[str] = []
        for name, tensor in model.net.state_dict().items():
            assert torch.equal(tensor, before[name]), name  # the trial leaves no trace
        for mode in (model.train, model.net.eval):
            mode()
            torch.manual_seed(1)
            whole = model.net(images)
            given = outputs(model.net, cut, images)
            assert given.shape == (3, *cut.shape)
            torch.manual_seed(1)
            with rest_only(model.net, cut), frozen_layers_that_run(model.net, ran):
                rest = model.net(given)
            assert ran == []
            torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-5)
        whole = model.net(images)  # as it was
        torch.testing.assert_close(whole, rest, rtol=1e-4, atol=1e-5)


def test_a_gain_that_begins_at_zero_hides_no_second_way() -> None:
    model = built("nfnet_l0", LAST, 64)  # whose branches are multiplied by zero at first
    assert find_cut(model, torch.randn(2, 3, 64, 64)).name == "stages.3.0.act1"


def test_where_position_embeddings_train_there_is_no_cut() -> None:
    with pytest.raises(NoCutError):
        find_cut(built("test_vit", [("head", 1.0), ("pos_embed", 1.0), (".*", 0.0)], 160), torch.randn(2, 3, 160, 160))


@pytest.mark.parametrize(
    ("backbone", "px", "trained", "frozen"),
    [
        ("test_vit", 160, "blocks.5.norm1.bias", ["blocks.4.norm1.bias", "pos_embed"]),
        ("convnext_atto", 64, "stages.3.blocks.0.gamma", ["stages.0.blocks.0.gamma"]),  # a block's own parameters
        ("resnet18", 64, "layer4.0.bn1.running_mean", ["layer1.0.bn1.running_mean"]),
    ],
)
def test_the_fingerprint_is_of_what_stands_still(backbone: str, px: int, trained: str, frozen: list[str]) -> None:
    model = built(backbone, LAST, px)
    model.train()
    before, state = fingerprint(model), model.net.state_dict()
    state[trained].add_(1)
    assert fingerprint(model) == before
    for name in frozen:
        state[name].add_(1)
        after = fingerprint(model)
        assert after != before
        before = after


def test_a_gate_that_begins_at_zero_is_opened_for_the_trial_also_under_autocast() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
            self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            stem = self.stem(images)
            pooled = self.pool(stem)
            logits: torch.Tensor = self.head((pooled + self.pool(self.gate(stem))).flatten(1))
            return logits

    net = Gated()
    net.stem.requires_grad_(False)
    model = Model(net, "x", "random", "head", [], Preprocessing(32, (0, 0, 0), (1, 1, 1)), True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert find_cut(model, torch.randn(2, 3, 32, 32)).name == "stem"


def test_batch_statistics_are_no_output_of_an_image() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8, affine=False))
    net.append(nn.Linear(8, 2))
    net[0].requires_grad_(False)
    model = Model(net, "x", "random", "4", [], Preprocessing(32, (0, 0, 0), (1, 1, 1)), False)
    assert find_cut(model, torch.randn(2, 3, 32, 32)).name == "2"


# the store


def test_a_row_is_whole_or_missing(tmp_path: Path) -> None:
    subject = Store(tmp_path / "s", 6, (2, 3), torch.bfloat16)
    subject.allocate()
    subject.open()
    assert subject.missing(0, 6).tolist() == [0, 1, 2, 3, 4, 5]
    values = torch.randn(4, 2, 3).bfloat16()
    subject.write(np.array([5, 0, 1, 3]), values)
    subject.open()
    with pytest.raises(TlearnError, match=r"s\.rows: is damaged; start the run again"):
        subject.read(np.array([0, 2]))
    assert torch.equal(subject.read(np.array([0, 5])), values[[1, 0]])
    assert subject.missing(0, 6).tolist() == [2, 4]
    with (tmp_path / "s.rows").open("r+b") as file:
        file.seek(3 * subject.row_bytes + 5)
        byte = file.read(1)
        file.seek(3 * subject.row_bytes + 5)
        file.write(bytes([byte[0] ^ 1]))
    again = Store(tmp_path / "s", 6, (2, 3), torch.bfloat16)
    again.allocate()  # it is there
    again.open()
    assert again.missing(1, 6).tolist() == [2, 3, 4]


# views


def test_views_come_again_and_a_single_one_is_what_evaluation_sees(tiny: MakeConfig) -> None:
    source, p = open_source(tiny()), Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def seen(views: int | None, epoch: int) -> dict[int, torch.Tensor]:
        loader = source.train_loader(p, Share(64), torch.device("cpu"), torch.float32, views)
        with loader.steps(0, loader.steps_per_epoch, epoch) as steps:
            batches = [batch for (batch,) in steps]
        keys = torch.cat([batch.keys for batch in batches]).tolist()
        return dict(zip(keys, torch.cat([batch.images for batch in batches]), strict=True))

    def equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> int:
        return sum(torch.equal(a[key], b[key]) for key in a)

    assert equal(seen(3, 1), seen(3, 4)) == 200
    assert equal(seen(3, 1), seen(3, 2)) < 20
    assert equal(seen(3, 2), seen(None, 2)) == 200  # the first views are those of a run without an end of them
    assert equal(seen(None, 1), seen(None, 4)) < 20
    split = source.splits["train"]  # type: ignore[attr-defined]
    plain = EvalTransform(p)(split.read(7))
    found = seen(1, 5)[int(split.rows["key"].view(np.int64)[7])]
    torch.testing.assert_close(found, (torch.from_numpy(plain).float() / 255 - 0.5) / 0.5)


# training


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in rows(run, "step")]


def decisions(run: Path) -> dict[str, str]:
    newest = max((run / "checkpoints").glob("step-*"))
    found: dict[str, str] = json.loads((newest / "progress.json").read_text())["features"]
    return found


@pytest.fixture
def recipe(tiny: MakeConfig) -> MakeConfig:
    return lambda *options: tiny(STAGES, "model.batch_norm=frozen", *options)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_notices_nothing_of_the_cache(recipe: MakeConfig, tmp_path: Path, precision: str) -> None:
    for name, cache in (("plain", "off"), ("cached", "auto")):
        train(recipe(f"precision={precision}", f"features.cache={cache}"), tmp_path / name)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    assert decisions(cached)["head"] == decisions(cached)["last"] == "cached"
    assert "cached" not in decisions(plain).values()
    assert decisions(cached)["all"] != "cached"
    np.testing.assert_allclose(losses(cached), losses(plain), rtol=1e-5 if precision == "fp32" else 0.02)
    assert [row["batch_hash"] for row in rows(cached, "step")] == [row["batch_hash"] for row in rows(plain, "step")]
    for a, b in zip(rows(cached, "epoch"), rows(plain, "epoch"), strict=True):
        assert abs(a["val/top1@32"] - b["val/top1@32"]) < (0.01 if precision == "fp32" else 0.1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images that frozen layers see while a store is filled."""
    numbers: list[int] = []
    computing = stagecache.outputs

    def counted(net: nn.Module, cut: Any, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1:] == (3, 32, 32):  # not what earlier layers gave
            numbers.append(len(images))
        return computing(net, cut, images)

    monkeypatch.setattr(stagecache, "outputs", counted)
    return numbers


@pytest.mark.slow
def test_a_second_run_computes_nothing(recipe: MakeConfig, computed: list[int], tmp_path: Path) -> None:
    train(recipe(), tmp_path / "first")
    assert sum(computed) == 200 * 3 + 120 + stagecache._PROBES * (3 + 1)  # the last block's, from which the head's come
    computed.clear()
    train(recipe(), tmp_path / "second")
    assert sum(computed) == stagecache._PROBES * (2 + 1 + 3 + 1)  # a sample of every file
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    computed.clear()
    saved = tmp_path / "first" / "best" / "model.safetensors"
    same = [f"model.weights={saved}", "stages=[{name: head, epochs: 4, train: [[head, 1], ['.*', 0]], views: 2}]"]
    train(recipe(*same), tmp_path / "before")
    for number, option in enumerate(["seed=1", "data.augment.hflip=0", "data.fit=pad", "data.max_val=100"]):
        computed.clear()
        train(recipe(*same, option), tmp_path / f"after{number}")
        assert sum(computed) >= 500, option


FREEZING = (
    "stages=[{name: two, epochs: 3, train: [[head, 1.0], ['last:2', 0.5], ['.*', 0]]},"
    "{name: one, epochs: 3, train: [[head, 1.0], ['last:1', 0.5], ['.*', 0]]},"
    "{name: head, epochs: 3, train: [[head, 1.0], ['.*', 0]]}]"
)


@pytest.mark.slow
@pytest.mark.parametrize("max_gib", [10.0, 1.2e-3])
def test_where_layers_freeze_one_after_another_images_are_looked_at_once(
    tiny: MakeConfig, computed: list[int], cache: Path, tmp_path: Path, max_gib: float
) -> None:
    options = (FREEZING, "model.batch_norm=frozen", "data.augment.views=2", f"features.max_gib={max_gib}")
    train(tiny(*options), tmp_path / "cached")
    assert set(decisions(tmp_path / "cached").values()) == {"cached"}
    again = 520 + 2 * stagecache._PROBES * 3  # a start is tried before it is used
    assert sum(computed) == again if max_gib == 10 else sum(computed) > again  # there is room for one, not for two
    stored = [file.stat().st_size for file in cache.glob("*/*.*") if file.is_file()]
    assert sum(stored) < max_gib * 2**30
    train(tiny(*options, "features.cache=off"), tmp_path / "plain")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "plain"), rtol=1e-5)


@pytest.mark.slow
def test_after_a_stop_the_last_stage_is_still_the_start(
    tiny: MakeConfig, computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (FREEZING, "model.batch_norm=frozen", "data.augment.views=2")
    with monkeypatch.context() as patch:
        patch.setattr(StageCache, "is_there", lambda self: signal.raise_signal(signal.SIGTERM))  # asked by the second
        with pytest.raises(StoppedBySignalError):
            train(tiny(*options), tmp_path / "run")
    computed.clear()
    train(tiny(*options), tmp_path / "run")
    assert sum(computed) == 2 * stagecache._PROBES * 3
    assert set(decisions(tmp_path / "run").values()) == {"cached"}


@pytest.mark.slow
def test_layers_that_freeze_give_the_same_by_several_processes(tiny: MakeConfig, tmp_path: Path) -> None:
    options = (FREEZING, "model.batch_norm=frozen", "data.augment.views=2", "precision=fp64", "batch.size=26")
    train(tiny(*options, "features.cache=off"), tmp_path / "alone")
    run_ranks(train, (tiny(*options), tmp_path / "three"), 3)
    assert set(decisions(tmp_path / "three").values()) == {"cached"}
    np.testing.assert_allclose(losses(tmp_path / "three"), losses(tmp_path / "alone"), rtol=1e-9)


@pytest.mark.slow
def test_what_is_rounded_is_no_start(recipe: MakeConfig, computed: list[int], tmp_path: Path) -> None:
    train(recipe("features.dtype=bf16"), tmp_path / "run")
    assert set(decisions(tmp_path / "run").values()) == {"cached", "no layer is frozen"}
    assert sum(computed) == 200 * (2 + 3) + 2 * 120


@pytest.mark.slow
def test_killed_while_filling_it_goes_on_where_the_rows_end(
    recipe: MakeConfig, computed: list[int], cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError, match="rank 1"):
        run_ranks(ranks.train_and_die_while_filling, (recipe(), tmp_path / "killed", 1, 100), 2)
    there = sum(np.count_nonzero(np.fromfile(file, np.uint32)) for file in cache.glob("*/*.sums"))
    assert 100 <= there < 700
    train(recipe(), tmp_path / "killed")
    assert sum(computed) <= 200 * 3 + 120 - there + stagecache._PROBES * 8
    train(recipe("features.cache=off"), tmp_path / "plain")
    np.testing.assert_allclose(losses(tmp_path / "killed"), losses(tmp_path / "plain"), rtol=1e-5)


@pytest.mark.slow
def test_stopped_while_filling_and_inside_a_stage_it_finds_its_rows_again(
    recipe: MakeConfig, computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.Store.write

    def write_and_stop(self: Store, *args: Any) -> None:
        write(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    log = Tracker.log

    def log_and_stop(self: Tracker, row: dict[str, Any]) -> None:
        log(self, row)
        if row["kind"] == "step" and row["step"] == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write_and_stop)
        with pytest.raises(StoppedBySignalError, match="everything is saved; go on with"):
            train(recipe(), folder)
    first = sum(computed)
    assert 0 < first <= 2 * 64
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_stop)
        with pytest.raises(StoppedBySignalError):
            train(recipe(), folder)
    assert sum(computed) <= 200 * 3 + 120 + 64
    computed.clear()
    train(recipe(), folder)
    assert sum(computed) == stagecache._PROBES * (2 + 1 + 3 + 1)
    train(recipe(), tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_damaged_and_missing_rows_are_computed_anew(recipe: MakeConfig, cache: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "first")
    for file in cache.glob("*/train.0.rows"):
        with file.open("r+b") as content:
            content.seek(1000)
            content.write(b"\xff" * 5000)
    for file in cache.glob("*/train.1.sums"):  # killed while it was filled
        with file.open("r+b") as content:
            content.write(bytes(400))
    for file in cache.glob("*/val.0.rows"):  # whole, but of something else
        stored = np.fromfile(file, np.float32)
        (-stored).tofile(file)
        sums = [store._sum(row) for row in (-stored).view(np.uint8).reshape(120, -1)]
        np.array(sums, np.uint32).tofile(file.with_suffix(".sums"))
    train(recipe(), tmp_path / "second")
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert [row["val/loss@32"] for row in rows(tmp_path / "first", "epoch")] == [
        row["val/loss@32"] for row in rows(tmp_path / "second", "epoch")
    ]
    assert "does not hold what the layers give" in (tmp_path / "second" / "log.txt").read_text()


@pytest.mark.slow
def test_a_full_disk_is_no_reason_to_stop(recipe: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    train(recipe(), tmp_path / "run")
    assert "No space left on device" in decisions(tmp_path / "run")["head"]
    assert "frozen layers run in every step" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(TlearnError, match=r"features\.cache: on: stage head: .*No space left"):
        train(recipe("features.cache=on"), tmp_path / "other")


@pytest.mark.slow
def test_a_quota_that_shows_late_is_none_either(
    recipe: MakeConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.pwrite, [0]

    def full(descriptor: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        return write(descriptor, data, offset) if calls[0] < 50 else write(descriptor, data[:1], offset)

    monkeypatch.setattr(os, "pwrite", full)
    train(recipe(), tmp_path / "run")
    assert "No space left on device" in decisions(tmp_path / "run")["head"]
    assert not list(cache.glob("*/train.0.rows"))  # else there would be no room for checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "not supported"), AttributeError("posix_fallocate")])
def test_a_disk_that_cannot_allocate_beforehand_stores_too(
    recipe: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    train(recipe("stages.0.epochs=3", "stages.1.epochs=4"), tmp_path / "run")
    assert decisions(tmp_path / "run")["last"] == "cached"


@pytest.mark.slow
def test_a_full_store_is_used_where_little_room_is_left(
    recipe: MakeConfig, computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(), tmp_path / "first")
    monkeypatch.setattr(stagecache, "_RESERVE_BYTES", 2**60)
    computed.clear()
    train(recipe(), tmp_path / "second")
    assert sum(computed) == stagecache._PROBES * (2 + 1 + 3 + 1)


@pytest.mark.slow
def test_machines_that_see_other_disks_do_not_share_a_store(recipe: MakeConfig, tmp_path: Path) -> None:
    for attempt in ("first", "second"):  # what the first one leaves must not pass for a shared folder
        run_ranks(ranks.train_on_own_disk, (recipe(), tmp_path / attempt, tmp_path, attempt == "second"), 2)
        assert "not all machines see" in decisions(tmp_path / attempt)["head"]
    assert list(tmp_path.glob("disk*/features/*/*.rows")) == []


@pytest.mark.slow
def test_why_nothing_is_stored_is_said_and_kept(recipe: MakeConfig, tmp_path: Path) -> None:
    train(recipe("stages.0.views=4"), tmp_path / "run")
    reason = "no view comes again in 4 epochs"
    assert decisions(tmp_path / "run")["head"] == reason
    assert f"stage head: frozen layers run in every step: {reason}" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["stages.0.image_size=40"], "another size"),
        (["stages.0.views=null"], "new crops in every epoch"),
        (["features.max_gib=1e-6"], "GiB are more than features.max_gib=1e-06"),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_an_error(
    recipe: MakeConfig, tmp_path: Path, options: list[str], reason: str
) -> None:
    with pytest.raises(TlearnError, match=f"features.cache: on: stage head: .*{reason}"):
        train(recipe("features.cache=on", *options), tmp_path / "run")
    assert (tmp_path / "run").exists() == ("max_gib" in reason)  # the others are known before anything is written


@pytest.mark.slow
def test_what_was_decided_is_kept_on_resume(recipe: MakeConfig, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(recipe("features.cache=off"), whole)

    log = Tracker.log

    def log_and_stop(self: Tracker, row: dict[str, Any]) -> None:
        log(self, row)
        if row["kind"] == "step" and row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_stop)
        with pytest.raises(StoppedBySignalError):
            train(recipe("features.cache=off"), stopped)
    train(recipe("features.cache=auto"), stopped)  # the stage that has begun goes on without, the next one begins with
    assert decisions(stopped) == {**decisions(stopped), "head": "features.cache: off", "last": "cached"}
    np.testing.assert_allclose(losses(stopped), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_two_runs_do_not_fill_the_same_files_at_once(recipe: MakeConfig, cache: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "first")
    held = [path.open("w") for path in cache.glob("*/filled.lock")]
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    threading.Timer(1.0, lambda: [file.close() for file in held]).start()
    train(recipe(), tmp_path / "second")
    assert "waiting for another run" in (tmp_path / "second" / "log.txt").read_text()
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.slow
def test_what_was_not_used_longest_makes_room(recipe: MakeConfig, cache: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "first")
    old = {path: (path / "used.lock").stat().st_mtime for path in cache.iterdir() if path.is_dir()}
    size = sum(file.stat().st_size for path in old for file in path.iterdir())
    in_use = max(old, key=lambda path: old[path])
    with (in_use / "used.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        train(recipe("seed=1", f"features.max_gib={1.1 * size / 2**30}"), tmp_path / "second")
    assert in_use.exists()
    assert not min(old, key=lambda path: old[path]).exists()
    assert decisions(tmp_path / "second")["last"] == "cached"


@pytest.mark.slow
def test_all_processes_fill_and_train_the_same(recipe: MakeConfig, tmp_path: Path, monkeypatch: Any) -> None:
    options = ("precision=fp64", "batch.size=26", "data.max_train=187")
    alone = tmp_path / "alone"
    train(recipe(*options, "features.cache=off"), alone)
    for world_size in (1, 2, 3):
        run = tmp_path / str(world_size)
        monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / f"cache{world_size}"))
        run_ranks(train, (recipe(*options), run), world_size)
        assert decisions(run)["head"] == decisions(run)["last"] == "cached"
        assert [row["batch_hash"] for row in rows(run, "step")] == [row["batch_hash"] for row in rows(alone, "step")]
        np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-9)


def test_a_broken_image_is_named_while_the_store_is_filled(
    recipe: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, data: bytes, seed: int = 0) -> Any:
        raise UnreadableImageError("cannot be decoded")

    monkeypatch.setattr(EvalTransform, "__call__", broken)
    with pytest.raises(TlearnError, match=r"sample .*: cannot be decoded; prepare the data again"):
        train(recipe(), tmp_path / "run")
