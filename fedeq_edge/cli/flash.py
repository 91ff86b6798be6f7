"""fedeq flash, logs, rollback: a device from this machine, wherever it is."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge.cli.fleet import passphrase_of
from fedeq_edge.errors import ConfigError, Exit, ProvisionError
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.layout import AGENT
from fedeq_edge.provision.plan import Flashed, Plan
from fedeq_edge.provision.targets import AnyTarget, open_target
from fedeq_edge.provision.targets.base import Machine
from fedeq_edge.provision.targets.image import ImageTarget
from fedeq_edge.provision.targets.rootfs import RootfsTarget

if TYPE_CHECKING:
    from fedeq_edge.provision.ca import Authority

FLASH_EXAMPLE = "Example: fedeq flash ssh://pi@10.0.0.5 --device pi-01 --check"
LOGS_EXAMPLE = "Example: fedeq logs pi-01 -n 50 -f"
ROLLBACK_EXAMPLE = "Example: fedeq rollback pi-01"
app = typer.Typer()
Folder = Annotated[Path, typer.Option("--fleet", help="Folder of the fleet.")]
DeviceId = Annotated[str, typer.Argument(metavar="ID", help="Id of the device.")]
Accept = Annotated[
    str, typer.Option(metavar="SHA256:...", help="Fingerprint of a host key that may be new; it is remembered.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
_HERE = Path("fleet")
_REPORT_S = 180.0  # a device that is on reports three times in it, and starts again within it


@app.command(name="flash", epilog=FLASH_EXAMPLE)
def flash(
    target: Annotated[str, typer.Argument(help="ssh://user@host[:port], local:, /mnt/rootfs, card.img or /dev/sdX.")],
    device: Annotated[str, typer.Option(help="Id of the device, as fleet.toml has it.")],
    bundle: Annotated[
        Path | None, typer.Option(help="What `fedeq bundle build` wrote [default: the newest for its board].")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="npz to train on, in the place of what the device has.")] = None,
    fleet: Folder = _HERE,
    check: Annotated[bool, typer.Option("--check", help="Look, say what would be done, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    accept_host_key: Accept = "",
    as_json: AsJson = False,
) -> None:
    """Bring a device from nothing, or from another release, to its first heartbeat; or prepare the card for it.

    Exit: 0 ok, 3 tampered, 4 unhealthy and rolled back, 5 no space, 6 would not run there, 7 host key, 8 not reached,
    11 clock, 12 card has booted, 13 another installer at work.
    """
    from fedeq_edge.provision.flash import flash as carry_out  # noqa: PLC0415  # cryptography, only for this command
    from fedeq_edge.provision.flash import prepare  # noqa: PLC0415  # as above

    if data is not None:
        _check_data(data)
    ours = Fleet.open(fleet)
    ours.check_admitted(device)
    choice = [bundle] if bundle else _bundles_of(ours, device)
    with _opened(target, ours, accept_host_key) as opened:
        plan = _first_sound(choice, lambda chosen: prepare(opened, ours, device, chosen, data=data))
        _show(plan)
        if check:
            _print(_described(plan), as_json)
            return
        _confirm(opened, ours, plan, yes=yes)
        done = carry_out(opened, ours, plan, sign=lambda: _authority(ours), told=_say)
    _summarise(done)
    _print(msgspec.to_builtins(done), as_json)


@app.command(name="logs", epilog=LOGS_EXAMPLE)
def logs(
    device: DeviceId,
    lines: Annotated[int, typer.Option("-n", min=1, help="How many lines.")] = 20,
    follow: Annotated[bool, typer.Option("-f", help="Go on with what it says from now on.")] = False,
    fleet: Folder = _HERE,
    accept_host_key: Accept = "",
) -> None:
    """Print what the agent of a device said, out of its journal: over ssh, or where there is no way, by its updater."""
    ours = Fleet.open(fleet)
    if not _is_reached(ours, device) and not follow:
        _asked_for_logs(ours, device, lines)
        return
    with _reached(ours, device, accept_host_key) as machine:
        more = ["--follow"] if follow else []
        command = ["journalctl", "--unit", AGENT, "--lines", str(lines), "--no-pager", "--output", "short-iso", *more]
        for line in machine.stream(command):
            typer.echo(_printable(line))


@app.command(name="rollback", epilog=ROLLBACK_EXAMPLE)
def rollback(device: DeviceId, fleet: Folder = _HERE, accept_host_key: Accept = "", as_json: AsJson = False) -> None:
    """Let a device run the release before the one it runs, and see it connected to its broker."""
    from fedeq_edge.provision.flash_board import check_heartbeat, roll_back  # noqa: PLC0415  # as above
    from fedeq_edge.provision.update import check_free  # noqa: PLC0415  # tuf, as above

    ours = Fleet.open(fleet)
    check_free(ours, device)
    if _is_reached(ours, device):
        with _reached(ours, device, accept_host_key) as machine:
            version = roll_back(machine)
            check_heartbeat(machine, version)
    else:
        version = _asked_to_roll_back(ours, device)
    if as_json:
        typer.echo(json.dumps({"device": device, "version": version}))
    _say(f"device {device} runs {version} again")


def _check_data(path: Path) -> None:
    """An agent would train on it. Raises ConfigError: what it refuses would come out at a card's first boot only."""
    from fedeq_edge.data.npz import load_client  # noqa: PLC0415  # numpy, only where data are given

    if not path.is_file():
        raise ConfigError(f"data {path} does not exist; name the npz that this device shall train on")
    load_client(path)


def _asked_for_logs(fleet: Fleet, device: str, lines: int) -> None:
    from fedeq_edge.provision import update  # noqa: PLC0415  # tuf, only where there is no other way

    for line in update.logs(fleet, device, _REPORT_S, told=_say)[-lines:]:
        typer.echo(_printable(line))


def _asked_to_roll_back(fleet: Fleet, device: str) -> str:
    """The version that it runs then, in its own words."""
    from fedeq_edge.provision import update  # noqa: PLC0415  # as above

    return update.roll_back(fleet, device, _REPORT_S, told=_say).removeprefix("runs ")


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in line)


def _bundles_of(fleet: Fleet, device: str) -> list[Path]:
    """The fleet's bundles for the device's board, newest first. Raises ConfigError where there is none."""
    built = sorted((fleet.folder / "bundles").glob("*.tar.gz"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [path for path in built if _is_for(path, fleet, device)]
    if not found:
        raise ConfigError(
            f"{fleet.folder}/bundles has no bundle for {device} or any {fleet.device(device).profile}; "
            f"fedeq bundle build --device {device}, or name one with --bundle"
        )
    return found


def _is_for(bundle: Path, fleet: Fleet, device: str) -> bool:
    """Whether it is for this device, or any of its board; one that cannot say, or has others' settings, is named."""
    from fedeq_edge.provision.agentfile import is_made_for  # noqa: PLC0415  # few commands need it
    from fedeq_edge.provision.bundle import read_manifest  # noqa: PLC0415  # as above

    known = fleet.device(device)
    try:
        manifest = read_manifest(bundle)
    except ProvisionError as error:
        _say(f"left out: {error}")
        return False
    if manifest.profile != known.profile:
        return False
    if not (made := is_made_for(manifest, fleet.settings, device, known)):
        _say(f"left out: bundle {bundle} was built for another device, or before its settings changed")
    return made


def _first_sound(bundles: Sequence[Path], prepare: Callable[[Path], Plan]) -> Plan:
    """The plan with the first bundle that is whole; those before it are named. Raises what the last one raises."""
    for bundle in bundles[:-1]:
        try:
            return prepare(bundle)
        except ProvisionError as error:
            if error.exit is not Exit.VERIFICATION:
                raise
            _say(f"left out: {error}")
    return prepare(bundles[-1])


@contextmanager
def _opened(target: str, fleet: Fleet, accept: str) -> Iterator[AnyTarget]:
    opened = open_target(target, known_hosts=fleet.folder / "known_hosts", accept=accept)
    try:
        yield opened
    finally:
        opened.close()


def _is_reached(fleet: Fleet, device: str) -> bool:
    target = fleet.device(device).target
    return target == "local:" or target.startswith("ssh://")


@contextmanager
def _reached(fleet: Fleet, device: str, accept: str) -> Iterator[Machine]:
    """The machine that a device was flashed at last. Raises ConfigError where it is not reached from here."""
    target = fleet.device(device).target
    if not _is_reached(fleet, device):
        how = f"it was flashed as {target}" if target else "it was never flashed from here"
        raise ConfigError(
            f"device {device} is not reached from this machine: {how}; flash it over ssh, "
            f'or set target = "ssh://USER@HOST" of [devices.{device}] in fleet.toml'
        )
    with _opened(target, fleet, accept) as opened:
        assert not isinstance(opened, ImageTarget | RootfsTarget)
        yield opened


def _confirm(target: AnyTarget, fleet: Fleet, plan: Plan, *, yes: bool) -> None:
    """The user wants it. Asked where it cannot be taken back, or where two boards would have one identity."""
    before = fleet.device(plan.device).target
    disk = isinstance(target, ImageTarget) and Path(target.name).is_block_device()
    doubts = [
        *([f"write to {target.name}"] if disk else []),
        *([f"make it {plan.device}, which was {before} before"] if before not in ("", target.name) else []),
        *([f"take it from {plan.occupant}, for which it was prepared"] if plan.occupant else []),
    ]
    if yes or not doubts:
        return
    why = ", and ".join(doubts)
    if not sys.stdin.isatty():
        raise ProvisionError(Exit.MISUSED, f"{target.name}: add --yes to {why}; nobody is here to be asked")
    typer.confirm(f"{why[0].upper()}{why[1:]}?", abort=True, err=True)


def _authority(fleet: Fleet) -> "Authority":
    from fedeq_edge.provision.ca import Authority  # noqa: PLC0415  # as above

    return Authority.open(fleet.folder / "ca", passphrase_of(fleet.folder))


def _show(plan: Plan) -> None:
    facts = plan.facts
    table = Table(show_header=False, box=None)
    what = " ".join(filter(None, (facts.architecture, facts.cpu_name or facts.cpu_part, facts.hostname)))
    table.add_row("board", what)
    table.add_row("system", f"python {facts.python}, {facts.libc} {facts.glibc}, systemd {facts.systemd}")
    table.add_row("bundle", f"{plan.manifest.version} for {plan.manifest.profile}")
    for warning in plan.warnings:
        table.add_row("warning", warning)
    for number, step in enumerate(plan.intended, 1):
        table.add_row(f"{number}.", step)
    Console(stderr=True).print(table)


def _summarise(done: Flashed) -> None:
    if done.heartbeat_s is None:
        _say(f"{done.target} is ready: device {done.device} enrols and starts at its next boot")
    else:
        what = "runs" if done.changed else "no change: runs"
        _say(f"device {done.device} {what} {done.version}, connected to its broker after {done.heartbeat_s:.1f} s")


def _described(plan: Plan) -> dict[str, Any]:
    """The plan without the thousands of files that its manifest names."""
    said = {"device": plan.device, "target": plan.target, "bundle": str(plan.bundle), "sha256": plan.digest}
    return {
        **said,
        "version": plan.manifest.version,
        "profile": plan.manifest.profile,
        "facts": msgspec.to_builtins(plan.facts),
        "warnings": plan.warnings,
        "intended": plan.intended,
    }


def _print(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value))


def _say(line: str) -> None:
    typer.echo(line, err=True)
