"""The commands around a training: `plan` and `lr-find` before it, `advise` after it. cli.py takes them in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tlearn.arguments import JsonFlag, print_json, split_arguments

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
