"""What is wrong here, and the command that mends it: on the host, on the gateway, on a device.

A check says what it saw, whether that is well, and what to do if not. None changes anything, and none stops the
others: what cannot be seen is itself a finding. Which checks are made follows from what is there: a fleet's folder, the
settings of an agent or an aggregator, a board's releases.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from fedeq_edge.errors import FedEqError
from fedeq_edge.provision.doctor_host import fleet_devices, fleet_folder, fleet_links, gateway, host_tools
from fedeq_edge.provision.doctor_links import broker, certificates, service
from fedeq_edge.provision.findings import Check, Clock, check, guarded, said
from fedeq_edge.provision.layout import AGENT, UPDATER
from fedeq_edge.provision.redact import printable, without
from fedeq_edge.transport.mqtt import Endpoint

_OLDEST: Final = (3, 11)
_CLOCK_FLOOR: Final = 1_750_000_000  # June 2025: before this program was written
_DISK_WARN, _DISK_FAIL = 500 << 20, 100 << 20  # a release without torch takes 150 MB beside the one that runs
_MEMORY_WARN: Final = 64 << 20  # an agent needs 45 MB, its trainer more
_EXTRAS: Final = {
    "host": {"cryptography": "fleet", "asyncssh": "fleet", "tuf": "fleet", "uv": "fleet"},
    "device": {"cryptography": "board", "tuf": "board", "onnxruntime": "board"},
}
_FLASH: Final = "on the host: fedeq flash, once more"
_ENROL: Final = "sudo fedeq device enrol --service URL --token TOKEN, as fedeq fleet token prints them on the host"
_COPY: Final = "on the host, with this board's address: scp {} root@BOARD:{}"
_RENEW: Final = "journalctl -u fedeq-updater.service; then enrol anew: fedeq device enrol --help"


class _Broker(msgspec.Struct, frozen=True):
    url: str = ""
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


class Config(msgspec.Struct, frozen=True):
    """What of agent.toml or aggregator.toml is looked at. device: "" in that of an aggregator."""

    device: str = ""
    state: str = "state"
    broker: _Broker = _Broker()


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to look at; None: not here. root: of the board. config: settings of an agent or an aggregator."""

    fleet: Path | None = None
    config: Path | None = None
    root: Path | None = None

    @property
    def places(self) -> list[str]:
        """What this machine is, "host", "gateway" or "device", and maybe more than one."""
        found = ["host"] if self.fleet else []
        if self.config and not read_config(self.config).device:
            found.append("gateway")
        if self.root or (self.config and read_config(self.config).device):
            found.append("device")
        return found


def find(fleet: Path, config: Path | None, root: Path = Path("/")) -> Here:
    """What is there: the fleet's folder, the settings named or else found, and a board's releases or identity."""
    identity = root / "etc/fedeq-edge"
    board = (root / "opt/fedeq-edge/state.json").exists() or (identity / "device.crt").exists()
    usual = (Path("agent.toml"), Path("aggregator.toml"), identity / "agent.toml")
    found = config or next((path for path in usual if path.exists()), None)
    return Here(fleet=fleet if (fleet / "fleet.toml").exists() else None, config=found, root=root if board else None)


def look(here: Here, clock: Clock = time.time) -> list[Check]:
    """Everything that can be seen here."""
    return [check for one in _looks(here, clock) for check in guarded(one)]


def _looks(here: Here, clock: Clock) -> Iterator[Callable[[], Iterable[Check]]]:
    yield lambda: _machine(here, clock)
    if here.fleet is not None:
        folder = here.fleet
        yield host_tools
        yield lambda: fleet_folder(folder)
        yield lambda: gateway(folder, clock)
        yield lambda: fleet_links(folder)
        yield lambda: fleet_devices(folder, clock)
    if here.config is not None:
        config = here.config
        yield lambda: _configured(config)
    if here.root is not None:
        root = here.root
        yield lambda: _releases(root)
        yield lambda: _identity(root, clock)


def _machine(here: Here, clock: Clock) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < _OLDEST
    yield check("python", f"{version} at {sys.executable}", fail=old, remedy="install python 3.11 or newer")
    for place in here.places:
        yield from _extras(place)
    yield _clock(clock())
    yield _disk(here)
    free = psutil.virtual_memory().available
    low = free < _MEMORY_WARN
    yield check("memory", f"{free >> 20} MB available", warn=low, remedy="ps aux --sort=-rss | head")
    yield _telemetry()


def _extras(place: str) -> Iterator[Check]:
    missing = {name: extra for name, extra in _EXTRAS.get(place, {}).items() if importlib.util.find_spec(name) is None}
    if place in _EXTRAS:
        saw = f"not installed: {', '.join(missing)}" if missing else f"{', '.join(_EXTRAS[place])} are installed"
        extra = next(iter(missing.values()), "")
        yield check(f"extras ({place})", saw, fail=bool(missing), remedy=f"pip install 'fedeq-edge[{extra}]'")


def _clock(now: float) -> Check:
    saw = f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    synchronised = said(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if synchronised == "no":
        saw += ", not synchronised"
    wrong = now < _CLOCK_FLOOR
    return check("clock", saw, fail=wrong, warn=synchronised == "no", remedy="sudo timedatectl set-ntp true")


def _disk(here: Here) -> Check:
    folder = here.fleet or (_home(here.root) if here.root else Path())
    free = shutil.disk_usage(folder).free
    saw = f"{free >> 20} MB free at {folder.absolute()}"
    return check("disk", saw, fail=free < _DISK_FAIL, warn=free < _DISK_WARN, remedy="sudo apt-get clean; df -h")


def _home(root: Path) -> Path:
    """Where releases go on a board, or where that will be: it may be a file system of its own."""
    return next(path for path in (root / "opt/fedeq-edge", root / "opt", root) if path.exists())


def _telemetry() -> Check:
    """onnxruntime >= 1.29 reports to its maker; fedeq switches that off before it loads it."""
    if importlib.util.find_spec("onnxruntime") is None:
        return Check(name="telemetry", saw="onnxruntime is not installed")
    version = importlib.metadata.version("onnxruntime")
    told = os.environ.get("ORT_DISABLE_TELEMETRY", "1")  # fedeq sets 1 where nothing is set
    on = told in ("", "0")
    saw = f"onnxruntime {version}, ORT_DISABLE_TELEMETRY={told}"
    return check("telemetry", saw, fail=on, remedy="unset ORT_DISABLE_TELEMETRY")


def _configured(path: Path) -> Iterator[Check]:
    config = read_config(path)
    yield _state(path.parent / config.state, config)
    named, beside = config.broker, path.parent
    if named.url:
        pem = [str(beside / name) if name else None for name in (named.ca, named.certificate, named.key)]
        yield broker(Endpoint(url=named.url, ca=pem[0], certificate=pem[1], key=pem[2]))


def _state(folder: Path, config: Config) -> Check:
    program = "agent" if config.device else "aggregator"
    try:
        found = json.loads((folder / "status.json").read_bytes())
        age = time.time() - (folder / "status.json").stat().st_mtime
    except FileNotFoundError:
        return check("state", f"{folder} has no status.json", warn=True, remedy=f"fedeq {program} run")
    runs = Path(f"/proc/{found.get('pid')}").exists()
    saw = f"{folder} is readable; {program} {'runs' if runs else 'does not run'}, broker: {found.get('broker', '?')}"
    return check("state", f"{saw}, written {age:.0f} s ago", warn=not runs, remedy=f"fedeq {program} run")


def _releases(root: Path) -> Iterator[Check]:
    home = root / "opt/fedeq-edge"
    try:
        state = json.loads((home / "state.json").read_bytes())
        current = (home / "current").readlink().name
    except FileNotFoundError as error:
        yield check("release", f"{error.filename} is missing", fail=True, remedy=_FLASH)
        return
    except ValueError as error:
        yield check("release", f"{home}/state.json is damaged ({error})", fail=True, remedy=_FLASH)
        return
    saw = f"{current}, {'confirmed' if state['confirmed'] == current else 'on trial'}; before it: {state['previous']}"
    trial = state["confirmed"] != current
    yield check("release", saw, warn=trial, remedy="sudo python3 /opt/fedeq-edge/release.py status")
    if failed := state.get("failed"):
        last = (failed.get("log") or ["it said nothing"])[-1]
        saw = f"release {failed['version']} was left again: {last}"
        yield Check(name="last update", saw=saw, verdict="warn", remedy=f"journalctl -u {AGENT}")


def _identity(root: Path, clock: Clock) -> Iterator[Check]:
    """Who the board is, and what runs as that: units without a certificate stay off, and no restart starts them."""
    certificate = root / "etc/fedeq-edge/device.crt"
    if not certificate.exists():
        saw = f"not enrolled, {certificate} is missing: neither agent nor updater starts"
        yield check("identity", saw, fail=True, remedy=_ENROL)
        return
    yield from guarded(lambda: certificates([certificate], clock, _RENEW))
    yield from _trusted(root)
    yield from guarded(lambda: _board_link(root))
    yield from _units((AGENT, UPDATER))


def _trusted(root: Path) -> Iterator[Check]:
    """What an update is held against: without it none is taken, and nothing but a new enrolment brings it."""
    kept = {"fleet/keys/bundle.pub": "opt/fedeq-edge/bundle.pub"}
    kept["fleet/tuf/metadata/1.root.json"] = "etc/fedeq-edge/root.json"
    for theirs, ours in kept.items():
        if not (root / ours).exists():
            saw = f"{root / ours} is missing: no update is taken"
            yield check("trust", saw, fail=True, remedy=_COPY.format(theirs, f"/{ours}"))


def _board_link(root: Path) -> Iterator[Check]:
    identity = root / "etc/fedeq-edge"
    settings = identity / "updater.toml"
    if not settings.exists():
        yield check("service", f"{settings} is missing", fail=True, remedy=_FLASH)
        return
    yield service(str(tomllib.loads(settings.read_text())["service"]), identity / "ca.crt", settings)


def _units(names: Sequence[str]) -> Iterator[Check]:
    for name in names:
        state = said(["systemctl", "is-active", name]) or "not known: no systemd here"
        yield check(f"unit {name}", state, fail=state != "active", remedy=f"sudo systemctl restart {name}")
        error = said(["journalctl", "--unit", name, "--priority", "err", "--lines", "1", "--output", "cat", "--quiet"])
        if error:
            saw = printable(without(error))
            yield Check(name=f"last error of {name}", saw=saw, verdict="warn", remedy=f"journalctl -u {name}")


def read_config(path: Path) -> Config:
    """The settings of an agent or an aggregator. Raises FedEqError where they cannot be read."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise FedEqError(f"{path} cannot be read ({error}); mend it, or name another with --config") from error
