"""fedeq doctor: what is wrong on this machine, or with a device, and the command that mends it."""

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedeq_edge import settings
from fedeq_edge.errors import ConfigError, FedEqError
from fedeq_edge.provision.doctor import find, look, read_config
from fedeq_edge.provision.doctor_host import of_device
from fedeq_edge.provision.findings import Check
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.support import pack

EXAMPLE = "Example: fedeq doctor pi-01 --bundle support.zip"
app = typer.Typer()
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@app.command(name="doctor", epilog=EXAMPLE)
def doctor(
    device: Annotated[str, typer.Argument(metavar="[ID]", help="A device of the fleet; else this machine.")] = "",
    fleet: Annotated[Path | None, typer.Option("--fleet", help="Folder of the fleet [default: fleet].")] = None,
    config: Annotated[
        Path | None, typer.Option(help="agent.toml or aggregator.toml [default: the one that is here].")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FILE.zip", help="Also write what a helper needs, without secrets.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Look at host, gateway or device, whatever this is: what each check saw, and the command that mends it.

    Exit: 0 nothing fails, 1 something does.
    """
    folder = fleet or Path("fleet")
    if device or fleet is not None:
        Fleet.open(folder)  # a folder that somebody names is one, or is refused
    here = find(folder, config)
    checks = _of_device(Fleet.open(folder), device) if device else [*look(here), *_read(here.config)]
    if bundle is not None:
        names = pack(here, checks, bundle)
        typer.echo(
            f"{bundle}: {len(names)} files without keys, tokens, passwords; read it before you send it", err=True
        )
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(checks)))
    _show(checks)
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(1)


def _read(path: Path | None) -> list[Check]:
    """Whether agent or aggregator would take these settings; `look` has said it where they cannot even be read."""
    try:
        config = read_config(path) if path else None
    except FedEqError:
        return []
    if path is None or config is None:
        return []
    try:
        if config.device:
            settings.load(path, settings.AgentSettings)
        else:
            settings.load(path, settings.AggregatorSettings)
    except ConfigError as error:
        reason, _, remedy = str(error).partition("; ")
        return [Check(name="settings", saw=reason, verdict="fail", remedy=remedy or f"correct it in {path}")]
    return [Check(name="settings", saw=f"{path}: {f'device {config.device}' if config.device else 'an aggregator'}")]


def _of_device(fleet: Fleet, device: str) -> list[Check]:
    found = of_device(fleet, device)
    target = fleet.device(device).target
    if not target.startswith("ssh://"):
        return found
    try:
        return [*found, *_asked(fleet, target)]
    except FedEqError as error:
        return [*found, Check(name="ssh", saw=str(error), verdict="warn", remedy=f"fedeq flash {target} --check")]


def _asked(fleet: Fleet, target: str) -> list[Check]:
    """What the board itself sees."""
    from fedeq_edge.provision.targets import open_target  # noqa: PLC0415  # asyncssh, only where there is an address
    from fedeq_edge.provision.targets.ssh import SshTarget  # noqa: PLC0415

    machine = open_target(target, known_hosts=fleet.folder / "known_hosts")
    assert isinstance(machine, SshTarget)
    try:
        ended = machine.run([machine.layout.program, "doctor", "--json"], timeout_s=120.0)
    finally:
        machine.close()
    try:
        seen = msgspec.json.decode(ended.out, type=list[Check])
    except msgspec.DecodeError:
        return [Check(name="ssh", saw=f"{target}: {ended.reason}", verdict="warn", remedy="flash it: fedeq flash")]
    return [msgspec.structs.replace(check, name=f"there: {check.name}") for check in seen]


def _show(checks: list[Check]) -> None:
    table = Table(Column("check", no_wrap=True), "", "saw", "mend it with")
    for check in checks:
        colour = _COLOURS[check.verdict]
        table.add_row(escape(check.name), f"[{colour}]{check.verdict}[/]", escape(check.saw), escape(check.remedy))
    Console(stderr=True).print(table)
