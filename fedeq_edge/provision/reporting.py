"""What a board says of itself to its fleet, and what it hears: light, for it is there all the time (updater.py).

/etc/fedeq-edge/updater.toml        where the service is
/opt/fedeq-edge/updater/task.json   what was told last, and how far it is
"""

import contextlib
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge.atomic import write_atomically
from fedeq_edge.errors import Exit, ProvisionError, StateError
from fedeq_edge.provision import link, records
from fedeq_edge.provision.actions import Action, ActionState, Progress, Reply, Report

AGENT: Final = "fedeq-agent.service"
REPORT: Final = "/v1/report"
LOG_LINES: Final = 200  # of an agent's journal: a report holds 32,768 characters
_LOG_CHARACTERS: Final = 30_000
_ERROR_CHARACTERS: Final = 8000
_INSTALL_S: Final = 900.0  # 144 MB on a slow card under emulation took 19 s; torch is three times that
_AUTHORITY: Final = "/.well-known/est/cacerts"

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
        ended = run_program(command, _INSTALL_S)
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
        return run_program(["journalctl", "--unit", AGENT, *lines], 60.0).stdout

    def _systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        elsewhere = [] if self.root == Path("/") else [f"--root={self.root}"]
        return run_program(["systemctl", *elsewhere, *arguments], _INSTALL_S)


def task_of(board: Board) -> Task | None:
    """The last task, None where there was none. Raises StateError where it is damaged."""
    return records.read(board.folder / "task.json", Task)


def report(board: Board, task: Task | None, trouble: str = "") -> Reply:
    """What the fleet wants, now that it knows how things are. trouble: why the last turn failed.

    Raises StateError where the board is not enrolled, ProvisionError where the service cannot be asked or refuses.
    """
    service = service_of(board)
    context = link.identified(board.identity)
    answer = link.ask(service, context, "POST", REPORT, msgspec.json.encode(_said(board, task, trouble)))
    try:
        return msgspec.json.decode(answer.body, type=Reply)
    except msgspec.DecodeError as error:
        raise ProvisionError(Exit.FAILED, f"{service} answers a report with {error}; is it of this version?") from error


def _said(board: Board, task: Task | None, trouble: str) -> Report:
    found = board.state()
    failed = found.get("failed") or {}
    return Report(
        version=str(found.get("current") or ""),
        confirmed=found.get("current") is not None and found.get("current") == found.get("confirmed"),
        previous=str(found.get("previous") or ""),
        healthy=board.is_healthy(),
        boot_id=_boot_id(),
        last_error=("\n".join(map(str, failed.get("log", []))) or trouble)[-_ERROR_CHARACTERS:],
        action=task.told if task else None,
    )


def follow(board: Board, service: str) -> None:
    """The service is asked there from now on, if it answers there: a slip in fleet.toml locks no board out."""
    if service in ("", service_of(board)):
        return
    try:
        link.ask(service, link.identified(board.identity), "GET", _AUTHORITY)
    except ProvisionError as error:
        logger.warning("the fleet names another service, which is not asked yet", extra={"reason": str(error)})
        return
    write_atomically(board.identity / "updater.toml", updater_toml(service))
    logger.info("the fleet's service has moved", extra={"service": service})


def updater_toml(service: str) -> bytes:
    """The settings of a board's updater."""
    return msgspec.toml.encode({"service": service})


def service_of(board: Board) -> str:
    """Where the fleet's service is. Raises StateError where this board knows none."""
    path = board.identity / "updater.toml"
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Settings).service
    except OSError as error:
        raise StateError(
            f"{path}: {error.strerror}; flash this board, or enrol it: sudo fedeq device enrol --service URL --token "
            "TOKEN, as fedeq fleet token prints them on the host"
        ) from error
    except msgspec.DecodeError as error:
        raise StateError(f"{path}: {error}; it has one line, service = an address") from error


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def run_program(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Its end; status 127 where there is no such program, -9 where it does not come back and is killed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", f"{command[0]} hangs")
