"""The commands: parse, delegate, turn outcomes into exit codes. torch is imported only where it is needed.

Exit codes: 0 done, 2 bad input or configuration, 3 no-go and 4 unsure of a quick run, 75 stopped by a signal with
everything saved, 1 anything else.
A command runs in this process; `--nproc N` starts N of them unless a launcher (accelerate, torchrun) has done so.
"""

from __future__ import annotations

import io
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tlearn import __version__, cli_jobs, cli_plan
from tlearn.arguments import JsonFlag, files_and_options, print_json, recipe, split_arguments
from tlearn.errors import EXPECTED, TlearnError, refused
from tlearn.rendezvous import resolved
from tlearn.signals import handled_by, stop

app = typer.Typer(
    name="tlearn",
    help="A folder of labelled images in; a trained, honestly evaluated image classifier out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (cli_jobs.commands, cli_plan.commands):
    app.add_typer(commands)


class ResumeMode(StrEnum):
    """What to do with a run folder that has checkpoints."""

    auto = "auto"
    never = "never"
    must = "must"


class Classifier(StrEnum):
    """What is fitted to features."""

    linear = "linear"
    logreg = "logreg"
    svm = "svm"
    knn = "knn"


NprocOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes on this machine. Under a launcher: how many it must have started.", show_default="1"
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tlearn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prepare(
    src: Annotated[str, typer.Argument(help="FOLDER, TABLE.csv, 'x-{000000..000127}.tar' or torchvision:NAME.")],
    out: Annotated[Path, typer.Argument(help="New folder for the shards, index.json and audit.json.")],
    val: Annotated[float, typer.Option(help="Share of every class that is kept for validation.")] = 0.2,
    test: Annotated[float, typer.Option(help="Share of every class that is kept for the final test.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    max_side: Annotated[int | None, typer.Option(help="Scale larger images down to this side, px.")] = None,
    shard_mib: Annotated[int, typer.Option(help="Size of a shard, MiB.")] = 128,
    classes: Annotated[str | None, typer.Option(help="a,b,c: names of classes that SRC numbers 0, 1, 2.")] = None,
    val_from: Annotated[str | None, typer.Option(help="Tar shards of the validation images.")] = None,
) -> None:
    """Verify, deduplicate and split labelled images; write WebDataset shards."""
    from tlearn.data.plan import Options
    from tlearn.data.prepare import prepare as run

    options = Options(val=val, test=test, seed=seed, max_side=max_side, shard_mib=shard_mib)
    run(src, out, options, classes=() if classes is None else classes.split(","), val_from=val_from)


@app.command()
def train(
    config: Annotated[list[str] | None, typer.Argument(help="[CONFIG.yaml] [a.b=c ...]", show_default=False)] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A short run on small images (quick.*), and a verdict: exit code 0 go, 3 no-go, 4 unsure."
        ),
    ] = False,
    quick_first: Annotated[
        bool, typer.Option("--quick-first", help="That in RUN/quick, and the full run only on a go.")
    ] = False,
    run: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<time>-<strategy>.")] = None,
    nproc: NprocOption = None,
    resume: Annotated[ResumeMode, typer.Option(help="Go on with the run in the folder?")] = ResumeMode.auto,
    override: Annotated[
        bool, typer.Option("--override", help="Go on with options that have changed, where that is safe.")
    ] = False,
) -> None:
    """Train and evaluate a classifier. Without CONFIG, --run RUN goes on with the run in RUN."""
    from tlearn.configfile import full_config, load_config
    from tlearn.launch import in_processes

    if run is not None and not config:  # what a quick run is about is not its own config
        full = run / "full.yaml" if quick else run / "quick" / "full.yaml"
        config = [str(full)] if (quick or quick_first) and full.is_file() else config
    file, overrides = recipe(config, run)
    if run is None and resume is ResumeMode.must:
        raise TlearnError("--resume must: goes on with a run; name its folder: --run RUN")
    if quick and quick_first:
        raise TlearnError("--quick: has no effect with --quick-first, which begins with one; leave it out")
    parsed, given = full_config(file, overrides) if quick or quick_first else (load_config(file, overrides), None)
    if quick and given and "quick.init_from_quick" in given:
        raise TlearnError("the command line: quick.init_from_quick has no effect without --quick-first")
    if parsed.data.reader == "indexed" and (nproc or 1) > 1 and "WORLD_SIZE" not in os.environ:
        from tlearn.data.prepare import open_or_prepare

        open_or_prepare(parsed.data.path)  # here, where its progress is seen, before there are several processes
    if given is None:
        in_processes("tlearn.run:train", nproc, parsed, run, resume.value, override)
        return
    from tlearn.verdict import EXIT_CODES

    name = "tlearn.quick:quick_first" if quick_first else "tlearn.quick:quick"
    report = in_processes(name, nproc, parsed, given, run, resume.value, override)
    raise typer.Exit(EXIT_CODES[report["verdict"]])


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path | None, typer.Option(help="Prepared data or class folders. Default: the run's.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score the best model of a run on val and test images."""
    from tlearn.console import print_result
    from tlearn.predict import load
    from tlearn.tables import scores_table

    scores = load(run).evaluate(data)
    if as_json:
        print_json(scores)
    else:
        print_result(scores_table(scores))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    topk: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    as_json: JsonFlag = False,
) -> None:
    """Print the most likely classes of images."""
    from tlearn.data.folders import walk
    from tlearn.predict import load

    files = [file for path in paths for file in (walk(path) if path.is_dir() else [path])]
    predictions = load(run).predict(files, topk)
    if as_json:
        top = [[{"class": name, "probability": value} for name, value in p.classes] for p in predictions]
        print_json([{"file": p.file, "top": t, "error": p.error} for p, t in zip(predictions, top, strict=True)])
    else:
        for p in predictions:
            best = "  ".join(f"{name} {value:.1%}" for name, value in p.classes)
            typer.echo(f"{p.file}: {best or 'ERROR ' + str(p.error)}", err=p.error is not None)
    if not files:
        raise TlearnError(f"no files in {', '.join(map(str, paths))}")
    if all(p.error for p in predictions):
        raise TlearnError(f"none of {len(predictions)} files could be read")


@app.command()
def doctor(
    nproc: NprocOption = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="In a short Slurm job, on the disk of --run.")] = False,
    profile: Annotated[Path | None, typer.Option(help="The shape of that job: slurm/*.yaml.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder on the disk that runs will use; --slurm: `runs`.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what the processes of a run see, test that they reach each other, and say what is wrong."""
    from tlearn.console import print_result
    from tlearn.launch import in_processes

    if slurm and nproc is not None:
        raise TlearnError("--nproc: has no effect with --slurm; the profile says how many processes there are")
    if profile is not None and not slurm:
        raise TlearnError("--profile: is for --slurm")
    if slurm:
        from tlearn.profile import Profile, load_profile
        from tlearn.submit import examined

        report = examined(load_profile(profile) if profile is not None else Profile(), run or Path("runs"))
    else:
        report = in_processes("tlearn.doctor:examine", nproc, run)
    if int(os.environ.get("RANK") or 0) > 0:
        return
    if as_json:
        print_json(report)
    else:
        from tlearn.doctor import report_table

        print_result(report_table(report))
        print_result("precision: " + ", ".join(report["precision"]))
        print_result(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
        print_result("\n".join(report["problems"]) or "no problem found")
    if report["problems"]:
        raise typer.Exit(1)


@app.command()
def probe(
    data: Annotated[Path, typer.Argument(help="Prepared data, or a folder of class folders.")],
    options: Annotated[list[str] | None, typer.Argument(help="[a.b=c ...]", show_default=False)] = None,
    backbone: Annotated[list[str] | None, typer.Option(help="One or more.", show_default="timm:resnet18")] = None,
    classifier: Annotated[Classifier, typer.Option(help="Of the features.")] = Classifier.linear,
    as_json: JsonFlag = False,
) -> None:
    """How well do frozen features separate the classes? Chosen by cross-validation on train, scored once on val."""
    from tlearn.configfile import load_config
    from tlearn.console import print_result
    from tlearn.models.backbones import full_name
    from tlearn.probe import probe as run
    from tlearn.tables import probe_table

    file, overrides = split_arguments(options or [])
    if file is not None:
        raise TlearnError(f"{file}: probe takes options as a.b=c only")
    models = [[f"model.backbone={name}"] for name in backbone or []] or [[]]
    configs = [load_config(None, [f"data.path={data}", *overrides, *model]) for model in models]
    for config in configs:  # all of them, before the first one takes its time
        full_name(config.model.backbone)
    rows = [run(config, classifier.value) for config in configs]
    if as_json:
        print_json(rows)
    else:
        print_result(probe_table(rows))


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="CONFIG.yaml CONFIG.yaml ... [a.b=c ...]", show_default=False)],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every recipe, with seeds 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the table.")] = Path("runs/compare"),
    nproc: Annotated[int, typer.Option(min=1, help="Processes of each run.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Train recipes on the same images with the same seeds, one run at a time; one table. Exit code 1: a run failed."""
    from tlearn.compare import compare as run
    from tlearn.comparison import comparison_table
    from tlearn.console import print_result

    files, overrides = files_and_options(recipes)
    report = run(files, overrides, out, seeds=seeds, nproc=nproc)
    if as_json:
        print_json(report)
    else:
        print_result(comparison_table(report["recipes"]))
        print_result("\n".join(report["notes"]))
    if report["failed"]:
        raise typer.Exit(1)


@app.command()
def drill(
    config: Annotated[list[str] | None, typer.Argument(help="[CONFIG.yaml] [a.b=c ...]", show_default=False)] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes of the run.")] = 1,
    kills: Annotated[int, typer.Option(min=1, help="Interruptions at random moments.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Kill and resume a short copy of a recipe, and compare it with a run that nobody touched. Exit code 1: differs."""
    from tlearn.console import print_result
    from tlearn.drill import drill as run
    from tlearn.drill import report_table, verdict

    file, overrides = split_arguments(config or [])
    report = run(file, overrides, nproc=nproc, kills=kills, seed=seed)
    if as_json:
        print_json(report)
    else:
        print_result(report_table(report))
        typer.echo("\n".join(verdict(report)))
    if not report["equal"]:
        raise typer.Exit(1)


def main() -> None:
    """Run a command; errors that people can mend become one message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a file name may be anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        os.environ.update(resolved(os.environ))
        with handled_by(stop):
            app()
    except EXPECTED as error:
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("RANK") or 0) > 0 else ""
        print(f"tlearn{rank}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        mistake = refused(error)
        if mistake is None:
            raise
        print(f"tlearn: {mistake}", file=sys.stderr)
        sys.exit(mistake.exit_code)
