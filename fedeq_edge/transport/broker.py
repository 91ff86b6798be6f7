"""The broker ladder: a configured URL, else `mosquitto` on PATH as a child, else amqtt as a child.

A child broker is for demos, development and small fleets on one machine; it listens on loopback only, keeps nothing on
disk, and ends with the context. In production mosquitto runs as its own service (see the folder broker/).
"""

import contextlib
import importlib.metadata
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

from fedeq_edge.errors import ConfigError, TransportError
from fedeq_edge.transport.mqtt import Endpoint

Kind = Literal["external", "mosquitto", "amqtt"]

_START_S: Final = 15.0
_STOP_S: Final = 5.0
# mosquitto 2.1 refuses packets over 2,000,000 bytes by default, 2.0 has no limit. A step of 262,000 float32 parameters
# still goes out as one message, and it bounds what a hostile client can make the broker hold.
MAX_PACKET_BYTES: Final = 1_048_576


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """A broker that answers. version: of the program, "" where it is not ours to ask.

    alive: whether our child still runs; always true of a broker that is not our child.
    """

    kind: Kind
    endpoint: Endpoint
    version: str
    alive: Callable[[], bool]


@contextlib.contextmanager
def running(choice: str, *, port: int | None = None, log: Path | None = None) -> Iterator[Broker]:
    """The broker of the ladder for `choice`: "auto", "mosquitto", "embedded" (amqtt) or an mqtt:// URL.

    port: where a child listens (a free one by default). log: file for the child's output. The child is ended on exit.
    Raises ConfigError where the choice names no broker, TransportError where it does not start.
    """
    kind = kind_of(choice)
    if kind == "external":
        yield Broker(kind=kind, endpoint=Endpoint(url=choice), version="", alive=lambda: True)
        return
    chosen = port or free_port()
    _check_free(chosen)
    with tempfile.TemporaryDirectory(prefix="fedeq-broker-") as folder, _log_file(log, Path(folder)) as output:
        process = subprocess.Popen(
            _command(kind, chosen, Path(folder)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C on the terminal must not end it before its clients have said goodbye
        )
        try:
            _wait_until_it_listens(process, chosen, kind, Path(output.name))
            yield Broker(
                kind=kind,
                endpoint=_endpoint(kind, chosen),
                version=version(kind),
                alive=lambda: process.poll() is None,
            )
        finally:
            _end(process)


def kind_of(choice: str) -> Kind:
    """What `running` would give for `choice`. Raises ConfigError, with the remedy, where that is nothing."""
    if choice.startswith(("mqtt://", "mqtts://")):
        Endpoint(url=choice).address()
        return "external"
    if choice == "auto":
        choice = "mosquitto" if mosquitto_path() else "embedded"
    if choice == "mosquitto":
        if mosquitto_path() is None:
            raise ConfigError(
                "mosquitto is not on PATH; install it (apt-get install mosquitto) or use --broker embedded"
            )
        return "mosquitto"
    if choice == "embedded":
        if importlib.util.find_spec("amqtt") is None:
            raise ConfigError(
                "no broker: mosquitto is not on PATH and amqtt is not installed; "
                "apt-get install mosquitto, or pip install 'fedeq-edge[broker]', or give --broker mqtt://host"
            )
        return "amqtt"
    raise ConfigError(f"broker {choice!r} is unknown; use auto, mosquitto, embedded or an mqtt:// or mqtts:// URL")


def mosquitto_path() -> str | None:
    """Where mosquitto is, looking also where Debian puts it for root only."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def version(kind: Kind) -> str:
    """Version of the broker program that `running` would start."""
    if kind == "amqtt":
        return importlib.metadata.version("amqtt")
    path = mosquitto_path()
    if kind != "mosquitto" or path is None:
        return ""
    # mosquitto -h exits 3 and says "mosquitto version 2.0.11" in its first line
    first = subprocess.run([path, "-h"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return first.rpartition(" ")[2]


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on 127.0.0.1 is in use ({error.strerror}); choose another with --port"
            ) from error


def mosquitto_config(port: int) -> str:
    """A loopback mosquitto without accounts and without a disk: for one machine only."""
    return "\n".join(
        (
            f"listener {port} 127.0.0.1",
            "allow_anonymous true",
            "persistence false",
            f"max_packet_size {MAX_PACKET_BYTES}",
            "set_tcp_nodelay true",
            "",
        )
    )


def _amqtt_config(port: int) -> str:
    return "\n".join(
        (
            "listeners:",
            "  default:",
            "    type: tcp",
            f"    bind: 127.0.0.1:{port}",
            "    max_connections: 1000",
            "plugins:",
            "  amqtt.plugins.authentication.AnonymousAuthPlugin:",
            "    allow_anonymous: true",
            "",
        )
    )


def _command(kind: Kind, port: int, folder: Path) -> list[str]:
    config = folder / "broker.conf"
    if kind == "mosquitto":
        config.write_text(mosquitto_config(port))
        return [str(mosquitto_path()), "-c", str(config)]
    config = config.with_suffix(".yaml")
    config.write_text(_amqtt_config(port))
    return [sys.executable, "-c", "from amqtt.scripts.broker_script import main; main()", "-c", str(config)]


def _endpoint(kind: Kind, port: int) -> Endpoint:
    # amqtt speaks MQTT 3.1.1 only
    return Endpoint(url=f"mqtt://127.0.0.1:{port}", version="5" if kind == "mosquitto" else "3.1.1")


@contextlib.contextmanager
def _log_file(log: Path | None, folder: Path) -> Iterator[BinaryIO]:
    with (log or folder / "broker.log").open("ab") as output:
        yield output


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, kind: Kind, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
            return
        time.sleep(0.05)
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    raise TransportError(f"{kind} did not start on port {port}: {last}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
