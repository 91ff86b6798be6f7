"""fedeq update: a release or a model over the air; fedeq device update-loop: the other end of it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedeq_edge.cli.fleet import passphrase_of
from fedeq_edge.errors import ConfigError
from fedeq_edge.provision.fleet import Fleet

EXAMPLE = "Example: fedeq update --all --bundle fleet/bundles/pi.tar.gz --canary 2 --max-failures 1"
app = typer.Typer()
INTERRUPTED = 130


@app.command(name="update", epilog=EXAMPLE)
def update(
    bundle: Annotated[Path, typer.Option(help="What `fedeq bundle build` wrote, or a model (.fedeq, .onnx).")],
    everyone: Annotated[bool, typer.Option("--all", help="Every device of the bundle's board.")] = False,
    device: Annotated[list[str] | None, typer.Option(metavar="ID", help="This device; repeat for more.")] = None,
    canary: Annotated[int, typer.Option(min=1, help="Devices of the first wave; each further one is twice it.")] = 1,
    max_failures: Annotated[int, typer.Option(min=0, help="No wave begins once more devices failed.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, metavar="S", help="Seconds that a wave may take.")] = 900.0,
    fleet: Annotated[Path, typer.Option("--fleet", help="Folder of the fleet.")] = Path("fleet"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Bring a release, or a model, to devices in waves; each goes back by itself where it is not well with it.

    Needs a running `fedeq fleet serve`. Exit: 0 all have it, 4 one rolled back, 14 one did not answer in time,
    1 one failed.
    """
    from fedeq_edge.provision import update as updates  # noqa: PLC0415  # tuf, only for this command

    if everyone == bool(device):
        raise ConfigError("say who is updated: --all, or --device ID, once for each")
    ours = Fleet.open(fleet)
    plan = updates.Plan(canary=canary, max_failures=max_failures, timeout_s=timeout)
    with updates.alone(ours):
        devices = updates.chosen(ours, bundle, device or [])
        published = updates.publish(ours, bundle, passphrase_of(fleet))
        done = updates.roll_out(ours, published, devices, plan, told=lambda line: typer.echo(line, err=True))
    if as_json:
        told = {"version": done.version, "exit": done.exit, "devices": msgspec.to_builtins(done.devices)}
        typer.echo(json.dumps(told))
    table = Table(Column("id", no_wrap=True), "wave", "state", "detail", title=f"update to {escape(done.version)}")
    for name, outcome in done.devices.items():
        last = outcome.detail.strip().rpartition("\n")[2]
        shown = "".join(letter if letter.isprintable() else "?" for letter in last)
        table.add_row(name, str(outcome.wave or "-"), outcome.state, escape(shown))
    Console(stderr=True).print(table)
    sys.exit(INTERRUPTED if done.interrupted else done.exit)
