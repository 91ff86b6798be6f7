"""fedeq device: what this machine is and can do."""

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from fedeq_edge import modelfile
from fedeq_edge.hardware.budget import budget_of, choose
from fedeq_edge.hardware.probe import probe as probe_machine
from fedeq_edge.hardware.probe import recognise
from fedeq_edge.hardware.profiles import profiles
from fedeq_edge.storage import finite
from fedeq_edge.training.step import Plan

app = typer.Typer(help="This machine, and the boards that are known.", no_args_is_help=True, rich_markup_mode=None)


@app.command(epilog="Example: fedeq device probe --model personal.fedeq --compute-s 2 --json")
def probe(
    model: Annotated[Path | None, typer.Option(help="Also measure a training step of this model here.")] = None,
    compute_s: Annotated[float, typer.Option(min=0.001, help="Seconds of training that a round allows.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps in a round.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show cores, memory, CPU part, temperature, throttling, battery, limits, and the iteration budget of a model."""
    machine = probe_machine()
    board = recognise(machine)
    found: dict[str, Any] = {**msgspec.to_builtins(machine), "profile": board.id if board else None}
    if model is not None:
        found["model"] = _measure(model, compute_s, steps)
    if as_json:
        typer.echo(json.dumps(finite(found)))
        return
    table = Table("what", "here")
    for key, value in found.items():
        table.add_row(key, json.dumps(finite(value)))
    Console(stderr=True).print(table)


def _measure(path: Path, compute_s: float, steps: int) -> dict[str, Any]:
    """Calibration of the model in `path` on this machine, and the budget that follows from it."""
    from fedeq_edge.training.cost import calibrate_model  # noqa: PLC0415  # torch, only when it is asked for

    plan = Plan(compute_s=compute_s)
    calibration = calibrate_model(modelfile.read(path).spec, plan)
    allowance = choose(
        calibration, steps=steps, compute_s=compute_s, menu=plan.budgets, adjoint_ratio=plan.adjoint_ratio
    )
    return {
        "calibration": msgspec.to_builtins(calibration),
        "budget": msgspec.to_builtins(budget_of(allowance.budget.forward, plan.adjoint_ratio)),
        "steps": allowance.steps,
        "predicted_s": allowance.predicted_s,
    }


@app.command(name="list", epilog="Example: fedeq device list")
def list_boards(as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
    """Show the boards that have a profile."""
    known = profiles()
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(profile) for profile in known.values()]))
        return
    table = Table(Column("id", no_wrap=True), "board", "architecture", "cores", "memory", "speed")
    table.caption = "speed: of one core, relative to x86-64; estimates until a device has been calibrated"
    for profile in known.values():
        memory = f"{profile.memory_bytes / 2**30:.3g} GiB"
        speed = f"{profile.relative_speed:g}"
        table.add_row(profile.id, profile.name, profile.arch, str(profile.cores), memory, speed)
    Console(stderr=True).print(table)
