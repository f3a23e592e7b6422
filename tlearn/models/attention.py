"""Attention behind a block of a pretrained network, which changes nothing before it is trained.

All three kinds weigh what a block gives by sigmoids. Here these are doubled, and what is in front of them starts at
zero: then every weight is 1 at first, to the bit, and can go down to 0 or up to 2. A gain that starts at zero would be
one more parameter, and the only one to learn anything in the first step.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import SqueezeExcite
from timm.layers.cbam import CbamModule
from torch import nn

from tlearn.errors import TlearnError


class Gate(nn.Module):
    """1 at 0, between 0 and 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return 2 * x.sigmoid()


class Spatial(nn.Module):
    """A weight for every position: a 1x1 convolution and a sigmoid."""

    def __init__(self, channels: int, gate_layer: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)
        self.gate = gate_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same shape."""
        weighed: torch.Tensor = x * self.gate(self.conv(x))
        return weighed


KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "spatial": (Spatial, ("conv.weight", "conv.bias")),
    "se": (SqueezeExcite, ("fc2.weight", "fc2.bias")),
    # the norm layer behind its convolution would divide by nothing, were the convolution zero
    "cbam": (CbamModule, ("channel.fc2.weight", "spatial.conv.bn.weight")),
}
"""Makers, and the parameters that are zero at first. Hu et al. 2018, "Squeeze-and-Excitation Networks"; Woo et al.
2018, "CBAM: Convolutional Block Attention Module"."""


class Attention(nn.Module):
    """One of the kinds, for maps or for tokens.

    Args:
        kind: one of `KINDS`.
        channels: of what the block gives.
        last: whether the channels are its last dimension: (B, H, W, C), or tokens (B, N, C).
    """

    def __init__(self, kind: str, channels: int, last: bool) -> None:
        super().__init__()
        make, zero = KINDS[kind]
        self.weigh: nn.Module = make(channels, gate_layer=Gate)
        self.last = last
        for name in zero:
            nn.init.zeros_(self.weigh.get_parameter(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the block gives, weighed."""
        weighed: torch.Tensor
        if not self.last:
            weighed = self.weigh(x)
            return weighed
        maps = x.movedim(-1, 1)
        weighed = self.weigh(maps.reshape(*maps.shape[:3], -1)).reshape(maps.shape)
        return weighed.movedim(1, -1)


def add_attention(
    net: nn.Module, kind: str, after: str, head: str, blocks: Sequence[Sequence[str]], size_px: int
) -> list[list[str]]:
    """Put attention behind a module: it becomes `AFTER.block`, and `AFTER.attention` follows.

    Args:
        net: changed in place.
        kind: one of `KINDS`.
        after: the module's name, or `last`: that of the last of `blocks`.
        head: name of the Linear that gives the logits.
        blocks: parameter names, shallow to deep.
        size_px: of images that the network takes.

    Returns:
        The blocks as they are now: attention belongs to the block it follows.

    Raises:
        TlearnError: no such module, or one that gives neither maps nor tokens.
    """
    name = _last_module(blocks) if after == "last" else after
    modules = dict(net.named_modules())
    if name not in modules:
        close = difflib.get_close_matches(name, list(modules), n=3) or [_last_module(blocks)]
        raise TlearnError(f"model.attention.after: no module {name!r}; there are, for instance: {', '.join(close)}")
    if f"{head}.".startswith(f"{name}.") or not name:
        raise TlearnError(f"model.attention.after: {name!r} holds the head; name a block in front of it")
    shape = _shape(net, modules[name], size_px)
    if shape is None or len(shape) not in (3, 4):
        what = "is no layer that runs once and gives a tensor" if shape is None else f"gives {shape}: no map, no tokens"
        raise TlearnError(f"model.attention.after: {name} {what}; name a block, {_last_module(blocks)} say")
    if kind == "cbam" and len(shape) == 3:
        raise TlearnError(f"model.attention.kind: cbam needs a map, and {name} gives tokens; use se or spatial")
    # images are square, so that the side which is unlike the others is the channels
    last = len(shape) == 3 or (shape[1] == shape[2] and shape[2] != shape[3])
    attention = Attention(kind, shape[-1] if last else shape[1], last)
    net.set_submodule(name, nn.Sequential(OrderedDict(block=modules[name], attention=attention)))
    number = {parameter: i for i, block in enumerate(blocks) for parameter in block}
    extended: list[list[str]] = [[] for _ in blocks]
    current = 0
    for parameter, _ in net.named_parameters():
        if not parameter.startswith(f"{head}."):
            before = parameter.replace(f"{name}.block.", f"{name}.", 1)
            current = number.get(before if parameter.startswith(f"{name}.block.") else parameter, current)
            extended[current].append(parameter)
    return extended


def check_attention(net: nn.Module, plan: Sequence[Mapping[str, float]]) -> None:
    """That some stage trains it, since it does nothing before.

    Args:
        net: with attention or without.
        plan: a rate for every parameter, per stage.

    Raises:
        TlearnError: none does.
    """
    for name, module in net.named_modules():
        if isinstance(module, Attention) and not any(
            rates[f"{name}.{inner}"] for rates in plan for inner, _ in module.named_parameters()
        ):
            raise TlearnError(
                f"model.attention: has no effect: no stage trains {name}, which starts as the identity; it belongs to "
                f'the block in front of it (`last:N`), or give it a rule: ["{name}", 1.0] behind head'
            )


def _last_module(blocks: Sequence[Sequence[str]]) -> str:
    """The outermost module that holds the beginning of the last block and nothing of the others."""
    others = [name for block in blocks[:-1] for name in block]
    parts = blocks[-1][0].split(".")
    prefixes = [".".join(parts[:i]) for i in range(1, len(parts))]
    return next(p for p in prefixes if not any(name.startswith(f"{p}.") for name in others))


def _shape(net: nn.Module, block: nn.Module, size_px: int) -> tuple[int, ...] | None:
    """Of what a module gives for one image; None: no tensor, or it never runs, or not once."""
    seen: list[Any] = []
    hook = block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    like = next(net.parameters())
    net.eval()
    try:
        with torch.no_grad():
            net(torch.zeros(1, 3, size_px, size_px, dtype=like.dtype, device=like.device))
    finally:
        hook.remove()
    return tuple(seen[0].shape) if len(seen) == 1 and isinstance(seen[0], torch.Tensor) else None
