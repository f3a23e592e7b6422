"""Functions that tests run in several processes: known by name, so that every rank can import them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tlearn import checkpoint, engine, replicas
from tlearn.config import Config
from tlearn.data.store import Store
from tlearn.errors import StoppedBySignalError, TlearnError
from tlearn.evaluate import evaluate
from tlearn.objectives import LossSum, Supervised
from tlearn.run import train
from tlearn.runtime import Runtime
from tlearn.tracking import Tracker

Row = dict[str, Any]


def train_and_send(config: Config, folder: Path, rank: int, step: int, number: int) -> None:
    """Send one rank a signal when the row of a step is logged."""
    log = Tracker.log

    def log_and_send(self: Tracker, row: Row) -> None:
        log(self, row)
        if int(os.environ["RANK"]) == rank and row["kind"] == "step" and row["step"] == step:
            os.kill(os.getpid(), number)

    Tracker.log = log_and_send  # type: ignore[method-assign]
    train(config, folder)


def train_and_disturb(config: Config, folder: Path, name: str) -> None:
    """Change one weight of rank 1 after the third step."""
    step = engine.train_step

    def disturbed(run: engine.Run, *rest: Any) -> torch.Tensor:
        if run.runtime.rank == 1 and run.progress.step == 3:
            with torch.no_grad():
                run.model.net.get_parameter(name)[0] += 1e-6
        return step(run, *rest)

    engine.train_step = disturbed
    train(config, folder)


def train_without_communication(config: Config, folder: Path) -> None:
    """The mistake that check_replicas is for: every rank trains alone."""
    prepare = Runtime.prepare

    def unwrapped(self: Runtime, shell: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        wrapped, stepper = prepare(self, shell, optimizer)
        return wrapped.module, stepper

    Runtime.prepare = unwrapped  # type: ignore[method-assign]
    train(config, folder)


def train_short_of_memory(config: Config, folder: Path, fits: int) -> Row:
    """Rank 1 has memory for `fits` images only."""
    forward = Supervised.forward

    def limited(self: Supervised, batch: Any) -> LossSum:
        if int(os.environ.get("RANK", 1)) == 1 and len(batch.labels) > fits and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch)

    Supervised.forward = limited  # type: ignore[method-assign]
    return train(config, folder)


def autocast_seen(config: Config, folder: Path) -> dict[str, set[str]]:
    """Data types that the head computes in, by stage and by whether it trains."""
    seen: dict[str, set[str]] = {}
    stage_of: list[str] = [""]
    run_stage = engine.run_stage

    def named(run: engine.Run, stage: Any, *rest: Any) -> Any:
        stage_of[0] = stage.name
        head = run.model.net.get_submodule(run.model.head)

        def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            seen.setdefault(f"{stage_of[0]} {torch.is_grad_enabled()}", set()).add(str(output.dtype))

        handle = head.register_forward_hook(note)
        try:
            return run_stage(run, stage, *rest)
        finally:
            handle.remove()

    import tlearn.run

    tlearn.run.run_stage = named
    train(config, folder)
    return seen


def fail_on(rank: int, how: str) -> Any:
    """One rank fails, the others wait for it in a collective."""
    runtime = Runtime()
    if runtime.rank == rank:
        match how:
            case "mistake":
                raise TlearnError("the disk of this node is full")
            case "bug":
                raise KeyError("no such thing")
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
    runtime.wait()
    return runtime.rank


def sleep(seconds: float, path: Path) -> None:
    """Say which process this is, then wait."""
    (path / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(seconds)


def on_main(fails: bool) -> Any:
    """Rank 0's result, or its error, on every rank."""
    runtime = Runtime()

    def work() -> int:
        if fails:
            raise TlearnError("rank 0 found a mistake")
        return 17 + runtime.rank

    try:
        return runtime.on_main(work)
    except TlearnError as error:
        return str(error)


def hashes(names: list[str]) -> Any:
    """What `check_replicas` says where rank 1 holds other tensors of these names."""
    runtime = Runtime()
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    if runtime.rank == 1:
        for name in names:
            tensor = net.state_dict()[name].view(-1)
            tensor.copy_(tensor.flip(0)) if tensor.numel() > 1 and tensor.unique().numel() > 1 else tensor.add_(1)
    try:
        replicas.check_replicas(runtime, net, "now")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def statistics(values: list[list[float]]) -> list[float]:
    """Buffers after averaging: floating ones are means over ranks."""
    runtime = Runtime()
    buffers = [torch.tensor(values[runtime.rank]), torch.tensor([[3.0 * runtime.rank]]), torch.tensor(5)]
    replicas.average_statistics(runtime, buffers)
    return [*buffers[0].tolist(), *buffers[1].view(-1).tolist(), int(buffers[2])]


class _Constant(nn.Module):
    """Logits that follow from the image's mean, so that answers differ between images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, classes, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.sin(images.mean(dim=(1, 2, 3))[:, None] * 7 + self.scale * 5)


def evaluated(config: Config) -> Row:
    """Scores of a fixed function on a source's val images."""
    from tlearn.data.loader import Share
    from tlearn.data.source import open_source
    from tlearn.data.transforms import Preprocessing

    runtime = Runtime()
    runtime.set_precision("fp64")
    source = open_source(config)
    p = Preprocessing(config.data.image_size or 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    share = Share(config.batch.size, runtime.rank, runtime.world_size)
    loader = source.eval_loader("val", p, share, runtime.device, runtime.dtype)
    return evaluate(runtime, _Constant(len(source.classes)), loader, source.classes)


def stream_steps(config: Config, accumulate: int) -> Any:
    """(samples per step of this rank, keys) of two epochs of the training stream."""
    from tlearn.data.loader import Share
    from tlearn.data.source import open_source
    from tlearn.data.transforms import Preprocessing

    runtime = Runtime()
    source = open_source(config)
    p = Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    share = Share(config.batch.size, runtime.rank, runtime.world_size, accumulate)
    loader = source.train_loader(p, share, runtime.device, torch.float32)
    with loader.steps(0, 2 * loader.steps_per_epoch) as steps:
        taken = [[batch.keys.tolist() for batch in step] for step in steps]
    runtime.wait()
    return taken


def train_with_little_room(config: Config, folder: Path, first: int, last: int) -> None:
    """From step `first` to step `last` files cannot become longer than 50 kB."""
    log = Tracker.log

    def log_and_limit(self: Tracker, row: Row) -> None:
        log(self, row)
        if row["kind"] == "step" and row["step"] in (first, last):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if row["step"] == first else hard, hard))

    Tracker.log = log_and_limit  # type: ignore[method-assign]
    train(config, folder)


def train_with_a_slow_disk(config: Config, folder: Path, first: int, seconds: float) -> None:
    """A checkpoint of step `first` or later takes so long to write."""
    write = checkpoint._write

    def slow(folder: Path, state: checkpoint.State) -> None:
        write(folder, state)
        if state.progress.step >= first:
            time.sleep(seconds)

    checkpoint._write = slow
    train(config, folder)


def train_and_send_in_evaluation(config: Config, folder: Path, number: int) -> None:
    """Every rank gets a SIGTERM at the start of evaluation `number`; no batch of it may be evaluated then."""
    forward, calls = engine.evaluate, 0

    def sent(runtime: Runtime, net: nn.Module, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
            net.register_forward_hook(lambda *_: pytest.fail("a batch was evaluated"))
        return forward(runtime, net, *rest)

    engine.evaluate = sent  # type: ignore[assignment]
    train(config, folder)


def train_forgetful(config: Config, folder: Path) -> None:
    """The optimizer's state is lost when a run goes on."""
    with folder.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    load = checkpoint.load

    def without_optimizer(folder: Path) -> checkpoint.State:
        return load(folder)._replace(optimizer={})

    checkpoint.load = without_optimizer
    train(config, folder)


def train_each_with_a_stop(runs: list[tuple[Config, Path]]) -> None:
    """One after the other; rank 1 of each is told to stop after its second step, and all go on."""
    log = Tracker.log

    def log_and_send(self: Tracker, row: Row) -> None:
        log(self, row)
        if os.environ["RANK"] == "1" and row["kind"] == "step" and row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    for config, folder in runs:
        Tracker.log = log_and_send  # type: ignore[method-assign]
        try:
            train(config, folder)
        except StoppedBySignalError:
            pass
        finally:
            Tracker.log = log  # type: ignore[method-assign]
        train(config, folder, "must")


def train_on_own_disk(config: Config, folder: Path, root: Path, swapped: bool) -> None:
    """Every rank has a cache of its own."""
    os.environ["TLEARN_CACHE"] = str(root / f"disk{int(os.environ['RANK']) ^ swapped}")
    train(config, folder)


def train_and_die_while_filling(config: Config, folder: Path, rank: int, rows: int) -> None:
    """One rank is killed when it has stored so many rows of features."""
    written, write = [0], Store.write

    def write_and_die(self: Store, part: Any, values: torch.Tensor) -> None:
        write(self, part, values)
        written[0] += len(part)
        if int(os.environ["RANK"]) == rank and written[0] >= rows:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.write = write_and_die  # type: ignore[method-assign]
    train(config, folder)
