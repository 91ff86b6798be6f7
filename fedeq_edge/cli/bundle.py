"""fedeq bundle: everything that a board needs, as one signed file."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge.errors import ConfigError, Exit, ProvisionError
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.provision import bundle as bundles
from fedeq_edge.provision.agentfile import agent_toml
from fedeq_edge.provision.archive import Manifest
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.platforms import platform_of
from fedeq_edge.provision.preflight import run_bundle

app = typer.Typer(
    help="Bundles: packages, units and models for a board, signed.", no_args_is_help=True, rich_markup_mode=None
)
Folder = Annotated[Path | None, typer.Option("--fleet", help="Folder of the fleet, whose key signs [default: fleet].")]
File = Annotated[Path, typer.Argument(help="A bundle, *.tar.gz.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
_HERE = Path("fleet")


@app.command(epilog="Example: fedeq bundle build --profile raspberry-pi-4 --python 3.13 --model personal.onnx")
def build(
    device: Annotated[str | None, typer.Option(help="Device of the fleet: its board, with its agent.toml.")] = None,
    profile: Annotated[str | None, typer.Option(help="Board; `fedeq device list` shows them.")] = None,
    python: Annotated[str | None, typer.Option(help="Minor version of the board's python3; else its usual.")] = None,
    extra: Annotated[Literal["torch"] | None, typer.Option("--with", help="Also torch, to train by it.")] = None,
    model: Annotated[list[Path] | None, typer.Option(help="A .fedeq or .onnx to take along; repeat for more.")] = None,
    wheelhouse: Annotated[Path | None, typer.Option(help="Folder of wheels to use instead of the network.")] = None,
    folder: Folder = None,
    out: Annotated[Path | None, typer.Option(help="Where to [default: bundles in the fleet, else here].")] = None,
    as_json: AsJson = False,
) -> None:
    """Build the bundle of a board: packages for it, units, models and the installer; same inputs, same bytes."""
    started = time.perf_counter()
    fleet = _fleet(folder)
    board, config = _board(fleet, device, profile, torch=extra == "torch")
    spec = bundles.BundleSpec(
        platform=platform_of(load_profile(board), python),
        out=out or (fleet.folder / "bundles" if fleet else Path()),
        key=fleet.folder / "keys" / "bundle.key" if fleet else None,
        name=device or board,
        torch=extra == "torch",
        models=tuple(model or ()),
        wheelhouse=wheelhouse,
        config=config,
    )
    if not as_json:
        typer.echo(f"wheels for {spec.platform.uv}, python {spec.platform.python}: a minute, more with torch", err=True)
    path = bundles.build(spec)
    told = {"path": str(path), "signed": fleet is not None, **_facts(path, bundles.read_manifest(path))}
    told["seconds"] = round(time.perf_counter() - started, 1)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        _say_built(told)


@app.command(epilog="Example: fedeq bundle inspect fleet/bundles/raspberry-pi-4-py311-0.1.0+2a121ddeae9f.tar.gz")
def inspect(file: File, as_json: AsJson = False) -> None:
    """Show what a bundle says of itself; exit 3 where it is damaged. `verify` tells whether the fleet signed it."""
    manifest, signed = bundles.whole(file)
    _show({**_facts(file, manifest), "models": _models(manifest), "signed": signed, "verified": False}, as_json)
    if not as_json:
        typer.echo(f"whole; whose signature it has, if any, was not checked: fedeq bundle verify {file}", err=True)


@app.command(epilog="Example: fedeq bundle verify raspberry-pi-4-py311-0.1.0+2a121ddeae9f.tar.gz --run-in arm64-root")
def verify(
    file: File,
    folder: Folder = None,
    key: Annotated[Path | None, typer.Option(help="bundle.pub, where the fleet is not here.")] = None,
    run_in: Annotated[
        Path | None,
        typer.Option(help="An arm64 root: also run the packages in it, under the board's core in qemu-aarch64."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a bundle and its signature; exit 3 where one differs, 6 where its packages would crash."""
    public = key or (folder or _HERE) / "keys" / "bundle.pub"
    if key is None and not public.exists():
        raise ConfigError(f"{public} does not exist; name the fleet with --fleet, or its bundle.pub with --key")
    manifest = bundles.verify(file, public)
    told: dict[str, Any] = {"verified": True, "version": manifest.version, "key": str(public)}
    if run_in is not None:
        smoke = run_bundle(file, public, run_in)
        told["run"] = msgspec.to_builtins(smoke)
        if not smoke.ok:
            how = f"dies of {smoke.signal}" if smoke.signal else f"fails: {smoke.detail}"
            raise ProvisionError(
                Exit.WRONG_PLATFORM,
                f"bundle {file}: {smoke.reached} {how} under {smoke.cpu}; pin a version that runs there under [pins] "
                "in the board's profile.toml",
            )
    _show(told, as_json)


def _say_built(told: dict[str, Any]) -> None:
    megabytes = f"{told['packed_bytes'] / 1e6:.1f} MB packed, {told['unpacked_bytes'] / 1e6:.0f} MB unpacked"
    typer.echo(f"{told['path']}: {megabytes}, {len(told['packages'])} packages, {told['seconds']} s", err=True)
    if not told["signed"]:
        typer.echo("not signed, and no board takes it: make a fleet with `fedeq fleet init`, build it again", err=True)


def _fleet(folder: Path | None) -> Fleet | None:
    """The fleet whose key signs; None where none was named and none is here."""
    if folder is None and not _HERE.exists():
        return None
    return Fleet.open(folder or _HERE)


def _board(fleet: Fleet | None, device: str | None, profile: str | None, *, torch: bool) -> tuple[str, bytes]:
    """Board and agent.toml: of a device of the fleet, or of a board by its name, which has none."""
    if device is not None and profile is not None:
        raise ConfigError(f"fleet.toml says what board device {device} is; leave out --profile {profile}")
    if device is None and profile is None:
        raise ConfigError("say what the bundle is for: --device ID of a fleet, or --profile BOARD")
    if device is None:
        return str(profile), b""
    if fleet is None:
        raise ConfigError(
            f"device {device} belongs to no fleet here; make one with `fedeq fleet init`, or give --fleet"
        )
    known = fleet.device(device)
    return known.profile, agent_toml(fleet.settings, device, known, torch=torch)


def _facts(path: Path, manifest: Manifest) -> dict[str, Any]:
    facts = {name: value for name, value in msgspec.to_builtins(manifest).items() if name != "files"}
    sizes = {"packed_bytes": path.stat().st_size, "unpacked_bytes": manifest.unpacked_bytes}
    return {**facts, "files": len(manifest.files), **sizes}


def _models(manifest: Manifest) -> list[str]:
    return [name.removeprefix("models/") for name in manifest.files if name.startswith("models/")]


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table("what", "value")
    for name, value in facts.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    Console(stderr=True).print(table)
