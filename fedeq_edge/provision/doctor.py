"""What is wrong here, and the command that mends it: on the host, on the gateway, on a device.

A check says what it saw, whether that is well, and what to do if not. None changes anything, and none stops the
others: what cannot be seen is itself a finding. Which checks are made follows from what is there: a fleet's folder, the
settings of an agent or an aggregator, a board's releases.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import psutil

from fedeq_edge.errors import Exit, FedEqError, ProvisionError
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.storage.files import write_atomically, writing
from fedeq_edge.transport.mqtt import Endpoint, without_secrets

Verdict = Literal["ok", "warn", "fail"]
Clock = Callable[[], float]

_DAY_S: Final = 86_400.0
_OLDEST: Final = (3, 11)
_CLOCK_FLOOR: Final = 1_750_000_000  # June 2025: before this program was written
_SILENT_S: Final = 300.0  # five reports that did not come
_DISK_WARN, _DISK_FAIL = 500 << 20, 100 << 20  # a release without torch takes 150 MB beside the one that runs
_MEMORY_WARN: Final = 64 << 20  # an agent needs 45 MB, its trainer more
_CERTIFICATE_WARN_S: Final = 30 * _DAY_S  # devices renew half a year before the end
_ANSWER_S: Final = 5.0
_LOG_LINES: Final = 200
_EXTRAS: Final = {
    "host": {"cryptography": "fleet", "asyncssh": "fleet", "tuf": "fleet", "uv": "fleet"},
    "device": {"cryptography": "board", "tuf": "board", "onnxruntime": "board"},
}
AGENT: Final = "fedeq-agent.service"
UPDATER: Final = "fedeq-updater.service"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. name: what was looked at. remedy: the command that mends it, "" where all is well."""

    name: str
    saw: str
    verdict: Verdict = "ok"
    remedy: str = ""


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
        if self.config and not _read_config(self.config).device:
            found.append("gateway")
        if self.root or (self.config and _read_config(self.config).device):
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
    return [check for one in _looks(here, clock) for check in _guarded(one)]


def _looks(here: Here, clock: Clock) -> Iterator[Callable[[], Iterable[Check]]]:
    yield lambda: _machine(here, clock)
    if here.fleet is not None:
        folder = here.fleet
        yield _host_tools
        yield lambda: _fleet_folder(folder)
        yield lambda: _certificates([folder / "gateway" / "server.crt", folder / "ca" / "ca.crt"], clock, _ANEW)
        yield lambda: _fleet_links(folder)
        yield lambda: _fleet_devices(folder, clock)
    if here.config is not None:
        config = here.config
        yield lambda: _configured(config)
    if here.root is not None:
        root = here.root
        yield lambda: _releases(root)
        yield lambda: _certificates([root / "etc/fedeq-edge/device.crt"], clock, _RENEW)
        yield lambda: _board_link(root)
        yield lambda: _units((AGENT, UPDATER))


_ANEW: Final = "fedeq fleet gateway --host NAME"
_RENEW: Final = "journalctl -u fedeq-updater.service; then enrol anew: fedeq device enrol --help"


def _guarded(one: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Its checks; where it cannot go on, that is one."""
    try:
        yield from one()
    except FedEqError as error:
        reason, _, remedy = str(error).partition("; ")
        yield Check(name="trouble", saw=reason, verdict="fail", remedy=remedy)
    except ModuleNotFoundError as error:
        remedy = "pip install 'fedeq-edge[fleet]', or [board] on a device"
        yield Check(name="trouble", saw=f"{error.name} is not installed", verdict="fail", remedy=remedy)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        yield Check(name="trouble", saw=str(error), verdict="fail", remedy="run it as root, with sudo")


def _machine(here: Here, clock: Clock) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < _OLDEST
    yield _check("python", f"{version} at {sys.executable}", fail=old, remedy="install python 3.11 or newer")
    for place in here.places:
        yield from _extras(place)
    yield _clock(clock())
    yield _disk(here)
    free = psutil.virtual_memory().available
    low = free < _MEMORY_WARN
    yield _check("memory", f"{free >> 20} MB available", warn=low, remedy="ps aux --sort=-rss | head")
    yield _telemetry()


def _extras(place: str) -> Iterator[Check]:
    missing = {name: extra for name, extra in _EXTRAS.get(place, {}).items() if importlib.util.find_spec(name) is None}
    if place in _EXTRAS:
        saw = f"not installed: {', '.join(missing)}" if missing else f"{', '.join(_EXTRAS[place])} are installed"
        extra = next(iter(missing.values()), "")
        yield _check(f"extras ({place})", saw, fail=bool(missing), remedy=f"pip install 'fedeq-edge[{extra}]'")


def _clock(now: float) -> Check:
    saw = f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    synchronised = _said(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if synchronised == "no":
        saw += ", not synchronised"
    wrong = now < _CLOCK_FLOOR
    return _check("clock", saw, fail=wrong, warn=synchronised == "no", remedy="sudo timedatectl set-ntp true")


def _disk(here: Here) -> Check:
    folder = here.fleet or (here.root / "opt" if here.root and (here.root / "opt").exists() else Path())
    free = shutil.disk_usage(folder).free
    saw = f"{free >> 20} MB free at {folder.absolute()}"
    return _check("disk", saw, fail=free < _DISK_FAIL, warn=free < _DISK_WARN, remedy="sudo apt-get clean; df -h")


def _telemetry() -> Check:
    """onnxruntime >= 1.29 reports to its maker; fedeq switches that off before it loads it."""
    if importlib.util.find_spec("onnxruntime") is None:
        return Check(name="telemetry", saw="onnxruntime is not installed")
    version = importlib.metadata.version("onnxruntime")
    told = os.environ.get("ORT_DISABLE_TELEMETRY", "1")  # fedeq sets 1 where nothing is set
    on = told in ("", "0")
    saw = f"onnxruntime {version}, ORT_DISABLE_TELEMETRY={told}"
    return _check("telemetry", saw, fail=on, remedy="unset ORT_DISABLE_TELEMETRY")


def _host_tools() -> Iterator[Check]:
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    saw = emulator or "no qemu-user: what would crash on a board is known from a table alone"
    yield _check("qemu", saw, warn=emulator is None, remedy="sudo apt-get install qemu-user-static")


def _fleet_folder(folder: Path) -> Iterator[Check]:
    fleet = Fleet.open(folder)
    yield Check(name="fleet", saw=f"{fleet.settings.name}, devices: {len(fleet.devices)}, in {folder}")
    for secret in (folder / "ca/ca.key", folder / "keys/bundle.key", *sorted((folder / "tuf/keys").glob("*"))):
        mode = secret.stat().st_mode & 0o777
        if mode & 0o077:
            yield Check(
                name="keys",
                saw=f"{secret} may be read by others ({mode:o})",
                verdict="fail",
                remedy=f"chmod 600 {secret}",
            )


def _fleet_links(folder: Path) -> Iterator[Check]:
    settings, gateway = Fleet.open(folder).settings, folder / "gateway"
    yield _service(settings.service, gateway / "ca.crt", folder / "fleet.toml")
    mutual = settings.broker.startswith("mqtts://")
    yield _broker(
        Endpoint(
            url=settings.broker,
            ca=str(gateway / "ca.crt") if mutual else None,
            certificate=str(gateway / "aggregator.crt") if mutual else None,
            key=str(gateway / "aggregator.key") if mutual else None,
        )
    )


def _fleet_devices(folder: Path, clock: Clock) -> Iterator[Check]:
    fleet = Fleet.open(folder)
    for device in fleet.devices:
        yield from _reported(fleet, device, clock())


def of_device(fleet: Fleet, device: str, clock: Clock = time.time) -> list[Check]:
    """What the fleet knows of a device: where it is, its certificates and tokens, its last report, its action."""
    known = fleet.device(device)
    found = [Check(name="device", saw=f"{known.profile}, added {known.added}, flashed at {known.target or '-'}")]
    return [
        *found,
        *_guarded(lambda: _issued(fleet, device, clock())),
        *_guarded(lambda: _reported(fleet, device, clock())),
        *_guarded(lambda: _action(fleet, device)),
    ]


def _issued(fleet: Fleet, device: str, now: float) -> Iterator[Check]:
    from cryptography import x509  # noqa: PLC0415  # the extra `fleet`

    from fedeq_edge.provision.ca import common_name, revoked, serial_of  # noqa: PLC0415

    void = revoked(fleet.folder / "ca")
    certificates = [
        x509.load_pem_x509_certificate(path.read_bytes()) for path in (fleet.folder / "ca/issued").glob("*.crt")
    ]
    own = [one for one in certificates if common_name(one) == device]
    good = [one for one in own if serial_of(one) not in void and one.not_valid_after_utc.timestamp() > now]
    waiting = fleet.tokens.waiting(device, now=now) is not None
    saw = f"certificates: {len(good)} good, {len(own) - len(good)} void; a token waits: {'yes' if waiting else 'no'}"
    nobody = not good and not waiting
    remedy = f"fedeq flash TARGET --device {device}, or: fedeq fleet token {device}"
    yield _check("identity", saw, fail=nobody and bool(own), warn=nobody, remedy=remedy)


def _reported(fleet: Fleet, device: str, now: float) -> Iterator[Check]:
    heard = fleet.heard(device)
    if heard is None:
        yield _check(device, "has never reported", warn=True, remedy=f"fedeq flash TARGET --device {device}")
        return
    said, age = heard.report, now - heard.at
    saw = (
        f"{said.version or 'no release'}, {'confirmed' if said.confirmed else 'on trial'}, "
        f"{'healthy' if said.healthy else 'not healthy'}, heard {age:.0f} s ago"
    )
    yield _check(
        device,
        _printable(saw),
        fail=not said.healthy,
        warn=age > _SILENT_S or not said.confirmed,
        remedy=f"fedeq logs {device}" if age <= _SILENT_S else "is it on? on the board: sudo fedeq doctor",
    )
    if said.last_error.strip():
        last = _printable(said.last_error.strip().rpartition("\n")[2])
        yield Check(name=f"{device}: last error", saw=last, verdict="warn", remedy=f"fedeq logs {device}")


def _action(fleet: Fleet, device: str) -> Iterator[Check]:
    given = fleet.given_action(device)
    if given is None:
        return
    state = "not heard of" if given.state is None else given.state.state
    detail = "" if given.state is None else _printable(given.state.detail.strip().rpartition("\n")[2])
    saw = f"{given.action.kind} {given.action.version}: {state}{f' ({detail})' if detail else ''}"
    bad = state in ("failed", "rolled_back", "expired")
    yield _check("last action", saw, warn=bad, remedy=f"fedeq logs {device}")


def _configured(path: Path) -> Iterator[Check]:
    config = _read_config(path)
    who = f"device {config.device}" if config.device else "an aggregator"
    yield Check(name="settings", saw=f"{path}: {who}")
    yield _state(path.parent / config.state, config)
    broker, beside = config.broker, path.parent
    if broker.url:
        pem = [str(beside / name) if name else None for name in (broker.ca, broker.certificate, broker.key)]
        yield _broker(Endpoint(url=broker.url, ca=pem[0], certificate=pem[1], key=pem[2]))


def _state(folder: Path, config: Config) -> Check:
    program = "agent" if config.device else "aggregator"
    try:
        found = json.loads((folder / "status.json").read_bytes())
        age = time.time() - (folder / "status.json").stat().st_mtime
    except FileNotFoundError:
        return _check("state", f"{folder} has no status.json", warn=True, remedy=f"fedeq {program} run")
    runs = Path(f"/proc/{found.get('pid')}").exists()
    saw = f"{folder} is readable; {program} {'runs' if runs else 'does not run'}, broker: {found.get('broker', '?')}"
    return _check("state", f"{saw}, written {age:.0f} s ago", warn=not runs, remedy=f"fedeq {program} run")


def _releases(root: Path) -> Iterator[Check]:
    home = root / "opt/fedeq-edge"
    state = json.loads((home / "state.json").read_bytes())
    current = (home / "current").readlink().name
    saw = f"{current}, {'confirmed' if state['confirmed'] == current else 'on trial'}; before it: {state['previous']}"
    trial = state["confirmed"] != current
    yield _check("release", saw, warn=trial, remedy="sudo python3 /opt/fedeq-edge/release.py status")
    if failed := state.get("failed"):
        last = (failed.get("log") or ["it said nothing"])[-1]
        saw = f"release {failed['version']} was left again: {last}"
        yield Check(name="last update", saw=saw, verdict="warn", remedy=f"journalctl -u {AGENT}")


def _board_link(root: Path) -> Iterator[Check]:
    identity = root / "etc/fedeq-edge"
    settings = identity / "updater.toml"
    if not settings.exists():
        yield _check("service", f"{settings} is missing", fail=True, remedy="on the host: fedeq flash, once more")
        return
    yield _service(str(tomllib.loads(settings.read_text())["service"]), identity / "ca.crt", settings)


def _service(url: str, authority: Path, settings: Path) -> Check:
    """The fleet's service answers, and is ours. settings: the file that names it."""
    from fedeq_edge.provision import link  # noqa: PLC0415  # only where there is a fleet

    try:
        link.ask(url, link.trusting(authority.read_bytes()), "GET", "/.well-known/est/cacerts")
    except FedEqError as error:
        lost = isinstance(error, ProvisionError) and error.exit is Exit.LOST
        mend = "on the host: fedeq fleet serve" if lost else f"correct `service` in {settings}, or: {_ANEW}"
        return Check(name="service", saw=str(error).partition("; ")[0], verdict="fail", remedy=mend)
    return Check(name="service", saw=f"{url} answers, with a certificate of this fleet")


def _broker(endpoint: Endpoint) -> Check:
    """It accepts a connection and, with TLS, both sides like each other's certificate."""
    host, port, _ = endpoint.address()
    where = endpoint.shown()
    try:
        with contextlib.ExitStack() as open_:
            link = open_.enter_context(socket.create_connection((host, port), _ANSWER_S))
            context = endpoint.tls_context()
            saw = f"{where} answers"
            if context is not None:
                tls = open_.enter_context(context.wrap_socket(link, server_hostname=host))
                saw += f", {tls.version()}, certificate until {(tls.getpeercert() or {}).get('notAfter')}"
    except ssl.SSLError as error:
        reason = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
        remedy = "compare ca.crt here with the broker's cafile, and its names: fedeq fleet gateway --host NAME"
        return Check(name="broker", saw=f"{where}: {reason}", verdict="fail", remedy=remedy)
    except OSError as error:
        remedy = "sudo systemctl status mosquitto, on the gateway"
        return Check(name="broker", saw=f"{where}: {error.strerror or error}", verdict="fail", remedy=remedy)
    return Check(name="broker", saw=saw)


def _certificates(paths: Sequence[Path], clock: Clock, remedy: str) -> Iterator[Check]:
    from cryptography import x509  # noqa: PLC0415  # an extra

    for path in paths:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        left = certificate.not_valid_after_utc.timestamp() - clock()
        saw = f"{path}: until {certificate.not_valid_after_utc:%Y-%m-%d}, {left / _DAY_S:.0f} days"
        yield _check("certificate", saw, fail=left < 0, warn=left < _CERTIFICATE_WARN_S, remedy=remedy)


def _units(names: Sequence[str]) -> Iterator[Check]:
    for name in names:
        state = _said(["systemctl", "is-active", name]) or "not known: no systemd here"
        yield _check(f"unit {name}", state, fail=state != "active", remedy=f"sudo systemctl restart {name}")
        error = _said(["journalctl", "--unit", name, "--priority", "err", "--lines", "1", "--output", "cat", "--quiet"])
        if error:
            saw = _printable(without(error))
            yield Check(name=f"last error of {name}", saw=saw, verdict="warn", remedy=f"journalctl -u {name}")


def _check(name: str, saw: str, *, fail: bool = False, warn: bool = False, remedy: str = "") -> Check:
    verdict: Verdict = "fail" if fail else "warn" if warn else "ok"
    return Check(name=name, saw=saw, verdict=verdict, remedy="" if verdict == "ok" else remedy)


def _read_config(path: Path) -> Config:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise FedEqError(f"{path} cannot be read ({error}); mend it, or name another with --config") from error


def _said(command: Sequence[str]) -> str:
    """What a command printed, "" where there is no such command or it does not come back."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip()


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# The support bundle

# Passwords and tokens have many shapes: better a harmless word too much is taken out.
_SECRETS: Final = (
    re.compile(r"-----BEGIN [^-]*PRIVATE KEY-----.*?(-----END [^-]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"fedeq1\.[\w.-]+"),
    re.compile(r"(?<=//)[^\s\"'<>]*(?=@)"),
    re.compile(r"(?i)\b(?:bearer|basic)\s+[\w.~+/=-]{8,}"),
    re.compile(
        r"(?i)(?<![a-z])[\w.-]*(?:password|passwd|passphrase|secret|token|api[_-]?key|private[_-]?key)[\w.-]*[\"']?"
        r"\s*[=:]\s*(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}\]]+)"
    ),
)


def without(text: str) -> str:
    """The text without keys, tokens and passwords, as far as they can be told from other words."""
    for pattern in _SECRETS:
        text = pattern.sub("[removed]", text)
    return without_secrets(text)


def pack(here: Here, checks: Sequence[Check], file: Path) -> list[str]:
    """`file` is a zip for whoever helps: checks, settings, states, logs; the names inside. No keys, no secrets.

    Files are named one by one: what is not on the list does not get in, whatever somebody put beside it.
    """
    found = {"checks.json": msgspec.json.format(msgspec.json.encode(checks)).decode(), "machine.json": _facts()}
    for name, path in _files(here):
        with contextlib.suppress(OSError):
            found[name] = path.read_text(errors="replace")
    if here.root is not None:
        for unit in (AGENT, UPDATER):
            lines = ["--lines", str(_LOG_LINES), "--output", "short-iso", "--no-pager", "--quiet"]
            found[f"journal/{unit}.txt"] = _said(["journalctl", "--unit", unit, *lines])
    part = file.with_name(f".{file.name}.part")
    with writing(file), zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(found.items()):
            archive.writestr(name, without(text))
    write_atomically(file, part.read_bytes(), mode=0o600)
    part.unlink()
    return sorted(found)


def _files(here: Here) -> Iterator[tuple[str, Path]]:
    if here.fleet is not None:
        yield "fleet/fleet.toml", here.fleet / "fleet.toml"
        yield "fleet/revoked.json", here.fleet / "ca" / "revoked.json"
        for kind in ("actions", "reports"):
            for path in sorted((here.fleet / kind).glob("*.json")):
                yield f"fleet/{kind}/{path.name}", path
    if here.config is not None:
        state = here.config.parent / _read_config(here.config).state
        yield f"config/{here.config.name}", here.config
        yield "config/status.json", state / "status.json"
        yield "config/rounds.jsonl", state / "rounds.jsonl"
    if here.root is not None:
        for name in ("state.json", "updater/task.json", "updater/seen.json"):
            yield f"board/{name}", here.root / "opt/fedeq-edge" / name
        yield "board/updater.toml", here.root / "etc/fedeq-edge/updater.toml"


def _facts() -> str:
    packages = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": sys.version,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": dict(sorted(packages.items())),
    }
    return json.dumps(facts, indent=1)
