"""The frozen beginning of a network and the rest of it, each run alone.

What lies before the first layer that trains (or draws random numbers) gives the same output for the same picture as
long as it is frozen. `find_cut` looks for the last layer of that beginning in one run of the network, of any family;
`outputs` runs the beginning alone; inside `rest_only` the network takes those outputs in place of images: its own code
runs, but every layer of the beginning hands on a blank of the right shape, and the last of them what was stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from tlearn.models.build import Model

TOLERANCE = 1e-4
"""Of the check, relative: rounding, where kernels depend on the shape of the batch."""


class NoCutError(Exception):
    """Why a network cannot be cut."""


class Blank(NamedTuple):
    """In place of a tensor: its shape for one image."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Where the frozen beginning ends."""

    layers: dict[str, Any]
    """Its layers in the order in which they run, by name: what each gives, with `Blank`s for tensors."""
    image: tuple[int, ...]
    """Shape of one image."""
    dtype: torch.dtype
    """Of what the last layer gives."""
    channels_last: bool
    """Whether it lies in memory like that."""

    @property
    def name(self) -> str:
        """Of the last layer, whose output is what there is to store."""
        return list(self.layers)[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it gives for one image."""
        shape: tuple[int, ...] = self.layers[self.name].shape
        return shape


class _CapturedError(Exception):
    """Carries an output out of the middle of a network."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


@torch.no_grad()
def find_cut(model: Model, images: torch.Tensor) -> Cut:
    """Cut a network in front of the first layer that trains.

    Args:
        model: as `set_trainable` left it.
        images: (2, 3, S, S), not alike, to try it with.

    Raises:
        NoCutError: no frozen layer gives all that the rest needs.
    """
    model.train()
    moving = model.moving_statistics
    before = [buffer.clone() for buffer in moving]
    try:
        layers, last = _beginning(model.net, images)
        while layers:
            name = list(layers)[-1]
            output = last[name]
            if isinstance(layers[name], Blank):
                channels_last = output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last)
                cut = Cut(dict(layers), tuple(images.shape[1:]), output.dtype, channels_last)
                # other images than those of which constants may have been taken
                if _suffices(model, cut, images.flip(0)):
                    return cut
            del layers[name]  # it is in the middle of a block, beside a shortcut, say
    finally:
        for buffer, old in zip(moving, before, strict=True):
            buffer.copy_(old)
    raise NoCutError("no layer in front of what trains holds all that the rest needs")


def _beginning(net: nn.Module, images: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layers that run before anything that trains, the largest ones: what they give, as `Blank`s and as it is."""
    gave: dict[str, list[Any]] = {}
    order: list[str] = []

    def ran(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            gave.setdefault(name, []).append(output)
            order.append(name)

        return hook

    def trains(module: nn.Module, args: Any) -> None:
        order.append("")

    hooks = [module.register_forward_pre_hook(trains) for module in net.modules() if _changes(module)]
    hooks += [
        module.register_forward_hook(ran(name))
        for name, module in net.named_modules()
        if not any(map(_changes, module.modules()))
    ]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    first = order[: order.index("")] if "" in order else []
    # the outermost that ran: a list of layers never does, and what is inside of a layer need not be looked at
    outermost = [
        name for name in first if not any(f"{name}.".startswith(f"{other}.") for other in gave if other != name)
    ]
    # a layer that runs more than once runs on
    layers = {name: _blanks(gave[name][0], len(images)) for name in outermost if len(gave[name]) == 1}
    return layers, {name: gave[name][0] for name in layers}


def _blanks(output: Any, n: int) -> Any:
    """The same with `Blank`s in place of what there is of every image."""
    return tree_map(
        lambda leaf: (
            Blank(tuple(leaf.shape[1:])) if isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (n,) else leaf
        ),
        output,
    )


def outputs(net: nn.Module, cut: Cut, images: torch.Tensor) -> torch.Tensor:
    """What the frozen beginning gives: (B, 3, S, S) -> (B, *cut.shape). The rest is not run."""

    def capture(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise _CapturedError(output)

    hook = net.get_submodule(cut.name).register_forward_hook(capture)
    try:
        with torch.no_grad():
            net(images)
    except _CapturedError as captured:
        return captured.value
    finally:
        hook.remove()
    raise AssertionError(f"{cut.name} did not run")


@contextmanager
def rest_only(net: nn.Module, cut: Cut) -> Iterator[None]:
    """Inside, `net` takes (B, *cut.shape) in place of images, and runs only what is behind the cut."""
    stored = [torch.empty(0)]

    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        stored[0] = args[0]
        return blank(cut.image)

    def blank(shape: tuple[int, ...]) -> torch.Tensor:
        like = stored[0]
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(len(like), *shape)

    def blanks(template: Any) -> Callable[..., Any]:
        def filled(leaf: Any) -> Any:
            return blank(leaf.shape) if isinstance(leaf, Blank) else leaf

        return lambda *args, **kwargs: tree_map(filled, template, is_leaf=lambda leaf: isinstance(leaf, Blank))

    hook = net.register_forward_pre_hook(enter)
    modules = {name: net.get_submodule(name) for name in cut.layers}
    for name, module in modules.items():
        module.forward = blanks(cut.layers[name]) if name != cut.name else lambda *args, **kwargs: stored[0]
    try:
        yield
    finally:
        hook.remove()
        for module in modules.values():
            del module.forward


def fingerprint(model: Model) -> str:
    """Hash of all weights on which outputs of frozen layers can depend, in hex: of all that stands still."""
    moving = {buffer.data_ptr() for buffer in model.moving_statistics}
    digest = hashlib.sha256()
    for name, tensor in model.net.state_dict(keep_vars=True).items():
        if not tensor.requires_grad and tensor.data_ptr() not in moving:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _suffices(model: Model, cut: Cut, images: torch.Tensor) -> bool:
    """Whether the rest, fed with the outputs alone, computes what the whole does, wherever training may lead it.

    What reaches the head is compared, since the head itself may be all zeros.
    """
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].cpu().double())

    hook = model.net.get_submodule(model.head).register_forward_pre_hook(look)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    saved = [p.clone() for p in trained]
    try:
        torch.manual_seed(1)
        features = outputs(model.net, cut, images)
        for p in trained:  # a gain that begins at zero would hide a second way through the network
            p.add_(torch.randn_like(p) * (0.1 * p.std(correction=0) or 0.1))
        torch.clear_autocast_cache()  # it has the weights of before
        torch.manual_seed(0)
        model.net(images)
        torch.manual_seed(0)
        with rest_only(model.net, cut):
            model.net(features)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):  # what is between layers wants no blanks
        return False
    finally:
        hook.remove()
        for p, old in zip(trained, saved, strict=True):
            p.copy_(old)
        torch.clear_autocast_cache()
    whole, rest = seen
    return bool((whole - rest).abs().max() <= TOLERANCE * whole.abs().max())


def _changes(module: nn.Module) -> bool:
    """Whether it has trained parameters of its own, draws random numbers, or looks at the rest of the batch."""
    trains = any(p.requires_grad for p in module.parameters(recurse=False))
    return trains or _is_random(module) or (isinstance(module, _BatchNorm) and module.training)


def _is_random(module: nn.Module) -> bool:
    """Dropout, stochastic depth and their like, where they are switched on."""
    rate = next((getattr(module, key) for key in ("p", "drop_prob", "drop_rate") if hasattr(module, key)), 0)
    leaf = next(module.children(), None) is None
    return leaf and module.training and "drop" in type(module).__name__.lower() and bool(rate)
