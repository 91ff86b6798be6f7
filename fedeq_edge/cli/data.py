"""fedeq data: what users bring."""

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge.data.npz import FleetSummary, describe, load_client, load_fleet
from fedeq_edge.errors import ConfigError

app = typer.Typer(help="Data sets of devices and fleets.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _noun() -> None:
    """Keep `inspect` a command of its own while it is the only one."""


@app.command(epilog="Example: fedeq data inspect har.npz --x X --client subject --test local_test --classes 0-5")
def inspect(
    path: Annotated[Path, typer.Argument(help="An .npz of one device, or of a fleet with a client column.")],
    x: Annotated[str, typer.Option(help="Array of samples.")] = "x",
    y: Annotated[str, typer.Option(help="Array of labels.")] = "y",
    client: Annotated[str | None, typer.Option(help="Column that names the client; none for one device.")] = None,
    test: Annotated[str | None, typer.Option(help="Column that marks test rows.")] = None,
    where: Annotated[str | None, typer.Option(help="Boolean column that chooses rows; !name for the others.")] = None,
    classes: Annotated[str | None, typer.Option(help="Labels to keep, such as 0-5 or 0,1,4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Check a data set and show what each client has."""
    if client is None and (x, y, test, where, classes) != ("x", "y", None, None, None):
        raise ConfigError(
            "--x, --y, --test, --where and --classes are for the file of a fleet; name its --client column"
        )
    if client is None:
        summary = describe({path.stem: load_client(path)})
    else:
        summary = describe(load_fleet(path, x=x, y=y, client=client, test=test, where=where, classes=classes))
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(summary)))
    else:
        _show(summary)


def _show(summary: FleetSummary) -> None:
    console = Console(stderr=True)
    console.print(f"samples of shape {summary.shape}, {summary.classes} classes, {len(summary.clients)} clients")
    table = Table("client", "train", "test", "training samples per label")
    for name, client in summary.clients.items():
        table.add_row(name, str(client.train), str(client.test), " ".join(map(str, client.histogram)))
    console.print(table)
