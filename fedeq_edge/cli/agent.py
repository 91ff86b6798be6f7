"""fedeq agent: the program on a device."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge import health, settings
from fedeq_edge.data.npz import load_client
from fedeq_edge.errors import ConfigError
from fedeq_edge.settings import AgentSettings

app = typer.Typer(help="The agent on a device.", no_args_is_help=True, rich_markup_mode=None)
EXAMPLE = "Example: fedeq agent run --config /etc/fedeq-edge/agent.toml"


Config = Annotated[Path, typer.Option(help="Settings of this device.")]


@app.command(epilog=EXAMPLE)
def run(
    config: Config = Path("agent.toml"),
    backend: Annotated[
        Literal["torch", "onnx"] | None, typer.Option(help="What trains, instead of the settings' backend.")
    ] = None,
) -> None:
    """Join the federation and take part in its rounds until SIGTERM.

    Settings, data and the solver are checked first; then this process becomes the small link process of the agent,
    which tells systemd that it is ready.
    """
    if backend is not None:
        os.environ[f"{settings.PREFIX}BACKEND"] = backend  # the program that this becomes reads its settings itself
    chosen = settings.load(config, AgentSettings)
    chosen.broker.endpoint(config)
    samples = len(load_client(settings.resolve(config, chosen.data)).y_train)
    health.solve()
    command = [sys.executable, "-m", "fedeq_edge.agent", str(config), str(samples)]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606  # becoming the link frees what checking needed


@app.command(epilog="Example: fedeq agent status --config /etc/fedeq-edge/agent.toml --json")
def status(
    config: Config = Path("agent.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show what this device is doing, and why the aggregator refused what it sent, if it did."""
    current = _read_status(config)
    if as_json:
        typer.echo(json.dumps(current))
        return
    table = Table(show_header=False, box=None)
    for name, value in current.items():
        table.add_row(name.replace("_", " "), "-" if value in (None, "", {}) else str(value))
    Console(stderr=True).print(table)


def _read_status(config: Path) -> dict[str, Any]:
    folder = settings.resolve(config, settings.load(config, AgentSettings).state)
    try:
        found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no status; has the agent run with this configuration?") from error
    return {**found, "running": Path(f"/proc/{found['pid']}").exists()}
