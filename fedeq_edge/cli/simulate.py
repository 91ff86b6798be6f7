"""fedeq simulate: which method, which model, which budgets for a fleet, without one."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedeq_edge.atomic import write_atomically
from fedeq_edge.errors import ConfigError, FedEqError, StateError

if TYPE_CHECKING:
    from fedeq_edge.simulation.collect import Collected
    from fedeq_edge.simulation.experiment import Variant
    from fedeq_edge.simulation.run import Options

    Draw = Callable[[Collected], None]

EXAMPLE = "Example: fedeq simulate --study digits --workers 2 --report digits.html"
app = typer.Typer()


@app.command(name="simulate", epilog=EXAMPLE)
def simulate(
    experiment: Annotated[Path | None, typer.Argument(help="TOML file of the experiment.")] = None,
    study: Annotated[
        str | None, typer.Option(help="One that ships with us, such as digits, instead of a file.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="File of the clients' samples for --study, .npz.")] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who trains: processes here, or Ray actors.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes or actors; one per core if not given.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="So many seeds, from 0; those of the file if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; fedeq-simulation/NAME if not given.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Draw the results as this page, .html; also where a run fails or is stopped.")
    ] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="Run nothing: tell of the runs that have finished.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Run an experiment: whole federations in virtual time, with real training; a run that was stopped goes on."""
    from fedeq_edge.simulation import experiment as files  # noqa: PLC0415  # numpy and all: other commands do without
    from fedeq_edge.simulation import run  # noqa: PLC0415
    from fedeq_edge.simulation.collect import collect  # noqa: PLC0415
    from fedeq_edge.simulation.summary import summarise  # noqa: PLC0415

    if (experiment is None) == (study is None):
        raise ConfigError(f"give the file of an experiment or --study NAME, one of them; {', '.join(files.studies())}")
    if study is None and data is not None:
        raise ConfigError("--data belongs to --study; an experiment's file names its data under [data]")
    variants = files.study(str(study), data) if experiment is None else files.load(experiment)
    text = files.study_text(str(study)) if experiment is None else experiment.read_text(encoding="utf-8")
    options = run.Options(engine=engine, workers=workers, seeds=seeds, out=out)
    console = Console(stderr=True)
    draw = None if report is None else _drawer(report, text, console)
    if not no_run:
        _run(variants, options, console, draw)
    found = collect(variants, options)
    if not found.results:
        reasons = ", ".join(sorted({one.reason for one in found.missing}))
        raise StateError(
            f"no run of this experiment has finished in {run.out_of(variants, options)} ({reasons}); "
            "leave out --no-run, or name another folder with --out"
        )
    if draw is not None:
        draw(found)
    summary = {**summarise(found.results), "missing": [asdict(one) for one in found.missing]}
    if as_json:
        typer.echo(json.dumps(summary))
    _show(console, summary)


def _run(variants: "Sequence[Variant]", options: "Options", console: Console, draw: "Draw | None") -> None:
    """All of it has run; where it is stopped or fails, what has finished is drawn first."""
    from fedeq_edge.simulation import run  # noqa: PLC0415  # as above
    from fedeq_edge.simulation.collect import collect  # noqa: PLC0415

    _interrupt_on_signals()
    try:
        with _Bar(console) if console.is_terminal else _Lines(console) as view:
            run.run(variants, options, view)
    except (KeyboardInterrupt, SystemExit, FedEqError) as stopped:
        if draw is not None:
            draw(collect(variants, options))
        if not isinstance(stopped, KeyboardInterrupt):
            raise
        console.print("interrupted; run the same command again to go on", highlight=False)
        raise typer.Exit(130) from None


def _drawer(path: Path, text: str, console: Console) -> "Draw":
    """What writes the page; raises ConfigError now for what would otherwise fail after hours."""
    from fedeq_edge.report.page import template  # noqa: PLC0415  # as above
    from fedeq_edge.report.simulation import TEMPLATE, Source, page  # noqa: PLC0415

    if path.suffix != ".html":
        raise ConfigError(f"--report {path}: the results are drawn as a page; name it NAME.html")
    if not path.parent.is_dir():
        raise ConfigError(f"--report {path}: the folder {path.parent} does not exist; make it or name another")
    template(TEMPLATE)
    source = Source(command=shlex.join(["fedeq", *sys.argv[1:]]), text=text)

    def draw(found: "Collected") -> None:
        if not found.results:
            console.print(f"{path} is not written: no run has finished", highlight=False, soft_wrap=True)
            return
        write_atomically(path, page(found, source).encode())
        short = f", {len(found.missing)} of {found.wanted} runs missing" if found.missing else ""
        console.print(f"report: {path}{short}", highlight=False, soft_wrap=True)

    return draw


def _interrupt_on_signals() -> None:
    """SIGTERM and a closed terminal end the workers as Ctrl-C does."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


class _Lines:
    """For logs and pipes: one line a run, and one for each evaluation."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begins(self, name: str, number: int, runs: int, rounds: int) -> None:
        """Print it."""
        self._console.print(f"run {number}/{runs}: {name}, {rounds} rounds", highlight=False, soft_wrap=True)

    def line(self, line: Mapping[str, Any]) -> None:
        """Print an evaluation."""
        if line["kind"] == "evaluation":
            self._console.print(
                f"round {line['round']:4d}  personal {_number(line['personal'])}  "
                f"consensus {_number(line['consensus'])}  residual {line['residual']:.1e}",
                highlight=False,
                soft_wrap=True,
            )


class _Bar:
    """For a terminal: how far the run is, and what the last evaluation said."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(*columns, TextColumn("{task.fields[told]}"), TimeElapsedColumn(), console=console)
        self._task: TaskID | None = None

    def __enter__(self) -> "_Bar":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(None, None, None)

    def begins(self, name: str, number: int, runs: int, rounds: int) -> None:
        """A bar for this run."""
        self._task = self._progress.add_task(f"{number}/{runs} {name}", total=max(rounds, 1), told="")

    def line(self, line: Mapping[str, Any]) -> None:
        """A round more, or an accuracy."""
        if self._task is None:
            return
        if line["kind"] == "round":
            self._progress.update(self._task, completed=line["round"])
        elif line["kind"] == "evaluation":
            self._progress.update(self._task, told=f"personal {_number(line['personal'])}")


def _show(console: Console, summary: Mapping[str, Any]) -> None:
    """Fits 80 columns with short names; a seed's spread stands below its mean. No column where nobody has a value."""
    caption = (
        "means over the seeds, ± their standard deviation; worst: of the worst tenth of the clients; "
        "MB up and down: of the whole run"
    )
    table = Table(caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("variant", overflow="fold")
    variants = summary["variants"]
    columns = [column for column in _COLUMNS if any(one[column[1]]["mean"] is not None for one in variants.values())]
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in variants.items():
        table.add_row(name, *(shown(found[key]) for _, key, shown in columns))
    console.print(table)
    if summary["missing"]:
        runs = ", ".join(f"{one['variant']} seed {one['seed']} ({one['reason']})" for one in summary["missing"])
        console.print(f"not of the whole experiment; missing: {runs}", highlight=False, soft_wrap=True, style="bold")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _spread(found: Mapping[str, Any]) -> str:
    return _number(found["mean"]) + ("" if found["sd"] is None else f"\n±{found['sd']:.4f}")


def _megabytes(found: Mapping[str, Any]) -> str:
    return "-" if found["mean"] is None else f"{found['mean'] / 1e6:.3g}"


def _count(found: Mapping[str, Any]) -> str:
    return "-" if found["mean"] is None else f"{found['mean']:.0f}"


# heading, key of a variant in the summary, how its mean and spread are shown
_COLUMNS: Final = (
    ("personal", "personal", _spread),
    ("consensus", "consensus", _spread),
    ("local", "local", _spread),
    ("worst", "worst_tenth", _spread),
    ("unseen", "unseen", _spread),
    ("up", "bytes_up", _megabytes),
    ("down", "bytes_down", _megabytes),
    ("target", "rounds_to_target", _count),
)
