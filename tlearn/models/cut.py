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
from typing import Any

import torch
from torch import nn

from tlearn.models.build import Model

TOLERANCE = 1e-4
"""Of the check, relative: rounding, where kernels depend on the shape of the batch."""


class NoCutError(Exception):
    """Why a network cannot be cut."""


@dataclass(frozen=True)
class Cut:
    """Where the frozen beginning ends."""

    layers: dict[str, tuple[int, ...]]
    """Its layers in the order in which they run, by name: the shape of what each gives for one image."""
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
        return self.layers[self.name]


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
    net = model.net
    model.train()
    moving = model.moving_statistics
    before = [buffer.clone() for buffer in moving]
    try:
        return _found(model, net, images)
    finally:
        for buffer, old in zip(moving, before, strict=True):
            buffer.copy_(old)


def _found(model: Model, net: nn.Module, images: torch.Tensor) -> Cut:
    calls: dict[str, list[Any]] = {name: [] for name, _ in _constant(net)}
    order: list[str] = []

    def ran(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name].append(output)
            order.append(name)

        return hook

    def trains(module: nn.Module, args: Any) -> None:
        order.append("")

    hooks = [net.get_submodule(name).register_forward_hook(ran(name)) for name in calls]
    hooks += [module.register_forward_pre_hook(trains) for module in _changing(net)]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    beginning = order[: order.index("")] if "" in order else []
    # a layer that runs more than once runs on; what gives no tensor, too
    n = len(images)
    layers = {
        name: tuple(calls[name][0].shape[1:])
        for name in beginning
        if len(calls[name]) == 1 and isinstance(calls[name][0], torch.Tensor) and calls[name][0].shape[0] == n
    }
    while layers:
        name = list(layers)[-1]
        last = calls[name][0]
        channels_last = last.dim() == 4 and last.is_contiguous(memory_format=torch.channels_last)
        cut = Cut(dict(layers), tuple(images.shape[1:]), last.dtype, channels_last)
        if _suffices(model, cut, images):
            return cut
        del layers[name]  # it is in the middle of a block, beside a shortcut, say
    raise NoCutError("no layer in front of what trains holds all that the rest needs")


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

    def blanks(shape: tuple[int, ...]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: blank(shape)

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


def fingerprint(net: nn.Module, cut: Cut) -> str:
    """Hash of all weights on which the outputs depend, in hex."""
    state = net.state_dict(keep_vars=True)
    prefixes = tuple(f"{name}." for name in cut.layers)
    loose = {f"{name}.{key}".lstrip(".") for name, module in _containers(net) for key in module._parameters}
    loose |= {f"{name}.{key}".lstrip(".") for name, module in _containers(net) for key in module._buffers}
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if name.startswith(prefixes) or name in loose:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _suffices(model: Model, cut: Cut, images: torch.Tensor) -> bool:
    """Whether the rest, fed with the outputs alone, computes what the whole does, wherever training may lead it.

    What reaches the head is compared, since the head itself may be all zeros.
    """
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].double())

    hook = model.net.get_submodule(model.head).register_forward_pre_hook(look)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    saved = [p.clone() for p in trained]
    try:
        for p in trained:  # a gain that begins at zero would hide a second way through the network
            p.add_(torch.randn_like(p) * (0.1 * p.std(correction=0) or 0.1))
        torch.manual_seed(0)
        model.net(images)
        torch.manual_seed(1)
        features = outputs(model.net, cut, images)
        torch.manual_seed(0)
        with rest_only(model.net, cut):
            model.net(features)
    except (RuntimeError, ValueError, IndexError):  # the code between the layers wants more than blanks
        return False
    finally:
        hook.remove()
        for p, old in zip(trained, saved, strict=True):
            p.copy_(old)
    whole, rest = seen
    return bool((whole - rest).abs().max() <= TOLERANCE * whole.abs().max())


def _containers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have others inside."""
    return ((name, module) for name, module in net.named_modules() if next(module.children(), None) is not None)


def _constant(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules in which nothing trains and nothing is random, by name."""
    for key, module in net.named_children():
        name = f"{prefix}{key}"
        if any(p.requires_grad for p in module.parameters()) or any(_is_random(m) for m in module.modules()):
            yield from _constant(module, f"{name}.")
        else:
            yield name, module


def _changing(net: nn.Module) -> Iterator[nn.Module]:
    """Modules with trained parameters of their own, and layers that draw random numbers."""
    for module in net.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)) or _is_random(module):
            yield module


def _is_random(module: nn.Module) -> bool:
    """Dropout, stochastic depth and their like, where they are switched on."""
    rate = next((getattr(module, key) for key in ("p", "drop_prob", "drop_rate") if hasattr(module, key)), 0)
    leaf = next(module.children(), None) is None
    return leaf and module.training and "drop" in type(module).__name__.lower() and bool(rate)
