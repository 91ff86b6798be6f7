"""Flashing a machine that runs: over ssh, or this one."""

import secrets
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.agentfile import agent_toml, agrees
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.layout import AGENT, UPDATER
from fedeq_edge.provision.plan import Plan, Sign, Steps
from fedeq_edge.provision.reporting import updater_toml
from fedeq_edge.provision.targets.base import PYTHON, Machine, Ran, get, make_folder, put

INSTALLER: Final = Path(__file__).with_name("release.py")
HEARTBEAT: Final = Path(__file__).with_name("board_heartbeat.py").read_bytes()
# How long a release must stay up after READY before it is confirmed. READY comes after a real solve; somebody waits,
# and sees the heartbeat next.
TRIAL_S = 1.0
HEARTBEAT_S: Final = 30.0  # a broker that is there answers within one; a board under emulation within ten
_INSTALL_S: Final = 900.0  # 144 MB on a slow card under emulation took 19 s; torch is three times that
_LOG_LINES: Final = 6  # of the journal in an error


class BoardWay:
    """The way of a machine that runs. What it has is asked once, when this is made."""

    occupant = ""  # a board that is another device is refused (agentfile.py)

    def __init__(self, machine: Machine, fleet: Fleet, plan: Plan) -> None:
        self._machine = machine
        self._at = machine.layout
        self._fleet = fleet
        self._plan = plan
        self._state = release_state(machine)
        mine, ca = (get(machine, f"{self._at.identity}/{name}") for name in ("device.crt", "ca.crt"))
        self._enrolled = is_identity(mine, ca, fleet, plan.device)
        self._settings = get(machine, f"{self._at.identity}/agent.toml")
        self._torch = "torch" in plan.manifest.packages
        self._configured = self._settings is not None and agrees(
            self._settings, fleet.settings, plan.device, torch=self._torch
        )
        self._reports = not self._enrolled or self._knows_service()
        self._has_data = not machine.run(["test", "-s", f"{self._at.state}/data.npz"]).code

    def intended(self) -> list[str]:
        """What will be done. Raises ProvisionError where the agent would have no data to train on."""
        if not self._has_data and self._plan.data is None and not self._configured:
            raise no_data(self._machine.name)
        version, before = self._plan.manifest.version, self._state.get("current")
        release = [f"install {version} (now: {before or 'nothing'})"] if self._stale else []
        identity = [] if self._enrolled else ["make its key, sign its certificate"]
        settings = [] if self._configured else ["write agent.toml"]
        service = [] if self._reports else [f"tell its updater of {self._fleet.settings.service}"]
        data = [f"put {self._plan.data.name}"] if self._plan.data else []
        return [*release, *identity, *settings, *service, *data, "see it connected to its broker"]

    def go(self, steps: Steps, sign: Sign) -> bool:
        """The release runs and is connected; whether anything changed."""
        changed = self._stale or not self._enrolled or not self._configured or self._plan.data is not None
        if self._plan.data is not None:
            with steps("data", self._plan.data.name):
                self._put_data(self._plan.data)
        if not self._configured:
            with steps("settings", "agent.toml"):
                self._put_settings()
        if not self._reports:
            with steps("service", self._fleet.settings.service):
                self._put_service()
        if self._enrolled and self._stale:
            self._install(steps, start=True)
        elif not self._enrolled:
            if self._stale:
                self._install(steps, start=False)
            with steps("enrol", self._plan.device):
                self._enrol(sign)
        if changed and not (self._enrolled and self._stale):
            with steps("start", AGENT):
                self._start()
        with steps("heartbeat", self._fleet.settings.broker):
            check_heartbeat(self._machine, self._plan.manifest.version)
        return changed or not self._reports

    @property
    def _stale(self) -> bool:
        return self._state.get("current") != self._plan.manifest.version

    def _knows_service(self) -> bool:
        """Its updater asks where the fleet's service is now."""
        known = get(self._machine, f"{self._at.identity}/updater.toml")
        return known == updater_toml(self._fleet.settings.service)

    def _put_service(self) -> None:
        put(self._machine, updater_toml(self._fleet.settings.service), f"{self._at.identity}/updater.toml")
        self._machine.run(["systemctl", "try-restart", UPDATER])

    def _put_data(self, path: Path) -> None:
        make_folder(self._machine, self._at.state, mode=0o700)
        put(self._machine, path.read_bytes(), f"{self._at.state}/data.npz", mode=0o644)

    def _put_settings(self) -> None:
        make_folder(self._machine, self._at.identity, mode=0o700)
        path, device = f"{self._at.identity}/agent.toml", self._plan.device
        if self._settings is not None:
            put(self._machine, self._settings, f"{path}.old", mode=0o600)
        content = agent_toml(self._fleet.settings, device, self._fleet.device(device), torch=self._torch)
        put(self._machine, content, path, mode=0o600)

    def _install(self, steps: Steps, *, start: bool) -> None:
        """The release is current. It goes on where the connection is lost: systemd runs it, not our shell."""
        bundle, key = f"{self._at.incoming}/bundle.tar.gz", f"{self._at.home}/bundle.pub"
        installer = f"{self._at.incoming}/release.py"
        with steps("upload", f"{self._plan.bundle.stat().st_size / 1e6:.1f} MB"):
            make_folder(self._machine, self._at.home, mode=0o755)
            make_folder(self._machine, self._at.incoming, mode=0o700)
            put(self._machine, (self._fleet.folder / "keys/bundle.pub").read_bytes(), key)
            put(self._machine, INSTALLER.read_bytes(), installer)
            put(self._machine, self._plan.bundle.read_bytes(), bundle)
        with steps("install", self._plan.manifest.version):
            options = ["--sha256", self._plan.digest, "--key", key, *(_trial() if start else ["--no-start"])]
            try:
                self._detached([PYTHON, "-I", installer, *self._root(), "install", bundle, *options])
            finally:
                self._machine.run(["rm", "-rf", self._at.incoming])

    def _root(self) -> list[str]:
        return ["--root", self._at.root] if self._at.root else []

    def _start(self) -> None:
        """The agent is up with what was just put there; where it is on trial and fails, the one before it is."""
        self._detached([PYTHON, "-I", self._at.installer, *self._root(), "start", *_trial()])
        if self._enrolled:  # a confirmed release that runs is not started again by that
            done = self._machine.run(["systemctl", "restart", AGENT], timeout_s=_INSTALL_S)
            if done.code:
                raise ProvisionError(Exit.FAILED, f"{self._machine.name}: {AGENT} does not start: {done.reason}")

    def _enrol(self, sign: Sign) -> None:
        """The board has a certificate for the key that it made itself, and what its updater trusts."""
        from fedeq_edge.provision.repository import board_files  # noqa: PLC0415  # tuf, only where a board is new

        make_folder(self._machine, self._at.identity, mode=0o700)
        asked = ["device", "csr", "--device", self._plan.device, "--folder", self._at.identity]
        done = self._machine.run([self._at.program, *asked])
        if done.code:
            raise ProvisionError(Exit.FAILED, f"{self._machine.name} cannot make its key: {done.reason}")
        authority = sign()
        certificate = authority.device_certificate(done.out, self._plan.device)
        put(self._machine, authority.pem, f"{self._at.identity}/ca.crt", mode=0o644)
        for name, content in board_files(self._fleet).items():
            put(self._machine, content, f"{self._at.identity}/{name}", mode=0o644)
        put(self._machine, certificate, f"{self._at.identity}/device.crt", mode=0o644)  # last: it says "enrolled"

    def _detached(self, argv: list[str]) -> None:
        """The installer ended well, wherever the connection was meanwhile. Raises ProvisionError with its exit."""
        at = f"{self._at.home}/flash-{secrets.token_hex(4)}"
        files = ["-p", f"StandardOutput=file:{at}.out", "-p", f"StandardError=file:{at}.err"]
        run = ["systemd-run", "--quiet", "--collect", "--wait", *files, "--", *argv]
        done = self._machine.run(run, timeout_s=_INSTALL_S)
        out, err = get(self._machine, f"{at}.out"), get(self._machine, f"{at}.err")
        self._machine.run(["rm", "-f", f"{at}.out", f"{at}.err"])
        if done.code:
            raise installer_error(self._machine.name, Ran(done.code, out or b"", err or done.err))


def no_data(name: str) -> ProvisionError:
    """What is said of a target whose agent would have nothing to train on."""
    return ProvisionError(
        Exit.MISUSED,
        f"{name} has no data to train on; give its npz with --data FILE, or put it at /var/lib/fedeq-edge/data.npz",
    )


def is_identity(mine: bytes | None, authority: bytes | None, fleet: Fleet, device: str) -> bool:
    """Whether a board's device.crt and ca.crt (PEM) are of this fleet and device, neither ended nor revoked."""
    from cryptography import x509  # noqa: PLC0415  # the extra `fleet`

    from fedeq_edge.provision.ca import common_name, revoked, serial_of  # noqa: PLC0415

    if not mine or authority != (fleet.folder / "ca/ca.crt").read_bytes():
        return False
    try:
        certificate = x509.load_pem_x509_certificate(mine)
    except ValueError:
        return False
    ends_s = certificate.not_valid_after_utc.timestamp() - time.time()
    known = serial_of(certificate) not in revoked(fleet.folder / "ca")
    return common_name(certificate) == device and ends_s > 0 and known


def _trial() -> list[str]:
    return ["--trial-s", f"{TRIAL_S:g}"]


def release_state(machine: Machine) -> dict[str, Any]:
    """state.json of the board as its installer tells it, empty where it has none."""
    root = ["--root", machine.layout.root] if machine.layout.root else []
    done = machine.run([PYTHON, "-I", machine.layout.installer, *root, "status"])
    return _json(done.out) if done.code == 0 else {}


def check_heartbeat(machine: Machine, version: str, *, seconds: float = HEARTBEAT_S) -> None:
    """This version runs and its broker took it. Raises ProvisionError with what it says instead."""
    current = release_state(machine).get("current")
    if current != version:
        raise ProvisionError(
            Exit.ROLLED_BACK, f"{machine.name} runs {current or 'nothing'} and not {version}; see fedeq logs"
        )
    path = f"{machine.layout.state}/state/status.json"
    done = machine.run([PYTHON, "-", path, f"{seconds:g}"], input=HEARTBEAT, timeout_s=seconds + 30)
    found = _json(done.out)
    if found.get("broker") == "connected":
        return
    journal = str(found.get("journal", "")).strip().splitlines()[-_LOG_LINES:]
    seen = f"agent is {found.get('active') or 'not known to systemd'}, broker: {found.get('broker') or 'no word'}"
    raise ProvisionError(
        Exit.FAILED,
        f"{machine.name} runs {version} but was not seen at its broker within {seconds:g} s ({seen}); "
        "is the broker of fleet.toml reachable from there? it goes on trying"
        + "".join(f"\n  {line}" for line in journal),
    )


def roll_back(machine: Machine) -> str:
    """The release before the current one runs; its version. Raises ProvisionError where there is none, or it fails."""
    root = ["--root", machine.layout.root] if machine.layout.root else []
    done = machine.run([PYTHON, "-I", machine.layout.installer, *root, "rollback", *_trial()], timeout_s=_INSTALL_S)
    if done.code:
        raise installer_error(machine.name, done)
    return str(_json(done.out).get("current", ""))


def installer_error(name: str, done: Ran) -> ProvisionError:
    """What release.py refused, with its exit and the last lines of the release that failed."""
    known = done.code in list(Exit)
    failed = _json(done.out).get("failed") or {}
    log = failed.get("log", [])[-_LOG_LINES:] if done.code == Exit.ROLLED_BACK else []
    reason = done.reason.removeprefix("release.py: ")
    return ProvisionError(
        Exit(done.code) if known else Exit.FAILED, f"{name}: {reason}" + "".join(f"\n  {line}" for line in log)
    )


def _json(out: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(out, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
