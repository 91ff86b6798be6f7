"""A fleet with a real service on loopback and boards in temporary roots, for the tests of updates."""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from fedeq_edge.provision import archive, enrol
from fedeq_edge.provision.actions import Action, ActionState
from fedeq_edge.provision.archive import Cpu, Manifest
from fedeq_edge.provision.ca import Authority
from fedeq_edge.provision.desk import Desk
from fedeq_edge.provision.fleet import Fleet, FleetSettings
from fedeq_edge.provision.reporting import Board, Task, updater_toml
from fedeq_edge.provision.repository import Published
from fedeq_edge.provision.service import Service
from fedeq_edge.provision.update import publish
from fedeq_edge.provision.updater import Updater
from tests.provision.release_board import INSTALLER, FakeBoard, files_of, hasty

NOW = 1_800_000_000.0
HOUR_S, DAY_S = 3600.0, 86_400.0
PROFILE = "x86-64"
STOCK = ("pi-01", *(f"pi-{number}" for number in range(1, 6)))
HASTY = hasty(INSTALLER.read_bytes())


class Time:
    """A clock that somebody sets."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Killed(BaseException):
    """The power is gone."""


class Plant:
    """A fleet in a folder, its service running; boards are made by `board`.

    stock: made by `stocked`; the fleet and its boards are copies of those, where there are such. Else they are new.
    """

    def __init__(self, folder: Path, stock: Path | None = None) -> None:
        self.clock = Time()
        self.folder = folder
        self.stock = stock
        if stock is None:
            settings = FleetSettings(name="plant", broker="mqtts://g", service="https://g", federation="plant")
            self.fleet = Fleet.init(folder / "fleet", settings, ["127.0.0.1"], clock=self.clock)
        else:
            shutil.copytree(stock / "fleet", folder / "fleet")
            self.fleet = Fleet.open(folder / "fleet", self.clock)
        self.tuf = self.fleet.folder / "tuf"
        self.url = ""

    @classmethod
    def stocked(cls, folder: Path) -> Path:
        """The folder has a fleet without devices, and a board for each name in STOCK, enrolled in it."""
        with cls(folder).serving() as plant:
            nobody = (plant.fleet.folder / "fleet.toml").read_bytes()
            for device in STOCK:
                plant.board(device)
            (plant.fleet.folder / "fleet.toml").write_bytes(nobody)
        return folder

    @contextlib.contextmanager
    def serving(self) -> Iterator["Plant"]:
        desk = Desk(self.fleet, Authority.open(self.fleet.folder / "ca", clock=self.clock), self.clock)
        with Service(desk, self.fleet.folder / "gateway", ("127.0.0.1", 0)) as service:
            self.url = f"https://127.0.0.1:{service.port}"
            thread = threading.Thread(target=service.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield self
            finally:
                service.shutdown()
                thread.join()

    def board(self, device: str) -> "Member":
        """A board of this fleet, enrolled, on which release 1.0+a runs."""
        self.fleet.add(device, PROFILE)
        made = Member(self, device)
        if self.stock is not None and (self.stock / device).exists():
            made.copy(self.stock / device)
        else:
            made.enrol()
        return made

    def bundle(self, version: str, health: str = "ok", profile: str = PROFILE) -> Path:
        """A bundle of the fleet; the same for the same words."""
        out = self.folder / f"{profile}-{version}.tar.gz"
        if out.exists():
            return out
        tree = self.folder / f"tree-{version}"
        files = {**files_of(version, health), "release.py": HASTY + f"# {version}\n".encode()}
        for name, content in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)
        entries = {
            name: archive.entry_of(tree / name, 0o755 if name.startswith("bin/") else 0o644) for name in sorted(files)
        }
        manifest = Manifest(
            version=version,
            profile=profile,
            architecture="x86_64",
            python="3.11",
            glibc="2.28",
            cpu=Cpu(part="", qemu=""),
            packages={},
            files=entries,
        )
        archive.pack(tree, manifest, self.fleet.folder / "keys" / "bundle.key", out)
        return out


def tell(plant: Plant, device: str, bundle: Path) -> tuple[Action, Published]:
    """The device is told to update to this bundle."""
    found = publish(plant.fleet, bundle, clock=plant.clock)
    action = plant.fleet.give_action(device, "update", found.meant.version, HOUR_S, target=found.path)
    return action, found


def said(plant: Plant, device: str) -> ActionState:
    """How far the device is with its action, as the host knows it."""
    given = plant.fleet.given_action(device)
    assert given is not None
    assert given.state is not None
    return given.state


class Member:
    """A board of a plant: release.py with its fake systemd, an identity, and an updater that can be killed."""

    def __init__(self, plant: Plant, device: str) -> None:
        self.plant, self.device = plant, device
        folder = plant.folder / device
        folder.mkdir()
        self.fake = FakeBoard(folder)
        self.board = Board(self.fake.root)
        self.clock = Time()
        self.steps: list[str] = []

    def enrol(self) -> None:
        """It is enrolled by a token, and release 1.0+a runs on it."""
        (self.fake.base / "release.py").write_bytes(HASTY)
        (self.fake.base / "bundle.pub").write_bytes((self.plant.fleet.folder / "keys" / "bundle.pub").read_bytes())
        token = str(self.plant.fleet.issue_token(self.device))
        enrol.enrol(self.plant.url, token, self.board.identity, self.device)
        with self.environment():
            status, _, line = self.fake.install(self.plant.bundle("1.0+a"))
        assert status == 0, line

    def copy(self, stocked: Path) -> None:
        """It is as this board is, and knows the plant's service."""
        for folder in (self.fake.root, self.fake.scripts):
            shutil.copytree(stocked / folder.name, folder, symlinks=True, dirs_exist_ok=True)
        (self.board.identity / "updater.toml").write_bytes(updater_toml(self.plant.url))

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(self.fake.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def turn(self, die_at: int | None = None, meanwhile: Callable[[str], None] = lambda _: None) -> None:
        """The updater starts, takes one turn and leaves; or it dies at its step of this number, counted from 0."""
        self.steps = []

        def told(step: str) -> None:
            if len(self.steps) == die_at:
                raise Killed
            self.steps.append(step)
            meanwhile(step)

        with self.environment():
            Updater(self.board, self.clock, told).once()

    @property
    def runs(self) -> str:
        """What the current release says of itself."""
        return self.fake.runs()

    @property
    def task(self) -> Task:
        """The last action as the board has it."""
        return msgspec.json.decode((self.board.folder / "task.json").read_bytes(), type=Task)
