"""The commands of a Slurm job: submit, status, logs, cancel. cli.py takes them in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from tlearn.arguments import JsonFlag, print_json, recipe, split_arguments
from tlearn.errors import TlearnError

commands = typer.Typer()
How = Literal["quick", "quick_first"] | None


@commands.command()
def submit(
    config: Annotated[list[str] | None, typer.Argument(help="[CONFIG.yaml] [a.b=c ...]", show_default=False)] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="The job: slurm/*.yaml. Default: the last of RUN; else 1 process."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder, on a disk that all nodes see.")] = None,
    after: Annotated[str | None, typer.Option(help="Id of a job that has to end well before.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short run on small images, and a verdict.")] = False,
    quick_first: Annotated[
        bool, typer.Option("--quick-first", help="That as a job in RUN/quick, and behind it the full run, on a go.")
    ] = False,
    override: Annotated[
        bool, typer.Option("--override", help="Go on with options that have changed, where that is safe.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="The same job on this machine, without Slurm.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch file; submit nothing.")] = False,
) -> None:
    """Train on a Slurm cluster: a job that is queued again until the run is done. Prints its id."""
    if local and (dry_run or after is not None):
        raise TlearnError(f"{'--dry-run' if dry_run else '--after'}: is for Slurm, and has no effect with --local")
    if quick and quick_first:
        raise TlearnError("--quick: has no effect with --quick-first, which begins with one; leave it out")
    from tlearn.configfile import full_config, load_config
    from tlearn.files import new_run
    from tlearn.jobs import QUICK, last_submission, read_order
    from tlearn.jobs import cancel as cancel_job
    from tlearn.profile import Profile, load_profile
    from tlearn.submit import sbatch_text
    from tlearn.submit import submit as send

    file, overrides = recipe(config, run)
    how: How = "quick_first" if quick_first else "quick" if quick else None
    parsed, given = full_config(file, overrides) if how else (load_config(file, overrides), ())
    if how == "quick" and "quick.init_from_quick" in given:
        raise TlearnError("the command line: quick.init_from_quick has no effect without --quick-first")
    place = run or new_run(parsed.strategy)
    last = last_submission(place)
    if how is None and last is not None and split_arguments(config or [])[0] is None:  # it goes on as it began
        how, given = (order := read_order(last))["quick"], order["given"]
    if profile is None and last is not None:
        profile = last / "profile.yaml"
    job = load_profile(profile) if profile is not None else Profile()
    put = partial(send, parsed, job, local=local, override=override, given=given)
    if how == "quick_first" and not local:
        if dry_run:
            typer.echo(sbatch_text(job, place / QUICK, after))
            after = "JOB"
        else:
            after = put(place / QUICK, after=after, quick="quick")
    if dry_run:
        typer.echo(sbatch_text(job, place, after))
        return
    try:
        typer.echo(put(place, after=after, quick=how))
    except TlearnError:
        if how == "quick_first" and not local:
            cancel_job(place / QUICK)
        raise
    typer.echo(f"run folder: {place}   (tlearn status, logs -f, cancel)", err=True)


@commands.command()
def status(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonFlag = False) -> None:
    """Where a run is, in Slurm and in its folder."""
    from tlearn.jobs import status as look

    report = look(run)
    if as_json:
        print_json(report)
    else:
        typer.echo("\n".join(f"{key:14s} {value}" for key, value in report.items()))


@commands.command()
def logs(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    rank: Annotated[int, typer.Option(min=0, help="Of which process.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job is over.")] = False,
) -> None:
    """What a process of a submitted run has printed, on stderr."""
    from tlearn.jobs import logs as read

    for text in read(run, rank, follow=follow):
        typer.echo(text, nl=False)


@commands.command()
def cancel(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """End the Slurm job of a run, which saves first; `tlearn submit --run RUN` goes on."""
    from tlearn.jobs import cancel as end

    typer.echo(f"job {end(run)} is cancelled; go on with: tlearn submit --run {run}")
