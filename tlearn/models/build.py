"""A backbone with a new head, and what the rest needs to know of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlearn.config import Config
from tlearn.console import show
from tlearn.data.transforms import Colour, Preprocessing
from tlearn.errors import TlearnError
from tlearn.models.backbones import blocks_of, build_backbone, check_input, full_name, last_linear

BESIDE = "beside"
"""Prefix of the names of layers that an objective adds."""


@dataclass
class Model:
    """A classifier: (B, 3, S, S) normalised images -> (B, classes) logits."""

    net: nn.Module
    backbone: str
    """`timm:NAME` or `torchvision:NAME`."""
    weights: str
    """Where the weights came from, as `model.weights` takes it."""
    head: str
    """Name of the Linear that gives the logits."""
    blocks: list[list[str]]
    """Parameter names of the backbone, shallow to deep."""
    preprocessing: Preprocessing
    batch_norm_frozen: bool
    """Whether running statistics stay as they are."""
    _eval_modules: set[nn.Module] = field(default_factory=set)

    @property
    def beside(self) -> dict[str, nn.Module]:
        """Layers that an objective trains with the network; what is trained in the end does without."""
        return dict(getattr(self.net, BESIDE, nn.ModuleDict()).items())

    def attach(self, layers: Mapping[str, nn.Module]) -> None:
        """Add such layers, whose parameters train in every stage."""
        if layers:
            dtype = next(self.net.parameters()).dtype
            self.net.add_module(BESIDE, nn.ModuleDict(layers).to(dtype))

    @property
    def weights_alone(self) -> dict[str, torch.Tensor]:
        """State of the network without the layers beside it."""
        return {name: x for name, x in self.net.state_dict().items() if not name.startswith(f"{BESIDE}.")}

    def load_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put such a state back."""
        self.net.load_state_dict({**self.net.state_dict(), **state})

    def set_trainable(self, multipliers: Mapping[str, float]) -> None:
        """Parameters with multiplier 0 are frozen, the others train."""
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(multipliers[name] > 0)
            parameter.grad = None
        frozen = set(_frozen_modules(self.net))
        self._eval_modules = {
            module
            for module in self.net.modules()
            if module in frozen or (self.batch_norm_frozen and isinstance(module, _BatchNorm))
        }

    def sized(self, size_px: int) -> Preprocessing:
        """The preprocessing at another image size."""
        return replace(self.preprocessing, size_px=size_px)

    @property
    def moving_statistics(self) -> list[torch.Tensor]:
        """Buffers of the BatchNorm layers that training changes."""
        norms = [m for m in self.net.modules() if isinstance(m, _BatchNorm) and m not in self._eval_modules]
        return [buffer for norm in norms for buffer in norm.buffers()]

    @property
    def smallest_batch(self) -> int:
        """Images that a micro-batch must have: train-mode BatchNorm has no variance of one."""
        return 2 if self.moving_statistics else 1

    def train(self) -> None:
        """Training mode, except for frozen parts: they stay in eval (BatchNorm statistics, dropout)."""
        self.net.train()
        for module in self._eval_modules:
            module.eval()


@dataclass(frozen=True)
class Card:
    """model.json: what a run's weights alone do not say."""

    backbone: str
    head: str
    weights: str
    """Where the run started from."""
    asked: str
    """What the config said of it: `default`, say."""
    classes: tuple[str, ...]
    """Names in label order."""
    data_fingerprint: str
    preprocessing: Preprocessing

    @classmethod
    def read(cls, path: Path) -> Card:
        """From the file.

        Raises:
            TlearnError: it is damaged.
        """
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            about = card["preprocessing"]
            preprocessing = Preprocessing(**about | {name: tuple(about[name]) for name in ("mean", "std")})
            return cls(**card | {"classes": tuple(card["classes"]), "preprocessing": preprocessing})
        except (ValueError, LookupError, TypeError) as error:
            raise TlearnError(f"{path}: damaged ({error}); restore the file, or train again") from None


def _own(p: Preprocessing, colours: tuple[Colour, Colour] | None, weights: str) -> Preprocessing:
    assert colours is not None
    mean, std = colours
    if p.grey:
        mean, std = (sum(mean) / 3,) * 3, (sum(std) / 3,) * 3
    if min(std) <= 0:
        raise TlearnError("data.normalise = 'own': the train images are all of one colour; use weights")
    if weights != "random":
        theirs = f"mean {p.mean} and deviation {p.std}"
        show(f"WARNING: weights {weights} were trained on pixels of {theirs}; data.normalise=own shows them others")
    return replace(p, mean=mean, std=std)


def _frozen_modules(net: nn.Module) -> Iterator[nn.Module]:
    """Modules with frozen parameters only, and those without parameters (dropout, say) in front of such a one."""
    frozen_next = False
    for module in reversed(list(net.modules())):
        parameters = list(module.parameters())
        if parameters:
            frozen = not any(p.requires_grad for p in parameters)
            if next(module.children(), None) is None:
                frozen_next = frozen
        else:
            frozen = frozen_next
        if frozen:
            yield module


def build_model(
    config: Config, classes: int, card: Card | None = None, colours: tuple[Colour, Colour] | None = None
) -> Model:
    """The configured backbone with a head for `classes`, which starts at zero: the first loss is ln(classes).

    Args:
        config: of the run.
        classes: how many.
        card: of a run that goes on: its weights come from a checkpoint, so that none are looked for here.
        colours: mean and standard deviation of the train images, for `data.normalise: own`.

    Raises:
        TlearnError: unknown names, weights that cannot be had or do not fit, a size that the model cannot take.
    """
    name = full_name(config.model.backbone)
    torch.manual_seed(config.seed)
    wanted = "random" if card else config.model.weights
    built = build_backbone(name, wanted, config.data.image_size, config.model.dropout)
    weights, start = (card.weights, card.preprocessing) if card else (built.weights, built.preprocessing)
    data, size_px = config.data, config.data.image_size or start.size_px
    preprocessing = replace(start, size_px=size_px, fit=data.fit, grey=data.grey)
    if data.normalise == "own" and not card:
        preprocessing = _own(preprocessing, colours, weights)
    binary = config.objective.name == "binary"
    if binary and classes != 2:
        raise TlearnError(f"objective.name = 'binary': the data have {classes} classes; use supervised")
    head = replace_head(built.net, classes, one_logit=binary)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    net = built.net.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for size_px in sorted({preprocessing.size_px, *(s.image_size for s in config.stages or [] if s.image_size)}):
        check_input(net, name, size_px, classes)
    if config.model.sync_batchnorm:
        net = convert_sync_batchnorm(net)
    choice = config.model.batch_norm
    frozen = weights != "random" if choice == "auto" else choice == "frozen"
    return Model(net, name, weights, head, blocks_of(net, head), preprocessing, frozen)


class Mirrored(nn.Module):
    """The mean of a network's logits for an image and for its mirror image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, classes)."""
        logits: torch.Tensor = (self.net(images) + self.net(images.flip(-1))) / 2
        return logits


class OneLogit(nn.Linear):
    """A head for two classes with one logit z, handed on as (0, z): its softmax is (1 - sigmoid(z), sigmoid(z)), its
    cross-entropy the binary one, and the larger of the two that of probability above 0.5."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, features) -> (B, 2)."""
        logit = super().forward(features)
        return torch.cat([torch.zeros_like(logit), logit], dim=-1)


def replace_head(net: nn.Module, classes: int, *, one_logit: bool = False) -> str:
    """Put a zero Linear for `classes` in place of the last Linear; returns its name.

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
    new = OneLogit(old.in_features) if one_logit else nn.Linear(old.in_features, classes)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    net.set_submodule(head, new)
    return head
