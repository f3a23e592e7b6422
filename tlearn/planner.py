"""From measured facts to a recipe: the rules of `tlearn plan` and `strategy: auto`, as tables. No torch.

A row says for which facts it stands; the first row that stands is taken. So a rule is corrected by changing a number
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

Need = Literal["any", "speed", "detail"]
Options = dict[str, Any]
"""Nested, as YAML has them: what `tlearn train` takes."""


@dataclass(frozen=True)
class Facts:
    """What a plan rests on."""

    train: int
    """Train images."""
    val: int
    classes: int
    smallest_class: int
    """Train images of the class with the fewest."""
    largest_class: int
    side_px: int
    """Median width or median height of the train images, whichever is smaller."""
    cores: int
    memory_gib: float
    """Of this machine."""
    device: str
    """cpu, cuda, ..."""
    devices: int
    device_gib: float
    """Memory of one device; 0 without one."""
    processes: int = 1
    need: Need = "any"
    probe_top1: float | None = None
    """Val top-1 of a linear probe; None: none was made."""
    probe_majority: float = 0.0
    """Share of the largest class among the images on which the probe was scored."""
    probe_px: int = 0
    random_weights: bool = False

    @property
    def gain(self) -> float | None:
        """Share of what the majority class gets wrong that the probe gets right: 1 is perfect, 0 no better."""
        if self.probe_top1 is None:
            return None
        return (self.probe_top1 - self.probe_majority) / max(1 - self.probe_majority, 1e-9)


class Reason(NamedTuple):
    """One row of a plan."""

    option: str
    value: str
    why: str


class Plan(NamedTuple):
    """Options to train with, and why."""

    options: Options
    reasons: list[Reason]


FAR = 0.3
"""Of `Facts.gain`: below it the images are unlike those of the pretraining, whose features hardly tell the classes
apart. A rule of thumb: measured with EfficientNet-Lite0 were 0.74 on cut-outs, where the features do well."""


class BackboneRow(NamedTuple):
    """A network for so many train images."""

    backbone: str
    need: Need
    below: float
    """Train images."""
    device_gib: float
    """Memory that a device must have; 0: a CPU will do."""
    why: str


# Not measured here, where only the weights of EfficientNet-Lite can be had: rules of thumb.
BACKBONES = (
    BackboneRow("timm:mobilenetv3_large_100", "speed", inf, 0, "little time per image was asked for"),
    BackboneRow("timm:efficientnet_b0", "speed", inf, 0, "little time per image was asked for"),
    BackboneRow("timm:resnet50", "detail", inf, 0, "fine detail was asked for: ResNets keep large maps for long"),
    BackboneRow("timm:densenet121", "detail", inf, 0, "fine detail was asked for: dense connections keep it"),
    BackboneRow("timm:resnet18", "any", 1_000, 0, "below 1,000 images a small network is enough"),
    BackboneRow("timm:efficientnet_b0", "any", 5_000, 0, "1,000 to 5,000 images"),
    BackboneRow("timm:vit_base_patch16_224", "any", inf, 40, "from 5,000 images a ViT pays, and the device has room"),
    BackboneRow("timm:vit_small_patch16_224", "any", inf, 8, "from 5,000 images a ViT pays, and the device has room"),
    BackboneRow("timm:efficientnet_b0", "any", inf, 0, "many images, but no device on which a ViT would pay"),
)


class Part(NamedTuple):
    """A stage but for its length."""

    name: str
    train: list[list[Any]]
    lr: float
    """Of Adam."""
    views: int | None = None
    """Versions of an image that frozen layers see: so they run once for each, and not in every epoch."""
    layer_decay: float | None = None


HEAD = Part("head", [["head", 1.0], [".*", 0.0]], 1e-3, 4)
FAST_HEAD = HEAD._replace(lr=3e-3)
"""Where later stages go on from it."""
LAST = Part("last_block", [["head", 1.0], ["last:1", 0.1], [".*", 0.0]], 1e-3, 4)
ALL = Part("all", [["head", 1.0], [".*", 0.1]], 1e-3)
FALLING = ALL._replace(layer_decay=0.75)
"""Deep layers faster than shallow ones, as ViTs are tuned (Bao et al. 2022)."""
RANDOM = Part("all", [[".*", 1.0]], 1e-3)


class StageRow(NamedTuple):
    """What trains, for so many train images and so much gain of the probe."""

    below: float
    """Train images."""
    gain: float
    """Largest gain of the probe."""
    parts: tuple[Part, ...]
    epochs: int
    why: str


# Below 1,000 images: on 257 cut-outs all recipes were within noise (81.4 to 84.3 %, standard error 4), the head at 1e-3
# among the best and the cheapest (benchmarks/strategies.py, table in README.md). Other rows: rules of thumb.
STAGES = (
    StageRow(
        1_000, FAR, (FAST_HEAD, LAST, ALL), 24, "few images, but unlike the pretraining: unfreeze all, step by step"
    ),
    StageRow(1_000, inf, (HEAD,), 12, "few images, and the features fit: only the head, at a small rate"),
    StageRow(5_000, FAR, (FAST_HEAD, ALL), 15, "unlike the pretraining: all layers"),
    StageRow(5_000, inf, (FAST_HEAD, LAST), 12, "a few thousand images, and the features fit: head and last block"),
    StageRow(inf, FAR, (FAST_HEAD, ALL), 10, "unlike the pretraining: all layers alike"),
    StageRow(inf, inf, (FAST_HEAD, FALLING), 10, "enough images to tune all layers, shallow ones the least"),
)


class SizeRow(NamedTuple):
    """Largest side of the square that the network sees, px."""

    on_cpu: bool
    size_px: int
    why: str


SIZES = (
    SizeRow(True, 128, "on a CPU: 224 px would be 3 times as many pixels"),
    SizeRow(False, 224, "the size most weights were trained for"),
)
SMALLEST_PX, STEP_PX = 64, 32


class BatchRow(NamedTuple):
    """Images per optimizer step."""

    below: float
    """Train images."""
    device_gib: float
    size: int
    why: str


BATCHES = (
    BatchRow(200, 0, 16, "so few images that larger batches would leave too few steps"),
    BatchRow(5_000, 0, 32, "enough for a steady gradient"),
    BatchRow(inf, 8, 128, "many images on a device with room"),
    BatchRow(inf, 0, 64, "many images"),
)
LITTLE_MEMORY_GIB, MICRO = 4.0, 8
MOST_WORKERS = 8
"""Loader processes per device."""
IMBALANCED = 10.0
"""Images of the largest class over those of the smallest."""


def backbones(facts: Facts) -> list[BackboneRow]:
    """Networks that would do, the best first; the caller takes the first whose weights can be had."""
    return [
        row
        for row in BACKBONES
        if row.need == facts.need and facts.train < row.below and facts.device_gib >= row.device_gib
    ]


def choose(facts: Facts, given: Options) -> Plan:
    """All but the backbone, which had to be chosen for the probe.

    Args:
        facts: measured.
        given: options that the user has set; the plan is made around them, and holds none of them.
    """
    options: Options = {}
    reasons: list[Reason] = []
    parts = [] if given.get("stages") else [_stages(facts, given)]
    rest = (_image_size, _colours, _batch, _loader, _balance)
    for chosen, why in [*parts, *(rule(facts) for rule in rest)]:
        for reason in why:
            if _is_given(reason.option, given) or _clashes(reason.option, given):
                continue
            section, _, name = reason.option.partition(".")
            if name:
                options.setdefault(section, {})[name] = chosen[name]
            else:
                options[section] = chosen[section]
            reasons.append(reason)
    return Plan(options, reasons)


def _is_given(option: str, given: Options) -> bool:
    section, _, name = option.partition(".")
    return name in given.get(section, {}) if name else section in given


def _clashes(option: str, given: Options) -> bool:
    """With what was given, though it is another option."""
    if option == "objective.class_weight":
        return bool(given.get("data", {}).get("sampling") == "balanced")
    return option == "batch.find" and bool(given.get("objective", {}).get("name") == "domain_adversarial")


def size_of(facts: Facts) -> tuple[int, str]:
    """Image size, px, and why."""
    row = next(row for row in SIZES if row.on_cpu == (facts.device == "cpu"))
    enough = max(SMALLEST_PX, -(-facts.side_px // STEP_PX) * STEP_PX)
    if enough < row.size_px:
        return enough, f"the median image has {facts.side_px} px: more would show nothing new"
    return row.size_px, f"{row.why} (median image {facts.side_px} px)"


def distance(facts: Facts) -> str:
    """How far the images are from those of the pretraining, in words and numbers."""
    if facts.probe_top1 is None or facts.gain is None:
        return "no probe was made"
    words = "unlike the pretraining" if facts.gain < FAR else "like enough to the pretraining"
    return (
        f"{words}: the probe gets {facts.probe_top1:.1%}, the largest class alone {facts.probe_majority:.1%} "
        f"({facts.gain:.0%} of the way to all)"
    )


def share_out(epochs: int, parts: int) -> list[int]:
    """Epochs per stage: as even as can be, earlier stages the longer ones."""
    return [epochs // parts + (i < epochs % parts) for i in range(parts)]


def stages_of(parts: Sequence[Part], epochs: int, given: Options) -> list[Options]:
    """Parts with lengths: as options, but for those that the user has set for all stages."""
    parts = parts[-epochs:]
    stages = []
    for part, length in zip(parts, share_out(epochs, len(parts)), strict=True):
        stage: Options = {"name": part.name, "epochs": length, "train": part.train}
        if "optimizer" not in given:
            stage["optimizer"] = {"name": "adam", "lr": part.lr}
        if part.views is not None and "views" not in given.get("data", {}).get("augment", {}):
            stage["views"] = part.views
        if part.layer_decay is not None and "layer_decay" not in given:
            stage["layer_decay"] = part.layer_decay
        stages.append(stage)
    return stages


def _stages(facts: Facts, given: Options) -> tuple[Options, list[Reason]]:
    if facts.random_weights:
        row = StageRow(inf, inf, (RANDOM,), 24, "random weights: there is nothing to preserve")
    else:
        gain = 1.0 if facts.gain is None else facts.gain
        row = next(row for row in STAGES if facts.train < row.below and gain < row.gain)
    stages = stages_of(row.parts, given.get("epochs", row.epochs), given)
    value = ", ".join(f"{stage['name']} {stage['epochs']}" for stage in stages)
    return {"stages": stages}, [Reason("stages", f"{value} epochs", f"{row.why} ({facts.train:,} images)")]


def _image_size(facts: Facts) -> tuple[Options, list[Reason]]:
    size_px, why = size_of(facts)
    return {"image_size": size_px}, [Reason("data.image_size", f"{size_px} px", why)]


def _colours(facts: Facts) -> tuple[Options, list[Reason]]:
    if facts.random_weights or facts.gain is None or facts.gain >= FAR:
        return {}, []
    why = "unlike the pretraining: the mean and deviation of these images, not of photographs"
    return {"normalise": "own"}, [Reason("data.normalise", "own", why)]


def _batch(facts: Facts) -> tuple[Options, list[Reason]]:
    row = next(row for row in BATCHES if facts.train < row.below and facts.device_gib >= row.device_gib)
    size = max(min(row.size, facts.train), facts.processes)
    chosen: Options = {"size": size}
    reasons = [Reason("batch.size", str(size), f"{row.why}: {-(-facts.train // size)} steps an epoch")]
    if facts.device != "cpu":
        chosen["find"] = True
        why = f"{facts.device_gib:.0f} GiB a device; the batch is cut in parts where it does not fit"
        reasons.append(Reason("batch.find", "true", why))
    elif facts.memory_gib < LITTLE_MEMORY_GIB:
        chosen["micro"] = MICRO
        reasons.append(Reason("batch.micro", str(MICRO), f"this machine has {facts.memory_gib:.1f} GiB of memory only"))
    return chosen, reasons


def _loader(facts: Facts) -> tuple[Options, list[Reason]]:
    if facts.device == "cpu":
        return {}, []
    workers = max(1, min(MOST_WORKERS, facts.cores // max(facts.devices, facts.processes, 1)))
    why = f"{facts.cores} cores for {max(facts.devices, 1)} devices that wait for images"
    return {"workers": workers}, [Reason("data.workers", str(workers), why)]


def _balance(facts: Facts) -> tuple[Options, list[Reason]]:
    if facts.largest_class < IMBALANCED * facts.smallest_class:
        return {}, []
    why = f"{facts.smallest_class:,} to {facts.largest_class:,} images a class: small ones would count for little"
    return {"class_weight": "inverse"}, [Reason("objective.class_weight", "inverse", why)]
