"""What `fedeq doctor` sees on the operator's machine: the fleet's folder, its gateway, what each device said last."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fedeq_edge.provision.doctor_links import ANEW, broker, certificates, service
from fedeq_edge.provision.findings import DAY_S, Check, Clock, check, guarded
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.redact import printable
from fedeq_edge.transport.mqtt import Endpoint

_ASK_THERE: Final = "is it on? on the board: sudo /opt/fedeq-edge/current/bin/fedeq doctor"
_SILENT_S: Final = 300.0  # five reports that did not come
_GATEWAY_WARN_S: Final = 180 * DAY_S  # nothing renews the gateway's, and without it no board hears from anybody


def host_tools() -> Iterator[Check]:
    """What this machine can try before a board is flashed."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    saw = emulator or "no qemu-user: what would crash on a board is known from a table alone"
    yield check("qemu", saw, warn=emulator is None, remedy="sudo apt-get install qemu-user-static")


def fleet_folder(folder: Path) -> Iterator[Check]:
    """The fleet, and keys that others may read."""
    fleet = Fleet.open(folder)
    yield Check(name="fleet", saw=f"{fleet.settings.name}, devices: {len(fleet.devices)}, in {folder}")
    yield from _trusted(folder)
    for secret in (folder / "ca/ca.key", folder / "keys/bundle.key", *sorted((folder / "tuf/keys").glob("*"))):
        mode = secret.stat().st_mode & 0o777
        if mode & 0o077:
            yield Check(
                name="keys",
                saw=f"{secret} may be read by others ({mode:o})",
                verdict="fail",
                remedy=f"chmod 600 {secret}",
            )


def _trusted(folder: Path) -> Iterator[Check]:
    """What boards hold releases against. Half of a key comes back from the other half, signatures do not."""
    public, signed = folder / "keys/bundle.pub", folder / "tuf/metadata/1.root.json"
    if not public.exists():
        saw = f"{public} is missing: no bundle can be flashed or published"
        yield check("trust", saw, fail=True, remedy=f"openssl pkey -in {folder}/keys/bundle.key -pubout -out {public}")
    if not signed.exists():
        saw = f"{signed} is missing: no board can enrol or update"
        remedy = f"cp -a BACKUP/tuf/metadata {folder}/tuf/, from a backup of this folder"
        yield check("trust", saw, fail=True, remedy=remedy)


def fleet_links(folder: Path) -> Iterator[Check]:
    """Service and broker, asked as a board asks them."""
    settings, gateway = Fleet.open(folder).settings, folder / "gateway"
    yield service(settings.service, gateway / "ca.crt", folder / "fleet.toml")
    mutual = settings.broker.startswith("mqtts://")
    yield broker(
        Endpoint(
            url=settings.broker,
            ca=str(gateway / "ca.crt") if mutual else None,
            certificate=str(gateway / "aggregator.crt") if mutual else None,
            key=str(gateway / "aggregator.key") if mutual else None,
        )
    )


def gateway(folder: Path, clock: Clock) -> Iterator[Check]:
    """The gateway's certificate: how long it is good, and whether it names the hosts at which boards ask."""
    from cryptography import x509  # noqa: PLC0415  # an extra

    path = folder / "gateway" / "server.crt"
    if not path.exists():
        yield check("certificate", f"{path} is missing", fail=True, remedy=ANEW)
        return
    yield from certificates([path], clock, ANEW, _GATEWAY_WARN_S)
    yield from certificates([folder / "ca" / "ca.crt"], clock, "found a new fleet, and flash its boards anew")
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    settings = Fleet.open(folder).settings
    hosts = {urlsplit(url).hostname or "" for url in (settings.service, settings.broker)}
    missing = sorted(hosts - {name.lower() for name in known})
    saw = f"{path} names {', '.join(sorted(known))}" + (f", and not {', '.join(missing)}" if missing else "")
    remedy = f"fedeq fleet gateway {' '.join(f'--host {name}' for name in [*missing, *sorted(known)])}"
    yield check("gateway's names", saw, fail=bool(missing), remedy=remedy)


def fleet_devices(folder: Path, clock: Clock) -> Iterator[Check]:
    """What each device said last."""
    fleet = Fleet.open(folder)
    for device in fleet.devices:
        yield from _reported(fleet, device, clock())


def of_device(fleet: Fleet, device: str, clock: Clock = time.time) -> list[Check]:
    """What the fleet knows of a device: where it is, its certificates and tokens, its last report, its action."""
    known = fleet.device(device)
    found = [Check(name="device", saw=f"{known.profile}, added {known.added}, flashed at {known.target or '-'}")]
    return [
        *found,
        *guarded(lambda: _issued(fleet, device, clock())),
        *guarded(lambda: _reported(fleet, device, clock())),
        *guarded(lambda: _action(fleet, device)),
    ]


def _issued(fleet: Fleet, device: str, now: float) -> Iterator[Check]:
    from cryptography import x509  # noqa: PLC0415  # the extra `fleet`

    from fedeq_edge.provision.ca import common_name, revoked, serial_of  # noqa: PLC0415

    known = fleet.device(device)
    if known.revoked:
        remedy = f"to let it in again: fedeq fleet add {device} --profile {known.profile}"
        yield check("identity", f"revoked on {known.revoked}", warn=True, remedy=remedy)
        return
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
    yield check("identity", saw, fail=nobody and bool(own), warn=nobody, remedy=remedy)


def _reported(fleet: Fleet, device: str, now: float) -> Iterator[Check]:
    heard = fleet.heard(device)
    if on := fleet.device(device).revoked:
        yield Check(name=device, saw=f"revoked on {on}")
        return
    if heard is None:
        yield check(device, "has never reported", warn=True, remedy=f"fedeq flash TARGET --device {device}")
        return
    said, age = heard.report, now - heard.at
    saw = (
        f"{said.version or 'no release'}, {'confirmed' if said.confirmed else 'on trial'}, "
        f"{'healthy' if said.healthy else 'not healthy'}, heard {age:.0f} s ago"
    )
    yield check(
        device,
        printable(saw),
        fail=not said.healthy,
        warn=age > _SILENT_S or not said.confirmed,
        remedy=f"fedeq logs {device}" if age <= _SILENT_S else _ASK_THERE,
    )
    if said.last_error.strip():
        last = printable(said.last_error.strip().rpartition("\n")[2])
        yield Check(name=f"{device}: last error", saw=last, verdict="warn", remedy=f"fedeq logs {device}")


def _action(fleet: Fleet, device: str) -> Iterator[Check]:
    given = fleet.given_action(device)
    if given is None:
        return
    state = "not heard of" if given.state is None else given.state.state
    detail = "" if given.state is None else printable(given.state.detail.strip().rpartition("\n")[2])
    saw = f"{f'{given.action.kind} {given.action.version}'.rstrip()}: {state}{f' ({detail})' if detail else ''}"
    bad = state in ("failed", "rolled_back", "expired")
    yield check("last action", saw, warn=bad, remedy=f"fedeq logs {device}")
