"""The fleet folder on the operator's machine: who belongs to the fleet, what each shall do, what each said last.

    fleet.toml              [fleet] and [devices.<id>]; yours to edit, comments stay
    ca/                     the authority (ca.py): the key that nothing makes anew, what it issued, what it took back
    gateway/                what broker and service need: server.crt, server.key, ca.crt, crl.pem; aggregator.crt, .key;
                            crl.new, crl.taken: crl.pem is new, and mosquitto does not have it yet (broker/)
    tokens.json             join tokens (tokens.py)
    keys/bundle.key, .pub   Ed25519, signs releases
    tuf/                    what boards may fetch, and the keys that say so (repository.py)
    actions/<device>.json   what a device shall do;  reports/<device>.json  what it said last

All of it is the owner's alone (0700). Nothing here is imported that a machine without the extra `fleet` has not.
"""

import contextlib
import datetime
import difflib
import secrets
import shutil
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge import orders
from fedeq_edge.atomic import reading, write_atomically, writing
from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.provision import records
from fedeq_edge.provision.actions import Action, ActionState, Kind, Report
from fedeq_edge.provision.brokerlist import MARK
from fedeq_edge.provision.founding import found
from fedeq_edge.provision.tokens import LIFETIME_S, Token, Tokens, pin_of
from fedeq_edge.wire.topics import check_identifier

Clock = Callable[[], float]

# CNs to which broker/acl gives more than a device's rights, and the gateway's own name.
_RESERVED: Final = ("aggregator", "gateway")


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[fleet]: broker (mqtts://...) and service (https://...) are addresses as devices see them.

    federation: which one the devices join. aggregator: state folder of its aggregator, where that is on this machine;
    a revoked device is then denied there, too. Relative to the fleet folder.
    """

    name: str
    broker: str
    service: str
    federation: str
    aggregator: str = ""

    def __post_init__(self) -> None:
        check_identifier(self.name, "fleet name")
        check_identifier(self.federation, "federation")
        if not self.service.startswith("https://"):
            raise ConfigError(f"service is {self.service!r}; give its address as devices see it, https://HOST:8443")


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[devices.<id>]: its board, the day it was added, where it was flashed last, when it was revoked ("": never)."""

    profile: str
    added: str
    target: str = ""
    revoked: str = ""


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fleet: FleetSettings
    devices: dict[str, Device] = {}


class GivenAction(msgspec.Struct, frozen=True, kw_only=True):
    """An action, when it was given (unix seconds), and how far the device has come with it, None before it says."""

    action: Action
    given: float
    state: ActionState | None = None


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """The last report of a device, and when it came (unix seconds)."""

    report: Report
    at: float


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """What `Fleet.revoke` did: certificates and tokens that are void now; whether the aggregator knows, or why not."""

    certificates: int
    tokens: int
    denied: bool
    trouble: str = ""


class Fleet:
    """A fleet folder. Several programs may have it open; what they change is seen by all at once."""

    def __init__(self, folder: Path, clock: Clock = time.time) -> None:
        self.folder = folder
        self.tokens = Tokens(folder / "tokens.json")
        self._clock = clock
        self._cached: tuple[tuple[int, int], _Settings] | None = None

    @classmethod
    def init(
        cls,
        folder: Path,
        settings: FleetSettings,
        hosts: Sequence[str],
        *,
        passphrase: str | None = None,
        clock: Clock = time.time,
    ) -> "Fleet":
        """A new fleet: authority, certificates of gateway and aggregator, key of the releases. All of it, or nothing.

        hosts: DNS names and addresses under which devices know the gateway. Raises StateError where the folder is not
        empty: what is in it, a CA above all, is never made anew.
        """
        folder = folder.absolute()
        if folder.exists():
            _check_empty(folder)
        fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            with writing(folder):
                found(fresh, settings, hosts, passphrase, clock)
                fresh.rename(folder)  # fails where something came into it meanwhile
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return cls.open(folder, clock)

    @classmethod
    def open(cls, folder: Path, clock: Clock = time.time) -> "Fleet":
        """The fleet in this folder. Raises ConfigError where there is none, or its fleet.toml cannot be read."""
        fleet = cls(folder, clock)
        fleet._read()
        return fleet

    @property
    def settings(self) -> FleetSettings:
        """[fleet] of fleet.toml."""
        return self._read().fleet

    @property
    def devices(self) -> Mapping[str, Device]:
        """Every device by id."""
        return self._read().devices

    def device(self, device: str) -> Device:
        """One device. Raises ConfigError naming the nearest known id."""
        known = self.devices
        if device in known:
            return known[device]
        nearest = difflib.get_close_matches(device, known, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]}, or" if nearest else "add it:"
        raise ConfigError(
            f"fleet {self.settings.name} has no device {device!r}; {hint} fedeq fleet add {device} --profile BOARD"
        )

    def add(self, device: str, profile: str) -> None:
        """The device belongs to the fleet, again if it was revoked; every other line of fleet.toml is as it was.

        Raises ConfigError on an id that cannot be one, one that is there already, and an unknown board.
        """
        check_identifier(device, "device")
        load_profile(profile)
        if device in _RESERVED:
            raise ConfigError(f"device {device!r}: the broker gives this name other rights; choose another id")
        with records.held(self.folder):
            known, fresh = self.devices.get(device), Device(profile=profile, added=self._today())
            if known is None:
                table = {"devices": {device: _shown(fresh)}}
                self._write(f"{self._text().rstrip()}\n\n{msgspec.toml.encode(table).decode()}")
            elif known.revoked:
                self._change(device, fresh)
            else:
                raise ConfigError(f"device {device} is in {self.folder}/fleet.toml already; edit it there")

    def flashed(self, device: str, target: str) -> None:
        """`target` is where the device was flashed last; no other line of fleet.toml changes."""
        with records.held(self.folder):
            self._change(device, msgspec.structs.replace(self.device(device), target=target))

    def check_admitted(self, device: str) -> None:
        """It is a device that was not revoked. Raises ConfigError where it is none, ProvisionError where it was."""
        known = self.device(device)
        if known.revoked:
            raise ProvisionError(
                Exit.MISUSED,
                f"device {device} was revoked on {known.revoked}; to let it in again: "
                f"fedeq fleet add {device} --profile {known.profile}",
            )

    def issue_token(self, device: str, *, lifetime_s: float = LIFETIME_S) -> Token:
        """A join token for a device of this fleet; earlier ones that it did not use are void.

        Raises ProvisionError where the device was revoked.
        """
        self.check_admitted(device)
        path = self.folder / "ca" / "ca.crt"
        with reading(path):
            authority = ssl.PEM_cert_to_DER_cert(path.read_text())
        return self.tokens.issue(device, pin_of(authority), now=self._clock(), lifetime_s=lifetime_s)

    def revoke(self, device: str, *, passphrase: str | None = None) -> Revoked:
        """Certificates and tokens of the device are void: at the service from now on, at the broker by its new list.

        Nothing gives it a new one before it is added again. The aggregator, where [fleet] names its state folder, takes
        nothing from it any more.
        """
        from fedeq_edge.provision.ca import Authority  # noqa: PLC0415  # cryptography: this command needs it, few do

        self.device(device)
        authority = Authority.open(self.folder / "ca", passphrase, self._clock)
        with self.admitting():
            self._mark_revoked(device)
            tokens = self.tokens.void(device)
            certificates = authority.revoke(device)
        write_atomically(self.folder / "gateway" / "crl.pem", authority.crl())
        write_atomically(self.folder / "gateway" / MARK, b"")
        denied, trouble = self._deny(device)
        return Revoked(certificates=len(certificates), tokens=tokens, denied=denied, trouble=trouble)

    def admitting(self) -> contextlib.AbstractContextManager[None]:
        """While a token becomes a certificate, nothing is revoked, and the other way round.

        Else a device that is revoked between the two would keep a certificate that nobody knows of yet.
        """
        return records.held(self.folder / "ca" / "issued")

    def give_action(self, device: str, kind: Kind, version: str, expires_s: float, *, target: str = "") -> Action:
        """The device is told to do this when it next reports, within `expires_s`; it takes the place of any other."""
        self.device(device)
        now = self._clock()
        action = Action(
            id=secrets.token_hex(8), kind=kind, version=version, expires=int(now + expires_s), target=target
        )
        with records.held(self.folder / "actions"):
            records.write(self._file("actions", device), GivenAction(action=action, given=now))
        return action

    def withdraw(self, action: Action, device: str) -> None:
        """The action is not told to the device any more; one that has begun it ends it. Another's is left alone."""
        with records.held(self.folder / "actions"):
            given = self.given_action(device)
            if given is None or given.action.id != action.id:
                return
            ended = msgspec.structs.replace(action, expires=min(action.expires, int(self._clock())))
            records.write(self._file("actions", device), msgspec.structs.replace(given, action=ended))

    def given_action(self, device: str) -> GivenAction | None:
        """The last action given to this device, ended or not, None if there was none."""
        return records.read(self._file("actions", device), GivenAction)

    def action_for(self, device: str) -> Action | None:
        """What the device shall do now: neither ended nor expired."""
        given = self.given_action(device)
        if given is None or given.action.expires <= self._clock() or (given.state is not None and given.state.ended):
            return None
        return given.action

    def take_report(self, device: str, report: Report) -> Action | None:
        """The report is kept, the action that it tells of goes on by it; what the device shall do next."""
        self.device(device)
        with records.held(self.folder / "actions"):
            records.write(self._file("reports", device), Heard(report=report, at=self._clock()))
            given = self.given_action(device)
            if given is not None and report.action is not None and report.action.id == given.action.id:
                records.write(
                    self._file("actions", device), msgspec.structs.replace(given, state=_further(given, report.action))
                )
        return self.action_for(device)

    def heard(self, device: str) -> Heard | None:
        """What the device said last."""
        return records.read(self._file("reports", device), Heard)

    def _file(self, folder: str, device: str) -> Path:
        return self.folder / folder / f"{check_identifier(device, 'device')}.json"

    def _deny(self, device: str) -> tuple[bool, str]:
        named = self.settings.aggregator
        if not named:
            return False, ""
        try:
            orders.give(self.folder / Path(named).expanduser(), "deny", device)
        except StateError as error:
            return False, str(error)
        return True, ""

    def _today(self) -> str:
        return datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).date().isoformat()

    def _mark_revoked(self, device: str) -> None:
        with records.held(self.folder):
            known = self.device(device)
            self._change(device, msgspec.structs.replace(known, revoked=known.revoked or self._today()))

    def _change(self, device: str, wanted: Device) -> None:
        """The device's table says this; the caller holds the folder."""
        whole = msgspec.structs.replace(self._read(), devices={**self.devices, device: wanted})
        text = _with_table(self._text(), f"devices.{device}", wanted)
        # a table that was written in another way than ours is not found; then the comments are lost, not what it says
        same = _decode(text, self.folder / "fleet.toml") == whole
        self._write(text if same else msgspec.toml.encode(whole).decode())

    def _text(self) -> str:
        return (self.folder / "fleet.toml").read_text()

    def _read(self) -> _Settings:
        path = self.folder / "fleet.toml"
        try:
            seen = path.stat()
            stamp = (seen.st_mtime_ns, seen.st_ino)  # a new inode with every write of ours
            if self._cached is None or self._cached[0] != stamp:
                self._cached = stamp, _decode(path.read_text(), path)
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}; name the fleet's folder with --fleet, or make one: fedeq fleet init NAME"
            ) from error
        return self._cached[1]

    def _write(self, text: str) -> None:
        path = self.folder / "fleet.toml"
        _decode(text, path)
        write_atomically(path, text.encode(), mode=0o600)


def _check_empty(folder: Path) -> None:
    if not folder.is_dir() or any(folder.iterdir()):
        raise StateError(
            f"{folder} is there and not empty; nothing makes a fleet's CA anew, it would lock every device out: "
            "add devices with fedeq fleet add, or choose another folder with --fleet"
        )


def _decode(text: str, path: Path) -> _Settings:
    try:
        return msgspec.toml.decode(text, type=_Settings)
    except (msgspec.DecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}; mend it by hand, comments and order are yours") from error


def _with_table(text: str, name: str, value: msgspec.Struct) -> str:
    """The text with the table [name] anew and no other line changed."""
    lines = text.splitlines()
    if f"[{name}]" not in lines:
        return text
    begin = lines.index(f"[{name}]") + 1
    end = next((number for number in range(begin, len(lines)) if lines[number].startswith("[")), len(lines))
    keys = {field.encode_name for field in msgspec.structs.fields(value)}
    kept = [line for line in lines[begin:end] if line.split("=")[0].strip() not in keys]
    lines[begin:end] = [*msgspec.toml.encode(_shown(value)).decode().splitlines(), *kept]
    return "\n".join(lines) + "\n"


def _shown(value: msgspec.Struct) -> dict[str, Any]:
    """Its keys for fleet.toml: what is not known yet is not there."""
    return {key: item for key, item in msgspec.structs.asdict(value).items() if item != ""}


def _further(given: GivenAction, told: ActionState) -> ActionState:
    """The newer of two states; one that has ended stays so, whatever arrives late."""
    return given.state if given.state is not None and given.state.ended else told
