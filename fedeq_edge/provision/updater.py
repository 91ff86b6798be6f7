"""On the board: does what the fleet asks for, and says how it went; a process of its own for each turn (../updater.py).

    /opt/fedeq-edge/updater/   task.json, renewing; the rest is downloads.py's

Theory of operation.
- Everything may end between any two lines: the power goes, and an update that succeeds restarts the updater itself. So
  task.json says what was told and how far it is, before it is done; whoever comes next carries on from there. An action
  is done once by its id; what cannot be told from the board afterwards (which release ran before) is noted before.
- Releases are release.py's business, in a process of its own that outlives this one. "Another installer is at work"
  therefore means: not yet. The next turn looks again.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # documented as this module's

from fedeq_edge.atomic import locked, write_atomically, writing
from fedeq_edge.errors import Exit, FedEqError, ProvisionError, StateError
from fedeq_edge.provision import enrol, records
from fedeq_edge.provision.actions import Action
from fedeq_edge.provision.downloads import Downloads, date_of
from fedeq_edge.provision.reporting import Board, Task, follow, report, service_of, task_of
from fedeq_edge.provision.repository import Meant

_ATTEMPTS: Final = 3  # at an installation that somebody kills: out of memory, for example


class Updater:
    """Reports, and does what the answer says. told: hears of every step before it is done. trouble: of the last turn.

    Raises StateError where the board is not enrolled.
    """

    def __init__(
        self,
        board: Board,
        clock: Callable[[], float] = time.time,
        told: Callable[[str], None] = lambda _: None,
        trouble: str = "",
    ) -> None:
        self._board = board
        self._clock = clock
        self._step = told
        self._service = service_of(board)
        self._trouble = trouble
        self._named = ""
        board.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._downloads = Downloads(board, clock, told)
        self._task = task_of(board)

    def once(self) -> None:
        """Whatever the fleet wants now is done and said. Raises FedEqError where it could not be asked or told.

        ProvisionError (BUSY) where another updater is at work: that of the release before, which ends what it began.
        """
        try:
            with self._alone():
                self._task = task_of(self._board)
                self._turn()
        except FedEqError as error:
            self._trouble = str(error)
            raise
        self._trouble = ""

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self._board.folder))
            except StateError as error:
                raise ProvisionError(Exit.BUSY, f"another updater is at work ({error})") from error
            yield

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
        follow(self._board, self._named)

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
        reply = report(self._board, self._task, self._trouble)
        self._named = reply.service
        return reply.action

    def _carry_out(self) -> None:
        """The task has ended, and how is noted; or it goes on at the next turn. Raises where the network broke."""
        task = self._current
        if task.acting == 0 and task.action.expires <= self._downloads.time():
            self._keep(task.ended("expired", f"it came too late: here it is {date_of(self._downloads.time())}"))
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
            return self._put_model(*self._downloads.target(action))
        found = self._board.state()
        if found.get("current") == found.get("confirmed") == action.version:
            return self._current.ended("done", "runs it already")
        failed = found.get("failed") or {}
        if self._current.acting and failed.get("version") == action.version and not self._current.again:
            return self._rolled_back(failed)
        return self._install(again=failed.get("version") == action.version, before=str(found.get("current") or ""))

    def _install(self, *, again: bool, before: str) -> Task:
        file = self._downloads.file
        if not (self._current.acting and file.exists()):
            entry, meant = self._downloads.target(self._current.action)
            self._downloads.fetch(entry)
            self._downloads.remember(entry, meant)
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
        self._downloads.fetch(entry)
        self._downloads.remember(entry, meant)
        name = Path(entry.path).name
        with writing(self._board.models / name):
            _place(self._downloads.file, self._board.models, name)
        return self._current.ended("done", f"{name} is {meant.version}")

    def _keep(self, task: Task) -> None:
        self._step("keep")
        records.write(self._board.folder / "task.json", task)
        self._task = task
        if task.state != "running":
            self._downloads.file.unlink(missing_ok=True)


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
