"""On the board: asks the fleet what to do, does it, says how it went. One process, as root (fedeq-updater.service).

    /etc/fedeq-edge/updater.toml, root.json   where the service is, and what is believed first
    /opt/fedeq-edge/updater/                  task.json, seen.json, metadata/ (TUF's cache), download, renewing

Theory of operation.
- Everything may end between any two lines: the power goes, and an update that succeeds restarts the updater itself. So
  task.json says what was told and how far it is, before it is done; whoever comes next carries on from there. An action
  is done once by its id; what cannot be told from the board afterwards (which release ran before) is noted before.
- Releases are release.py's business, in a process of its own that outlives this one. "Another installer is at work"
  therefore means: not yet. The next turn looks again.
- Nothing is believed of an action but its wish: what a target is, TUF's signatures say, and its serial may not be lower
  than that of the one this board had before. Only `rollback` goes back, to what lies on the board, without a network.
- The time is the latest of: the clock, the newest time in signed metadata, the day of our own certificate. A clock in
  1970 thus neither makes old metadata new nor an expired action good again.
"""
# pyright: reportPrivateImportUsage=false

import contextlib
import datetime
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography import x509
from tuf.api import exceptions
from tuf.api.metadata import Metadata, TargetFile  # type: ignore[attr-defined]  # documented as this module's
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater as TufClient

from fedeq_edge.errors import Exit, FedEqError, ProvisionError, StateError
from fedeq_edge.provision import enrol, link, records
from fedeq_edge.provision.actions import Action, ActionState, Progress, Reply, Report
from fedeq_edge.provision.ca import issued_at
from fedeq_edge.provision.repository import ISSUED, Meant
from fedeq_edge.storage.files import locked, write_atomically, writing

AGENT: Final = "fedeq-agent.service"
REPORT: Final = "/v1/report"
LOG_LINES: Final = 200  # of an agent's journal: a report holds 32,768 characters
_LOG_CHARACTERS: Final = 30_000
_ERROR_CHARACTERS: Final = 8000
_SPARE_BYTES: Final = 16 << 20  # left free beside a download, as release.py leaves it
_ATTEMPTS: Final = 3  # at an installation that somebody kills: out of memory, for example
_INSTALL_S: Final = 900.0  # 144 MB on a slow card under emulation took 19 s; torch is three times that
_DAY_S: Final = 86_400.0

_ROLES: Final = ("root", "timestamp", "snapshot", "targets")

logger = logging.getLogger(__name__)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """updater.toml: the fleet's service."""

    service: str


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The last action and how far it is; what of it must not be forgotten.

    acting: release.py was started with it `acting` times. before: the release that ran then. again: that had failed
    before, so that its failure alone does not say that this action has failed. sha256, serial: of what it installs.
    """

    action: Action
    state: Progress = "running"
    detail: str = ""
    acting: int = 0
    before: str = ""
    again: bool = False
    sha256: str = ""
    serial: int = 0

    @property
    def told(self) -> ActionState:
        """What the fleet hears of it."""
        return ActionState(id=self.action.id, state=self.state, detail=self.detail)

    def ended(self, state: Progress, detail: str = "") -> "Task":
        """It is over."""
        return msgspec.structs.replace(self, state=state, detail=detail[-_LOG_CHARACTERS:])


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The newest time in signed metadata (unix seconds); the serial of what was installed last, by what it is."""

    time: int = 0
    serials: dict[str, int] = {}


class Board:
    """The machine under `root`: its folders, its installer, its agent."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.identity = root / "etc/fedeq-edge"
        self.home = root / "opt/fedeq-edge"
        self.folder = self.home / "updater"
        self.models = root / "var/lib/fedeq-edge/models"

    def release(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        """Exit status, JSON and the line on stderr of release.py; the status is negative where it was killed."""
        command = [sys.executable, "-IB", str(self.home / "release.py"), "--root", str(self.root), *arguments]
        ended = _run(command, _INSTALL_S)
        with contextlib.suppress(ValueError):
            return ended.returncode, dict(json.loads(ended.stdout)), ended.stderr.strip().removeprefix("release.py: ")
        return ended.returncode, {}, ended.stderr.strip()

    def state(self) -> dict[str, Any]:
        """state.json: current, confirmed, previous, trial, failed; empty without an installer.

        Read, not asked of release.py: on a small board python takes a second to start, and this is asked each minute.
        """
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = dict(json.loads((self.home / "state.json").read_bytes()))
            found["current"] = (self.home / "current").readlink().name  # the link is the truth
        return found

    def restart_agent(self) -> bool:
        """Whether it has said READY again."""
        return not self._systemctl("restart", AGENT).returncode

    def is_healthy(self) -> bool:
        """Whether the agent is up: it says READY after a solve that converged."""
        return "ActiveState=active" in self._systemctl("show", AGENT, "--property=ActiveState").stdout.splitlines()

    def log(self) -> str:
        """The agent's last lines in the journal."""
        lines = ["--lines", str(LOG_LINES), "--output", "short-iso", "--no-pager", "--quiet"]
        return _run(["journalctl", "--unit", AGENT, *lines], 60.0).stdout

    def _systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        elsewhere = [] if self.root == Path("/") else [f"--root={self.root}"]
        return _run(["systemctl", *elsewhere, *arguments], _INSTALL_S)


class Updater:
    """Reports, and does what the answer says. told: hears of every step before it is done.

    Raises StateError where the board is not enrolled, or another updater runs.
    """

    def __init__(
        self, board: Board, clock: Callable[[], float] = time.time, told: Callable[[str], None] = lambda _: None
    ) -> None:
        self._board = board
        self._clock = clock
        self._step = told
        self._service = _settings(board.identity / "updater.toml").service
        self._trouble = ""
        board.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._seen = records.read(board.folder / "seen.json", Seen) or Seen()
        self._task = records.read(board.folder / "task.json", Task)

    def once(self) -> None:
        """Whatever the fleet wants now is done and said. Raises FedEqError where it could not be asked or told."""
        try:
            with locked(self._board.folder):
                self._turn()
        except FedEqError as error:
            self._trouble = str(error)
            raise
        self._trouble = ""

    def _turn(self) -> None:
        enrol.keep_root(self._service, self._board.identity)
        if self._is_acting:
            self._carry_out()
        wanted = self._report()
        while self._take(wanted):
            wanted = self._report()  # it is said that it begins, and may still be taken back
            if wanted is not None and wanted.id == self._current.action.id:
                self._carry_out()
                wanted = self._report()

    def renew(self) -> bool:
        """Whether the certificate was due and is new; the agent uses it then, whenever this is interrupted."""
        mark = self._board.folder / "renewing"
        interrupted = mark.exists()
        self._step("renew")
        write_atomically(mark, b"")
        renewed = enrol.renew_if_due(self._service, self._board.identity, self._clock)
        if renewed or interrupted:
            self._step("restart")
            self._board.restart_agent()
        mark.unlink()
        return renewed

    @property
    def _is_acting(self) -> bool:
        """Whether an installation was begun and its end not seen: that comes before anything new."""
        return self._task is not None and self._task.state == "running" and self._task.acting > 0

    def _take(self, action: Action | None) -> bool:
        """Whether there is something to do: a new action, or the rest of the last one. The newest replaces others."""
        task = self._task
        if task is not None and task.state == "running" and not self._is_acting:
            if action is not None and action.id == task.action.id:
                return True
            self._keep(task.ended("expired", "withdrawn before it began"))
        if action is None or (task is not None and action.id == task.action.id):
            return False
        self._keep(Task(action=action))
        return True

    def _report(self) -> Action | None:
        """What the fleet wants, now that it knows how things are."""
        self._step("report")
        found = self._board.state()
        failed = found.get("failed") or {}
        said = Report(
            version=str(found.get("current") or ""),
            confirmed=found.get("current") is not None and found.get("current") == found.get("confirmed"),
            previous=str(found.get("previous") or ""),
            healthy=self._board.is_healthy(),
            boot_id=_boot_id(),
            last_error=("\n".join(map(str, failed.get("log", []))) or self._trouble)[-_ERROR_CHARACTERS:],
            action=self._task.told if self._task else None,
        )
        context = link.identified(self._board.identity)
        answer = link.ask(self._service, context, "POST", REPORT, msgspec.json.encode(said))
        try:
            return msgspec.json.decode(answer.body, type=Reply).action
        except msgspec.DecodeError as error:
            raise ProvisionError(
                Exit.FAILED, f"{self._service} answers a report with {error}; is it of this version?"
            ) from error

    def _carry_out(self) -> None:
        """The task has ended, and how is noted; or it goes on at the next turn. Raises where the network broke."""
        task = self._current
        if task.acting == 0 and task.action.expires <= self.time():
            self._keep(task.ended("expired", f"it came too late: here it is {_date(self.time())}"))
            return
        try:
            ended = {"update": self._update, "rollback": self._roll_back, "logs": self._logs}[task.action.kind]()
        except ProvisionError as error:
            if error.exit in (Exit.LOST, Exit.BUSY):
                raise  # the task goes on when the network, or the other installer, lets it
            ended = task.ended("failed", str(error))
        except FedEqError as error:
            ended = task.ended("failed", str(error))
        self._keep(ended)

    @property
    def _current(self) -> Task:
        assert self._task is not None
        return self._task

    def _logs(self) -> Task:
        self._step("logs")
        return self._current.ended("done", self._board.log())

    def _roll_back(self) -> Task:
        found = self._board.state()
        if self._current.acting and found.get("current") != self._current.before:
            return self._finish_rollback()
        self._begin(before=str(found.get("current") or ""))
        status, found, reason = self._board.release("rollback")
        if status == Exit.OK:
            return self._current.ended("done", f"runs {found.get('current')}")
        return self._unfinished(status, reason)

    def _finish_rollback(self) -> Task:
        """The link has gone back and whoever moved it is no more: what runs may still be the release before."""
        status, found, reason = self._board.release("sweep")  # waits for nobody: BUSY where it is still at it
        if status != Exit.OK:
            return self._unfinished(status, reason)
        self._step("restart")
        if not self._board.restart_agent():
            return self._current.ended("failed", f"{found.get('current')} is current again but does not start")
        return self._current.ended("done", f"runs {found.get('current')}")

    def _update(self) -> Task:
        action = self._current.action
        if action.target.startswith("models/"):
            return self._put_model(*self._target(action))
        found = self._board.state()
        if found.get("current") == found.get("confirmed") == action.version:
            return self._current.ended("done", "runs it already")
        failed = found.get("failed") or {}
        if self._current.acting and failed.get("version") == action.version and not self._current.again:
            return self._rolled_back(failed)
        return self._install(again=failed.get("version") == action.version, before=str(found.get("current") or ""))

    def _install(self, *, again: bool, before: str) -> Task:
        file = self._board.folder / "download"
        if not (self._current.acting and file.exists()):
            entry, meant = self._target(self._current.action)
            self._download(entry)
            self._remember(entry, meant)
            self._begin(sha256=entry.hashes["sha256"], again=again, before=before)
        else:
            self._begin()
        status, found, reason = self._board.release("install", str(file), "--sha256", self._current.sha256)
        if status == Exit.OK:
            return self._current.ended("done", f"runs {found.get('current')}")
        if status == Exit.ROLLED_BACK:
            return self._rolled_back(found.get("failed") or {}, reason)
        return self._unfinished(status, reason)

    def _rolled_back(self, failed: dict[str, Any], reason: str = "it was unhealthy") -> Task:
        return self._current.ended("rolled_back", "\n".join([reason, *map(str, failed.get("log", []))]))

    def _unfinished(self, status: int, reason: str) -> Task:
        """release.py refused; or somebody holds its lock or has killed it, and the task goes on."""
        if status == Exit.BUSY:
            raise ProvisionError(Exit.BUSY, reason)
        if status < 0 and self._current.acting < _ATTEMPTS:
            raise ProvisionError(Exit.BUSY, f"release.py was killed by signal {-status}; it is tried again")
        return self._current.ended("failed", reason or f"release.py ended with {status}")

    def _begin(self, **noted: Any) -> None:
        """From here on the board may change; what is noted first is what could not be told afterwards."""
        noted = noted if not self._current.acting else {}
        self._keep(msgspec.structs.replace(self._current, acting=self._current.acting + 1, **noted))
        self._step("act")

    def _put_model(self, entry: TargetFile, meant: Meant) -> Task:
        """The model is in the agent's folder, whole, or what was there before."""
        self._download(entry)
        self._remember(entry, meant)
        name = Path(entry.path).name
        with writing(self._board.models / name):
            _place(self._board.folder / "download", self._board.models, name)
        return self._current.ended("done", f"{name} is {meant.version}")

    def _target(self, action: Action) -> tuple[TargetFile, Meant]:
        """What the action is about, by the operator's signature. Raises ProvisionError where it is not to be had."""
        self._step("metadata")
        cache = self._board.folder / "metadata"
        cache.mkdir(exist_ok=True, mode=0o700)
        with _judged(self.time()):
            client = TufClient(
                metadata_dir=str(cache),
                metadata_base_url="/tuf/metadata",
                fetcher=_Fetcher(self._service, self._board.identity),
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

    def _remember(self, entry: TargetFile, meant: Meant) -> None:
        """Nothing older than this is taken from now on."""
        serials = {**self._seen.serials, _series(entry, meant): meant.serial}
        self._see(msgspec.structs.replace(self._seen, serials=serials))

    def _download(self, entry: TargetFile) -> None:
        """`download` is the target, byte for byte."""
        self._step("download")
        to = self._board.folder / "download"
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

    def _keep(self, task: Task) -> None:
        self._step("keep")
        records.write(self._board.folder / "task.json", task)
        self._task = task
        if task.state != "running":
            (self._board.folder / "download").unlink(missing_ok=True)

    def time(self) -> float:
        """Unix seconds, at least; see above."""
        return max(self._clock(), self._seen.time, _enrolled_at(self._board.identity / "device.crt"))


class _Fetcher(FetcherInterface):
    """Fetches for TUF, as this board."""

    def __init__(self, service: str, identity: Path) -> None:
        self._service = service
        self._identity = identity

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from link.stream(self._service, link.identified(self._identity), url)
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
            f"{error}, here it is {_date(now)}: somebody keeps news back, or the clock is wrong; compare it with the "
            "host's, where fedeq fleet serve signs anew",
        ) from error
    except exceptions.DownloadHTTPError as error:
        raise ProvisionError(Exit.FAILED, f"the service gives no metadata: {error}") from error
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        raise ProvisionError(
            Exit.VERIFICATION, f"what the service gave is not what the fleet signed ({error}); this board keeps its own"
        ) from error


def _place(source: Path, folder: Path, name: str) -> None:
    """`folder` holds the file, for everybody to read; by no link, for the folder is the agent's and we are root."""
    folder.mkdir(parents=True, exist_ok=True)
    part = f".{name}.part"
    within = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=within)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with source.open("rb") as content, os.fdopen(os.open(part, flags, 0o644, dir_fd=within), "wb") as output:
            os.fchmod(output.fileno(), 0o644)
            shutil.copyfileobj(content, output)
            output.flush()
            os.fsync(output.fileno())
        os.replace(part, name, src_dir_fd=within, dst_dir_fd=within)
        os.fsync(within)
    finally:
        os.close(within)


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


def _settings(path: Path) -> Settings:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Settings)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; flash this board, or enrol it: fedeq device enrol") from error
    except msgspec.DecodeError as error:
        raise StateError(f"{path}: {error}; it has one line, service = an address") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; flash this board, or enrol it: fedeq device enrol") from error


def _enrolled_at(path: Path) -> float:
    """When the certificate was made, 0 where there is none."""
    try:
        return issued_at(x509.load_pem_x509_certificate(path.read_bytes())).timestamp()
    except (OSError, ValueError):
        return 0.0


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _date(now: float) -> str:
    return f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%Y-%m-%d %H:%M}"


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Its end; status 127 where there is no such program, -9 where it does not come back and is killed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", f"{command[0]} hangs")


def run(board: Board, every_s: float, *, once: bool = False) -> None:
    """Report every so often, and renew once a day, until the process ends. once: one turn, and errors are raised."""
    updater, renewed_at = Updater(board), float("-inf")
    while True:
        try:
            if time.monotonic() >= renewed_at + _DAY_S:
                updater.renew()
                renewed_at = time.monotonic()
            updater.once()
        except FedEqError as error:
            if once:
                raise
            logger.warning("not this time", extra={"reason": str(error)})
        if once:
            return
        time.sleep(every_s)
