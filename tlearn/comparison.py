"""What recipes that were trained on the same images with the same seeds come to: figures, table, picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tlearn.errors import TlearnError
from tlearn.files import replace

Row = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """Figures of one finished run."""

    seed: int
    val_top1: list[float]
    """After every epoch."""
    best_top1: float
    """Of the epoch that was best on val, on val."""
    test_top1: float | None
    """Of the same epoch, on test."""
    n_val: int
    image_size_px: int
    """At which it was evaluated."""
    data_fingerprint: str
    trained_parameters: int
    """In the stage that trains most of them."""
    train_images_per_s: float
    """Steps only, without starting, evaluating and saving."""
    wall_s: float
    """Of the whole program, over all attempts."""
    peak_mib: float | None
    """Resident memory of its largest process; None: nobody saw it end, or it was not alone."""
    peak_device_mib: float | None
    """Of tensors on rank 0's accelerator."""
    attempts: int


def read_run(folder: Path, seed: int, attempts: Sequence[Mapping[str, Any]]) -> Trained:
    """The figures of a finished run.

    Args:
        folder: a run folder with its result.json.
        seed: of the run.
        attempts: `wall_s` and `peak_mib` of every process that worked on it.
    """
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    top1 = f"val/top1@{result['image_size_px']}"
    return Trained(
        seed=seed,
        val_top1=[row[top1] for row in rows if row["kind"] == "epoch"],
        best_top1=result["val"]["top1"],
        test_top1=result["test"]["top1"] if "test" in result else None,
        n_val=result["val"]["n"],
        image_size_px=result["image_size_px"],
        data_fingerprint=result["data_fingerprint"],
        trained_parameters=max(row["trainable_parameters"] for row in rows if row["kind"] == "stage"),
        train_images_per_s=result["train_images_per_s"],
        wall_s=sum(attempt["wall_s"] for attempt in attempts),
        peak_mib=max((a["peak_mib"] for a in attempts if a["peak_mib"] is not None), default=None),
        peak_device_mib=result["peak_device_mib"],
        attempts=len(attempts),
    )


def summarise(recipes: Mapping[str, Sequence[Trained]], seeds: Sequence[int]) -> list[Row]:
    """One row a recipe: means over its runs, and its paired difference to the first recipe.

    Args:
        recipes: finished runs by recipe; a seed that is missing has failed.
        seeds: that were asked for.

    Raises:
        TlearnError: runs that did not see the same images.
    """
    _check_same_images(recipes)
    first = next(iter(recipes.values()))
    return [_row(name, runs, seeds, first) for name, runs in recipes.items()]


def _check_same_images(recipes: Mapping[str, Sequence[Trained]]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for name, runs in recipes.items():
        for run in runs:
            seen.setdefault((run.data_fingerprint, run.n_val), f"{name} (seed {run.seed})")
    if len(seen) > 1:
        what = ", ".join(f"{who}: data {data[:12]}, {n:,} val images" for (data, n), who in seen.items())
        raise TlearnError(f"the recipes were not trained on the same images: {what}; compare them in a new --out")


def _row(name: str, runs: Sequence[Trained], seeds: Sequence[int], first: Sequence[Trained]) -> Row:
    row: Row = {"recipe": name, "failed": sorted(set(seeds) - {run.seed for run in runs})}
    if not runs:
        return row | {"runs": []}
    epochs = len(runs[0].val_top1)
    early = max(1, round(epochs / 4))
    tests = [run.test_top1 for run in runs if run.test_top1 is not None]
    return row | {
        "image_size_px": runs[0].image_size_px,
        "epochs": epochs,
        "early_epochs": early,
        "early": spread([run.val_top1[early - 1] for run in runs]),
        "last": spread([run.val_top1[-1] for run in runs]),
        "best": spread([run.best_top1 for run in runs]),
        "test": spread(tests) if tests else None,
        "difference": paired_difference(runs, first) if runs is not first else None,
        "trained_parameters": runs[0].trained_parameters,
        "train_images_per_s": statistics.mean(run.train_images_per_s for run in runs),
        "wall_s": statistics.mean(run.wall_s for run in runs),
        "peak_mib": max((run.peak_mib for run in runs if run.peak_mib is not None), default=None),
        "peak_device_mib": max((r.peak_device_mib for r in runs if r.peak_device_mib is not None), default=None),
        "runs": [asdict(run) for run in runs],
    }


def spread(values: Sequence[float]) -> Row:
    """`n`, `mean` and its standard error `se`: the deviation over sqrt(n); None for a single value."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"n": len(values), "mean": statistics.mean(values), "se": se}


def paired_difference(runs: Sequence[Trained], first: Sequence[Trained]) -> Row | None:
    """Of val top-1 after the last epoch, seed by seed, to another recipe; None without a seed in common.

    What two runs of one seed have in common (order, crops) drops out. `interval95` is Student's t interval of the mean,
    `differs` whether it leaves out 0; None for a single seed.
    """
    others = {run.seed: run.val_top1[-1] for run in first}
    differences = [run.val_top1[-1] - others[run.seed] for run in runs if run.seed in others]
    if not differences:
        return None
    found = spread(differences)
    if found["se"] is None:
        return found | {"interval95": None, "differs": None}
    from scipy.special import stdtrit

    half = float(stdtrit(found["n"] - 1, 0.975)) * found["se"]
    low, high = found["mean"] - half, found["mean"] + half
    return found | {"interval95": [low, high], "differs": not low <= 0 <= high}


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column heads and what stands under them, in words."""
    trained = [row for row in rows if row["runs"]]
    sizes = {row["image_size_px"] for row in trained}
    at = f"@{sizes.pop()}" if len(sizes) == 1 else "@SIZE"
    with_test = any(row["test"] for row in trained)
    with_device = any(row["peak_device_mib"] for row in trained)
    heads = ["recipe", "seeds", "epochs", f"val/top1{at} early", "last", "best", f"last, against {rows[0]['recipe']}"]
    heads += [f"test/top1{at}"] * with_test
    heads += ["trained", "train images/s", "wall s", "peak MiB"] + ["device MiB"] * with_device
    lines = []
    for row in rows:
        if not row["runs"]:
            lines.append([row["recipe"], "failed", *[""] * (len(heads) - 2)])
            continue
        of_row = f" @{row['image_size_px']}" if at == "@SIZE" else ""
        line = [
            row["recipe"],
            f"{len(row['runs'])}" + (f", {len(row['failed'])} failed" if row["failed"] else ""),
            f"{row['epochs']}",
            *(_percent(row[key]) + of_row for key in ("early", "last", "best")),
            _difference(row["difference"]) if row is not rows[0] else "",
        ]
        line += [_percent(row["test"]) + of_row if row["test"] else ""] * with_test
        line += [f"{row['trained_parameters']:,}", f"{row['train_images_per_s']:.0f}", f"{row['wall_s']:.0f}"]
        line += [_mib(row["peak_mib"])] + [_mib(row["peak_device_mib"])] * with_device
        lines.append(line)
    return heads, lines


def _percent(value: Row) -> str:
    return f"{100 * value['mean']:.1f}" + (f" ± {100 * value['se']:.1f}" if value["se"] is not None else "")


def _difference(difference: Row | None) -> str:
    if difference is None:
        return "no seed in common"
    sign = "+" if difference["mean"] >= 0 else ""
    verdict = {True: "differs", False: "not told apart", None: "one seed"}[difference["differs"]]
    return f"{sign}{_percent(difference)}, {verdict}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """How to read the table."""
    trained = [row for row in rows if row["runs"]]
    if not trained:
        return ["No run has finished."]
    n = trained[0]["runs"][0]["n_val"]
    p = trained[0]["last"]["mean"]
    early = " or ".join(map(str, sorted({row["early_epochs"] for row in trained})))
    lines = [
        f"Val top-1 in %, mean ± standard error over the seeds. early: after epoch {early}; last: chosen on nothing; "
        "best: of the epoch chosen on the same val images, so a little too good. Test is scored once, with that epoch.",
        f"{n:,} val images: with others every number would be another by about "
        f"{100 * math.sqrt(p * (1 - p) / n):.1f} points (its standard error), and differences by somewhat less.",
        "differs: the 95 % interval of the paired difference over the seeds (Student's t) leaves out 0.",
        "trained: parameters of the stage that trains most. wall s: the whole program. peak MiB: its largest process, "
        "loader workers not added.",
    ]
    for row in trained:
        if again := [run["seed"] for run in row["runs"] if run["attempts"] > 1]:
            lines.append(
                f"{row['recipe']}, seed {', '.join(map(str, again))}: interrupted; wall s counts what was done twice."
            )
    return lines


def comparison_table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    heads, lines = cells(rows)
    table = Table(*heads, title="comparison", title_justify="left")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(report: Mapping[str, Any]) -> str:
    """For a README: the command and the date in a line, the table, how to read it."""
    heads, lines = cells(report["recipes"])
    table = [heads, ["---"] * len(heads), *lines]
    about = f"`{report['command']}` ({report['date']}, {report['machine']}):"
    rows = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([about, "", *rows, "", *notes(report["recipes"])]) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG: val top-1 over epochs, a line a recipe, with a band from its worst to its best seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in (row for row in rows if row["runs"]):
        curves = [[100 * top1 for top1 in run["val_top1"]] for run in row["runs"]]
        epochs = range(1, row["epochs"] + 1)
        label = f"{row['recipe']} @{row['image_size_px']}"
        (line,) = axes.plot(epochs, [statistics.mean(at) for at in zip(*curves, strict=True)], ".-", label=label)
        low, high = ([pick(at) for at in zip(*curves, strict=True)] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    seeds = max((len(row["runs"]) for row in rows), default=0)
    axes.set(xlabel="epoch", ylabel="val top-1, %", title=f"mean and range over {seeds} seed{'s' * (seeds != 1)}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=120, format="png")
    replace(temporary, path)
