"""The one loop. It trains a stage, whatever the strategy and the objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlearn.checkpoint import Progress, Tensors
from tlearn.config import Config, Stage
from tlearn.console import progress_bar, show
from tlearn.data.loader import Batch, Share, Steps
from tlearn.data.order import mix
from tlearn.errors import StoppedBySignalError
from tlearn.evaluate import evaluate
from tlearn.features import Inputs
from tlearn.folder import RunFolder
from tlearn.ledger import Ledger
from tlearn.models.build import Model
from tlearn.models.heads import Mirrored
from tlearn.objectives import LossSum, Objective
from tlearn.optim import (
    WeightAverage,
    build_optimizer,
    load_named_state,
    lr_factor,
    named_state,
    set_learning_rates,
)
from tlearn.replicas import average_statistics, blank_batch, check_replicas, find_micro_batch, warm_up
from tlearn.runtime import Runtime
from tlearn.saver import Saver
from tlearn.tracking import Tracker


@dataclass
class Run:
    """What a training run is made of."""

    config: Config
    runtime: Runtime
    folder: RunFolder
    classes: tuple[str, ...]
    train_loader: Callable[[int, Share, int | None], Steps]
    """(image size in px, share, views) -> the training images of a stage."""
    val_loader: Steps
    train_images: int
    share: Share
    epochs: int
    """Of all stages."""
    model: Model
    objective: Objective
    tracker: Tracker
    saver: Saver
    progress: Progress

    @property
    def scored(self) -> nn.Module:
        """What is evaluated."""
        return Mirrored(self.model.net) if self.config.data.eval_flips else self.model.net

    def images(self, stage: Stage) -> Inputs:
        """What a stage is fed where every layer computes in every step."""
        size_px, views = stage.image_size, stage.views
        assert size_px is not None
        return Inputs(
            train=lambda share: self.train_loader(size_px, share, views),
            val=self.val_loader,
            blank=lambda n: blank_batch(self.runtime, n, size_px),
        )


class Shell(nn.Module):
    """A fresh thin wrapper per stage: what is prepared (DDP, autocast) is this, so nothing is wrapped twice."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> LossSum:
        """Loss sums of a micro-batch."""
        result: LossSum = self.objective(batch)
        return result


def run_stage(
    run: Run,
    stage: Stage,
    inputs: Inputs,
    multipliers: Mapping[str, float],
    first_epoch: int,
    optimizer_state: Tensors,
) -> dict[str, torch.Tensor]:
    """Train one stage from `run.progress` to its end.

    Args:
        run: model, as `set_trainable` left it, and progress; changed in place.
        stage: with optimizer and schedule filled in.
        inputs: images, or what the frozen layers make of them.
        multipliers: learning-rate multiplier of every parameter, 0 where it is frozen.
        first_epoch: epochs of the stages before.
        optimizer_state: by parameter name, of the stage before or of a checkpoint.

    Returns:
        The optimizer's state by parameter name, for the next stage.

    Raises:
        StoppedBySignalError: after everything was saved.
        NoGradientError: a trainable parameter without gradient.
        DivergedError: gradients that stay non-finite.
        RankFailedError: the ranks do not hold the same model.
    """
    assert stage.optimizer is not None
    assert stage.schedule is not None
    config, runtime, model, progress = run.config, run.runtime, run.model, run.progress
    check_replicas(runtime, model.net, f"at the start of stage {stage.name}")
    optimizer = build_optimizer(stage.optimizer, model.net, multipliers)
    load_named_state(optimizer, optimizer_state)
    average = WeightAverage(model.net, model.moving_statistics, config.ema, optimizer_state)
    shell, stepper = runtime.prepare(Shell(run.objective), optimizer)
    runtime.load_scaler(progress.scaler)
    model.net.eval()  # the next two lines must not move statistics
    share = fitting_share(run, shell, optimizer, stage.name, inputs) if config.batch.find else run.share
    warm_up(runtime, shell, optimizer, inputs.blank(1))
    statistics = model.moving_statistics
    loader = inputs.train(share)
    total = stage.epochs * loader.steps_per_epoch
    ledger = Ledger(runtime, run.objective.weight, run.tracker, progress, stage.name, run.saver, audit=config.run.audit)
    started = time.perf_counter()

    def epoch_is_over() -> bool:
        return progress.stage_step == (progress.stage_epochs + 1) * loader.steps_per_epoch

    def is_settled() -> bool:
        return stage.patience is not None and progress.stage_stale >= stage.patience

    def state() -> dict[str, torch.Tensor]:
        return named_state(optimizer) | average.state()

    with (
        _saved_when_stopped(run, ledger, state),
        loader.steps(progress.stage_step, total, first_epoch) as steps,
        progress_bar(stage.name, total, progress.stage_step) as advance,
    ):
        ledger.pause()
        model.train()
        if epoch_is_over():  # the run ended between the last step of an epoch and its evaluation
            _finish_epoch(run, ledger, average, inputs.val, stage, first_epoch)
        for micro_batches in steps if not is_settled() else ():
            epoch = progress.stage_step / loader.steps_per_epoch
            run.objective.time = (first_epoch + epoch) / run.epochs
            lr = stage.optimizer.lr * lr_factor(stage.schedule, epoch, stage.epochs)
            rates = set_learning_rates(optimizer, lr)
            sums = train_step(run, shell, optimizer, stepper, statistics, micro_batches)
            ledger.add(sums, micro_batches, first_epoch + int(epoch), rates)
            average.update(progress.step)
            advance(note=ledger.note)
            if ledger.stop:
                raise runtime.stop.error()
            if ledger.save_due or run.saver.is_due(progress, loader.steps_per_epoch):
                _save(run, ledger, state)
            if epoch_is_over():
                _finish_epoch(run, ledger, average, inputs.val, stage, first_epoch)
                if is_settled():
                    show(f"stage {stage.name} ends: {progress.stage_stale} epochs were no better")
                    break
    run.tracker.log(
        {
            "kind": "stage",
            "stage": stage.name,
            "epoch": first_epoch + progress.stage_epochs - 1,
            "step": progress.step,
            "samples": progress.samples,
            "trainable_parameters": sum(p.numel() for p in model.net.parameters() if p.requires_grad),
            "seconds": round(time.perf_counter() - started, 3),
        }
    )
    progress.stage, progress.stage_step, progress.stage_epochs = progress.stage + 1, 0, 0
    progress.stage_best, progress.stage_stale = None, 0
    _save(run, ledger, state)
    runtime.accelerator.free_memory()
    return state()


def fitting_share(run: Run, shell: nn.Module, optimizer: torch.optim.Optimizer, stage: str, inputs: Inputs) -> Share:
    """The run's share of a batch in micro-batches that fit the memory of every process."""
    largest = run.share.largest_part(run.train_images)
    found = find_micro_batch(run.runtime, shell, optimizer, largest, inputs.blank)
    share = run.share.in_parts_of(found, run.train_images)
    share.check(run.train_images, stage, run.model.smallest_batch)
    if found < largest:
        show(f"batch.find: stage {stage} fits the memory in micro-batches of {found}")
    return share


def train_step(
    run: Run,
    shell: nn.Module,
    optimizer: torch.optim.Optimizer,
    stepper: Any,
    statistics: list[torch.Tensor],
    micro_batches: list[Batch],
) -> torch.Tensor:
    """One optimizer step. Returns `ledger.StepSums` over all processes, (5,), not yet read."""
    runtime, progress = run.runtime, run.progress
    accelerator = runtime.accelerator
    weight = run.objective.weight(micro_batches[0].global_labels)
    # a rejected step must not leave its mark on BatchNorm either
    before = [buffer.clone() for buffer in statistics]
    sums = torch.zeros(5, dtype=runtime.sum_dtype, device=runtime.device)
    for i, batch in enumerate(micro_batches):
        # for dropout: a function of the position, so that no generator's state has to be saved
        torch.manual_seed(mix(run.config.seed, progress.step, i, runtime.rank))
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(shell):
            out: LossSum = shell(batch)
            # DDP takes the mean over processes: times their number it is the sum
            accelerator.backward(out.loss * (runtime.world_size / weight))
        sums[0] += out.loss.detach()
        sums[1] += out.correct
    average_statistics(runtime, statistics)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = accelerator.clip_grad_norm_(parameters, run.config.clip_norm or float("inf"))
    # fused optimizers skip a step where found_inf is 1, without a synchronisation; the norm is equal on all ranks
    rejected = (~torch.isfinite(norm)).float().reshape(())
    optimizer.found_inf = rejected  # type: ignore[attr-defined]
    stepper.step()
    stepper.zero_grad()
    for buffer, old in zip(statistics, before, strict=True):
        buffer.copy_(torch.where(rejected > 0, old, buffer))
    sums[2] = rejected / runtime.world_size
    sums[3], sums[4] = float(bool(runtime.stop)), float(run.saver.is_due_by_clock)
    return runtime.sum(sums)


def _finish_epoch(
    run: Run, ledger: Ledger, average: WeightAverage, val_loader: Steps, stage: Stage, first_epoch: int
) -> None:
    """Evaluate, log the epoch, keep the best weights."""
    ledger.settle()
    progress, size_px = run.progress, run.model.preprocessing.size_px
    epoch = first_epoch + progress.stage_epochs
    check_replicas(run.runtime, run.model.net, f"after epoch {epoch + 1}")
    with average.applied():
        val = evaluate(run.runtime, run.scored, val_loader, run.classes)
    sums, progress.epoch_sums = progress.epoch_sums, {}
    loss = sums["loss"] / sums["weight"] if sums else None  # none: every step was rejected
    top1 = sums["correct"] / sums["n"] if sums else None
    place = {"stage": stage.name, "epoch": epoch, "step": progress.step}
    measures = {
        "train/loss": loss,
        "train/top1": top1,
        f"val/top1@{size_px}": val["top1"],
        f"val/loss@{size_px}": val["loss"],
    }
    run.tracker.log({"kind": "epoch", **place, "samples": progress.samples, **measures, **run.saver.cost.account()})
    show(
        f"epoch {epoch + 1:3d}  {stage.name:12s}  train loss {number(loss)}  top-1 {top1 or 0:6.1%}"
        f"  |  val@{size_px} loss {number(val['loss'])}  top-1 {val['top1']:6.1%}"
    )
    score = {**place, "top1": val["top1"], "loss": val["loss"], "selected_on": "val"}
    # sorting keeps the order of equals: the earlier epoch wins
    progress.best = sorted([*progress.best, score], key=_rank, reverse=True)[: run.config.keep.best]
    progress.stage_epochs += 1
    progress.stage_stale += 1
    if progress.stage_best is None or _rank(score) > _rank(progress.stage_best):
        progress.stage_best, progress.stage_stale = dict(score), 0
    with average.applied():
        run.saver.keep_best(run.model.weights_alone, progress.best, score)
    run.model.train()
    ledger.pause()


def _rank(scores: Mapping[str, Any]) -> tuple[float, float]:
    """The better epoch is the one with more hits; among equals the one with the lower loss."""
    return scores["top1"], -math.inf if scores["loss"] is None else -scores["loss"]


def number(loss: float | None) -> str:
    """For a line."""
    return "not finite" if loss is None else f"{loss:.4f}"


@contextmanager
def _saved_when_stopped(run: Run, ledger: Ledger, state: Callable[[], Tensors]) -> Iterator[None]:
    """A stop on which all ranks agreed leaves with everything saved."""
    try:
        yield
    except StoppedBySignalError:
        _save(run, ledger, state)
        raise


def _save(run: Run, ledger: Ledger, state: Callable[[], Tensors]) -> None:
    ledger.settle()
    run.progress.scaler = run.runtime.scaler_state()
    run.saver.save(run.model.net.state_dict(), state(), run.progress)
    ledger.save_due = False
    ledger.pause()
