"""A backbone with a new head, and what the rest needs to know of it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlearn.config import Config
from tlearn.console import show
from tlearn.data.transforms import Colour, Preprocessing
from tlearn.errors import TlearnError
from tlearn.modelconfig import Attention
from tlearn.modelconfig import Model as Options
from tlearn.models.attention import add_attention
from tlearn.models.backbones import (
    Backbone,
    SizeError,
    blocks_of,
    build_backbone,
    check_input,
    full_name,
    last_linear,
    replace_head,
)
from tlearn.models.heads import Prototypes, Texts, new_head
from tlearn.models.hybrid import Hybrid, build_hybrid
from tlearn.models.stem import small_image_stem
from tlearn.models.weights import BESIDE, BEST, CARD, is_run, load_state, read_weights

_FAR_PX = 65
"""Sizes further away are not looked at."""

ATTACHED = "beside"
"""Prefix of the names of layers that an objective adds."""


@dataclass
class Model:
    """A classifier: (B, 3, S, S) normalised images -> (B, classes) logits."""

    net: nn.Module
    backbone: str
    """`timm:NAME` or `torchvision:NAME`, or several, as `model.backbone` takes them."""
    weights: str
    """Where the weights came from, as `model.weights` takes it."""
    head: str
    """Name of the last layer, which gives the logits."""
    blocks: list[list[str]]
    """Parameter names of the backbone, shallow to deep."""
    preprocessing: Preprocessing
    batch_norm_frozen: bool
    """Whether running statistics stay as they are."""
    text_width: int | None = None
    """Numbers per text, where the head compares with texts."""
    is_zero_shot: bool = False
    """Whether the head has answers before any training."""
    _eval_modules: set[nn.Module] = field(default_factory=set)

    @property
    def beside(self) -> dict[str, nn.Module]:
        """Layers that an objective trains with the network; what is trained in the end does without."""
        return dict(getattr(self.net, ATTACHED, nn.ModuleDict()).items())

    def attach(self, layers: Mapping[str, nn.Module]) -> None:
        """Add such layers, whose parameters train in every stage."""
        if layers:
            dtype = next(self.net.parameters()).dtype
            self.net.add_module(ATTACHED, nn.ModuleDict(layers).to(dtype))

    @property
    def weights_alone(self) -> dict[str, torch.Tensor]:
        """State of the network without the layers beside it."""
        return {name: x for name, x in self.net.state_dict().items() if not name.startswith(f"{ATTACHED}.")}

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
    stem: Literal["original", "small_image"]
    attention: Attention | None
    text_width: int | None = None
    """Of a head that compares with texts."""

    @property
    def texts(self) -> Prototypes | None:
        """Room for them."""
        return Prototypes.blank(len(self.classes), self.text_width) if self.text_width else None

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"attention": self.attention and self.attention.model_dump()}

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
            attention = Attention(**card["attention"]) if card["attention"] else None
            changed = {"classes": tuple(card["classes"]), "preprocessing": preprocessing, "attention": attention}
            return cls(**card | changed)
        except (ValueError, LookupError, TypeError) as error:
            raise TlearnError(f"{path}: damaged ({error}); restore the file, or train again") from None


_LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in grey (ITU-R BT.601), as Pillow converts them."""


def _own(p: Preprocessing, colours: tuple[Colour, Colour] | None, weights: str) -> Preprocessing:
    assert colours is not None
    mean, std = colours
    if p.grey:
        # the deviation as if the channels went together, as they do in most images
        mean, std = ((sum(w * x for w, x in zip(_LUMA, colour, strict=True)),) * 3 for colour in (mean, std))
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


class Assembled(NamedTuple):
    """A network with a new head, and what there is to know of its backbone."""

    net: nn.Module
    head: str
    blocks: list[list[str]]
    built: Backbone


def assemble(
    options: Options, size_px: int | None, classes: int, *, one_logit: bool = False, texts: Prototypes | None = None
) -> Assembled:
    """A network as `model` describes it, with a head for `classes`: one that starts at zero, or compares with texts.

    Args:
        options: the section `model` of a config.
        size_px: input size for models that are built for one; None: the size of the weights.
        classes: how many.
        one_logit: for two classes.
        texts: one per class.

    Raises:
        SizeError: a size that the model cannot take.
        TlearnError: unknown names, weights that cannot be had or do not fit, a stem or attention that cannot be made.
    """
    name = full_name(options.backbone)
    is_hybrid = BESIDE in name
    build = build_hybrid if is_hybrid else build_backbone
    built = build(name, options.weights, size_px, options.dropout)
    net = built.net
    head = last_linear(net)
    blocks = net.blocks if isinstance(net, Hybrid) else blocks_of(net, head)
    replace_head(net, lambda old: new_head(old, classes, one_logit, texts))
    if options.stem == "small_image":
        if is_hybrid:
            raise TlearnError("model.stem: small_image takes one backbone, not a hybrid; use model.stem=original")
        small_image_stem(net, name, blocks)
    size_px = size_px or built.preprocessing.size_px
    check_input(net, name, size_px, classes)
    if options.attention is not None:
        kind, after = options.attention.kind, options.attention.after
        if is_hybrid and after == "last":
            ends = ", ".join(f"parts.{i}.NAME" for i in range(name.count(BESIDE) + 1))
            raise TlearnError(f"model.attention.after: last: every part of a hybrid has a last block; name one: {ends}")
        blocks = add_attention(net, kind, after, head, blocks, size_px)
    return Assembled(net, head, blocks, built)


def build_model(
    config: Config,
    classes: int,
    card: Card | None = None,
    colours: tuple[Colour, Colour] | None = None,
    names: tuple[str, ...] = (),
    texts: Prototypes | None = None,
) -> Model:
    """The configured backbone with a head for `classes`, which starts at zero (the first loss is ln(classes)), or
    compares with texts.

    Args:
        config: of the run.
        classes: how many.
        card: of a run that goes on: its weights come from a checkpoint, so that none are looked for here.
        colours: mean and standard deviation of the train images, for `data.normalise: own`.
        names: of the classes: another run's head is taken where it has the same.
        texts: of the classes, for `model.head.text`.

    Raises:
        TlearnError: unknown names, weights that cannot be had or do not fit, a size that the model cannot take.
    """
    torch.manual_seed(config.seed)
    earlier = None if card or not is_run(config.model.weights) else Path(config.model.weights).expanduser()
    options = _random(config.model) if card or earlier else config.model
    binary = config.objective.name == "binary"
    if binary and classes != 2:
        raise TlearnError(f"objective.name = 'binary': the data have {classes} classes; use supervised")
    size_px = config.data.image_size
    try:
        net, head, blocks, built = assemble(options, size_px, classes, one_logit=binary, texts=texts)
    except SizeError as error:
        raise _with_sizes("data.image_size", error, lambda size: assemble(_random(options), size, classes)) from None
    for stage in config.stages or []:
        if stage.image_size is not None:
            try:
                check_input(net, built.name, stage.image_size, classes)
            except SizeError as error:
                same = copy.deepcopy(net).to("meta")
                takes = functools.partial(check_input, same, built.name, classes=classes)
                raise _with_sizes(f"stages: {stage.name}: image_size", error, takes) from None
    if earlier is not None:
        weights, start = config.model.weights, _taken(earlier, net, built.name, head, names)
    else:
        weights, start = (card.weights, card.preprocessing) if card else (built.weights, built.preprocessing)
    data = config.data
    preprocessing = replace(start, size_px=size_px or start.size_px, fit=data.fit, grey=data.grey)
    if data.normalise == "own" and not card:
        preprocessing = _own(preprocessing, colours, weights)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    net = net.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.model.sync_batchnorm:
        net = convert_sync_batchnorm(net)
    choice = config.model.batch_norm
    frozen = "random" not in weights.split(BESIDE) if choice == "auto" else choice == "frozen"
    width = None if texts is None else texts.features.shape[1]
    last = net.get_submodule(head)
    is_zero_shot = isinstance(last, Texts) and last.is_pretrained and options.weights != "random"
    return Model(net, built.name, weights, head, blocks, preprocessing, frozen, width, is_zero_shot)


def _taken(run: Path, net: nn.Module, backbone: str, head: str, names: tuple[str, ...]) -> Preprocessing:
    """Put the best weights of another run into a network; how that run prepared its images.

    Raises:
        TlearnError: they do not fit.
    """
    card = Card.read(run / CARD)
    if card.backbone != backbone:
        raise TlearnError(f"model.weights: {run} has trained {card.backbone}; set model.backbone={card.backbone}")
    state, texts = read_weights(run / BEST), f"{head}.prototypes"
    if texts in net.state_dict():  # what they are compared with is what is asked for now
        state[texts] = net.state_dict()[texts]
    elif card.classes != names:
        state = {name: x for name, x in state.items() if not name.startswith(f"{head}.")}
    load_state(net, state, str(run), head)
    return card.preprocessing


def _random(options: Options) -> Options:
    return options.model_copy(update={"weights": "random"})


def _with_sizes(key: str, error: SizeError, attempt: Callable[[int], object]) -> TlearnError:
    """An error that names the nearest sizes which a model takes, as `attempt` finds out without memory."""
    takes = [f"{size_px} px" for sign in (-1, 1) if (size_px := _next_size(error.size_px, sign, attempt))]
    nearest = f"; it takes {' and '.join(takes)}" if takes else "; choose another one, or another model"
    return TlearnError(f"{key}: {error}{nearest}")


def nearest_size(options: Options, size_px: int) -> int:
    """The image size, nearest to this one, that a model takes; this one where none is found near it."""

    def attempt(size_px: int) -> object:
        return assemble(_random(options), size_px, 2)

    if _takes(size_px, attempt):
        return size_px
    found = [near for sign in (-1, 1) if (near := _next_size(size_px, sign, attempt))]
    return min(found, key=lambda near: abs(near - size_px), default=size_px)


def _next_size(size_px: int, sign: int, attempt: Callable[[int], object]) -> int | None:
    """The first larger (sign 1) or smaller (-1) one that works."""
    near = (size_px + sign * distance for distance in range(1, _FAR_PX))
    sides = (px for px in near if px >= 16 and not (px % 4 and px % 14))  # sides of patches
    return next((px for px in sides if _takes(px, attempt)), None)


def _takes(size_px: int, attempt: Callable[[int], object]) -> bool:
    """Found out without memory."""
    try:
        with torch.device("meta"):
            attempt(size_px)
    except TlearnError:
        return False
    return True
