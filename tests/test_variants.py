"""Changed backbones: a stem for small images, attention behind a block, two backbones side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_distributed import rows, weights
from torch import nn

from tlearn.config import Config, Rule, Stage
from tlearn.configfile import load_config
from tlearn.data.transforms import Preprocessing
from tlearn.errors import TlearnError
from tlearn.launch import run_ranks
from tlearn.models.attention import KINDS
from tlearn.models.build import Model, build_model
from tlearn.models.cut import NoCutError, find_cut, outputs, rest_only
from tlearn.models.hybrid import Hybrid, Renormalise
from tlearn.predict import load
from tlearn.run import train
from tlearn.stages import HEAD_ONLY, LAST_BLOCK, resolve


def model(backbone: str, *overrides: str, px: int = 64) -> Model:
    options = ["data.path=x", f"model.backbone={backbone}", "model.weights=random", f"data.image_size={px}"]
    return build_model(load_config(None, [*options, *overrides]), 5)


def complaint(backbone: str, *overrides: str) -> str:
    with pytest.raises(TlearnError) as caught:
        model(backbone, *overrides)
    return str(caught.value)


def trained(m: Model, rules: list[Rule]) -> set[str]:
    """Parameters that train under rules, which are set."""
    names = [name for name, _ in m.net.named_parameters()]
    multipliers = resolve(Stage(name="a", epochs=1, train=rules), names, m.head, m.blocks)
    m.set_trainable(multipliers)
    return {name for name, rate in multipliers.items() if rate}


def features(m: Model, images: torch.Tensor) -> torch.Tensor:
    """What reaches the head."""
    seen: list[torch.Tensor] = []
    hook = m.net.get_submodule(m.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    m.net.eval()
    with torch.no_grad():
        m.net(images)
    hook.remove()
    return seen[0]


# small images

STEMS = [
    ("timm:resnet18", "conv1", ["maxpool"], 16),
    ("timm:resnet18d", "conv1.0", ["maxpool"], 16),
    ("torchvision:resnet18", "conv1", ["maxpool"], 16),
    ("torchvision:densenet121", "features.conv0", ["features.pool0"], 16),
    ("timm:tf_efficientnet_lite0", "conv_stem", [], 4),
    ("torchvision:mobilenet_v2", "features.0.0", [], 4),
]


@pytest.mark.parametrize(("backbone", "first", "pools", "times"), STEMS)
def test_a_small_image_stem_looks_at_every_pixel(backbone: str, first: str, pools: list[str], times: int) -> None:
    with torch.device("meta"):
        changed, plain = (model(backbone, f"model.stem={stem}") for stem in ("small_image", "original"))

    conv = changed.net.get_submodule(first)
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride) == ((3, 3), (1, 1))
    for pool in pools:
        assert isinstance(plain.net.get_submodule(pool), nn.MaxPool2d)
        assert isinstance(changed.net.get_submodule(pool), nn.Identity)
    assert [n for n, _ in changed.net.named_parameters()] == [n for n, _ in plain.net.named_parameters()]
    positions = [m.net.get_submodule(m.blocks[1][0].rpartition(".")[0]) for m in (changed, plain)]
    sizes: list[int] = []
    for module, m in zip(positions, (changed, plain), strict=True):
        module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1] * args[0].shape[-2]))
        m.net(torch.zeros(1, 3, 64, 64, device="meta"))
    assert sizes[0] == times * sizes[1]


@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:resnet18", "torchvision:resnet18"])
def test_a_small_image_stem_answers_to_one_colour_as_the_weights_did(backbone: str) -> None:
    changed, plain = (model(backbone, f"model.stem={stem}") for stem in ("small_image", "original"))
    image = torch.tensor([0.3, -1.2, 0.7]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    first = [next(c for c in m.net.modules() if isinstance(c, nn.Conv2d)) for m in (changed, plain)]
    centres = [conv(image)[..., conv(image).shape[-1] // 2, conv(image).shape[-1] // 2] for conv in first]

    assert centres[1].abs().max() > 0.01
    torch.testing.assert_close(*centres, rtol=1e-4, atol=1e-5)
    if first[1].kernel_size == (7, 7):  # the same change for all nine weights
        change = first[0].weight - first[1].weight[:, :, 2:5, 2:5]
        torch.testing.assert_close(change, change[:, :, :1, :1].expand_as(change), rtol=0, atol=1e-5)
    else:
        assert torch.equal(first[0].weight, first[1].weight)


@pytest.mark.parametrize(
    ("backbone", "answer"),
    [
        ("timm:test_vit", "the first layer of timm:test_vit (16x16, stride 16) cannot become 3x3"),
        ("timm:convnext_atto", "cuts the image into patches"),
        ("timm:vgg11", "timm:vgg11 looks at every pixel already"),
        ("test_resnet + test_vit", "takes one backbone, not a hybrid"),
    ],
)
def test_a_backbone_without_a_stem_to_change_is_refused(backbone: str, answer: str) -> None:
    with torch.device("meta"):
        message = complaint(backbone, "model.stem=small_image")

    assert message.startswith("model.stem: small_image")
    assert answer in message


@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:test_efficientnet"])
def test_three_equal_channels_are_one_channel_with_summed_weights(backbone: str) -> None:
    """Why there is no option for grey images: the network computes the same function of them as it is."""
    net = model(backbone).net
    conv = next(c for c in net.modules() if isinstance(c, nn.Conv2d))
    grey = torch.randn(2, 1, 32, 32)
    summed = F.conv2d(grey, conv.weight.sum(1, keepdim=True), conv.bias, conv.stride, conv.padding)

    torch.testing.assert_close(conv(grey.expand(-1, 3, -1, -1)), summed, rtol=1e-4, atol=1e-5)


# attention

BLOCKS = [
    ("timm:test_resnet", "layer4", 64),
    ("timm:test_convnext", "stages.3", 64),
    ("timm:test_efficientnet", "blocks.4", 64),
    ("torchvision:mobilenet_v3_small", "features.12", 64),
    ("torchvision:shufflenet_v2_x0_5", "stage4", 64),
    ("timm:test_vit", "blocks.5", 64),
    ("timm:swin_tiny_patch4_window7_224", "layers.3", 64),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backbone", "last", "px"), BLOCKS)
def test_attention_changes_nothing_at_first_and_belongs_to_the_block_it_follows(
    backbone: str, last: str, px: int, kind: str
) -> None:
    if kind == "cbam" and "vit" in backbone:
        assert "cbam needs a map, and blocks.5 gives tokens" in complaint(backbone, f"model.attention.kind={kind}")
        return
    plain, attentive = (model(backbone, *o, px=px) for o in ([], [f"model.attention.kind={kind}"]))
    state = plain.net.state_dict()
    renamed = {n: state.get(n.replace(f"{last}.block.", f"{last}."), t) for n, t in attentive.net.state_dict().items()}
    attentive.net.load_state_dict(renamed)
    images = torch.randn(2, 3, px, px)
    assert torch.equal(features(plain, images), features(attentive, images))

    new = {name for name, _ in attentive.net.named_parameters() if name.startswith(f"{last}.attention.")}
    assert new <= set(attentive.blocks[-1])
    assert [len(block) for block in attentive.blocks[:-1]] == [len(block) for block in plain.blocks[:-1]]
    assert new <= trained(attentive, LAST_BLOCK)
    attentive.train()
    nn.init.normal_(attentive.net.get_parameter(f"{attentive.head}.weight"))
    attentive.net(images).sum().backward()
    gradients = {name: attentive.net.get_parameter(name).grad for name in new}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values() if gradient is not None)  # it begins to learn at once


@pytest.mark.parametrize("after", ["layer2", "layer3.0", "maxpool"])
def test_attention_can_follow_any_module_with_a_name(after: str) -> None:
    m = model("timm:test_resnet", f"model.attention={{kind: se, after: {after}}}")
    block = next(i for i, names in enumerate(m.blocks) if any("attention" in name for name in names))

    assert block == {"maxpool": 0, "layer2": 2, "layer3.0": 3}[after]
    flat = [name for names in m.blocks for name in names]
    assert flat == [name for name, _ in m.net.named_parameters() if not name.startswith("fc.")]


@pytest.mark.parametrize(
    ("backbone", "after", "answer"),
    [
        ("test_resnet", "layer5", "no module 'layer5'; there are, for instance: layer"),
        ("test_resnet", "fc", "'fc' holds the head"),
        ("test_resnet", "global_pool", "no map, no tokens; name a block, layer4 say"),
        ("torchvision:vit_b_16", "encoder.dropout2", "no module 'encoder.dropout2'"),
        ("test_resnet + test_vit", "last", "every part of a hybrid has a last block"),
    ],
)
def test_attention_that_cannot_be_placed_is_refused(backbone: str, after: str, answer: str) -> None:
    with torch.device("meta"):
        message = complaint(backbone, f"model.attention={{kind: se, after: {after}}}")

    assert message.startswith("model.attention.after: ")
    assert answer in message


def test_attention_that_no_stage_trains_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(TlearnError, match=r"has no effect: no stage trains blocks.4.attention"):
        train(tiny("strategy=feature_extraction", "model.attention.kind=se"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# two backbones


@pytest.fixture
def hybrid() -> Model:
    return model("test_resnet + torchvision:shufflenet_v2_x0_5")


def test_a_hybrid_gives_the_features_of_both(hybrid: Model) -> None:
    images = torch.randn(2, 3, 64, 64)
    assert (hybrid.backbone, hybrid.weights, hybrid.head) == (
        "timm:test_resnet + torchvision:shufflenet_v2_x0_5",
        "random",
        "head",
    )
    assert isinstance(hybrid.net, Hybrid)
    joined = features(hybrid, images)
    with torch.no_grad():
        alone = [part(given(images)) for part, given in zip(hybrid.net.parts, hybrid.net.inputs, strict=True)]
    assert torch.equal(joined, torch.cat(alone, dim=1))
    assert not hybrid.net(images).any()


def test_the_last_block_of_a_hybrid_is_that_of_every_part(hybrid: Model) -> None:
    assert trained(hybrid, [("last:1", 1.0), (".*", 0.0)]) == {
        n
        for n, _ in hybrid.net.named_parameters()
        if n.startswith(("parts.0.layer4.", "parts.1.stage4.", "parts.1.conv5."))
    }
    assert sorted(name for block in hybrid.blocks for name in block) == sorted(
        name for name, _ in hybrid.net.named_parameters() if not name.startswith("head.")
    )
    one_side = trained(hybrid, [("head", 1.0), (r"parts\.1\.", 1.0), (".*", 0.0)])
    assert one_side == {n for n, _ in hybrid.net.named_parameters() if n.startswith(("head.", "parts.1."))}


def test_each_part_sees_images_as_its_weights_want_them() -> None:
    given = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    wanted = Preprocessing(32, (0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    pixels = torch.rand(2, 3, 4, 4)
    as_given, as_wanted = (
        (pixels - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1) for p in (given, wanted)
    )

    torch.testing.assert_close(Renormalise(given, wanted)(as_given), as_wanted)
    assert torch.equal(Renormalise(given, given)(as_given), as_given)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_hybrid_with_frozen_parts_is_cut_behind_the_join(dropout: float) -> None:
    m = model("test_resnet + test_vit", f"model.dropout={dropout}")
    trained(m, HEAD_ONLY)
    images = torch.randn(2, 3, 64, 64)
    cut = find_cut(m, images)

    assert cut.name == ("join" if dropout else "drop")
    stored = outputs(m.net, cut, images)
    m.net.eval()
    nn.init.normal_(m.net.get_parameter("head.weight"))
    with torch.no_grad(), rest_only(m.net, cut):
        rest = m.net(stored)
    torch.testing.assert_close(rest, m.net(images).detach(), rtol=1e-4, atol=1e-4)


def test_a_hybrid_with_one_frozen_part_is_not_cut() -> None:
    m = model("test_resnet + test_vit")
    trained(m, [("head", 1.0), (r"parts\.1\.", 1.0), (".*", 0.0)])
    with pytest.raises(NoCutError):
        find_cut(m, torch.randn(2, 3, 64, 64))


def test_each_part_has_weights_of_its_own(tmp_path: Path) -> None:
    state = {k: torch.full_like(v, 0.25).contiguous() for k, v in model("test_resnet").net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    m = model("test_efficientnet + test_resnet", f"model.weights=random + {tmp_path / 'w.safetensors'}")

    assert m.weights == f"random + {tmp_path / 'w.safetensors'}"
    assert (m.net.get_parameter("parts.1.conv1.0.weight") == 0.25).all()
    assert not m.batch_norm_frozen
    assert "3 weights for 2 backbones" in complaint("test_resnet + test_vit", "model.weights=random + random + a")


# whole runs

VARIANTS = {
    "small_image": ["model.stem=small_image", "data.image_size=16"],
    "se": ["model.attention.kind=se"],
    "cbam": ["model.attention={kind: cbam, after: blocks.2}"],
    "hybrid": ["model.backbone=test_efficientnet + test_vit"],
}
SHORT = (
    "stages=[{name: head, epochs: 1, train: [[head, 1.0], ['.*', 0]]},"
    "{name: all, epochs: 2, train: [['.*', 1.0]], image_size: 48, optimizer: {name: sgd, lr: 0.01}}]"
)
"""Adam would make much of gradients that are nothing but rounding: those of the keys' biases in a ViT."""


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_alike_on_two_processes_goes_on_and_is_used(
    tiny: Callable[..., Config], tmp_path: Path, variant: str
) -> None:
    exact = (SHORT, "data.max_train=78", "data.max_val=40", "batch.size=26", "precision=fp64")
    config = tiny(*exact, *VARIANTS[variant], "model.batch_norm=frozen", "features.cache=off")
    result = train(config, tmp_path / "1")
    run_ranks(train, (config, tmp_path / "2"), 2)

    one, two = ([row["train/loss"] for row in rows(tmp_path / n, "step")] for n in ("1", "2"))
    assert len(one) == 9
    assert len(set(one)) == 9
    np.testing.assert_allclose(one, two, rtol=1e-9, atol=0)
    theirs = weights(tmp_path / "2")
    for name, tensor in weights(tmp_path / "1").items():
        # timm interpolates position embeddings in fp32
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-10, msg=name)

    assert train(config, tmp_path / "1")["val"] == result["val"]  # it is over: built from its card and a checkpoint
    again = load(tmp_path / "1").evaluate()["val"]
    assert again["confusion"] == result["val"]["confusion"]
    assert again["loss"] == pytest.approx(result["val"]["loss"], rel=1e-9)
