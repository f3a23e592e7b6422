"""A beginning for images of 28 to 64 px: networks made for 224 px halve theirs once or twice before they look."""

from __future__ import annotations

import torch
from timm.layers import Conv2dSame
from torch import nn

from tlearn.errors import TlearnError


@torch.no_grad()
def small_image_stem(net: nn.Module, name: str, blocks: list[list[str]]) -> None:
    """Let the first convolution look at every pixel (3x3, stride 1) and leave out the max-pooling behind it.

    The new kernel is the centre of the old one, over which the sum of what was cut off is spread evenly: of all kernels
    that respond to an image of one colour as the old one did (which is what BatchNorm's statistics and all further
    layers expect) the one nearest to the centre. A factor instead would blow up filters whose centre sums to almost
    nothing, as that of an edge filter does.
    A kernel that is 3x3 is kept.

    Args:
        net: as its library makes it, changed in place.
        name: for errors.
        blocks: parameter names, shallow to deep; the first one is the stem.

    Raises:
        TlearnError: a first convolution that has stride 1 already, or that cuts the image into patches.
    """
    convolutions = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or len(blocks) < 2:
        raise TlearnError(f"model.stem: small_image: {name} has no stem that could be told from its blocks")
    where, old = convolutions[0]
    kernel, stride = old.kernel_size, old.stride
    if max(stride) == 1:
        raise TlearnError(f"model.stem: small_image: {name} looks at every pixel already; use model.stem=original")
    plain = type(old) in (nn.Conv2d, Conv2dSame)
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or kernel[0] <= stride[0] or (kernel[0] > 3 and not plain):
        raise TlearnError(
            f"model.stem: small_image: the first layer of {name} ({kernel[0]}x{kernel[1]}, stride {stride[0]}) cannot "
            "become 3x3 with stride 1: it cuts the image into patches, or normalises its kernel; choose a ResNet, "
            "DenseNet, EfficientNet or MobileNet, or model.stem=original"
        )
    if kernel[0] == 3:
        old.stride = (1, 1)
    else:
        net.set_submodule(where, _centre(old))
    modules = list(net.named_modules())
    behind = next((i for i, (n, m) in enumerate(modules) if _in_a_block(n, m, blocks[0])), len(modules))
    for n, module in modules[:behind]:
        if isinstance(module, nn.MaxPool2d):
            net.set_submodule(n, nn.Identity())


def _centre(old: nn.Conv2d) -> nn.Conv2d:
    new = nn.Conv2d(
        old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None, device=old.weight.device
    )
    edge = (old.kernel_size[0] - 3) // 2
    centre = old.weight[:, :, edge : edge + 3, edge : edge + 3]
    lost = old.weight.sum((2, 3), keepdim=True) - centre.sum((2, 3), keepdim=True)
    new.weight.copy_(centre + lost / 9)
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias)
    return new


def _in_a_block(name: str, module: nn.Module, stem: list[str]) -> bool:
    return any(f"{name}.{own}".lstrip(".") not in stem for own, _ in module.named_parameters(recurse=False))
