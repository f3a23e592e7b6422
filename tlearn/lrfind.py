"""`tlearn lr-find`: the rate-range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", 3.3).

A few steps of training in which the rate grows by the same factor from step to step; the loss falls, then explodes.
FOLDER/lr-find.json   every rate and loss, the suggestions, the options that apply them
FOLDER/lr-find.png    the curves
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tlearn.checkpoint import Progress
from tlearn.config import Config, Stage
from tlearn.configfile import as_overrides
from tlearn.console import progress_bar, show
from tlearn.engine import Run, Shell, fitting_share, train_step
from tlearn.errors import TlearnError
from tlearn.files import new_run, write_json
from tlearn.folder import RunFolder
from tlearn.models.build import ATTACHED, Model
from tlearn.optim import build_optimizer, set_learning_rates
from tlearn.ratecurve import DIVERGED, Curve, Span, draw, smooth, suggest
from tlearn.replicas import warm_up
from tlearn.run import assembled, make_run
from tlearn.runtime import Runtime
from tlearn.stages import filled, resolve

Multipliers = Mapping[str, float]
Row = dict[str, Any]

_FILES = ("lr-find.json", "lr-find.png")


def lr_find(run: Run, stage: Stage, multipliers: Multipliers, span: Span | None = None) -> Curve:
    """Train as a stage would from where the model is, at growing rates; afterwards everything is as it was before.

    Args:
        run: weights, BatchNorm statistics, what is frozen, modes, loss scale, progress and torch's generators are
            restored, bit for bit.
        stage: filled in; its optimizer starts afresh.
        multipliers: of every parameter; 0 freezes it.
        span: of the rates that parameters of multiplier 1 get.

    Raises:
        TlearnError: a trainable parameter without gradient.
    """
    rates = (span or Span()).rates()
    losses: list[float] = []
    smoothed: list[float] = []
    with (
        _restored(run),
        progress_bar(stage.name, len(rates)) as advance,
        closing(_steps(run, stage, multipliers, rates)) as steps,
    ):
        for loss in steps:
            advance(note=f"loss {loss:.3f}")
            losses.append(loss)
            if not math.isfinite(loss):
                break
            smoothed = smooth(losses)
            if smoothed[-1] > DIVERGED * min(smoothed):
                break
    return Curve(rates[: len(losses)], losses, smoothed)


def _steps(run: Run, stage: Stage, multipliers: Multipliers, rates: Sequence[float]) -> Generator[float]:
    """Take a training step at each of these rates; the loss of each, before it was taken."""
    assert stage.optimizer is not None
    run = replace(run, progress=Progress())
    runtime, model, inputs = run.runtime, run.model, run.images(stage)
    model.set_trainable(multipliers)
    optimizer = build_optimizer(stage.optimizer, model.net, multipliers)
    try:
        shell, stepper = runtime.prepare(Shell(run.objective), optimizer)
        model.net.eval()  # the next two lines must not move statistics
        share = fitting_share(run, shell, optimizer, stage.name, inputs) if run.config.batch.find else run.share
        warm_up(runtime, shell, optimizer, inputs.blank(1))
        statistics = model.moving_statistics
        model.train()
        with inputs.train(share).steps(0, len(rates)) as batches:
            for step, (rate, micro_batches) in enumerate(zip(rates, batches, strict=True)):
                run.progress.step = step
                set_learning_rates(optimizer, rate)
                sums = train_step(run, shell, optimizer, stepper, statistics, micro_batches)
                yield float(sums[0]) / run.objective.weight(micro_batches[0].global_labels)
    finally:
        runtime.accelerator.free_memory()


@contextmanager
def _restored(run: Run) -> Iterator[None]:
    """Afterwards the model, what of it trains, the loss scale and torch's generators are as they were."""
    net, runtime = run.model.net, run.runtime
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trains = {name: float(parameter.requires_grad) for name, parameter in net.named_parameters()}
    modes = {module: module.training for module in net.modules()}
    scale, device = runtime.scaler_state(), runtime.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        try:
            yield
        finally:
            net.load_state_dict(state)
            run.model.set_trainable(trains)
            for module, mode in modes.items():
                module.training = mode
            runtime.load_scaler(scale)


class Group(NamedTuple):
    """Parameters that have one rate, but for `layer_decay`."""

    name: str
    multiplier: float
    """Of the stage's rule."""
    relative: dict[str, float]
    """By parameter: its multiplier over the rule's."""


def groups(model: Model, stage: Stage, multipliers: Multipliers) -> list[Group]:
    """What a stage trains: the head (with layers that an objective adds), and the backbone, a group per multiplier."""
    own = [name for name in multipliers if not name.startswith(f"{ATTACHED}.")]
    rules = resolve(stage.model_copy(update={"layer_decay": None}), own, model.head, model.blocks)
    head, found = _head(model), dict[str, list[str]]()
    for name, multiplier in multipliers.items():
        if multiplier > 0:
            found.setdefault("head" if name in head else f"backbone x{rules[name]:g}", []).append(name)
    parts = []
    for group, members in found.items():
        most = max(rules.get(name, 1.0) for name in members)  # rules may tell parts of a head apart
        parts.append(Group(group, most, {name: multipliers[name] / most for name in members}))
    return sorted(parts, key=lambda group: group.name != "head")


def _head(model: Model) -> dict[str, float]:
    """Its parameters and those beside the network, each with multiplier 1."""
    prefixes = (f"{model.head}.", f"{ATTACHED}.")
    return {name: 1.0 for name, _ in model.net.named_parameters() if name.startswith(prefixes)}


class Trial(NamedTuple):
    """A test to make."""

    stage: int
    trains: str
    is_whole: bool
    """Whether that is all that the stage trains, so that it names a value for `optimizer.lr`."""
    multiplier: float
    """The rate that grows, over `optimizer.lr`."""
    relative: dict[str, float]
    """Of the parameters that train: their rates over the one that grows."""
    behind_head: bool
    """Whether the head is trained first. A new head is zero, through which the backbone gets no gradient."""


def trials(model: Model, stages: Sequence[Stage], plan: Sequence[Multipliers]) -> list[Trial]:
    """For every stage a test of all that it trains with its multipliers, and one of each group alone."""
    found = []
    for i, (stage, multipliers) in enumerate(zip(stages, plan, strict=True)):
        parts = groups(model, stage, multipliers)
        if len(parts) > 1:
            found.append(Trial(i, "all", True, 1.0, {n: m for n, m in multipliers.items() if m > 0}, i > 0))
        for name, multiplier, relative in parts:
            found.append(Trial(i, name, len(parts) == 1, multiplier, relative, name != "head"))
    return found


def find_rates(
    config: Config, stage: str | None = None, folder: Path | None = None, span: Span | None = None
) -> dict[str, Any]:
    """Test the rates of a recipe's stages, write the curves and what they suggest.

    Nothing of the stages before is trained but the head: for the first stage's test the model is as a run finds it,
    for the others its head has been trained for `span.steps` steps at the rate that its own test suggests.

    Args:
        config: of the run.
        stage: its name; None: every one.
        folder: for the two files; default: `runs/<time>-lr-find`.
        span: of the rates.

    Returns:
        What lr-find.json holds.

    Raises:
        TlearnError: bad input or configuration; nothing was written.
    """
    span = span or Span()
    if not span.start < span.end:
        raise TlearnError(f"--start {span.start:g}: is not below --end {span.end:g}")
    names = [each.name for each in filled(config)]
    if stage not in (None, *names):
        raise TlearnError(f"--stage {stage}: no such stage; there are {', '.join(names)}")
    folder = folder or new_run("lr-find")
    if folder.exists() and (not folder.is_dir() or any(path.name not in _FILES for path in folder.iterdir())):
        raise TlearnError(f"{folder}: holds something else; choose another --out")
    runtime = Runtime()
    if runtime.world_size > 1:
        raise TlearnError("lr-find runs in one process: start it without a launcher")
    parts = assembled(config, runtime, config.precision)
    run = make_run(parts, runtime, RunFolder(folder), None, Progress(), active=False)
    todo = [t for t in trials(run.model, parts.stages, parts.plan) if stage in (None, names[t.stage])]
    curves = _curves(run, parts.stages, todo, span)
    rows = [_row(run, parts.stages[t.stage], t, curve) for t, curve in zip(todo, curves, strict=True)]
    report = {
        "folder": str(folder),
        "date": time.strftime("%Y-%m-%d"),
        "backbone": run.model.backbone,
        "weights": run.model.weights,
        "batch_size": run.config.batch.size,
        "precision": runtime.precision,
        "device": runtime.device.type,
        **span._asdict(),
        "tests": rows,
        "options": _options(config, [(t.stage, row) for t, row in zip(todo, rows, strict=True) if t.is_whole]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _FILES[0], report)
    draw(rows, folder / _FILES[1])
    return report


def _curves(run: Run, stages: Sequence[Stage], todo: Sequence[Trial], span: Span) -> list[Curve]:
    """Of every test; those that would be the same are made once."""
    made: dict[Any, Curve] = {}
    frozen = {name: 0.0 for name, _ in run.model.net.named_parameters()}

    def curve(trial: Trial) -> Curve:
        stage = stages[trial.stage]
        assert stage.optimizer is not None
        optimizer = stage.optimizer.model_dump(exclude={"lr"})
        key = (*optimizer.items(), stage.image_size, stage.views, *trial.relative.items(), trial.behind_head)
        if key not in made:
            show(f"lr-find   stage {stage.name}: {trial.trains}")
            made[key] = lr_find(run, stage, frozen | trial.relative, span)
        return made[key]

    found = {i: curve(trial) for i, trial in enumerate(todo) if not trial.behind_head}
    if len(found) < len(todo):
        first, head = stages[0], _head(run.model)
        assert first.optimizer is not None
        rate = suggest(curve(Trial(0, "head", False, 1.0, head, False))).rate or first.optimizer.lr
        show(f"lr-find   the head is trained for {span.steps} steps at {rate:g}, for what needs one")
        with _restored(run):
            for _ in _steps(run, first, frozen | head, [rate] * span.steps):
                pass
            found |= {i: curve(trial) for i, trial in enumerate(todo) if trial.behind_head}
    return [found[i] for i in range(len(todo))]


def _row(run: Run, stage: Stage, trial: Trial, curve: Curve) -> Row:
    assert stage.optimizer is not None
    suggestion = suggest(curve)
    sizes = {name: parameter.numel() for name, parameter in run.model.net.named_parameters()}
    return {
        "stage": stage.name,
        "trains": trial.trains,
        "parameters": sum(sizes[name] for name in trial.relative),
        "head": "trained" if trial.behind_head else "new",
        "optimizer": stage.optimizer.name,
        "lr": stage.optimizer.lr * trial.multiplier,
        "multiplier": trial.multiplier,
        "suggestion": suggestion.rate,
        "why_not": suggestion.why_not,
        "others": suggestion.others,
        "rates": curve.rates,
        "losses": [loss if math.isfinite(loss) else None for loss in curve.losses],
        "smoothed": curve.smoothed,
    }


def _options(config: Config, whole: Sequence[tuple[int, Row]]) -> list[str]:
    """`a.b=c`; stages that share `optimizer.lr` get the smallest of their rates."""
    chosen: dict[str, float] = {}
    for i, row in whole:
        if row["suggestion"] is not None:
            own = config.stages is not None and config.stages[i].optimizer is not None
            key = f"stages.{i}.optimizer.lr" if own else "optimizer.lr"
            chosen[key] = min(chosen.get(key, math.inf), float(f"{row['suggestion'] / row['multiplier']:.2g}"))
    return as_overrides(chosen)
