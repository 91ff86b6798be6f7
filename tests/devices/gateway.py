"""The operator's machine at a site: a fleet's folder, the shipped mosquitto, the fleet's service, an aggregator."""

import getpass
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedeq_edge import settings
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.provision.actions import Report
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.tokens import LIFETIME_S
from fedeq_edge.settings import AggregatorSettings, BrokerSettings
from fedeq_edge.storage import history
from fedeq_edge.training.step import Plan
from fedeq_edge.transport.broker import mosquitto_path
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.cards import Card
from tests.devices.depot import NAME, Depot
from tests.devices.sites import GATEWAY, Site

COMMAND_S: Final = 600.0  # a flash of an emulated board with torch
FEATURES, CLASSES = 16, 3
IDENTITY: Final = "/etc/fedeq-edge"  # of a board
_SHIPPED: Final = Path(__file__).parents[2] / "broker"


class Gateway:
    """A gateway with a fleet that has no devices yet. Nothing runs until it is started; what does ends with the site.

    folder: of the fleet, its logs and its home folders. depot: where fleet and bundles come from.
    """

    def __init__(self, folder: Path, site: Site, depot: Depot) -> None:
        self.fleet = folder / "fleet"
        self.aggregator = folder / "aggregator"
        self._folder = folder
        self._site = site
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._depot = depot
        depot.copy_to(self.fleet)

    @property
    def service(self) -> str:
        """The address at which boards enrol and report."""
        return f"https://{GATEWAY}:8443"

    # The command line

    def fedeq(self, *words: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `fedeq` here. home: whose .ssh it shall see."""
        environment = os.environ | {"HOME": str(home or self._folder), "COLUMNS": "200"}
        return self._site.run([sys.executable, "-m", "fedeq_edge", *words], env=environment, timeout=COMMAND_S)

    def must(self, *words: str, home: Path | None = None) -> str:
        """Standard output of a `fedeq` that must succeed."""
        done = self.fedeq(*words, home=home)
        assert done.returncode == 0, f"fedeq {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def add(self, device: str, profile: str) -> None:
        """The device belongs to the fleet."""
        self.must("fleet", "add", device, "--profile", profile, "--fleet", str(self.fleet))

    def bundle(self, profile: str, *more: str) -> Path:
        """A bundle for this kind of board, signed by the fleet."""
        return self._depot.bundle(profile, *more)

    def token(self, device: str, *more: str) -> str:
        """A join token for the device."""
        return self.must("fleet", "token", device, "--fleet", str(self.fleet), *more).strip()

    def expired_token(self, device: str) -> str:
        """One that was good until yesterday."""
        fleet = Fleet.open(self.fleet, lambda: time.time() - 2 * LIFETIME_S)
        return str(fleet.issue_token(device, lifetime_s=LIFETIME_S))

    def enrol(self, board: Board, token: str, *, folder: str = IDENTITY) -> subprocess.CompletedProcess[str]:
        """What a board says that asks for an identity with a token; `folder` is where it shall be."""
        words = f"--service {self.service} --token - --folder {folder}"
        return board.ssh(f"/opt/fedeq-edge/current/bin/fedeq device enrol {words}", data=f"{token}\n", check=False)

    def flash(self, board: Board, bundle: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Flash a board that runs, over ssh, as the device of its name. Its report is JSON on standard output."""
        return self.fedeq(*self._flash(board, bundle), *more, home=board.home)

    def flash_card(self, card: Card, device: str, bundle: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Flash a card for the device. The report is JSON on standard output."""
        options = ["--device", device, "--bundle", str(bundle), "--fleet", str(self.fleet), "--json"]
        return self.fedeq("flash", str(card.path), *options, *more)

    def flash_root(self, board: Board, bundle: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Flash a board that is off, by its mounted root. The report is JSON on standard output."""
        options = ["--device", board.name, "--bundle", str(bundle), "--fleet", str(self.fleet), "--json"]
        return self.fedeq("flash", str(board.root), *options, *more)

    def start_flash(self, board: Board, bundle: Path) -> subprocess.Popen[bytes]:
        """The same, without waiting for its end."""
        command = ["env", f"HOME={board.home}", sys.executable, "-m", "fedeq_edge", *self._flash(board, bundle)]
        return self._site.start(command, self._folder / "flash.log")

    def reported(self, device: str) -> Report | None:
        """What a device's updater said last, None where it has not said anything yet."""
        heard = Fleet.open(self.fleet).heard(device)
        return None if heard is None else heard.report

    # What runs here

    def start_broker(self) -> None:
        """The shipped mosquitto.conf and its ACL, with the fleet's certificates."""
        folder = self._folder / "mosquitto"
        folder.mkdir()
        text = (_SHIPPED / "mosquitto.conf").read_text()
        credentials = self.fleet / "gateway"
        shipped_in = text.partition("\ncafile ")[2].partition("ca.crt")[0]  # the folder that it names
        changed = {
            "listener 8883": f"listener 8883 {GATEWAY}",
            f"{shipped_in}broker": f"{credentials}/server",
            f"{shipped_in}ca.crl": f"{credentials}/crl.pem",
            f"{shipped_in}acl": f"{folder}/acl",
            shipped_in: f"{credentials}/",
            "/var/lib/mosquitto/": f"{folder}/",
        }
        for shipped, ours in changed.items():
            text = text.replace(shipped, ours)
        (folder / "acl").write_text((_SHIPPED / "acl").read_text())
        (folder / "acl").chmod(0o600)  # else mosquitto warns
        # started by root it would become another user, who may not read the fleet's folder
        (folder / "mosquitto.conf").write_text(f"{text}\nuser {getpass.getuser()}\n")
        self._start("broker", [str(mosquitto_path()), "-c", str(folder / "mosquitto.conf")], 8883)

    def start_service(self) -> None:
        """Enrolment, reports and releases over HTTPS."""
        words = ["fleet", "serve", "--listen", f"{GATEWAY}:8443", "--fleet", str(self.fleet)]
        self._start("service", [sys.executable, "-m", "fedeq_edge", *words], 8443)

    def start_aggregator(self, *, devices: int, rounds: int) -> None:
        """Let a federation begin as soon as so many devices are there."""
        credentials = self.fleet / "gateway"
        broker = BrokerSettings(
            url=f"mqtts://{GATEWAY}:8883",
            ca=str(credentials / "ca.crt"),
            certificate=str(credentials / "aggregator.crt"),
            key=str(credentials / "aggregator.key"),
        )
        chosen = AggregatorSettings(
            federation=NAME,
            model=ModelSpec(input_shape=(FEATURES,), classes=CLASSES, channels=8),
            train=Plan(rounds=rounds, refit_steps=5),
            schedule=Schedule(min_devices=devices, quorum=1.0, deadline_s=240.0, final_s=240.0),
            broker=broker,
        )
        self.aggregator.mkdir(exist_ok=True)
        path = self.aggregator / "aggregator.toml"
        path.write_text(settings.to_toml(chosen))
        self._start("aggregator", [sys.executable, "-m", "fedeq_edge", "aggregator", "run", "--config", str(path)])

    def read_revoked(self) -> None:
        """Let the broker read its list of revoked certificates again."""
        self._processes["broker"].send_signal(signal.SIGHUP)

    def stop(self, name: str) -> None:
        """The broker, the service or the aggregator is gone at once."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for name in list(self._processes):
            self.stop(name)

    def log(self, name: str) -> str:
        """Of the broker, the service, the aggregator, or the flash that was started last."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def rounds(self) -> list[dict[str, Any]]:
        """What the aggregator has written of the rounds that closed."""
        state = self.aggregator / "state"
        return [line for line in history(state) if line["kind"] == "round"] if state.exists() else []

    def _flash(self, board: Board, bundle: Path) -> list[str]:
        options = ["--device", board.name, "--bundle", str(bundle), "--fleet", str(self.fleet), "--json"]
        return ["flash", f"ssh://root@{board.address}", *options]

    def _start(self, name: str, command: list[str], port: int | None = None) -> None:
        process = self._processes[name] = self._site.start(command, self._folder / f"{name}.log")
        if port is not None:
            until(lambda: self._site.listens(GATEWAY, port) or process.poll() is not None, f"{name} listens")
        assert process.poll() is None, self.log(name)


def some_data(path: Path, seed: int = 0) -> Path:
    """Data of a device: three noisy prototypes, 60 training and 20 test samples of them."""
    prototypes = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=80)
    x = (prototypes[y] + 0.5 * rng.normal(size=(80, FEATURES))).astype(np.float32)
    save_client(path, ClientData(x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:]))
    return path
