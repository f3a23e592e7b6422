"""From a config to a finished run: the straight line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tlearn import checkpoint
from tlearn.auto import decided
from tlearn.checkpoint import Progress
from tlearn.config import Config, Stage
from tlearn.console import note, show
from tlearn.data.loader import Share
from tlearn.data.source import Source, open_source
from tlearn.engine import Run, number, run_stage
from tlearn.errors import StoppedBySignalError, TlearnError
from tlearn.evaluate import evaluate
from tlearn.features import Features, check_features
from tlearn.files import write_json
from tlearn.folder import Resume, RunFolder
from tlearn.models.attention import check_attention
from tlearn.models.backbones import full_name
from tlearn.models.build import ATTACHED, Card, Model, build_model
from tlearn.models.text import text_features
from tlearn.models.weights import check_weights
from tlearn.objectives import Objective, build_objective
from tlearn.precision import choose_precision
from tlearn.runtime import Runtime
from tlearn.saver import Saver
from tlearn.signals import handled_by
from tlearn.stages import expand, filled, resolve
from tlearn.tables import plan_table, show_result, show_stages
from tlearn.tracking import Tracker


def train(
    config: Config, folder: str | Path | None = None, resume: Resume = "auto", override: bool = False
) -> dict[str, Any]:
    """Train, evaluate, write a run folder. Alone, or as one of several processes.

    Args:
        config: the run, from `load_config`.
        folder: where the run lives; default: `runs/<time>-<strategy>`.
        resume: auto: go on where the folder's checkpoints end, if there are any; must: fail if there are none;
            never: fail if the folder holds a run.
        override: go on with options that differ from those the run began with, where that is safe.

    Returns:
        What result.json holds.

    Raises:
        TlearnError: bad input or configuration; nothing was written.
        StoppedBySignalError: a signal came; everything is saved.
    """
    runtime = Runtime()
    place = runtime.on_main(lambda: RunFolder.named(folder, config))
    with closing(place):
        found = runtime.on_main(lambda: place.newest_checkpoint(resume))
        config, made = decided(config, place, runtime)
        card = runtime.on_main(lambda: place.recorded_model(config, found))
        wanted = runtime.on_main(lambda: place.precision_of(config))
        parts = assembled(config, runtime, wanted, card)
        asked, config, source, model = config.model.weights, parts.config, parts.source, parts.model
        stages, plan = parts.stages, parts.plan
        same = source.fingerprint, parts.objective.rests_on
        changes = runtime.on_main(lambda: place.changes(found, config, *same, override=override))

        restored = checkpoint.load(found) if found else None
        progress = restored.progress if restored else Progress(data_fingerprint=same[0], rests_on=same[1])
        progress.config = config.model_dump(mode="json")
        progress.overridden += [f"from step {progress.step}: {change}" for change in changes]
        if restored:
            best = progress.best
            progress.best = runtime.on_main(lambda: checkpoint.mended_best(place.checkpoints, place.best.parent, best))
            model.net.load_state_dict(restored.model)
        model.net.to(runtime.device)
        environment = runtime.environment() | {"precision_measured": parts.measured}
        if restored and changes:  # before config.yaml names what no checkpoint knows
            state = restored._replace(progress=progress)
            found = runtime.on_main(lambda: checkpoint.save(place.checkpoints, state, config.keep.checkpoints, found))
        runtime.on_main(lambda: place.open(config, environment, model, asked, source.classes, source.fingerprint, made))
        run = make_run(parts, runtime, place, found, progress, active=runtime.is_main)
        _introduce(run, source)
        if made is not None:
            show(plan_table(made))
        show_stages(stages, plan, {name: p.numel() for name, p in model.net.named_parameters()})

        with run.tracker, run.saver, closing(run.val_loader), handled_by(runtime.stop.set), _stopped_in(run):
            if progress.stage < len(stages):
                run.tracker.log(runtime.start_row() | {"step": progress.step, "samples": progress.samples})
            if model.is_zero_shot and restored is None:
                progress.zero_shot = _zero_shot(run)
            features = Features(config, runtime, model, source, progress, stages, plan)
            optimizer_state = restored.optimizer if restored else {}
            for number, (stage, multipliers) in enumerate(zip(stages, plan, strict=True)):
                if number >= progress.stage:
                    first_epoch = sum(s.epochs for s in stages[:number])
                    with features.inputs(number, run.images(stage)) as inputs:
                        optimizer_state = run_stage(run, stage, inputs, multipliers, first_epoch, optimizer_state)
            runtime.on_main(run.saver.wait)
            result = _result(run, source)
            if runtime.is_main:
                write_json(place.result, result)
            show_result(place.path, result)
    return result


class Parts(NamedTuple):
    """What a run is made of before there is a folder for it."""

    config: Config
    """With every default filled in."""
    source: Source
    share: Share
    model: Model
    """On the CPU still."""
    objective: Objective
    stages: list[Stage]
    """With every default filled in."""
    plan: list[dict[str, float]]
    """Per stage, the learning-rate multiplier of every parameter."""
    measured: dict[str, float]
    """To choose a precision."""


def assembled(config: Config, runtime: Runtime, wanted: str, card: Card | None = None) -> Parts:
    """Everything that a config names, checked; the runtime computes in the run's precision from here on.

    Args:
        config: whose stages are listed or of a named strategy, not `auto`.
        runtime: of this process.
        wanted: the precision, or `auto`.
        card: of a run that goes on: its weights come from a checkpoint.

    Raises:
        TlearnError: bad input or configuration.
    """
    _check_names(config, runtime, card)
    source = open_source(config)
    share = _share(config, runtime, source.sizes["train"])
    texts = card.texts if card else runtime.on_main(lambda: text_features(config.model.head, source.classes))
    model = build_model(config, len(source.classes), card, source.colours, source.classes, texts)
    precision, measured = runtime.on_main(lambda: choose_precision(wanted, runtime.device, model))
    _check_precision(precision, runtime)
    runtime.set_precision(precision)
    config = _resolved(config, model, precision)
    torch.manual_seed(config.seed)  # rank 0 may have drawn numbers to measure precisions
    objective = build_objective(config.objective, model, source.classes, source.per_class)
    stages, plan = _planned(config, model, source, share)
    return Parts(config, source, share, model, objective, stages, plan, measured)


def _planned(config: Config, model: Model, source: Source, share: Share) -> tuple[list[Stage], list[dict[str, float]]]:
    """The stages, filled in, and the rate multiplier of every parameter in each.

    Raises:
        TlearnError: rules that do not fit the model, batches that are too small, features that cannot be stored.
    """
    stages = filled(config)
    names = [name for name, _ in model.net.named_parameters()]
    beside = {name: 1.0 for name in names if name.startswith(f"{ATTACHED}.")}
    own = [name for name in names if name not in beside]
    plan = [resolve(stage, own, model.head, model.blocks) | beside for stage in stages]
    check_attention(model.net, plan)
    for stage, multipliers in zip(stages, plan, strict=True):
        model.set_trainable(multipliers)
        share.check(source.sizes["train"], stage.name, model.smallest_batch)
        check_features(config, model, source, stage)
    return stages, plan


@contextmanager
def _stopped_in(run: Run) -> Iterator[None]:
    """Where a run can be stopped with everything saved: says how to go on. What else ends it is noted in its log."""
    try:
        yield
    except StoppedBySignalError as stopped:
        run.runtime.on_main(run.saver.wait)
        raise StoppedBySignalError(
            f"{stopped}, everything is saved; go on with: tlearn train --run {run.folder.path}", stopped.signal
        ) from None
    except Exception as error:
        note(f"ended by {type(error).__name__}: {error}")
        raise


def make_run(
    parts: Parts, runtime: Runtime, place: RunFolder, found: Path | None, progress: Progress, *, active: bool
) -> Run:
    """What the loop works with.

    Args:
        parts: the model may be anywhere.
        runtime: of this process.
        place: where the run lives.
        found: the checkpoint from which it goes on.
        progress: where it is.
        active: metrics and checkpoints are written.
    """
    config, source, share, model = parts.config, parts.source, parts.share, parts.model
    loading: dict[str, Any] = {"device": runtime.device, "dtype": runtime.dtype}
    tracker = Tracker(config, place.path, progress.metrics_bytes, progress.wandb_id, active=active)
    return Run(
        config=config,
        runtime=runtime,
        folder=place,
        classes=source.classes,
        train_loader=lambda size_px, share, views: source.train_loader(
            model.sized(size_px), share, views=views, **loading
        ),
        val_loader=source.eval_loader("val", model.preprocessing, share.for_evaluation(), **loading),
        train_images=source.sizes["train"],
        share=share,
        epochs=sum(stage.epochs for stage in config.stages or []),
        model=model,
        objective=parts.objective.to(runtime.device),
        tracker=tracker,
        saver=Saver(
            place.checkpoints,
            place.best.parent,
            found,
            tracker,
            config.save_every,
            config.keep,
            active=active,
        ),
        progress=progress,
    )


def _check_names(config: Config, runtime: Runtime, card: Card | None) -> None:
    """What can be known to be wrong before a long `prepare` or download begins."""
    _check_precision(config.precision, runtime)
    if config.model.sync_batchnorm and runtime.device.type == "cpu":
        raise TlearnError("model.sync_batchnorm: needs an accelerator; leave it out on a CPU")
    full_name(config.model.backbone)
    if card is None:
        check_weights(config.model.weights)
    filled(config)


def _check_precision(precision: str, runtime: Runtime) -> None:
    if reason := runtime.unsupported(precision):
        raise TlearnError(f"precision = {precision!r}: {reason}")


def _share(config: Config, runtime: Runtime, n: int) -> Share:
    if config.batch.size > n:
        raise TlearnError(f"batch.size = {config.batch.size}: there are only {n} train images; use batch.size={n}")
    if config.batch.size < runtime.world_size:
        raise TlearnError(f"batch.size = {config.batch.size}: fewer images than the {runtime.world_size} processes")
    unit = 2 if config.data.augment.mixup or config.data.augment.cutmix else 1  # neighbours are mixed
    return Share(config.batch.size, runtime.rank, runtime.world_size, unit=unit).in_parts_of(config.batch.micro, n)


def _resolved(config: Config, model: Model, precision: str) -> Config:
    """The config with every default that depends on model or machine filled in: what the run folder records."""
    return expand(
        config.model_copy(
            update={
                "data": config.data.model_copy(update={"image_size": model.preprocessing.size_px}),
                "model": config.model.model_copy(update={"backbone": model.backbone, "weights": model.weights}),
                "precision": precision,
            }
        )
    )


def _introduce(run: Run, source: Source) -> None:
    if source.warning:
        show(f"WARNING: {source.warning}")
    counts = ", ".join(f"{split} {n:,}" for split, n in source.sizes.items())
    show(f"data      {run.config.data.path}: {len(run.classes)} classes, {counts}")
    show(f"model     {run.model.backbone}, weights {run.model.weights}, {run.model.preprocessing.size_px} px")
    where = f"{run.runtime.device.type}, {run.runtime.precision}, processes: {run.runtime.world_size}"
    parts = f", each process's part in {run.share.accumulate} micro-batches" if run.share.accumulate > 1 else ""
    show(f"compute   {where}, batch {run.config.batch.size}{parts}")
    resumed = f", resumed at step {run.progress.step:,}" if run.progress.step else ""
    show(f"run       {run.folder.path}{resumed}")
    for change in run.progress.overridden:
        show(f"override  {change}")


def _zero_shot(run: Run) -> dict[str, Any]:
    """What the head answers before any training."""
    val, size_px = evaluate(run.runtime, run.scored, run.val_loader, run.classes), run.model.preprocessing.size_px
    measures = {f"val/top1@{size_px}": val["top1"], f"val/loss@{size_px}": val["loss"]}
    run.tracker.log({"kind": "zero_shot", "step": 0, "samples": 0, **measures})
    show(f"zero-shot, before any training  |  val@{size_px} loss {number(val['loss'])}  top-1 {val['top1']:6.1%}")
    return {name: val[name] for name in ("top1", "top1_interval95", "loss")}


def _result(run: Run, source: Source) -> dict[str, Any]:
    """Reload the best weights and score val, and test where there is one."""
    state, best = checkpoint.load_best(run.folder.best)
    run.model.load_weights(state)
    progress, runtime, net = run.progress, run.runtime, run.scored
    result = {"val": evaluate(runtime, net, run.val_loader, run.classes)}
    where = run.model.preprocessing, run.share.for_evaluation(), runtime.device, runtime.dtype
    for split in [name for name in ("test", "target") if name in source.sizes]:
        with closing(source.eval_loader(split, *where)) as loader:
            result[split] = evaluate(runtime, net, loader, run.classes)
    return result | {
        "best": best,
        "top": progress.best,
        "zero_shot": progress.zero_shot,
        "image_size_px": run.model.preprocessing.size_px,
        "world_size": runtime.world_size,
        "steps": progress.step,
        "rejected_steps": progress.rejected_in_all,
        "overridden": progress.overridden,
        "seconds": round(progress.seconds, 3),
        "train_images_per_s": round(progress.samples / progress.seconds, 2),
        "peak_device_mib": runtime.peak_device_mib(),
        **run.saver.cost.account(),
        "backbone": run.model.backbone,
        "weights": run.model.weights,
        "classes": list(run.classes),
        "data_fingerprint": source.fingerprint,
    }
