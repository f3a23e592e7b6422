"""Options of the network. Imports neither torch nor the rest of tlearn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tlearn.dataconfig import Section


class Attention(Section):
    """Weighs what a block of the backbone gives; changes nothing until it is trained."""

    kind: Literal["spatial", "se", "cbam"]
    """spatial: every position, by a 1x1 convolution; se: every channel (Hu et al. 2018); cbam: both (Woo et al.)."""
    after: str = "last"
    """Name of a module (`layer3`, `blocks.5`), to whose block it belongs then; `last`: the last block."""


class TextHead(Section):
    """The cosine between a projection of an image's features and the features of a text per class."""

    text: str = Field(min_length=1)
    """`open_clip:MODEL/WEIGHTS`, a text tower (`pip install open_clip_torch`; WEIGHTS: a tag or a file), or a .npz file
    that holds `classes` (names), `features` (a row for each) and, if wanted, `scale` (of the cosines)."""
    prompts: list[str] = Field(["a photo of a {}."], min_length=1)
    """For a text tower; `{}` is the class. The features of several are averaged."""
    words: dict[str, str] = Field(default_factory=dict)
    """What a class is called in prompts, where its name does not say it: {n01440764: tench}."""

    @field_validator("prompts")
    @classmethod
    def _have_a_place(cls, prompts: list[str]) -> list[str]:
        if bad := [prompt for prompt in prompts if prompt.count("{}") != 1]:
            raise ValueError(f"{bad[0]!r} has no place for the class; write {{}} once, as in 'a photo of a {{}}.'")
        return prompts

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> TextHead:
        if not self.text.startswith("open_clip:") and (self.words or self.prompts != ["a photo of a {}."]):
            raise ValueError(
                "prompts and words have no effect on a file, whose texts are encoded already; leave them out"
            )
        return self


class Model(Section):
    """The backbone and the weights it starts from."""

    backbone: str = "timm:resnet18"
    """`timm:NAME` or `torchvision:NAME`; a bare name is looked up in timm, then in torchvision. `A + B`: side by side,
    their features joined in front of one head; `parts.0` and `parts.1` in rules."""
    weights: str = "default"
    """`default` or a tag (from the library's hub), a file (.safetensors, .pth), `package:NAME`, the folder of another
    run (its best weights, head included where the classes are the same), or `random`; for several backbones one for
    all, or `A + B`."""
    head: TextHead | None = None
    """Default: a Linear layer that starts at zero."""
    stem: Literal["original", "small_image"] = "original"
    """small_image: the first convolution is 3x3 with stride 1, without max-pooling: for images of 28 to 64 px."""
    attention: Attention | None = None
    """Attention behind a block; for all but the last one, training it costs the way back through what follows."""
    batch_norm: Literal["auto", "frozen", "train"] = "auto"
    """Running statistics of trainable BatchNorm layers; auto: frozen with pretrained weights, else train."""
    sync_batchnorm: bool = False
    """Batch statistics over all processes instead of each its own (accelerators only)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the head (backbones that offer it)."""
