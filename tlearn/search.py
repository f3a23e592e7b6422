"""`tlearn search`: candidates on small budgets, the best of them on larger ones, and a config for the full run.

FOLDER/NAME/rung-K/seed-S*   a run and what stands beside it (tlearn/apart.py); NAME is the config's file stem
FOLDER/candidates.json       what was planned, where no configs were given
FOLDER/search.*              json (everything), md (the table), png (accuracy at every rung)
FOLDER/winner.yaml           the full run of the winner

Successive halving (tlearn/halving.py); a rung is a `quick` section, its runs are what `--quick` makes of the candidates
with it. Imports no torch.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlearn.apart import Job, check_not_launched, check_same_images, machine_of, train_all
from tlearn.comparison import read_run
from tlearn.config import Config
from tlearn.configfile import dump_options, given_options, load_config, shrunk
from tlearn.console import show
from tlearn.data.prepare import open_or_prepare
from tlearn.errors import TlearnError
from tlearn.files import write_json, write_text
from tlearn.halving import ETA, Rung, Score, draw, markdown, notes, outcome, rungs
from tlearn.launch import call, run_ranks
from tlearn.profile import Profile
from tlearn.stages import expand, filled
from tlearn.submit import train_in_jobs

USUAL_PX = 224
"""For which most weights were trained: the full size of a candidate that names none."""

Scores = dict[str, Score]
Jobs = dict[str, list[Job]]
"""Of a rung, by candidate: one for every seed."""


def search(
    data: str,
    files: Sequence[Path],
    overrides: Sequence[str],
    folder: Path,
    *,
    seeds: int = 1,
    at_once: int = 1,
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Successive halving over recipes; finished runs are kept.

    Args:
        data: prepared images, or a folder of class folders.
        files: a config per candidate, whose name is the file's stem; none: the neighbours of `tlearn plan`.
        overrides: `a.b=c` for all of them; `quick.*` is the first rung.
        folder: for runs and tables.
        seeds: 0, 1, ...; of all runs.
        at_once: so many runs side by side.
        profile: every run is a Slurm job of this shape; all of a rung at once, as Slurm allows.

    Returns:
        What search.json holds; `failed` counts the runs that failed.

    Raises:
        TlearnError: every problem of the candidates, a folder that holds other runs; nothing was trained.
        StoppedBySignalError: what was under way is saved; the same call goes on.
    """
    check_not_launched("search")
    keys = {text: text.partition("=")[0] for text in overrides}
    if "seed" in keys.values():
        raise TlearnError("the command line: seed has no effect: --seeds N trains every candidate with seeds 0 to N-1")
    if "data.path" in keys.values():
        raise TlearnError(f"the command line: data.path has no effect: the images are {data}, the first argument")
    if profile is not None and not files:
        raise TlearnError("--profile: needs configs: a plan rests on this machine, not on those of the jobs")
    limits = [text for text, key in keys.items() if key.partition(".")[0] == "quick"]
    options = [text for text in overrides if text not in limits]
    candidates = _given(data, files, options) if files else _planned(data, options, folder)
    if len(candidates) < 2:
        raise TlearnError("search takes two candidates or more")
    check_same_images(list(candidates.items()))
    ladder = _ladder(candidates, load_config(None, [f"data.path={data}", *limits], quick=True))
    jobs = _jobs(candidates, ladder, seeds, folder)
    scores, failed = _climbed(jobs, ladder, at_once, profile)
    command = ["tlearn", "search", data, *map(str, files), *overrides, "--out", str(folder)]
    report: dict[str, Any] = {
        "command": shlex.join(command + (["--seeds", str(seeds)] if seeds > 1 else [])),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_of([job for rung in jobs for some in rung.values() for job in some if job.is_finished]),
        "selected_on": "val",
        "eta": ETA,
        "seeds": list(range(seeds)),
        "failed": failed,
        **outcome(list(candidates), ladder, scores),
    }
    report["candidates"] = _rows(report, jobs, scores)
    report["notes"] = notes(report)
    if report["winner"] is not None:
        winner = folder / "winner.yaml"
        report["train"] = shlex.join(["tlearn", "train", str(winner)])
        write_text(winner, _about(report) + dump_options(given_options(candidates[report["winner"]])))
    write_json(folder / "search.json", report)
    write_text(folder / "search.md", markdown(report))
    draw(report, folder / "search.png")
    show(f"search    {folder}/search.json, search.md, search.png")
    return report


def _given(data: str, files: Sequence[Path], options: Sequence[str]) -> dict[str, Config]:
    """Candidates from files.

    Raises:
        TlearnError: the problems of all files.
    """
    stems = [file.stem for file in files]
    if twice := sorted({str(file) for file in files if stems.count(file.stem) > 1}):
        raise TlearnError(f"{', '.join(twice)}: these candidates have one name; rename a file")
    found, problems = {}, []
    for file in files:
        try:
            found[file.stem] = load_config(file, [*options, f"data.path={data}"])
            filled(found[file.stem])
        except TlearnError as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise TlearnError("\n".join(problems))
    return found


def _planned(data: str, options: Sequence[str], folder: Path) -> dict[str, Config]:
    """Candidates around the plan; a search that goes on is not planned again.

    Raises:
        TlearnError: as `tlearn plan`; the folder's candidates were planned for something else.
    """
    if strategy := [text for text in options if text.partition("=")[0] == "strategy"]:
        raise TlearnError(f"the command line: {strategy[0]} has no effect without configs: the stages are planned")
    file, asked = folder / "candidates.json", [data, *options]
    if not file.is_file():
        show("search    no configs were given: looking at the images and at this machine")
        config = load_config(None, [*options, f"data.path={data}"])
        # a process of its own: this one imports no torch, whose memory would count as that of its runs
        found = run_ranks(call, ("tlearn.neighbours:neighbours", config), 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"asked": asked, "candidates": found})
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["asked"] != asked:
        raise TlearnError(f"{file}: was planned for `{shlex.join(record['asked'])}`; use a new --out")
    return {name: Config.model_validate(options) for name, options in record["candidates"].items()}


def _ladder(candidates: Mapping[str, Config], limits: Config) -> list[Rung]:
    """From `quick.*` to the full run of the largest candidate.

    Args:
        candidates: by name.
        limits: its `quick` holds what the command line says; the rest is that of the candidates.
    """
    said = limits.quick.model_dump(include=limits.quick.model_fields_set)
    quick = [config.quick.model_copy(update=said) for config in candidates.values()]
    first = Rung(*(max(getattr(section, name) for section in quick) for name in Rung._fields))
    stages = [(config, stage) for config in candidates.values() for stage in filled(config)]
    sizes = [stage.image_size or USUAL_PX for _, stage in stages] + [c.data.image_size or 0 for c, _ in stages]
    epochs = max(sum(stage.epochs for stage in filled(config)) for config in candidates.values())
    return rungs(first, Rung(max(sizes), epochs, _images(next(iter(candidates.values())))), len(candidates))


def _images(config: Config) -> int:
    """Of train or of val, whichever has more: `quick.samples` limits both."""
    if config.data.stream is not None:
        return config.data.stream.train_samples
    splits = open_or_prepare(config.data.path).splits
    counts = {name: len(splits[name]) if name in splits else 1 for name in ("train", "val")}
    limits = {"train": config.data.max_train, "val": config.data.max_val}
    return max(min(counts[name], limits[name] or counts[name]) for name in counts)


def _jobs(candidates: Mapping[str, Config], ladder: Sequence[Rung], seeds: int, folder: Path) -> list[Jobs]:
    """All runs that may come, by rung.

    Raises:
        TlearnError: shortened candidates that do not work, a folder that holds other runs.
    """
    jobs: list[Jobs] = []
    for number, rung in enumerate(ladder, start=1):
        jobs.append({})
        for name, config in candidates.items():
            # stages are listed first: a named strategy leaves some out where there are few epochs
            update = {"quick": config.quick.model_copy(update=rung._asdict())}
            try:
                short = shrunk(expand(config).model_copy(update=update), given=())
                filled(short)
            except TlearnError as error:
                raise TlearnError(f"{name}, in rung {number}: {error}") from None
            place = folder / name / f"rung-{number}"
            jobs[-1][name] = [
                Job(name, seed, short.model_copy(update={"seed": seed}), place / f"seed-{seed}")
                for seed in range(seeds)
            ]
            for job in jobs[-1][name]:
                job.check_folder()
                _check_images(job)
    return jobs


def _check_images(job: Job) -> None:
    """A finished run is kept as long as its images are what they were; one that has not ended checks that itself."""
    data = job.config.data
    if not job.is_finished or data.reader == "stream" or job.config.objective.name == "domain_adversarial":
        return  # a stream has no index, and the fingerprint of two domains is of both
    if job.result()["data_fingerprint"] != open_or_prepare(data.path).fingerprint:
        raise TlearnError(f"{job.folder}: was trained on other images than {data.path} holds now; use a new --out")


def _climbed(
    jobs: Sequence[Jobs], ladder: Sequence[Rung], at_once: int, profile: Profile | None
) -> tuple[list[Scores], int]:
    """Scores of every rung that was run, and how many runs failed."""
    racing, scores, failed = list(jobs[0]), list[Scores](), 0
    for number, (rung, all_jobs) in enumerate(zip(ladder, jobs, strict=True), start=1):
        about = f"{rung.image_size} px, {rung.epochs} epochs, at most {rung.samples:,} images"
        show(f"search    rung {number} of {len(ladder)}: {len(racing)} candidates, {about}")
        by_seed = zip(*(all_jobs[name] for name in racing), strict=True)
        due = [job for turn in by_seed for job in turn if not job.is_finished]
        for job in due:
            job.note_what_is_asked()
        if profile is not None:
            failed += train_in_jobs("search", due, profile)
        else:
            failed += train_all("search", due, at_once=at_once)
        finished = [name for name in racing if all(job.is_finished for job in all_jobs[name])]
        scores.append({name: _score(all_jobs[name]) for name in finished})
        found = outcome(list(jobs[0]), ladder, scores)
        racing = found["rungs"][-1]["kept"]
        show(f"search    {', '.join(racing) or 'nobody'} {'stays' if len(racing) == 1 else 'stay'}")
        if len(racing) < 2:
            break
    return scores, failed


def _score(jobs: Sequence[Job]) -> Score:
    results = [job.result() for job in jobs]
    losses = [math.inf if r["val"]["loss"] is None else r["val"]["loss"] for r in results]
    top1 = statistics.mean(r["val"]["top1"] for r in results)
    return Score(jobs[0].name, top1, statistics.mean(losses), results[0]["val"]["n"], results[0]["image_size_px"])


def _rows(report: Mapping[str, Any], jobs: Sequence[Jobs], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """One a candidate: the winner first, then who came further, then who was better there."""
    rows = []
    for name in jobs[0]:
        own = [found[name] for found in scores if name in found]
        ran = [job for rung in jobs for job in rung[name] if job.beside(".yaml").is_file()]
        done = [read_run(job.folder, job.seed, job.attempts()) for job in ran if job.is_finished]
        last = max(number for number, rung in enumerate(report["rungs"], start=1) if name in rung["candidates"])
        is_broken = name in report["rungs"][last - 1]["broken"]
        rows.append(
            {
                "candidate": name,
                "outcome": "won"
                if name == report["winner"]
                else f"{'failed in' if is_broken else 'cut after'} rung {last}",
                "rung": last,
                "scores": [
                    {
                        "top1": score.top1,
                        "se": score.standard_error,
                        "loss": score.loss if math.isfinite(score.loss) else None,
                        "n_val": score.n_val,
                        "image_size_px": score.image_size_px,
                    }
                    for score in own
                ],
                "trained_parameters": done[-1].trained_parameters if done else None,
                "seconds": round(sum(_seconds(job) for job in ran), 1),
            }
        )
    worst = {"top1": 0.0, "loss": 0.0}
    return sorted(
        rows, key=lambda row: (row["outcome"] != "won", -len(row["scores"]), -(row["scores"] or [worst])[-1]["top1"])
    )


def _seconds(job: Job) -> float:
    """Of all its processes; of a Slurm job, which no process here has seen, of its steps."""
    if attempts := job.attempts():
        return sum(float(attempt["wall_s"]) for attempt in attempts)
    return float(job.result()["seconds"]) if job.is_finished else 0.0


def _about(report: Mapping[str, Any]) -> str:
    """The head of winner.yaml."""
    row, others = report["candidates"][0], len(report["candidates"]) - 1
    score, rung = row["scores"][-1], report["rungs"][-1]
    chosen = (
        f"{row['candidate']}: the winner of {others + 1} candidates, chosen on val: val/top1@{score['image_size_px']} "
        f"{score['top1']:.1%} (standard error {100 * score['se']:.1f} points, {score['n_val']:,} images) after rung "
        f"{len(report['rungs'])} ({rung['epochs']} epochs, at most {rung['samples']:,} images). Of the other {others}, "
        f"{len(report['close'])} came within one standard error. No test split was looked at; the full run scores it."
    )
    lines = [*textwrap.wrap(chosen, 116), "", f"  {report['train']}", ""]
    lines += [f"Found by `{report['command']}` ({report['date']}, {report['machine']})", ""]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
