"""fedeq chaos: break a fleet at random, and see that nothing was lost."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedeq_edge import chaos as storm
from fedeq_edge.storage import finite

EXAMPLE = "Example: fedeq chaos --minutes 10 --seed 1"
app = typer.Typer()


@app.command(name="chaos", epilog=EXAMPLE)
def chaos(
    minutes: Annotated[float | None, typer.Option(min=0.0, help="How long the storm lasts; 5 if not given.")] = None,
    kills: Annotated[int | None, typer.Option(min=1, help="End the storm after so many kill -9 instead.")] = None,
    seed: Annotated[int, typer.Option(help="Of the moments and kinds of faults.")] = 0,
    devices: Annotated[int, typer.Option(min=1, max=50, help="Agents, each with a trainer of its own.")] = 4,
    out: Annotated[Path, typer.Option(help="Empty or new folder for state and logs.")] = Path("fedeq-chaos"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON on stdout.")] = False,
) -> None:
    """Kill and cut parts of a real fleet at random, then compute its consensus again from what it had accepted.

    Exit 0 where it is bit-equal and nothing acknowledged is lost, 1 with the first difference.
    """
    lasting = 5.0 if minutes is None and kills is None else minutes
    options = storm.Options(out=out, minutes=lasting, kills=kills, seed=seed, devices=devices)
    console = Console(stderr=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda which, _frame: sys.exit(128 + which))  # takes the fleet's processes along
    verdict = storm.run(options, lambda text: console.print(text, highlight=False, soft_wrap=True))
    if as_json:
        typer.echo(json.dumps(finite(verdict.summary())))
    console.print(verdict.sentence, highlight=False, soft_wrap=True)
    if not verdict.sound:
        raise typer.Exit(1)
