"""fedeq agent: the program on a device."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedeq_edge import settings
from fedeq_edge.data.npz import load_client
from fedeq_edge.settings import AgentSettings

app = typer.Typer(help="The agent on a device.", no_args_is_help=True, rich_markup_mode=None)
EXAMPLE = "Example: fedeq agent run --config /etc/fedeq/agent.toml"


@app.callback()
def _noun() -> None:
    """Keep `run` a command of its own while it is the only one."""


@app.command(epilog=EXAMPLE)
def run(
    config: Annotated[Path, typer.Option(help="Settings of this device.")] = Path("agent.toml"),
) -> None:
    """Join the federation and take part in its rounds until SIGTERM.

    Settings and data are checked first; then this process becomes the small link process of the agent.
    """
    chosen = settings.load(config, AgentSettings)
    chosen.broker.endpoint()
    samples = len(load_client(settings.resolve(config, chosen.data)).y_train)
    command = [sys.executable, "-m", "fedeq_edge.agent", str(config), str(samples)]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606  # becoming the link frees what checking needed
