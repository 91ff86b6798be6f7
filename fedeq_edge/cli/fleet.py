"""fedeq fleet: the operator's machine; who belongs to the fleet and who does not any more."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedeq_edge.errors import ConfigError
from fedeq_edge.provision.brokerlist import BrokerHere
from fedeq_edge.provision.fleet import Fleet, FleetSettings, Heard
from fedeq_edge.provision.founding import new_gateway

app = typer.Typer(
    help="The fleet: its authority, its devices, their identities.", no_args_is_help=True, rich_markup_mode=None
)
Folder = Annotated[Path, typer.Option("--fleet", help="Folder of the fleet.")]
DeviceId = Annotated[str, typer.Argument(metavar="ID", help="Id of the device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="DNS name or address of the gateway as devices see it; repeat for more."),
]
_HERE = Path("fleet")
_PASSPHRASE = "FEDEQ_CA_PASSPHRASE"  # noqa: S105  # the name of a variable


@app.command(epilog="Example: fedeq fleet init plant --host gateway.local --host 192.168.1.10 --passphrase")
def init(
    name: Annotated[str, typer.Argument(help="Name of the fleet.")],
    host: Hosts = None,
    broker: Annotated[str, typer.Option(help="Broker as devices see it [default: mqtts://HOST:8883].")] = "",
    service: Annotated[str, typer.Option(help="Service as devices see it [default: https://HOST:8443].")] = "",
    federation: Annotated[str, typer.Option(help="Federation that the devices join [default: NAME].")] = "",
    aggregator: Annotated[str, typer.Option(help="State folder of the aggregator, where it is on this machine.")] = "",
    ask: Annotated[
        bool,
        typer.Option("--passphrase", help="Ask for a passphrase of the CA key; else $FEDEQ_CA_PASSPHRASE, if set."),
    ] = False,
    folder: Folder = _HERE,
) -> None:
    """Make a fleet: its authority, the gateway's certificate, the key of its releases. Nothing makes them anew."""
    hosts = host or _own_names()
    settings = FleetSettings(
        name=name,
        broker=broker or f"mqtts://{_in_url(hosts[0])}:8883",
        service=service or f"https://{_in_url(hosts[0])}:8443",
        federation=federation or name,
        aggregator=str(Path(aggregator).absolute()) if aggregator else "",
    )
    secret = _new_passphrase() if ask else os.environ.get(_PASSPHRASE)
    Fleet.init(folder, settings, hosts, passphrase=secret)
    _say(
        f"fleet {name} is in {folder}; the gateway is {', '.join(hosts)}. Back up {folder}/ca: without it no device "
        "can ever be added. Next:",
        f"  fedeq fleet add pi-01 --profile raspberry-pi-4{_where(folder)}",
        f"  fedeq fleet serve{_where(folder)}",
        f"  mosquitto, out of {folder}/gateway: ca.crt, server.crt, server.key, and crl.pem as its crlfile",
    )


@app.command(epilog="Example: fedeq fleet gateway --host gateway.local --host 10.0.0.5")
def gateway(host: Hosts = None, folder: Folder = _HERE) -> None:
    """Give the gateway a certificate for other names or addresses; CA and devices stay as they are."""
    fleet = Fleet.open(folder)
    # Boards know it by the names in fleet.toml: a certificate without them would lock all of them out.
    known = [urlsplit(url).hostname for url in (fleet.settings.service, fleet.settings.broker)]
    hosts = list(dict.fromkeys([*(host or _own_names()), *filter(None, known)]))
    new_gateway(folder, hosts, passphrase=passphrase_of(folder))
    _say(
        f"{folder}/gateway has a new server.crt and server.key for {', '.join(hosts)}; fedeq fleet serve shows them "
        "from now on; give them to the broker, too, then: sudo systemctl reload mosquitto"
    )


@app.command(epilog="Example: fedeq fleet add pi-01 --profile raspberry-pi-4")
def add(
    device: DeviceId,
    profile: Annotated[str, typer.Option(help="Its board, out of `fedeq device list`.")],
    folder: Folder = _HERE,
) -> None:
    """Add a device, or let one in again that was revoked; those that are there do not change."""
    Fleet.open(folder).add(device, profile)
    _say(
        f"device {device} is in {folder}/fleet.toml. Next, one of:",
        f"  fedeq flash ssh://USER@HOST --device {device}{_where(folder)}    a board that runs",
        f"  fedeq flash card.img --device {device}{_where(folder)}           a card or its image",
        f"  fedeq fleet token {device}{_where(folder)}                       to enrol it by hand",
    )


@app.command(name="list", epilog="Example: fedeq fleet list --json")
def list_devices(folder: Folder = _HERE, as_json: AsJson = False) -> None:
    """Show the devices, their boards, and where they were flashed."""
    known = Fleet.open(folder).devices
    if as_json:
        typer.echo(json.dumps({device: msgspec.to_builtins(one) for device, one in known.items()}))
        return
    table = Table(Column("id", no_wrap=True), "board", "added", "flashed at", "revoked")
    for device, one in known.items():
        table.add_row(device, one.profile, one.added, escape(one.target) or "-", one.revoked or "-")
    Console(stderr=True).print(table)


@app.command(epilog="Example: fedeq fleet status --json")
def status(folder: Folder = _HERE, as_json: AsJson = False) -> None:
    """Show what each device reported last: the version it runs, whether it is confirmed and well, and when that was."""
    fleet = Fleet.open(folder)
    reports = {device: fleet.heard(device) for device in fleet.devices}
    revoked = {device: known.revoked for device, known in fleet.devices.items() if known.revoked}
    if as_json:
        ended = {device: {"revoked": on} for device, on in revoked.items()}
        typer.echo(json.dumps(msgspec.to_builtins(reports) | ended))
        return
    table = Table(Column("id", no_wrap=True), "version", "confirmed", "healthy", "heard", "last error")
    now = time.time()
    for device, heard in reports.items():
        gone = ("-", "-", "-", "-", f"revoked on {revoked[device]}") if device in revoked else ()
        table.add_row(device, *(gone or _row(heard, now)))
    Console(stderr=True).print(table)


@app.command(epilog="Example: fedeq fleet token pi-01 --hours 2")
def token(
    device: DeviceId,
    hours: Annotated[float, typer.Option(min=0.01, max=8760, help="How long it may be used.")] = 24.0,
    folder: Folder = _HERE,
    as_json: AsJson = False,
) -> None:
    """Print a join token on stdout: for this device, for one use. An earlier one that was not used is void."""
    fleet = Fleet.open(folder)
    made = fleet.issue_token(device, lifetime_s=3600 * hours)
    service = fleet.settings.service
    if as_json:
        typer.echo(json.dumps({"device": device, "token": str(made), "service": service, "hours": hours}))
        return
    typer.echo(str(made))
    _say(f"good for {hours:g} hours; on the board: sudo fedeq device enrol --service {service} --token TOKEN")


@app.command(epilog="Example: fedeq fleet serve --listen 192.168.1.10:8443")
def serve(
    listen: Annotated[str, typer.Option(help="HOST:PORT; devices are other machines.")] = "0.0.0.0:8443",
    folder: Folder = _HERE,
) -> None:
    """Serve devices until SIGTERM: enrolment, renewal, reports and releases over HTTPS."""
    from fedeq_edge.provision.ca import Authority  # noqa: PLC0415  # cryptography, only when it is asked for
    from fedeq_edge.provision.desk import Desk  # noqa: PLC0415  # as above
    from fedeq_edge.provision.service import Service  # noqa: PLC0415  # as above

    fleet = Fleet.open(folder)
    desk = Desk(fleet, Authority.open(folder / "ca", passphrase_of(folder)))
    with Service(desk, folder / "gateway", _address(listen)) as service:
        _stop_on_signal(service.shutdown)
        _say(f"fleet {fleet.settings.name} is served at port {service.port}, for devices at {fleet.settings.service}")
        service.serve_forever()


@app.command(epilog="Example: fedeq fleet revoke pi-17")
def revoke(device: DeviceId, folder: Folder = _HERE, as_json: AsJson = False) -> None:
    """Take back all certificates and tokens of a device; whoever was told refuses it from now on, the service at once.

    To let it in again: `fedeq fleet add ID --profile BOARD`, and `fedeq aggregator allow ID`.
    """
    fleet, broker = Fleet.open(folder), BrokerHere(folder)
    done = fleet.revoke(device, passphrase=passphrase_of(folder))
    shut = broker.took_list()
    if as_json:
        typer.echo(json.dumps({"device": device, **msgspec.to_builtins(done), "broker": shut}))
    _say(
        f"device {device} is revoked (certificates: {done.certificates}, tokens: {done.tokens}); the service knows",
        *(["the broker has ended its connection and takes no other from it"] if shut else _unheard(folder)),
        "the aggregator takes nothing from it any more" if done.denied else _undone(device, done.trouble, shut=shut),
    )
    if done.trouble:
        raise typer.Exit(1)


def _unheard(folder: Path) -> list[str]:
    """What the broker needs that does not do it by itself. A reload would let a connection that is up stay up."""
    install = f"sudo install -m 640 -g mosquitto {folder}/gateway/crl.pem /etc/mosquitto/fedeq-edge"
    return [
        "the broker was not told; on the gateway, to end its connection and refuse another:",
        f"  {install} && sudo systemctl restart mosquitto",
        "  (broker/fedeq-revoked.path does it by itself from then on)",
    ]


def _undone(device: str, trouble: str, *, shut: bool) -> str:
    if shut and not trouble:
        return "the aggregator hears nothing of it any more, since the broker does not"
    why = trouble or "[fleet] aggregator in fleet.toml names no state folder"
    return f"the aggregator was not told ({why}); there: fedeq aggregator deny {device}"


def _row(heard: Heard | None, now: float) -> tuple[str, ...]:
    if heard is None:
        return "-", "-", "-", "never", ""
    said = heard.report
    error = _printable(said.last_error.strip().rpartition("\n")[2])
    return _printable(said.version), _yes(said.confirmed), _yes(said.healthy), _ago(now - heard.at), error


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _printable(text: str) -> str:
    """What a device said, without what would steer a terminal or rich."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in text))


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _own_names() -> list[str]:
    """Names of this machine that a device on the same network finds (mDNS), and its own for tests on it."""
    name = socket.gethostname().partition(".")[0].lower()
    return [f"{name}.local", name, "localhost", "127.0.0.1"]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"--listen {listen!r} is no HOST:PORT; give 0.0.0.0:8443, or [::]:8443")
    return host.strip("[]"), int(port)


def _stop_on_signal(stop: Callable[[], None]) -> None:
    """SIGTERM and Ctrl-C end serving; `stop` waits for the loop that the signal interrupts, so it runs beside it."""

    def obey(_number: int, _frame: Any) -> None:
        threading.Thread(target=stop).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, obey)


def passphrase_of(folder: Path) -> str | None:
    """Of the CA key: $FEDEQ_CA_PASSPHRASE, or asked for where the key has one and somebody is there to ask."""
    given = os.environ.get(_PASSPHRASE)
    with contextlib.suppress(OSError):
        if given is None and b"ENCRYPTED" in (folder / "ca" / "ca.key").read_bytes() and sys.stdin.isatty():
            return str(typer.prompt("passphrase of the CA", hide_input=True, err=True))
    return given


def _new_passphrase() -> str:
    return str(typer.prompt("passphrase of the CA", hide_input=True, confirmation_prompt=True, err=True))


def _where(folder: Path) -> str:
    return "" if folder == _HERE else f" --fleet {folder}"


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(line, err=True)
