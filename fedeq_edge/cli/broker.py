"""fedeq broker: a broker for one machine."""

import signal
import threading
from typing import Annotated

import typer

from fedeq_edge.errors import ConfigError, TransportError
from fedeq_edge.transport import broker as ladder

_CHECK_S = 1.0

app = typer.Typer(help="A broker for demos and development.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _noun() -> None:
    """Keep `run` a command of its own while it is the only one."""


@app.command(epilog="Example: fedeq broker run --port 1883")
def run(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Loopback port to listen on.")] = 1883,
    kind: Annotated[str, typer.Option(help="auto, mosquitto or embedded (amqtt).")] = "auto",
) -> None:
    """Run a broker on loopback until SIGTERM: mosquitto if it is installed, else amqtt."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    if ladder.kind_of(kind) == "external":
        raise ConfigError(f"{kind} is somebody else's broker; give --kind auto, mosquitto or embedded")
    with ladder.running(kind, port=port) as broker:
        typer.echo(f"{broker.kind} {broker.version} listens at {broker.endpoint.shown()}", err=True)
        while not ended.wait(_CHECK_S):
            if not broker.alive():
                raise TransportError(f"{broker.kind} at {broker.endpoint.shown()} has died; start it again")
