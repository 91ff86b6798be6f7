"""The TUF repository of a fleet (The Update Framework 1.0.31): what boards may fetch, and who says so.

    keys/root, targets     Ed25519 (PEM), with the CA's passphrase: only `fedeq update` opens them
    keys/snapshot, timestamp   Ed25519 (PEM), open: the service signs with them that nothing newer is kept back
    metadata/N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    targets/releases/<profile>/<sha256>.<version>.tar.gz, targets/models/<sha256>.<name>

Theory of operation.
- Who holds the service can at most withhold: what a file is, its digest and its serial are signed by `targets`.
- The serial counts publications. A board takes no release of a lower one than it had, whatever the service tells it to;
  to publish an old bundle again gives it a new serial: that is the operator's will, and nobody else can say so.
- `timestamp` says when it was signed. Boards without a clock know from it that it is at least that late.
"""
# pyright: reportPrivateImportUsage=false

import contextlib
import datetime
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # as below
from tuf.api.metadata import (  # type: ignore[attr-defined]  # documented as this module's, defined in a private one
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError

from fedeq_edge.atomic import sync, write_atomically, writing
from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.provision import archive, records
from fedeq_edge.provision.models import SUFFIXES
from fedeq_edge.provision.reporting import updater_toml

if TYPE_CHECKING:
    from fedeq_edge.provision.fleet import Fleet

Clock = Callable[[], float]
_Signed: TypeAlias = Root | Targets | Snapshot | Timestamp
_Kind = TypeVar("_Kind", Root, Targets, Snapshot, Timestamp)
_Role = Literal["root", "targets", "snapshot", "timestamp"]

_DAY_S: Final = 86_400
# root, targets: `fedeq update` signs them anew past half of it. snapshot, timestamp: the service does when it is asked;
# a board that is kept from news finds out after so long.
_LIFETIME_S: Final = {
    "root": 3650 * _DAY_S,
    "targets": 365 * _DAY_S,
    "snapshot": 7 * _DAY_S,
    "timestamp": 7 * _DAY_S,
}
_OFFLINE: Final = ("root", "targets")
ISSUED: Final = "x-fedeq-issued"  # of timestamp and root: when it was signed, unix seconds
_MODEL_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")


class Meant(msgspec.Struct, frozen=True, kw_only=True):
    """`custom` of a target. serial: higher with each publication. A model is for every board: its profile is ""."""

    kind: Literal["release", "model"]
    version: str
    serial: int
    profile: str = ""
    architecture: str = ""
    python: str = ""


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A file that boards may fetch: its path in the repository, what it is, sha256 in hex, and bytes."""

    path: str
    meant: Meant
    sha256: str
    size: int


class Repository:
    """The repository in `folder`, to publish into. passphrase: of the keys `root` and `targets`, if they have one."""

    def __init__(self, folder: Path, passphrase: str | None = None, clock: Clock = time.time) -> None:
        self._folder = folder
        self._passphrase = passphrase
        self._clock = clock

    @classmethod
    def create(cls, folder: Path, passphrase: str | None = None, clock: Clock = time.time) -> "Repository":
        """A new one with keys of its own, in which nothing is published. Raises StateError where there is one."""
        if folder.exists():
            raise StateError(f"{folder} is there; nothing makes its keys anew, no board would know them")
        for name in ("keys", "metadata", "targets"):
            (folder / name).mkdir(mode=0o700, parents=True)
        made = cls(folder, passphrase, clock)
        root = Root(consistent_snapshot=True)
        for role in _LIFETIME_S:
            root.add_key(_new_signer(folder, role, passphrase).public_key, role)
        made._sign("root", root)
        made._sign("targets", Targets())
        made._sign_online()
        return made

    def publish(self, file: Path, fleet_key: Path, keep: Collection[str] = ()) -> Published:
        """Boards may fetch `file`: a bundle that `fleet_key` (PEM) has signed, or a model (.fedeq, .onnx).

        keep: paths of targets that some board has yet to fetch; others go. Raises ProvisionError on a bundle that is
        damaged or another fleet's, ConfigError on what is neither bundle nor model.
        """
        with records.held(self._folder):
            targets = _newest(self._folder, "targets", Targets)
            found = _described(file, fleet_key, serial=targets.version + 1)
            entry = TargetFile.from_file(found.path, str(file), ["sha256"])
            entry.unrecognized_fields["custom"] = msgspec.to_builtins(found.meant)
            _copy(file, _stored(self._folder, entry))
            targets.targets = {path: old for path, old in targets.targets.items() if path in keep}
            targets.targets[found.path] = entry
            self._renew_root()
            self._sign("targets", targets)
            self._sign_online()
            _drop_unlisted(self._folder, targets)
        return found

    def _renew_root(self) -> None:
        root = _newest(self._folder, "root", Root)
        if _is_due(root, "root", self._clock()):
            self._sign("root", root)

    def _sign_online(self) -> None:
        _sign_online(self._folder, self._clock())

    def _sign(self, role: _Role, signed: _Kind) -> None:
        _sign(self._folder, role, signed, self._clock(), self._passphrase)


def freshen(folder: Path, clock: Clock = time.time) -> None:
    """What the service signs was signed within the last half of its life. Needs no passphrase."""
    if not _is_due(_newest(folder, "timestamp", Timestamp), "timestamp", clock()):
        return
    with records.held(folder):
        _sign_online(folder, clock())


def board_files(fleet: "Fleet") -> dict[str, bytes]:
    """What a board needs in /etc/fedeq-edge, its identity apart, so that its updater can work."""
    root = fleet.folder / "tuf" / "metadata" / "1.root.json"
    try:
        return {"root.json": root.read_bytes(), "updater.toml": updater_toml(fleet.settings.service)}
    except OSError as error:
        raise StateError(f"{root}: {error.strerror}; restore the fleet's folder from a backup") from error


def _described(file: Path, fleet_key: Path, serial: int) -> Published:
    with _opened(file):
        sha256, size = _digest(file), file.stat().st_size
    if file.suffix in SUFFIXES:
        if not _MODEL_NAME.fullmatch(file.name):
            raise ConfigError(f"model {file.name!r} has an odd name; rename it to letters, digits, '.', '_' and '-'")
        meant = Meant(kind="model", version=f"{file.stem}-{sha256[:12]}", serial=serial)
        return Published(path=f"models/{file.name}", meant=meant, sha256=sha256, size=size)
    manifest = archive.verify(file, fleet_key)
    meant = Meant(
        kind="release",
        version=manifest.version,
        serial=serial,
        profile=manifest.profile,
        architecture=manifest.architecture,
        python=manifest.python,
    )
    path = f"releases/{manifest.profile}/{manifest.version}.tar.gz"
    return Published(path=path, meant=meant, sha256=sha256, size=size)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name a bundle, or a model (.fedeq, .onnx)") from error


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stored(folder: Path, entry: TargetFile) -> Path:
    """Where a target lies: TUF puts its digest before its name, so that no file ever changes under a reader."""
    parent, name = os.path.split(entry.path)
    return folder / "targets" / parent / f"{entry.hashes['sha256']}.{name}"


def _copy(file: Path, to: Path) -> None:
    part = to.with_name(f".{to.name}.part")
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copyfile(file, part)
        sync(part)
        part.replace(to)


def _drop_unlisted(folder: Path, targets: Targets) -> None:
    listed = {_stored(folder, entry) for entry in targets.targets.values()}
    for path in (folder / "targets").rglob("*"):
        if path.is_file() and path not in listed:
            path.unlink()


def _sign_online(folder: Path, now: float) -> None:
    """Snapshot and timestamp speak of the newest targets. The caller holds the folder."""
    metadata = folder / "metadata"
    snapshot = _newest(folder, "snapshot", Snapshot) if any(metadata.glob("*.snapshot.json")) else Snapshot()
    snapshot.meta["targets.json"] = MetaFile(_newest(folder, "targets", Targets).version)
    _sign(folder, "snapshot", snapshot, now)
    stamp = _newest(folder, "timestamp", Timestamp) if (metadata / "timestamp.json").exists() else Timestamp()
    stamp.snapshot_meta = MetaFile(_newest(folder, "snapshot", Snapshot).version)
    _sign(folder, "timestamp", stamp, now)


def _sign(folder: Path, role: _Role, signed: _Kind, now: float, passphrase: str | None = None) -> None:
    """The metadata is on the disk in its next version, valid from now on."""
    known = _numbers(folder, role)
    signed.version = (max(known) if known else signed.version if role == "timestamp" else 0) + 1
    signed.expires = datetime.datetime.fromtimestamp(int(now) + _LIFETIME_S[role], datetime.UTC)
    signed.unrecognized_fields[ISSUED] = int(now)
    whole = Metadata(signed)
    whole.sign(_signer(folder, role, passphrase if role in _OFFLINE else None))
    name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
    write_atomically(folder / "metadata" / name, whole.to_bytes())


def _numbers(folder: Path, role: _Role) -> list[int]:
    return [int(path.name.split(".")[0]) for path in (folder / "metadata").glob(f"*.{role}.json")]


def _newest(folder: Path, role: _Role, kind: type[_Kind]) -> _Kind:
    """The newest metadata of a role. Raises StateError where there is none that can be read."""
    name = f"{role}.json" if role == "timestamp" else f"{max(_numbers(folder, role), default=1)}.{role}.json"
    path = folder / "metadata" / name
    try:
        signed = Metadata.from_file(str(path)).signed
    except (OSError, DeserializationError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}); restore the fleet's folder from a backup") from error
    assert isinstance(signed, kind)
    return signed


def _is_due(signed: _Signed, role: _Role, now: float) -> bool:
    return signed.expires.timestamp() - now < _LIFETIME_S[role] / 2


def _new_signer(folder: Path, role: str, passphrase: str | None) -> CryptoSigner:
    key = Ed25519PrivateKey.generate()
    lock: KeySerializationEncryption = NoEncryption()
    if passphrase and role in _OFFLINE:
        lock = BestAvailableEncryption(passphrase.encode())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    write_atomically(folder / "keys" / role, pem, mode=0o600)
    return CryptoSigner(key)


def _signer(folder: Path, role: _Role, passphrase: str | None) -> CryptoSigner:
    path = folder / "keys" / role
    try:
        pem = path.read_bytes()
        # a passphrase that a key has none for is refused by the library; this fleet may have got its passphrase later
        secret = passphrase.encode() if passphrase and b"ENCRYPTED" in pem else None
        key = load_pem_private_key(pem, secret)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; restore the fleet's folder from a backup") from error
    except (ValueError, TypeError) as error:
        raise ProvisionError(
            Exit.MISUSED, f"{path} cannot be opened; give the CA's passphrase in FEDEQ_CA_PASSPHRASE"
        ) from error
    assert isinstance(key, Ed25519PrivateKey)
    return CryptoSigner(key)
