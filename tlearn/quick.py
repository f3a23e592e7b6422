"""`tlearn train --quick`: train on few small images, say whether the full run is worth it; `--quick-first` does both.

RUN/verdict.json   go, no-go or unsure; reasons, faults, leaks, what the full run will take
RUN/full.yaml      the full run that it is about

Quick wraps `run.train` from outside: neither that nor the loop knows of it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tlearn.advice import Seen, read_run, still_improves, too_fast
from tlearn.auto import make_plan
from tlearn.config import Config
from tlearn.configfile import completed, differing_keys, dump_config, given_options, load_config, shrunk
from tlearn.console import show
from tlearn.data.source import Indexed
from tlearn.errors import DivergedError, NoGradientError, RankFailedError, StoppedBySignalError, TlearnError
from tlearn.faults import Facts, Fault, Leaks
from tlearn.files import new_run, write_json, write_text
from tlearn.folder import FREE_TO_CHANGE, Resume
from tlearn.forecast import Forecast
from tlearn.jobs import QUICK
from tlearn.launch import run_ranks
from tlearn.models.build import Card, nearest_size
from tlearn.models.weights import BESIDE, CARD
from tlearn.run import train
from tlearn.runtime import Runtime
from tlearn.signals import StopFlag
from tlearn.stages import expand
from tlearn.tables import verdict_table
from tlearn.trial import Evidence, foresee, look, mapped_mib
from tlearn.verdict import decide

Report = dict[str, Any]

OF_THE_MACHINE = ("memory", "full run")
"""Faults."""


def quick(
    config: Config,
    given: Collection[str],
    folder: str | Path | None = None,
    resume: Resume = "auto",
    override: bool = False,
) -> Report:
    """Train what `--quick` makes of a run, and decide. Alone, or as one of several processes.

    Args:
        config: the full run, from `full_config`.
        given: options of the command line, which stay as they are.
        folder: where the quick run lives; default: `runs/<time>-quick`.
        resume, override: as for `train`. With `auto` a verdict that is there already is taken.

    Returns:
        What verdict.json holds.

    Raises:
        TlearnError, StoppedBySignalError: as `train`.
    """
    runtime = Runtime()
    place = runtime.on_main(lambda: Path(folder) if folder is not None else new_run("quick"))
    full = _planned(config, place, runtime)
    if resume == "auto" and (report := runtime.on_main(lambda: _recorded(place, full))) is not None:
        _tell(place, report)
        return report
    runtime.on_main(lambda: (place / "verdict.json").unlink(missing_ok=True))
    small = runtime.on_main(lambda: _fitting(shrunk(full, given), given))
    ended = _trained(small, place, resume, override, runtime)

    def judge() -> Report:
        report = _judged(full, place, ended, runtime.world_size, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        write_text(place / "full.yaml", f"# tlearn train {place / 'full.yaml'}   the full run\n{dump_config(full)}")
        write_json(place / "verdict.json", report)
        _tell(place, report)
        return report

    if runtime.device.type != "cpu":
        torch.accelerator.empty_cache()  # for the trial, which is another process
    return runtime.on_main(judge)


def quick_first(
    config: Config,
    given: Collection[str],
    folder: str | Path | None = None,
    resume: Resume = "auto",
    override: bool = False,
) -> Report:
    """A quick run in FOLDER/quick; on a `go` the full run in FOLDER.

    Returns:
        The verdict; on a `go` with what result.json of the full run holds, as `result`.

    Raises:
        TlearnError, StoppedBySignalError: as `train`.
    """
    runtime = Runtime()
    place = runtime.on_main(lambda: Path(folder) if folder is not None else new_run(config.strategy))
    config = _planned(config, place / QUICK, runtime)
    begun = runtime.on_main((place / "config.yaml").is_file)
    if begun and resume == "never":
        raise TlearnError(f"{place}: holds a run; choose another --run, or --resume auto to go on with it")
    if begun:  # whatever was said of it before
        report = (runtime.on_main(lambda: _read(place / QUICK)) or {}) | {"verdict": "go"}
    else:
        report = quick(config, given, place / QUICK, resume, override)
    if report["verdict"] != "go":
        show(
            f"the full run was not begun; to begin it all the same: tlearn train {place}/quick/full.yaml --run {place}"
        )
        return report
    if config.quick.init_from_quick:
        config = _continued(config, place / QUICK, report)
    return report | {"result": train(config, place, resume if begun else "auto", override)}


def _recorded(place: Path, config: Config) -> Report | None:
    """A verdict on the same run and the same images, which is not to be made again."""
    report, before = _read(place), _full(place)
    if report is None or before is None or report["stopped"]:
        return None
    if any(fault["name"] in OF_THE_MACHINE for fault in report["faults"]):  # another one may have what it takes
        return None
    free = ("quick.minutes", *FREE_TO_CHANGE)
    same = not [d for d in differing_keys(before, config) if not d.startswith(free)]
    if config.data.reader == "indexed":
        same = same and report.get("data_fingerprint") == Indexed(config).fingerprint
    return report if same else None


def _read(place: Path) -> Report | None:
    try:
        report: Report = json.loads((place / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


def _full(place: Path) -> Config | None:
    try:
        return load_config(place / "full.yaml")
    except (OSError, TlearnError):
        return None


def _planned(config: Config, place: Path, runtime: Runtime) -> Config:
    """With `strategy: auto` made into stages, for the full run: the small one would get another plan.

    Args:
        config: the full run.
        place: where the plan of before stands in full.yaml; it is taken where it does what is asked for.
        runtime: of the run.
    """
    if config.strategy != "auto" or config.stages is not None:
        return config

    def plan() -> Config:
        before = _full(place)
        if before is not None and completed(config, given_options(before)) == before:
            return before
        return completed(config, run_ranks(make_plan, (config, "any", runtime.world_size), 1)[0].options)

    return runtime.on_main(plan)


def _fitting(small: Config, given: Collection[str]) -> Config:
    """With the image sizes nearest to those of `--quick` that the model takes."""
    size_px = small.data.image_size
    if size_px is None or "data.image_size" in given:
        return small
    near = nearest_size(small.model, size_px)
    if near == size_px:
        return small
    show(f"quick: {small.model.backbone} does not take {size_px} px; {near} px it is")
    stages = small.stages and [
        stage.model_copy(update={"image_size": stage.image_size and nearest_size(small.model, stage.image_size)})
        for stage in small.stages
    ]
    return small.model_copy(update={"data": small.data.model_copy(update={"image_size": near}), "stages": stages})


class _Late(Exception):  # noqa: N818
    """The clock of quick.minutes ended the training."""


def _trained(small: Config, place: Path, resume: Resume, override: bool, runtime: Runtime) -> Fault | _Late | None:
    """Train; what ended it before its end, as far as a verdict can say something of it."""
    try:
        with _ended_after(small.quick.minutes if runtime.is_main else None) as is_late:
            train(small, place, resume, override)
    except StoppedBySignalError as stopped:
        if small.quick.minutes is not None and runtime.on_main(is_late):
            return _Late()
        reason = "the quick run is saved; the same command goes on"
        raise StoppedBySignalError(f"stopped by {stopped.signal or 'a signal'}; {reason}", stopped.signal) from None
    except NoGradientError as error:
        return Fault("no gradient", str(error), "or leave these layers out of the stages that train them")
    except DivergedError as error:
        return Fault("not finite", str(error), "lower rates are what helps most often")
    except torch.OutOfMemoryError as error:
        if runtime.world_size > 1:  # the others do not know
            raise
        return Fault("memory", str(error).partition("\n")[0], "set batch.find=true, or a smaller quick.image_size")
    return None


@contextmanager
def _ended_after(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Ask the training to stop as a signal would, once so long has passed; yields whether that was so."""
    late, over = threading.Event(), threading.Event()

    def watch() -> None:
        over.wait(60 * (minutes or 0))
        # only where a run can be stopped with everything saved
        while not over.wait(0.05):
            if getattr(signal.getsignal(signal.SIGTERM), "__func__", None) is StopFlag.set:
                late.set()
                signal.raise_signal(signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if minutes is not None:
        watcher.start()
    try:
        yield late.is_set
    finally:
        over.set()
        if minutes is not None:
            watcher.join()


def _judged(full: Config, place: Path, ended: Fault | _Late | None, processes: int, here: int) -> Report:
    """On rank 0: measure what is not known yet, decide."""
    seen = read_run(place)
    card = Card.read(place / CARD)
    evidence = Evidence(None, "the training did not come to its end", Leaks(), (), None)
    outlook: Forecast | None = None
    troubles: dict[str, Any] = {}
    if ended is None:
        show("quick: looking at train and val images beside each other")
        try:
            evidence = run_ranks(look, (place, full), 1)[0]
        except RankFailedError as error:
            why = str(error).strip().splitlines()[-1]
            evidence = Evidence(None, why, Leaks(unseen=why), (), None)
        show("quick: a few steps of the full run, for its time and memory")
        outlook, troubles = _outlook(full, processes, here, place)
    facts = Facts(
        **_scores(seen, card),
        ended_by=ended if isinstance(ended, Fault) else None,
        stopped=isinstance(ended, _Late),
        against=evidence.against,
        no_probe=evidence.no_probe,
        leaks=evidence.leaks,
        missing=evidence.missing,
        normalised=(card.preprocessing.mean, card.preprocessing.std) if evidence.own else None,
        own=evidence.own,
        forecast=outlook,
        finds_batch=full.batch.find,
        batch=full.batch.micro or -(-full.batch.size // processes),
        **troubles,
    )
    return decide(facts).content() | _measures(facts, card)


def _scores(seen: Seen, card: Card) -> Report:
    """What the run's own files say."""
    epochs, steps = seen.of("epoch"), seen.of("step")
    val: Any = seen.result["val"] if seen.result is not None else {"n": 0, "confusion": [[0]]}
    last = epochs[-1][f"val/top1@{card.preprocessing.size_px}"] if epochs else 0.0
    return {
        "image_size_px": card.preprocessing.size_px,
        "classes": len(card.classes),
        "epochs": sum(stage.epochs for stage in seen.stages),
        "val": val["n"],
        "hits": round(last * val["n"]),
        "majority": max(map(sum, val["confusion"])),
        "losses": tuple(row["train/loss"] for row in epochs),
        "loss_is_of_labels": seen.config.objective.name in ("supervised", "binary"),
        "too_fast": tuple(too_fast(seen)),
        "steps": len(steps),
        "skipped": sum(bool(row.get("rejected")) for row in steps),
        "still_improving": still_improves(seen),
    }


def _outlook(full: Config, processes: int, here: int, place: Path) -> tuple[Forecast | None, dict[str, Any]]:
    """What the full run will take, or why that is not known."""
    if full.data.reader != "indexed":  # all of a stream's val images are evaluated, or none
        return None, {"no_forecast": "data.reader: stream has no index of which a few images could be picked"}
    try:
        return run_ranks(foresee, (full, processes, here, mapped_mib(), place), 1)[0], {}
    except TlearnError as error:
        return None, {"refused": str(error)}
    except (RankFailedError, DivergedError) as error:
        lines = str(error).strip().splitlines()
        ran_out = any(sign in str(error) for sign in ("OutOfMemoryError", "out of memory", "killed by SIGKILL"))
        return None, {"no_room" if ran_out else "no_forecast": lines[-1] if lines else str(error)}


def _measures(facts: Facts, card: Card) -> Report:
    """What verdict.json holds beside the verdict."""
    low, high = facts.interval
    size = facts.image_size_px
    return {
        f"val/top1@{size}": facts.hits / facts.val if facts.val else None,
        f"val/top1_interval95@{size}": [low, high],
        "val/n": facts.val,
        "largest_class": facts.majority / facts.val if facts.val else None,
        "probe": facts.against and {**facts.against._asdict(), "p": facts.against.p},
        "no_probe": facts.no_probe,
        "leaks": asdict(facts.leaks)
        | {"share": facts.leaks.share, "listed": [c._asdict() for c in facts.leaks.listed]},
        "train_loss": list(facts.losses),
        "skipped_steps": facts.skipped,
        "stopped": facts.stopped,
        "full_run": facts.forecast and facts.forecast.content(),
        "data_fingerprint": card.data_fingerprint,
    }


def _tell(place: Path, report: Report) -> None:
    show(verdict_table(report))
    for reason in report["reasons"]:
        show(f"  {reason}")
    for warning in report["warnings"]:
        show(f"  WARNING: {Fault(**warning)}")
    show(f"VERDICT   {report['verdict']} (exit code {report['exit_code']}); {place}/verdict.json")


def _continued(config: Config, small: Path, report: Report) -> Config:
    """The full run, from the quick run's weights."""
    size_px = config.data.image_size or (report["full_run"] or {}).get("image_size_px")
    if size_px is None:
        raise TlearnError("quick.init_from_quick: the size of the full run is not known; set data.image_size")
    origin = Card.read(small / CARD).weights
    model = config.model
    # what `auto` means depends on where the weights came from before
    batch_norm = (
        ("train" if "random" in origin.split(BESIDE) else "frozen") if model.batch_norm == "auto" else model.batch_norm
    )
    update: dict[str, Any] = {
        "data": config.data.model_copy(update={"image_size": size_px}),
        "model": model.model_copy(update={"weights": str(small.resolve()), "batch_norm": batch_norm}),
    }
    if config.strategy == "scratch":  # a name for what begins with random weights
        update |= {"stages": expand(config).stages, "strategy": "full"}
    return config.model_copy(update=update)
