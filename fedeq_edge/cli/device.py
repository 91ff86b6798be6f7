"""fedeq device: what this machine is and can do."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from fedeq_edge import modelfile
from fedeq_edge.backends import open_backend
from fedeq_edge.cli import enrol
from fedeq_edge.deq.wellposed import certificate
from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.budget import budget_of, choose, for_certificate, seconds_of, step_seconds
from fedeq_edge.hardware.probe import probe as probe_machine
from fedeq_edge.hardware.probe import recognise
from fedeq_edge.hardware.profiles import profiles
from fedeq_edge.storage import finite
from fedeq_edge.training.cost import calibrate_model
from fedeq_edge.training.step import BackendName, Calibration, Plan

app = typer.Typer(help="This machine, and the boards that are known.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="enrol", epilog=enrol.ENROL_EXAMPLE)(enrol.enrol)
app.command(name="csr", epilog=enrol.CSR_EXAMPLE)(enrol.csr)


@app.command(epilog="Example: fedeq device probe --model personal.fedeq --compute-s 2 --accuracy 0.01 --json")
def probe(
    model: Annotated[Path | None, typer.Option(help="Also measure a training step of this model here.")] = None,
    compute_s: Annotated[float, typer.Option(min=0.001, help="Seconds of training that a round allows.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps in a round.")] = 16,
    energy_j: Annotated[
        float | None, typer.Option(min=0.001, help="Joules of training that a round allows, on a board of known watts.")
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Also find the least budget proven to reach |z_K - z*| <= this."),
    ] = None,
    backend: Annotated[
        Literal["torch", "onnx"], typer.Option(help="What trains; onnx builds the model's graph, which needs onnx.")
    ] = "torch",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show cores, memory, CPU part, temperature, throttling, battery, limits, and the iteration budget of a model."""
    if model is None and (energy_j, accuracy) != (None, None):
        raise ConfigError("--energy-j and --accuracy are about a model's budget; name the model with --model")
    machine = probe_machine()
    board = recognise(machine)
    found: dict[str, Any] = {**msgspec.to_builtins(machine), "profile": board.id if board else None}
    if model is not None:
        watts = board.active_watts if board else None
        allowed_s = compute_s if energy_j is None else min(compute_s, seconds_of(energy_j, watts))
        found["model"] = _measure(model, allowed_s, steps, accuracy, backend)
    if as_json:
        typer.echo(json.dumps(finite(found)))
        return
    table = Table("what", "here")
    for key, value in found.items():
        table.add_row(key, json.dumps(finite(value)))
    Console(stderr=True).print(table)


@app.command(name="update-loop", epilog="Example: fedeq device update-loop --every 60")
def update_loop(
    every: Annotated[float, typer.Option(min=1, metavar="S", help="Seconds between two reports.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Report once, do what is asked, and leave.")] = False,
    root: Annotated[Path, typer.Option(help="Of the system.")] = Path("/"),
) -> None:
    """Report to the fleet and do what it says: install, go back, send logs. Runs as root, by fedeq-updater.service."""
    from fedeq_edge import updater  # noqa: PLC0415  # tuf, only for this command
    from fedeq_edge.provision.reporting import Board  # noqa: PLC0415  # as above

    if once:
        updater.once(Board(root))
    else:
        updater.run(Board(root), every)


def _measure(path: Path, compute_s: float, steps: int, accuracy: float | None, backend: BackendName) -> dict[str, Any]:
    """Calibration of the model in `path` here, the budget that follows from it, and what is proven of its answers."""
    model = modelfile.read(path)
    plan = Plan(compute_s=compute_s).for_model(model.spec)
    calibration = calibrate_model(open_backend(backend, model.spec, plan), plan)
    allowance = choose(
        calibration, steps=steps, compute_s=compute_s, menu=plan.budgets, adjoint_ratio=plan.adjoint_ratio
    )
    return {
        "calibration": msgspec.to_builtins(calibration),
        "budget": msgspec.to_builtins(budget_of(allowance.budget.forward, plan.adjoint_ratio)),
        "steps": allowance.steps,
        "predicted_s": allowance.predicted_s,
        "certificate": msgspec.to_builtins(certificate(model.theta, model.spec, allowance.budget.forward)),
        **({} if accuracy is None else {"proven": _proven(model, calibration, accuracy)}),
    }


def _proven(model: modelfile.ModelFile, calibration: Calibration, accuracy: float) -> dict[str, Any]:
    """The least budget that is proven to reach `accuracy`, and what a training step with it costs here."""
    first = certificate(model.theta, model.spec, evaluations=1)
    if first is None:
        raise ConfigError(
            "--accuracy: nothing is proven of this model, its cell is no certified contraction; "
            'train one with cell = "contractive" or "monotone", or leave --accuracy out'
        )
    budget = for_certificate(first, accuracy)
    return {"accuracy": accuracy, "budget": msgspec.to_builtins(budget), "step_s": step_seconds(calibration, budget)}


@app.command(name="list", epilog="Example: fedeq device list")
def list_boards(as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
    """Show the boards that have a profile."""
    known = profiles()
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(profile) for profile in known.values()]))
        return
    table = Table(Column("id", no_wrap=True), "board", "architecture", "cores", "memory", "speed", "W")
    table.caption = "speed: of one core, relative to x86-64; W: of the board at work; estimates until measured"
    for profile in known.values():
        memory = f"{profile.memory_bytes / 2**30:.3g} GiB"
        speed = f"{profile.relative_speed:g}"
        watts = "-" if profile.active_watts is None else f"{profile.active_watts:g}"
        table.add_row(profile.id, profile.name, profile.arch, str(profile.cores), memory, speed, watts)
    Console(stderr=True).print(table)
