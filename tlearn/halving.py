"""Successive halving (Jamieson & Talwalkar 2016): all candidates on a small budget, the best of them on a larger one.

The rungs, who stays, what may be said of it; table and picture. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from tlearn.files import replace

ETA = 3
"""One in so many candidates stays, and the next rung costs so many times as much."""
_STEP_PX = 32


class Rung(NamedTuple):
    """The limits of a rung's runs; names as those of `quick.*`, as which every candidate is given them."""

    image_size: int
    epochs: int
    samples: int

    @property
    def cost(self) -> int:
        """Pixels that a run looks at."""
        return self.image_size**2 * self.epochs * self.samples


class Score(NamedTuple):
    """What a candidate came to at a rung: means over its seeds."""

    name: str
    top1: float
    """On val, of the best epoch."""
    loss: float
    """Of the same epoch; infinite where it is not finite."""
    n_val: int
    image_size_px: int

    @property
    def standard_error(self) -> float:
        """Of `top1`: with other val images it would be another by about as much."""
        return math.sqrt(self.top1 * (1 - self.top1) / self.n_val)


def rungs(first: Rung, full: Rung, candidates: int) -> list[Rung]:
    """As many as it takes to come down to one candidate, or fewer where the full run is reached before.

    Size, epochs and images grow by one share of the way from `first` to `full`, on a logarithmic scale, so that the
    cost of a run grows by ETA.

    Args:
        first: of all candidates.
        full: what nobody exceeds.
        candidates: at the first rung.
    """
    first = Rung(*map(min, first, full))
    ladder = [first]
    while ladder[-1] != full and (candidates := stays(candidates)) > 1:
        cost = min(full.cost, first.cost * ETA ** len(ladder))
        share = math.log(cost / first.cost) / math.log(full.cost / first.cost)
        size, epochs = (a * (b / a) ** share for a, b in zip(first[:2], full[:2], strict=True))
        size_px = full.image_size if cost == full.cost else round(size / _STEP_PX) * _STEP_PX
        # the images make up for what is rounded
        rung = Rung(size_px, round(epochs), round(cost / (size_px**2 * round(epochs))))
        ladder.append(Rung(*map(min, map(max, rung, ladder[-1]), full)))
    return ladder


def stays(candidates: int) -> int:
    """How many of them go on: one in ETA, rounded up."""
    return -(-candidates // ETA)


def ranked(scores: Sequence[Score]) -> list[Score]:
    """The best first: by accuracy, then by loss."""
    return sorted(scores, key=lambda score: (-score.top1, score.loss, score.name))


def outcome(names: Sequence[str], ladder: Sequence[Rung], scores: Sequence[Mapping[str, Score]]) -> dict[str, Any]:
    """Who was cut where, who won, and what is within noise.

    Args:
        names: of the candidates.
        ladder: all rungs.
        scores: by rung that was run, of the candidates that have finished it.

    Returns:
        `winner`: its name, or None; `rungs`: limits, who ran, who went on, and who was cut within one standard error of
        the last that went on; `close`: candidates within one standard error of the winner where both were scored last.
    """
    racing, rows = list(names), []
    for rung, finished in zip(ladder, scores, strict=False):
        order = ranked(list(finished.values()))
        kept = order[: 1 if rung == ladder[-1] else stays(len(racing))]
        edge = kept[-1].top1 - kept[-1].standard_error if kept else 0.0
        rows.append(
            {
                **rung._asdict(),
                "candidates": racing,
                "kept": [score.name for score in kept],
                "cut_within_noise": [score.name for score in order[len(kept) :] if score.top1 >= edge],
                "broken": [name for name in racing if name not in finished],
            }
        )
        racing = [score.name for score in kept]
    winner = racing[0] if racing else None
    close = []
    for name in names:
        both = [found for found in scores if name in found and winner in found]
        if both and winner is not None and name != winner:
            best = both[-1][winner]
            close += [name] * (both[-1][name].top1 >= best.top1 - best.standard_error)
    return {"winner": winner, "rungs": rows, "close": close}


def notes(report: Mapping[str, Any]) -> list[str]:
    """How to read the table, and how far to trust it."""
    if report["winner"] is None:
        return ["No candidate has finished the first rung."]
    rows = {row["candidate"]: row for row in report["candidates"]}
    best = rows[report["winner"]]["scores"][-1]
    among, close = len(rows) - 1, report["close"]
    lines = [
        "Val top-1 in %, of the best epoch, chosen on val: a little too good, and that of the winner more so, as the "
        "best of several. Columns cannot be compared with each other: sizes, epochs and images differ. Test is "
        "not scored.",
        f"{best['n_val']:,} val images: the winner's accuracy has a standard error of {100 * best['se']:.1f} points. "
        f"Of the other {among} candidates, {len(close)} came within one standard error of it, where both were scored "
        f"last{': ' + ', '.join(close) if close else ''}.",
        "trained: parameters of the stage that trains most. s: all runs of the candidate; what frozen layers gave "
        "another one is not computed again.",
    ]
    for number, rung in enumerate(report["rungs"], start=1):
        if (within := rung["cut_within_noise"]) and number < len(report["rungs"]):  # else they are close to the winner
            names = ", ".join(within)
            lines.append(f"Cut after rung {number}, within one standard error of the last that stayed: {names}.")
        if broken := rung["broken"]:
            lines.append(f"Failed in rung {number}, and dropped out: {', '.join(broken)}.")
    return lines


def cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and what stands under them, in words."""
    heads = ["candidate", "came to"]
    for number, rung in enumerate(report["rungs"], start=1):
        heads.append(f"rung {number}, {rung['epochs']} epochs: val/top1@{rung['image_size']}")
    heads += ["trained", "s"]
    lines = []
    for row in report["candidates"]:
        line = [row["candidate"], row["outcome"]]
        for number, rung in enumerate(report["rungs"]):
            score = row["scores"][number] if number < len(row["scores"]) else None
            other = f" @{score['image_size_px']}" if score and score["image_size_px"] != rung["image_size"] else ""
            line.append(f"{100 * score['top1']:.1f}{other}" if score else "")
        trained = row["trained_parameters"]
        lines.append([*line, "-" if trained is None else f"{trained:,}", f"{row['seconds']:.0f}"])
    return heads, lines


def search_table(report: Mapping[str, Any]) -> Table:
    """For the terminal."""
    heads, lines = cells(report)
    table = Table(*heads, title=f"search (selected on {report['selected_on']})", title_justify="left")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(report: Mapping[str, Any]) -> str:
    """For a README: the command and the date in a line, the table, how to read it."""
    heads, lines = cells(report)
    rows = [f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines]]
    about = f"`{report['command']}` ({report['date']}, {report['machine']}), selected on {report['selected_on']}:"
    return "\n".join([about, "", *rows, "", *report["notes"]]) + "\n"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """A PNG: val top-1 at every rung with its standard error, a line a candidate, the winner's a thick one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in (row for row in report["candidates"] if row["scores"]):
        heights, errors = ([100 * score[key] for score in row["scores"]] for key in ("top1", "se"))
        wide = 2.5 if row["candidate"] == report["winner"] else 1.0
        where = range(1, len(heights) + 1)
        axes.errorbar(where, heights, yerr=errors, fmt=".-", lw=wide, elinewidth=0.5, capsize=2, label=row["candidate"])
    ticks = [f"rung {k}\n{r['image_size']} px, {r['epochs']} epochs" for k, r in enumerate(report["rungs"], start=1)]
    axes.set_xticks(range(1, len(ticks) + 1), ticks)
    axes.set(ylabel="val top-1, %", xlim=(0.7, len(ticks) + 0.3), title="candidates, with one standard error")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=120, format="png")
    replace(temporary, path)
