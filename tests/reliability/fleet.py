"""A fleet of real processes (parts.py), each behind a fault proxy of its own, and what must be true at its end."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedeq_edge import settings
from fedeq_edge.audit import Audit, audit
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings
from fedeq_edge.storage import ClientFolder, history
from fedeq_edge.training.step import Plan
from fedeq_edge.transport.faults import FaultProxy, Packet, concerns_devices
from fedeq_edge.transport.mqtt import Version
from fedeq_edge.wire import messages
from tests.reliability.parts import HOLD

PARTS = Path(__file__).with_name("parts.py")
AGGREGATOR = "aggregator"
PATIENCE_S = 60.0
FEATURES, CLASSES = 4, 3
Process = subprocess.Popen[bytes]


def _some_data() -> ClientData:
    """Never looked at: the trainers are puppets."""
    x, y = np.zeros((4, FEATURES), np.float32), np.arange(4) % CLASSES
    return ClientData(x_train=x, y_train=y, x_test=x, y_test=y)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a fleet is like. channels: of the model, whose contribution has about 4 channels^2 bytes as float32."""

    devices: tuple[str, ...] = ("a", "b", "c")
    rounds: int = 5
    channels: int = 8
    codec: str = "int8"
    version: Version = "5"
    keepalive_s: int = 60
    retry_s: float = 1.0
    schedule: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    privacy: Privacy | None = None


class Fleet:
    """Processes of one federation under one folder, and their links. `close` leaves nothing."""

    def __init__(self, folder: Path, port: int, shape: Shape, elsewhere: Mapping[str, int] | None = None) -> None:
        """elsewhere: ports of the brokers of those devices that talk to another one."""
        self.folder, self.shape, self.name = folder, shape, folder.name
        self.processes: dict[str, Process] = {}
        ports = dict.fromkeys((AGGREGATOR, *shape.devices), port) | dict(elsewhere or {})
        self.links = {name: FaultProxy(ports[name]) for name in ports}
        self._every: list[Process] = []
        self.aggregator_settings = AggregatorSettings(
            federation=self.name,
            model=ModelSpec(input_shape=(FEATURES,), classes=CLASSES, channels=shape.channels),
            train=Plan(rounds=shape.rounds, compute_s=1.0),
            codec=shape.codec,
            audit=True,
            method=dict(shape.method),
            privacy=shape.privacy,
            schedule=msgspec.convert(
                {"min_devices": len(shape.devices), "quorum": 1.0, "deadline_s": 30.0, "final_s": 30.0}
                | dict(shape.schedule),
                Schedule,
            ),
            broker=self._broker(AGGREGATOR),
        )
        self._config(AGGREGATOR).write_text(settings.to_toml(self.aggregator_settings))
        for device in shape.devices:
            self._prepare(device)

    def _broker(self, name: str) -> BrokerSettings:
        return BrokerSettings(url=self.links[name].url, version=self.shape.version)

    def _prepare(self, device: str) -> None:
        (self.folder / device).mkdir()
        save_client(self.folder / device / "data.npz", _some_data())
        own = AgentSettings(device=device, federation=self.name, data="data.npz", broker=self._broker(device))
        self._config(device).write_text(settings.to_toml(own))

    def _config(self, name: str) -> Path:
        return self.folder / f"{name}.toml" if name == AGGREGATOR else self.folder / name / "agent.toml"

    # Processes

    def start(self, *names: str, clock_off_s: float = 0.0) -> None:
        """These parts run; without names, all."""
        for name in names or (AGGREGATOR, *self.shape.devices):
            kind = AGGREGATOR if name == AGGREGATOR else "agent"
            self.processes[name] = self._run(kind, self._config(name), clock_off_s)

    def start_twin(self, device: str) -> Process:
        """A second agent that says it is the same device; it has a state folder of its own."""
        own = settings.load(self._config(device), AgentSettings)
        twin = self._config(device).with_name("twin.toml")
        twin.write_text(settings.to_toml(msgspec.structs.replace(own, state="twin/state")))
        return self._run("agent", twin, 0.0)

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].kill()
        self.processes[name].wait()

    def _run(self, kind: str, config: Path, clock_off_s: float) -> Process:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "KEEPALIVE_S": str(self.shape.keepalive_s),
            "RETRY_S": str(self.shape.retry_s),
            "CLOCK_OFF_S": str(clock_off_s),
        }
        with config.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(PARTS), kind, str(config)], stdout=log, stderr=log, env=environment
            )
        self._every.append(process)
        return process

    def close(self) -> None:
        for process in self._every:
            process.kill()
            process.wait()
        for link in self.links.values():
            link.stop()

    # Trainers

    def hold(self, *devices: str) -> None:
        """The trainers of these devices come to no end from now on."""
        for device in devices:
            (self.folder / device / HOLD).touch()

    def release(self, *devices: str) -> None:
        for device in devices:
            (self.folder / device / HOLD).unlink()

    # What can be seen from outside

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """The condition holds, or the test fails with what the aggregator has said."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s\n{self.logs()}"
            time.sleep(0.01)

    def status(self) -> dict[str, Any]:
        return self._told(self.folder) or {
            "round": 0,
            "contributed": [],
            "online": [],
            "broker": "",
            "refusals": {},
            "status": "",
        }

    def agent_status(self, device: str) -> dict[str, Any]:
        return self._told(self.folder / device) or {"doing": "", "pending_bytes": 0}

    @staticmethod
    def _told(part: Path) -> dict[str, Any] | None:
        """What this part has written of itself; None where it has not yet."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((part / "state" / "status.json").read_text())
            return found
        return None

    def rounds(self) -> list[dict[str, Any]]:
        return [line for line in history(self.folder / "state") if line["kind"] == "round"]

    def until_round(self, number: int) -> None:
        """So many rounds are closed."""
        self.until(lambda: len(self.rounds()) >= number, f"round {number} closes")

    def until_open(self, number: int) -> None:
        """This round is open, or a later one."""
        self.until(lambda: self.status()["round"] >= number, f"round {number} opens")

    def until_only(self, *devices: str) -> None:
        """The open round waits for these devices alone."""
        others = sorted(set(self.shape.devices) - set(devices))
        self.until(lambda: sorted(self.status()["contributed"]) == others, f"the round waits for {devices} alone")

    def logs(self) -> str:
        """The ends of all logs."""
        paths = [self.folder / "aggregator.log", *sorted(self.folder.glob("*/agent.log"))]
        return "\n".join(
            f"--- {path.parent.name}/{path.name}\n{path.read_text()[-1500:]}" for path in paths if path.exists()
        )

    # What must be true

    def finish(self) -> Audit:
        """The federation has come to its end, and every consensus is what the accepted contributions make.

        Every round is there once; none has a contribution that another had; each device holds the dual that the
        aggregator counts with, so nothing that was acknowledged to it is lost.
        """
        aggregator = self.processes[AGGREGATOR]
        self.until(lambda: aggregator.poll() is not None, "the federation ends")
        assert aggregator.returncode == 0, self.logs()
        assert [line["round"] for line in self.rounds()] == list(range(1, self.shape.rounds + 1))
        found = audit(self.folder / "state", self.aggregator_settings)
        assert found.sound, f"{found.sentence}\n{self.logs()}"
        self._leave()
        self.check_duals(found)
        return found

    def check_duals(self, found: Audit) -> None:
        """What a device holds is what counts, but for a contribution whose verdict has not come."""
        for device in self.shape.devices:
            held = ClientFolder(self.folder / device / "state").load()
            if held.pending is None and device in found.duals:
                nu = held.nu if held.nu.size else np.zeros_like(found.duals[device])
                np.testing.assert_array_equal(nu, found.duals[device], err_msg=device)

    def _leave(self) -> None:
        for process in self._every:
            process.terminate()
        for process in self._every:
            process.wait(PATIENCE_S)


def carries(*kinds: type[messages.Message]) -> Callable[[Packet], bool]:
    """Whether a packet is a device's PUBLISH, up or down, of one of these kinds."""

    def matches(packet: Packet) -> bool:
        return concerns_devices(packet) and isinstance(messages.decode(packet.payload).message, kinds)

    return matches


class Gate:
    """Holds a link from the first packet of a kind on, both ways, until it is opened; `reached` when it has come."""

    def __init__(self, link: FaultProxy, matches: Callable[[Packet], bool]) -> None:
        self.reached = threading.Event()
        self._link, self._matches = link, matches
        link.conditions.tamper = self

    def __call__(self, packet: Packet) -> Sequence[Packet]:
        if not self.reached.is_set() and self._matches(packet):
            self._link.stall()  # takes effect before this packet leaves: it still has to pass through the air
            self.reached.set()
        return (packet,)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S), "the packet never came"

    def open(self) -> None:
        self._link.conditions.tamper = None
        self._link.release()
