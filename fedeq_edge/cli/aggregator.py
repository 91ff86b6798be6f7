"""fedeq aggregator: the program on a gateway."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge import audit as audits
from fedeq_edge import orders, settings
from fedeq_edge.backends import build_graph
from fedeq_edge.errors import ConfigError
from fedeq_edge.gateway import Gateway
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.storage import history, write_atomically

app = typer.Typer(help="The aggregator on a gateway.", no_args_is_help=True, rich_markup_mode=None)
Device = Annotated[str, typer.Argument(help="Id of the device.")]
Config = Annotated[Path, typer.Option(help="Settings of the federation.")]


@app.command(epilog="Example: fedeq aggregator run --config aggregator.toml")
def run(config: Config = Path("aggregator.toml")) -> None:
    """Run the federation's rounds until the last one, or until SIGTERM; goes on where it was after a crash."""
    Gateway(config, settings.load(config, AggregatorSettings)).run()


@app.command(epilog="Example: fedeq aggregator status --config aggregator.toml --json")
def status(
    config: Config = Path("aggregator.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show where the federation stands."""
    chosen = settings.load(config, AggregatorSettings)
    folder = settings.resolve(config, chosen.state)
    current = _read_status(folder)
    if as_json:
        typer.echo(json.dumps(current))
    else:
        _show(current, history(folder))


@app.command(epilog="Example: fedeq aggregator graph --config aggregator.toml --out plant.onnx")
def graph(
    config: Config = Path("aggregator.toml"),
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("training.onnx"),
) -> None:
    """Write the graph by which this federation's devices train without torch, for bundles and updates.

    Nobody needs it who has a broker: the running aggregator gives it to every device that asks.
    """
    content = build_graph(settings.load(config, AggregatorSettings).model)
    write_atomically(out, content)
    typer.echo(f"{out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}", err=True)


@app.command(epilog="Example: fedeq aggregator deny pi-17 --config aggregator.toml")
def deny(device: Device, config: Config = Path("aggregator.toml")) -> None:
    """Take nothing from this device any more; what it contributed to the open round is taken out again.

    The running aggregator obeys within a second, one that is down when it starts. Revoke the device's certificate, too.
    """
    _order(config, "deny", device)


@app.command(epilog="Example: fedeq aggregator allow pi-17 --config aggregator.toml")
def allow(device: Device, config: Config = Path("aggregator.toml")) -> None:
    """Let a denied device take part again, from the start."""
    _order(config, "allow", device)


@app.command(epilog="Example: fedeq aggregator retire pi-17 --config aggregator.toml")
def retire(device: Device, config: Config = Path("aggregator.toml")) -> None:
    """Take a device that never comes back out of the sums; should it come back, it begins anew."""
    _order(config, "retire", device)


@app.command(epilog="Example: fedeq aggregator audit --config aggregator.toml --json")
def audit(
    config: Config = Path("aggregator.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Compute every consensus again from the contributions that were accepted; needs audit = true in the settings.

    Exit 0 where every round is bit-equal, 1 with the first difference.
    """
    chosen = settings.load(config, AggregatorSettings)
    found = audits.audit(settings.resolve(config, chosen.state), chosen)
    if as_json:
        told = {"sound": found.sound, "rounds": found.rounds, "contributions": found.contributions}
        typer.echo(json.dumps({**told, "difference": found.difference}))
    Console(stderr=True).print(found.sentence, highlight=False, soft_wrap=True)
    if not found.sound:
        raise typer.Exit(1)


def _order(config: Path, order: orders.Order, device: str) -> None:
    chosen = settings.load(config, AggregatorSettings)
    orders.give(settings.resolve(config, chosen.state), order, device)


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no status; has the aggregator run with this configuration?") from error
    return {**found, "running": Path(f"/proc/{found['pid']}").exists()}


def _denied(current: dict[str, Any]) -> str:
    return f", denied: {', '.join(current['denied'])}" if current["denied"] else ""


def _show_workers(console: Console, workers: list[str], contributed: list[str]) -> None:
    missing = [worker for worker in workers if worker not in contributed]
    console.print(f"shares of {len(contributed)} of {len(workers)} workers are in; waits for {', '.join(missing)}")


def _privacy(current: dict[str, Any]) -> str:
    told = current.get("privacy")  # a status that an older version left has none
    if told is None:
        return ""
    return f"; epsilon {told['epsilon']:.3g}, planned {told['planned']:.3g} at delta {told['delta']:g}"


def _masking(current: dict[str, Any]) -> str:
    told = current.get("masking")
    if told is None or told["step"] is None:
        return ""
    trouble = f" ({told['trouble']})" if told["trouble"] else ""
    return f"; masked sum: {told['answered']} of {told['expected']} answered in step {told['step']}{trouble}"


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"  # nobody was drawn for a private round, or it was masked


def _show(current: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    console = Console(stderr=True)
    alive = "running" if current["running"] else "not running"
    console.print(
        f"{current['run']}: {current['status']}, round {current['round']} of {current['rounds']} ({alive}); "
        f"broker: {current['broker']}"
    )
    if "workers" in current:
        _show_workers(console, current["workers"], current["contributed"])
        return
    console.print(
        f"online {len(current['online'])} of {current['members']} members{_denied(current)}{_privacy(current)}"
        f"{_masking(current)}"
    )
    counted = {**current["counters"], **{f"refused: {code}": number for code, number in current["refusals"].items()}}
    console.print(", ".join(f"{name} {number}" for name, number in counted.items() if number) or "nothing counted yet")
    table = Table("round", "contributed", "late", "accuracy", "primal", "dual", "seconds")
    for line in [line for line in lines if line["kind"] == "round"][-10:]:
        told = [device["accuracy"] for device in line["devices"].values() if device["accuracy"] is not None]
        table.add_row(
            str(line["round"]),
            f"{len(line['contributed'])}/{line['cohort']}",
            str(len(line["late"])),
            f"{sum(told) / len(told):.3f}" if told else "-",
            _known(line["primal_residual"]),
            f"{line['dual_residual']:.3g}",
            f"{line['seconds']:.1f}",
        )
    console.print(table)
