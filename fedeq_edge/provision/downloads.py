"""What the fleet has signed, fetched by a board: TUF's metadata and targets, judged by the time as the board knows it.

    /etc/fedeq-edge/root.json        what is believed first
    /opt/fedeq-edge/updater/         seen.json, metadata/ (TUF's cache), download

Theory of operation.
- Nothing is believed of an action but its wish: what a target is, TUF's signatures say, and its serial may not be lower
  than that of the one this board had before. Only `rollback` goes back, to what lies on the board, without a network.
- The time is the latest of: the clock, the newest time in signed metadata, the day of our own certificate. A clock in
  1970 thus neither makes old metadata new nor an expired action good again.
"""
# pyright: reportPrivateImportUsage=false

import contextlib
import datetime
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from tuf.api import exceptions
from tuf.api.metadata import Metadata, TargetFile  # type: ignore[attr-defined]  # documented as this module's
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater as TufClient

from fedeq_edge.atomic import writing
from fedeq_edge.errors import Exit, ProvisionError, StateError
from fedeq_edge.provision import link, records
from fedeq_edge.provision.actions import Action
from fedeq_edge.provision.ca import issued_at
from fedeq_edge.provision.reporting import Board, service_of
from fedeq_edge.provision.repository import ISSUED, Meant

_SPARE_BYTES: Final = 16 << 20  # left free beside a download, as release.py leaves it
_ROLES: Final = ("root", "timestamp", "snapshot", "targets")


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The newest time in signed metadata (unix seconds); the serial of what was installed last, by what it is."""

    time: int = 0
    serials: dict[str, int] = {}


class Downloads:
    """What this board fetches. told: hears of every step before it is done."""

    def __init__(self, board: Board, clock: Callable[[], float], told: Callable[[str], None]) -> None:
        self._board = board
        self._clock = clock
        self._step = told
        self._service = service_of(board)
        self._seen = records.read(board.folder / "seen.json", Seen) or Seen()
        self.file = board.folder / "download"

    def target(self, action: Action) -> tuple[TargetFile, Meant]:
        """What the action is about, by the operator's signature. Raises ProvisionError where it is not to be had."""
        self._step("metadata")
        cache = self._board.folder / "metadata"
        cache.mkdir(exist_ok=True, mode=0o700)
        with _judged(self.time()):
            client = TufClient(
                metadata_dir=str(cache),
                metadata_base_url="/tuf/metadata",
                fetcher=_Fetcher(self._service, link.identified(self._board.identity)),
                bootstrap=_read(self._board.identity / "root.json"),
            )
            client.refresh()
            self._check_fresh()
            entry = client.get_targetinfo(action.target)
        if entry is None:
            raise ProvisionError(Exit.FAILED, f"{action.version} is not published any more; tell this board anew")
        meant = _meant(entry)
        if meant.version != action.version:
            raise ProvisionError(Exit.VERIFICATION, f"{action.target} is {meant.version}, not {action.version}")
        had = self._seen.serials.get(_series(entry, meant), 0)
        if meant.serial < had:
            raise ProvisionError(
                Exit.VERIFICATION,
                f"{meant.version} (serial {meant.serial}) is older than what this board had (serial {had}); it goes "
                "back by fedeq rollback, or by publishing that bundle again",
            )
        return entry, meant

    def _check_fresh(self) -> None:
        """TUF compared ends with the clock alone, which may stand in 1970; here with the time as we know it.

        The time that the timestamp says is kept only if what the operator signed is good by it: a thief of the
        service's key could otherwise send a board into a future in which everything has expired.
        """
        folder = self._board.folder / "metadata"
        signed = {role: Metadata.from_file(str(folder / f"{role}.json")).signed for role in _ROLES}
        issued = int(signed["timestamp"].unrecognized_fields.get(ISSUED, 0))
        now = datetime.datetime.fromtimestamp(max(self.time(), issued), datetime.UTC)
        for role, metadata in signed.items():
            if metadata.is_expired(now):
                raise exceptions.ExpiredMetadataError(f"{role}.json is expired")
        self._see(msgspec.structs.replace(self._seen, time=max(self._seen.time, issued)))

    def remember(self, entry: TargetFile, meant: Meant) -> None:
        """Nothing older than this is taken from now on."""
        serials = {**self._seen.serials, _series(entry, meant): meant.serial}
        self._see(msgspec.structs.replace(self._seen, serials=serials))

    def fetch(self, entry: TargetFile) -> None:
        """`download` is the target, byte for byte."""
        self._step("download")
        to = self.file
        to.unlink(missing_ok=True)
        if shutil.disk_usage(to.parent).free < entry.length + _SPARE_BYTES:
            needed = (entry.length + _SPARE_BYTES) >> 20
            raise ProvisionError(Exit.NO_SPACE, f"{to.parent} needs {needed} MB free for a download; free some")
        part = to.with_name("download.part")
        parent, name = os.path.split(entry.path)
        path = f"/tuf/targets/{parent}/{entry.hashes['sha256']}.{name}"
        with writing(part), part.open("w+b") as output:
            left = entry.length
            for piece in link.stream(self._service, link.identified(self._board.identity), path):
                left -= len(piece)
                if left < 0:
                    raise _tampered(entry.path)
                output.write(piece)
            output.seek(0)
            with _judged(self.time()):
                entry.verify_length_and_hashes(output)
        self._step("downloaded")
        part.replace(to)

    def _see(self, seen: Seen) -> None:
        if seen != self._seen:
            self._step("see")
            records.write(self._board.folder / "seen.json", seen)
            self._seen = seen

    def time(self) -> float:
        """Unix seconds, at least; see above."""
        return max(self._clock(), self._seen.time, _enrolled_at(self._board.identity / "device.crt"))


class _Fetcher(FetcherInterface):
    """Fetches for TUF, as this board."""

    def __init__(self, service: str, context: ssl.SSLContext) -> None:
        self._service = service
        self._context = context

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from link.stream(self._service, self._context, url)
        except link.RefusedError as error:
            raise exceptions.DownloadHTTPError(str(error), error.status) from error


@contextlib.contextmanager
def _judged(now: float) -> Iterator[None]:
    """What TUF refuses inside becomes a ProvisionError."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise ProvisionError(
            Exit.VERIFICATION,
            f"{error}, here it is {date_of(now)}: somebody keeps news back, or the clock is wrong; compare it with the "
            "host's, where fedeq fleet serve signs anew",
        ) from error
    except exceptions.DownloadHTTPError as error:
        raise ProvisionError(Exit.FAILED, f"the service gives no metadata: {error}") from error
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        raise ProvisionError(
            Exit.VERIFICATION, f"what the service gave is not what the fleet signed ({error}); this board keeps its own"
        ) from error


def _tampered(path: str) -> ProvisionError:
    return ProvisionError(Exit.VERIFICATION, f"{path} is longer than the fleet signed; this board keeps its own")


def _meant(entry: TargetFile) -> Meant:
    try:
        return msgspec.convert(entry.custom, Meant)
    except msgspec.ValidationError as error:
        raise ProvisionError(
            Exit.VERIFICATION, f"{entry.path} is not described as this version expects ({error}); update this board"
        ) from error


def _series(entry: TargetFile, meant: Meant) -> str:
    """What takes the place of what: one release is after the other, and one model of a name."""
    return "release" if meant.kind == "release" else entry.path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateError(
            f"{path}: {error.strerror}; flash this board, or enrol it: sudo fedeq device enrol --service URL --token "
            "TOKEN, as fedeq fleet token prints them on the host"
        ) from error


def _enrolled_at(path: Path) -> float:
    """When the certificate was made, 0 where there is none."""
    try:
        return issued_at(x509.load_pem_x509_certificate(path.read_bytes())).timestamp()
    except (OSError, ValueError):
        return 0.0


def date_of(now: float) -> str:
    """The day and the minute, UTC."""
    return f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M}"
