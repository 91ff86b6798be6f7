"""Flashing a card: everything is put on it, and its first boot installs, enrols and starts."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge.atomic import write_atomically
from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision import card
from fedeq_edge.provision.agentfile import agent_toml, agrees
from fedeq_edge.provision.enrol import Join
from fedeq_edge.provision.flash_board import INSTALLER, installer_error, is_identity, no_data
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.plan import Plan, Sign, Steps
from fedeq_edge.provision.targets.base import Ran
from fedeq_edge.provision.targets.image import FOLDER, ImageTarget
from fedeq_edge.provision.targets.partitions import Ext4, Fat
from fedeq_edge.provision.targets.rootfs import RootfsTarget
from fedeq_edge.provision.tokens import Token

_SPARE_BYTES: Final = 2**22  # what cloud-init and status.json write beside ours
_WANTS: Final = f"etc/systemd/system/multi-user.target.wants/{card.UNIT_NAME}"
_DATA: Final = "var/lib/fedeq-edge/data.npz"


class ImageWay:
    """The way of a card or its image that has never booted."""

    def __init__(self, target: ImageTarget, fleet: Fleet, plan: Plan) -> None:
        assert target.root is not None
        self._target = target
        self._fleet = fleet
        self._plan = plan
        self._boot = target.boot
        self._root = target.root
        self._how = _mechanism(target.boot, target.root)
        self._box: Fat | Ext4 = self._root if self._how == "unit" or self._boot is None else self._boot
        self._folder = card.ROOT_FOLDER[1:] if self._how == "unit" else FOLDER
        self.occupant = _other(self._box.read(f"{self._folder}/card.json"), plan.device)
        self._done = self._is_done()

    def intended(self) -> list[str]:
        """What will be done. Raises ProvisionError where it does not fit on the card, or brings no data to train on."""
        if self._plan.data is None and not self._has_data():
            raise no_data(self._target.name)
        needed = self._plan.bundle.stat().st_size + _SPARE_BYTES
        free = self._box.free_bytes()
        if not self._done and free < needed:
            smaller = ", or a bundle without torch" if "torch" in self._plan.manifest.packages else ""
            raise ProvisionError(
                Exit.NO_SPACE,
                f"{self._target.name} has {free / 1e6:.0f} MB free for the {needed / 1e6:.0f} MB of the bundle; "
                f"use an image with a larger boot partition{smaller}",
            )
        if self._done:
            return ["nothing: the card is ready for its first boot"]
        how = {
            "cloud-init": "add a part to user-data (cloud-init)",
            "firstrun": "call it from firstrun.sh and cmdline.txt",
            "unit": "enable its unit in the root partition",
        }
        put = [f"put bundle, settings and a join token into {self._folder}/", how[self._how], "read all of it back"]
        return [*_displacing(self.occupant), *put]

    def go(self, steps: Steps, sign: Sign) -> bool:  # noqa: ARG002  # the token stands for the signature
        """The card's first boot will do the rest; whether anything changed."""
        if self._done:
            return False
        with steps("write", f"{self._plan.bundle.stat().st_size / 1e6:.1f} MB into {self._folder}/"):
            if self.occupant:
                self._box.remove(f"{self._folder}/data.npz")  # another device's samples
            for name, content in _payload(self._fleet, self._plan).items():
                self._box.write(f"{self._folder}/{name}", content, mode=0o600)
        with steps("arrange", self._how):
            self._arrange()
        return True

    def _arrange(self) -> None:
        """The first boot knows of what is there: last, so that a card pulled out too early boots as before."""
        if self._how == "unit" or self._boot is None:
            self._root.write(card.SCRIPT_PATH[1:], card.FIRST_BOOT, mode=0o755)
            self._root.write(f"etc/systemd/system/{card.UNIT_NAME}", card.unit(card.ROOT_FOLDER))
            self._root.symlink(_WANTS, f"../{card.UNIT_NAME}")
            return
        boot = self._boot
        boot.write(f"{FOLDER}/first_boot.py", card.FIRST_BOOT)
        boot.write(f"{FOLDER}/{card.UNIT_NAME}", card.unit(card.BOOT_FOLDER))
        boot.write(f"{FOLDER}/arrange.sh", card.arrange())
        if self._how == "firstrun":
            boot.write("firstrun.sh", card.merged_firstrun(boot.read("firstrun.sh")))
            boot.write("cmdline.txt", card.merged_cmdline(boot.read("cmdline.txt") or b""))
            return
        boot.write("user-data", card.merged_user_data(boot.read("user-data") or b""))
        if boot.read("meta-data") is None:
            boot.write("meta-data", b"instance-id: fedeq-edge\n")  # without it cloud-init sees no user-data

    def _has_data(self) -> bool:
        """A flash before this one brought them, for this device, or somebody put them where the agent looks."""
        brought = not self.occupant and self._box.read(f"{self._folder}/data.npz") is not None
        return brought or self._root.exists(_DATA)

    def _is_done(self) -> bool:
        """This bundle is on the card, for this device, with a token that is still good."""
        wanted = card.card_text(device=self._plan.device, sha256=self._plan.digest)
        bundle, join = (self._box.read(f"{self._folder}/{name}") for name in ("bundle.tar.gz", "join.toml"))
        if self._box.read(f"{self._folder}/card.json") != wanted or self._plan.data is not None:
            return False
        same = bundle is not None and hashlib.sha256(bundle).hexdigest() == self._plan.digest
        return same and _is_good(self._fleet, self._plan.device, join) and self._is_arranged()

    def _is_arranged(self) -> bool:
        if self._how == "unit" or self._boot is None:
            return self._root.link(_WANTS) != ""
        if self._how == "firstrun":
            return b"systemd.run=" in (self._boot.read("cmdline.txt") or b"")
        found = self._boot.read("user-data") or b""
        return card.merged_user_data(found) == found


class RootfsWay:
    """The way of a mounted root: installed at once, enrolled at the next boot, once."""

    def __init__(self, target: RootfsTarget, fleet: Fleet, plan: Plan) -> None:
        self._target = target
        self._fleet = fleet
        self._plan = plan
        self._at = Path(target.path)
        self._current = (self._at / "opt/fedeq-edge/current").is_symlink() and (
            (self._at / "opt/fedeq-edge/current").readlink().name == plan.manifest.version
        )
        settings, mine, ca = (
            _content(self._at / "etc/fedeq-edge" / name) for name in ("agent.toml", "device.crt", "ca.crt")
        )
        self._enrolled = is_identity(mine, ca, fleet, plan.device)
        if settings is not None:
            agrees(settings, fleet.settings, plan.device, torch="torch" in plan.manifest.packages)
        self.occupant = _other(_content(self._folder / "card.json"), plan.device)
        token = _content(self._folder / "join.toml")
        self._joins = _is_good(fleet, plan.device, token)

    @property
    def _folder(self) -> Path:
        return self._at / card.ROOT_FOLDER[1:]

    def intended(self) -> list[str]:
        """What will be done. Raises ProvisionError where the first boot was, or where there are no data to train on."""
        if self._enrolled:
            raise booted(self._target.name)
        if self._plan.data is None and not self._has_data():
            raise no_data(self._target.name)
        release = [] if self._current else [f"install {self._plan.manifest.version}"]
        join = [] if self._joins else ["put settings and a join token", "enrol at the next boot"]
        data = [f"put {self._plan.data.name}"] if self._plan.data else []
        return [*_displacing(self.occupant), *release, *join, *data] or ["nothing: it is ready for its next boot"]

    def go(self, steps: Steps, sign: Sign) -> bool:  # noqa: ARG002  # the token stands for the signature
        """The release is current there, and its next boot enrols; whether anything changed."""
        if not self._current:
            with steps("install", self._plan.manifest.version):
                self._install()
        if not self._joins or self._plan.data is not None:
            with steps("join", self._plan.device):
                self._join()
        return not (self._current and self._joins) or self._plan.data is not None

    def _has_data(self) -> bool:
        brought = not self.occupant and (self._folder / "data.npz").exists()
        return brought or (self._at / _DATA).exists()

    def _install(self) -> None:
        home = self._at / "opt/fedeq-edge"
        home.mkdir(parents=True, exist_ok=True)
        key = self._fleet.folder / "keys/bundle.pub"
        write_atomically(home / "bundle.pub", key.read_bytes())
        options = ["--sha256", self._plan.digest, "--key", str(key), "--no-start"]
        command = [sys.executable, "-I", str(INSTALLER), "--root", str(self._at), "install", str(self._plan.bundle)]
        done = subprocess.run([*command, *options], capture_output=True, check=False, timeout=900)
        if done.returncode:
            raise installer_error(self._target.name, Ran(done.returncode, done.stdout, done.stderr))

    def _join(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.occupant:
            (self._folder / "data.npz").unlink(missing_ok=True)  # another device's samples
        payload = _payload(self._fleet, self._plan)
        for name in ("agent.toml", "join.toml", "data.npz", "card.json"):
            if name in payload:
                write_atomically(self._folder / name, payload[name], mode=0o600)
        write_atomically(self._at / card.SCRIPT_PATH[1:], card.FIRST_BOOT, mode=0o755)
        units = self._at / "etc/systemd/system"
        (units / "multi-user.target.wants").mkdir(parents=True, exist_ok=True)
        write_atomically(units / card.UNIT_NAME, card.unit(card.ROOT_FOLDER))
        link = self._at / _WANTS
        link.unlink(missing_ok=True)
        link.symlink_to(f"../{card.UNIT_NAME}")  # what `systemctl --root` does, and needs no systemctl here


def booted(name: str) -> ProvisionError:
    """What is said of a card that is a device already: another first boot would give it a second identity."""
    return ProvisionError(
        Exit.BOOTED_CARD,
        f"{name} has booted already, and a first boot happens once; write its operating system anew, "
        "or flash the running board: fedeq flash ssh://USER@HOST",
    )


def _mechanism(boot: Fat | None, root: Ext4) -> str:
    """How the first boot is told: "cloud-init", "firstrun" (both Raspberry Pi OS), or "unit" in the root partition."""
    if boot is None or boot.read("cmdline.txt") is None:
        return "unit"
    return "cloud-init" if root.exists("usr/bin/cloud-init") or boot.read("user-data") is not None else "firstrun"


def _payload(fleet: Fleet, plan: Plan) -> dict[str, bytes]:
    """The files of the card, the one that says that they are complete at the end. A new token is made for it."""
    settings = fleet.settings
    token = fleet.issue_token(plan.device)
    data = {} if plan.data is None else {"data.npz": plan.data.read_bytes()}
    return {
        "bundle.tar.gz": plan.bundle.read_bytes(),
        "release.py": INSTALLER.read_bytes(),
        "bundle.pub": (fleet.folder / "keys/bundle.pub").read_bytes(),
        "agent.toml": agent_toml(
            settings, plan.device, fleet.device(plan.device), torch="torch" in plan.manifest.packages
        ),
        **data,
        "join.toml": card.join_text(service=settings.service, token=str(token)),
        "card.json": card.card_text(device=plan.device, sha256=plan.digest),
    }


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _other(said: bytes | None, device: str) -> str:
    """Whom a card.json names, "" where that is this device or nobody."""
    try:
        prepared = msgspec.json.decode(said or b"{}", type=dict[str, str]).get("device", "")
    except msgspec.DecodeError:
        return ""
    return "" if prepared == device else prepared


def _displacing(occupant: str) -> list[str]:
    return [f"take the place of what was prepared for device {occupant}"] if occupant else []


def _is_good(fleet: Fleet, device: str, join: bytes | None) -> bool:
    """Whether a card's join.toml holds the token that this device may still use, for this service."""
    if join is None:
        return False
    try:
        found = msgspec.toml.decode(join, type=Join)
        waiting = fleet.tokens.waiting(device, now=time.time())
        return found.service == fleet.settings.service and (
            waiting is not None and waiting.sha256 == Token.parse(found.token).digest
        )
    except (msgspec.DecodeError, ProvisionError):
        return False
