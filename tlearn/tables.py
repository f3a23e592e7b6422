"""What people read before and after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tlearn.advice import Advice
from tlearn.config import Stage
from tlearn.console import show
from tlearn.planner import Plan


def show_stages(stages: Sequence[Stage], plan: Sequence[Mapping[str, float]], sizes: Mapping[str, int]) -> None:
    """One row a stage: what trains and at which rates.

    Args:
        stages: filled in.
        plan: learning-rate multiplier of every parameter, per stage.
        sizes: elements of every parameter.
    """
    table = _table("stages", "stage", "epochs", "px", "trains", "parameters", "optimizer", "peak rate", "schedule")
    for stage, multipliers in zip(stages, plan, strict=True):
        assert stage.optimizer is not None
        assert stage.schedule is not None
        trained = sum(sizes[name] for name, multiplier in multipliers.items() if multiplier > 0)
        rates = sorted({stage.optimizer.lr * m for m in multipliers.values() if m > 0}, reverse=True)
        table.add_row(
            stage.name,
            str(stage.epochs),
            str(stage.image_size),
            ", ".join(f"{pattern} x{multiplier:g}" for pattern, multiplier in stage.train if multiplier > 0),
            f"{_short(trained)} of {_short(sum(sizes.values()))}",
            stage.optimizer.name,
            ", ".join(f"{rate:.2g}" for rate in rates) if len(rates) <= 3 else f"{rates[0]:.2g} to {rates[-1]:.2g}",
            stage.schedule.name,
        )
    show(table)


def scores_table(result: Mapping[str, Any]) -> Table:
    """One row a split."""
    table = _table("result", "split", "images", "top-1", "95 % interval", "macro F1", "loss")
    for split in ("val", "test", "target"):
        if split in result:
            r = result[split]
            low, high = r["top1_interval95"]
            table.add_row(
                f"{split}@{result['image_size_px']}",
                f"{r['n']:,}",
                f"{r['top1']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{r['macro_f1']:.3f}",
                "not finite" if r["loss"] is None else f"{r['loss']:.4f}",
            )
    return table


def probe_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a backbone."""
    columns = (
        "backbone, weights",
        "px",
        "features",
        "classifier",
        "options",
        "cv top-1",
        "val top-1",
        "95 % interval",
        "s",
    )
    table = _table(f"probe of {rows[0]['val/n']:,} val images; largest class {rows[0]['largest_class']:.1%}", *columns)
    for column in table.columns:
        column.no_wrap = column.header not in ("backbone, weights", "options")  # numbers stay whole
    for row in rows:
        low, high = row["val/top1_interval95"]
        table.add_row(
            f"{row['backbone']}\n{row['weights']}",
            str(row["image_size_px"]),
            str(row["features"]),
            row["classifier"],
            ", ".join(f"{key} {value:g}" for key, value in row["options"].items()),
            f"{row['cv/top1']:.1%}",
            f"{row['val/top1']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['seconds']:.1f}",
        )
    return table


def verdict_table(report: Mapping[str, Any]) -> Table:
    """What a verdict rests on, and what the full run will take."""
    table = _table(f"verdict: {report['verdict']}", "what", "value")
    size = next(key.partition("@")[2] for key in report if key.startswith("val/top1@"))
    if report[f"val/top1@{size}"] is not None:
        low, high = report[f"val/top1_interval95@{size}"]
        table.add_row(f"val/top1@{size}, last epoch", f"{report[f'val/top1@{size}']:.1%} ({low:.1%} to {high:.1%})")
        table.add_row("largest class", f"{report['largest_class']:.1%} of {report['val/n']:,} val images")
    if report["probe"] is not None:
        p = report["probe"]
        table.add_row("linear probe", f"{(p['both'] + p['only_probe']) / report['val/n']:.1%}")
    full = report["full_run"]
    if full is not None:
        device = f", {full['device_mib'] / 1024:.1f} GiB of the device" if full["device_mib"] else ""
        table.add_row(f"full run at {full['image_size_px']} px", f"about {duration(full['wall_s'])}")
        table.add_row("its speed", f"{full['train_images_per_s']:.3g} training images/s, all in all")
        table.add_row("its memory", f"{full['memory_mib'] / 1024:.1f} GiB a process{device}")
    return table


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length or unit == "h":
            break
    return f"{seconds / length:.2g} {unit}"


def plan_table(plan: Plan) -> Table:
    """One row a choice."""
    table = _table("plan", "what", "value", "why")
    for reason in plan.reasons:
        table.add_row(*reason)
    return table


def advice_table(advice: Sequence[Advice]) -> Table:
    """One row an advice."""
    table = _table("advice", "seen", "in numbers", "what to set")
    for row in advice:
        table.add_row(*row)
    return table


def rates_table(report: Mapping[str, Any]) -> Table:
    """One row a test of `lr-find`."""
    columns = ("stage", "trains", "parameters", "head", "rate now", "suggested", "steepest", "valley")
    table = _table(f"rates from {report['start']:g} to {report['end']:g} in {report['steps']} steps", *columns)
    for row in report["tests"]:
        others = (row["others"].get(name) for name in ("steepest", "valley"))
        table.add_row(
            row["stage"],
            row["trains"],
            _short(row["parameters"]),
            row["head"],
            f"{row['lr']:.2g}",
            row["why_not"] or f"{row['suggestion']:.2g}",
            *("" if rate is None else f"{rate:.2g}" for rate in others),
        )
    return table


def show_result(folder: Path, result: Mapping[str, Any]) -> None:
    """The end of a run."""
    show(scores_table(result))
    best = result["best"]
    show(f"best epoch {best['epoch'] + 1} (stage {best['stage']}), chosen on val")
    show(f"{result['steps']:,} steps in {result['seconds']:.0f} s, {result['train_images_per_s']} training images/s")
    show(f"run folder: {folder}")


def _short(n: float) -> str:
    for unit in ("", "k", "M"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}G"


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut off may be another's too
    return table
