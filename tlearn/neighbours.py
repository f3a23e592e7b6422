"""Candidates for `tlearn search` where nobody has named any: the plan for these images, and what lies around it."""

from __future__ import annotations

from typing import Any

from tlearn.auto import make_plan, recipe_of
from tlearn.config import Config
from tlearn.configfile import given_options
from tlearn.console import show
from tlearn.models.reach import hub_has, installed_packages
from tlearn.planner import ALL, BACKBONES, FAST_HEAD, HEAD, LAST, Options, Part, stages_of
from tlearn.tables import plan_table

STRATEGIES: dict[str, tuple[Part, ...]] = {
    "head": (HEAD,),
    "last_block": (FAST_HEAD, LAST),
    "all": (FAST_HEAD, ALL),
    "step_by_step": (FAST_HEAD, LAST, ALL),
}
RATES = {"rate_x3": 3.0, "rate_div3": 1 / 3}
"""Of the plan's own stages, times this."""
OTHER_BACKBONES = 3
"""At most."""


def neighbours(config: Config) -> dict[str, Options]:
    """Candidates by name, the plan itself first. What the user has set stays in all of them.

    Takes a process of its own, for the probe.

    Raises:
        TlearnError: as `tlearn plan`.
    """
    plan = make_plan(config)
    show(plan_table(plan))
    planned, given = recipe_of(config, plan), given_options(config)
    stages = planned["stages"]
    rules = [stage["train"] for stage in stages]
    # nothing is preserved by freezing layers that are random
    may_freeze = "stages" in plan.options and planned.get("model", {}).get("weights") != "random"
    strategies = STRATEGIES if may_freeze else {}
    same = [name for name, parts in strategies.items() if [part.train for part in parts] == rules]
    name = same[0] if same else "plan"
    found = {name: planned}
    epochs = sum(stage["epochs"] for stage in stages)
    for other, parts in strategies.items():
        if other != name and len(parts) <= epochs:
            found[other] = planned | {"stages": stages_of(parts, epochs, given)}
    if "stages" in plan.options and "optimizer" not in given:
        for word, factor in RATES.items():
            found[f"{name}_{word}"] = planned | {"stages": [_at_rate(stage, factor) for stage in stages]}
    if "backbone" in plan.options.get("model", {}) and "weights" not in given.get("model", {}):
        for model in _other_models(plan.options["model"]["backbone"])[:OTHER_BACKBONES]:
            short = model["backbone"].removeprefix("timm:")
            found[f"{name}_{short}"] = planned | {"model": planned["model"] | {"weights": "default"} | model}
    return found


def _at_rate(stage: dict[str, Any], factor: float) -> Options:
    optimizer = stage["optimizer"]
    return stage | {"optimizer": optimizer | {"lr": float(f"{optimizer['lr'] * factor:.2g}")}}


def _other_models(planned: str) -> list[dict[str, str]]:
    """Backbones whose weights can be had here, as options, those of the planner's table first."""
    known = dict.fromkeys(row.backbone for row in BACKBONES if row.device_gib == 0)
    models = [{"backbone": name} for name in known if name != planned and hub_has(name)]
    packages = [{"backbone": name, "weights": weights} for name, weights in installed_packages().items()]
    return [*models, *(model for model in packages if model["backbone"] != planned)]
