"""The commands around a training: `plan`, `search` and `lr-find` before it, `advise` after it. cli.py takes them in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tlearn.arguments import JsonFlag, files_and_options, print_json, split_arguments
from tlearn.errors import TlearnError

commands = typer.Typer()


class Needs(StrEnum):
    """What matters besides accuracy."""

    any = "any"
    speed = "speed"
    detail = "detail"


@commands.command()
def plan(
    data: Annotated[Path, typer.Argument(help="Prepared data, or a folder of class folders.")],
    options: Annotated[list[str] | None, typer.Argument(help="[a.b=c ...] to plan around.", show_default=False)] = None,
    need: Annotated[Needs, typer.Option(help="Little time per image, or fine detail.")] = Needs.any,
    as_json: JsonFlag = False,
) -> None:
    """Look at images and machine; print which backbone, stages, image size and batch to train, and why."""
    from tlearn.auto import document, make_plan
    from tlearn.configfile import dump_options, load_config
    from tlearn.console import print_result
    from tlearn.tables import plan_table

    config = load_config(None, [f"data.path={data}", *(options or [])])
    made = make_plan(config, need.value)
    report = document(config, made)
    if as_json:
        print_json(report)
        return
    print_result(plan_table(made))
    typer.echo(f"\n# plan.yaml; tlearn train plan.yaml\n{dump_options(report['config'])}")
    typer.echo(f"# or in one line:\n{report['command']}")


@commands.command()
def lr_find(
    config: Annotated[list[str] | None, typer.Argument(help="[CONFIG.yaml] [a.b=c ...]", show_default=False)] = None,
    stage: Annotated[str | None, typer.Option(help="Name of a stage.", show_default="every one")] = None,
    start: Annotated[float, typer.Option(min=1e-12, help="Rate of the first step.")] = 1e-7,
    end: Annotated[float, typer.Option(max=1e6, help="Rate of the last step.")] = 10.0,
    steps: Annotated[int, typer.Option(min=20, help="Of each test.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/<time>-lr-find.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a few steps at growing rates; print the rate that each stage and each of its parts could take."""
    from tlearn.configfile import load_config
    from tlearn.console import print_result, show
    from tlearn.lrfind import find_rates
    from tlearn.ratecurve import Span
    from tlearn.tables import rates_table

    report = find_rates(load_config(*split_arguments(config or [])), stage, out, Span(start, end, steps))
    show(f"lr-find   {report['folder']}/lr-find.json, lr-find.png")
    if as_json:
        print_json(report)
        return
    print_result(rates_table(report))
    typer.echo(f"to train so: {' '.join(report['options'])}" if report["options"] else "no rate is suggested")


@commands.command()
def search(
    data: Annotated[str, typer.Argument(help="Prepared data, or a folder of class folders.")],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            help="[CONFIG.yaml ...] [a.b=c ...] Without configs: the plan and its neighbours.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and winner.yaml.")] = Path("runs/search"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; they share the cores.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a candidate at every rung, with seeds 0, 1, ...")] = 1,
    profile: Annotated[Path | None, typer.Option(help="Every run is a Slurm job of this shape: slurm/*.yaml.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Try recipes on few and small images, the best of them on more; write a config for the full run of the winner.

    Exit code 1: a run failed."""
    from tlearn.console import print_result
    from tlearn.halving import search_table
    from tlearn.profile import load_profile
    from tlearn.search import search as run

    if profile is not None and jobs > 1:
        raise TlearnError("--jobs: has no effect with --profile; Slurm says how many run at once")
    files, overrides = files_and_options(recipes or [])
    job = load_profile(profile) if profile is not None else None
    report = run(data, files, overrides, out, seeds=seeds, at_once=jobs, profile=job)
    if as_json:
        print_json(report)
    else:
        print_result(search_table(report))
        print_result("\n".join(report["notes"]))
        if "train" in report:
            typer.echo(f"\n{report['train']}")
    if report["failed"]:
        raise typer.Exit(1)


@commands.command()
def advise(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonFlag = False) -> None:
    """What to change after a run: its symptoms, in numbers, and the options to set."""
    from tlearn.advice import advise as look
    from tlearn.advice import read_run
    from tlearn.console import print_result
    from tlearn.tables import advice_table

    found = look(read_run(run))
    if as_json:
        print_json([row._asdict() for row in found])
    elif found:
        print_result(advice_table(found))
    else:
        typer.echo("no symptom found")
