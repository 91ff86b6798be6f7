"""A small fleet of real processes on data made here: an aggregator and agents, each killable by its id."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import pytest

from fedeq_edge import settings
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings
from fedeq_edge.storage import history
from fedeq_edge.training.step import BackendName, Plan
from fedeq_edge.transport.base import Arrived, Event
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from fedeq_edge.wire import messages

DEVICES = ("a", "b", "c")
PATIENCE_S = 60.0  # torch starts three times on two cores that others use as well
FEATURES, CLASSES = 16, 3
Process = subprocess.Popen[bytes]


def client_data(seed: int) -> ClientData:
    """Three noisy prototypes, the same for all clients, 60 training and 20 test samples of them."""
    prototypes = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=80)
    x = (prototypes[y] + 0.5 * rng.normal(size=(80, FEATURES))).astype(np.float32)
    return ClientData(x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])


class Fleet:
    """Processes of one federation under one folder. Nothing runs until it is started; `close` leaves nothing.

    by_graph: the devices that train without torch. changes: further AggregatorSettings.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        version: Literal["3.1.1", "5"] = "5",
        devices: tuple[str, ...] = DEVICES,
        rounds: int = 3,
        by_graph: tuple[str, ...] = (),
        **changes: Any,
    ) -> None:
        self.folder = folder
        self.name = folder.name  # brokers are shared
        self.devices = devices
        self.agents: dict[str, Process] = {}
        self.aggregator: Process | None = None
        self._started: list[Process] = []
        self._endpoint = Endpoint(url=url, version=version)
        broker = BrokerSettings(url=url, version=version)
        federation = AggregatorSettings(
            federation=self.name,
            model=ModelSpec(input_shape=(FEATURES,), classes=CLASSES, channels=8),
            train=Plan(rounds=rounds, refit_steps=20),
            schedule=Schedule(min_devices=len(devices), quorum=1.0, deadline_s=60.0, final_s=60.0),
            broker=broker,
            **changes,
        )
        (folder / "aggregator.toml").write_text(settings.to_toml(federation))
        for seed, device in enumerate(devices):
            home = folder / device
            home.mkdir()
            save_client(home / "data.npz", client_data(seed))
            backend: BackendName = "onnx" if device in by_graph else "torch"
            own = AgentSettings(device=device, federation=self.name, data="data.npz", backend=backend, broker=broker)
            (home / "agent.toml").write_text(settings.to_toml(own))

    # Processes

    def start_aggregator(self) -> None:
        self.aggregator = self._start("aggregator", self.folder / "aggregator.toml")

    def start_gateway(self, program: Path) -> None:
        """A program of the test's own in the place of the aggregator."""
        config = self.folder / "aggregator.toml"
        self.aggregator = self._run(config, str(program), str(config))

    def start_agents(self) -> None:
        for device in self.devices:
            self.start_agent(device)

    def start_agent(self, device: str, *options: str) -> None:
        self.agents[device] = self._start("agent", self.folder / device / "agent.toml", *options)

    def restart_agent(self, device: str) -> None:
        """Killed and back; the aggregator has seen both."""
        self.kill_agent(device)
        self.until(lambda: device not in self.status()["online"], f"{device} is missed")
        self.start_agent(device)
        self.until(lambda: device in self.status()["online"], f"{device} is back")

    def kill_aggregator(self) -> None:
        assert self.aggregator is not None
        self.aggregator.kill()
        self.aggregator.wait()

    def kill_agent(self, device: str) -> None:
        self.agents[device].kill()
        self.agents[device].wait()

    def trainer(self, device: str) -> psutil.Process:
        """The trainer of this device, as soon as it runs."""
        link = psutil.Process(self.agents[device].pid)
        self.until(lambda: bool(_trainers(link)), f"{device} has a trainer")
        return _trainers(link)[0]

    def finish(self) -> None:
        """The federation has come to its end; the agents are still there."""
        assert self.aggregator is not None
        assert self.aggregator.wait(PATIENCE_S) == 0, self.log("aggregator")

    def dismiss(self) -> dict[str, int]:
        """Exit statuses of the agents after SIGTERM."""
        for agent in self.agents.values():
            agent.terminate()
        return {device: agent.wait(PATIENCE_S) for device, agent in self.agents.items()}

    def close(self) -> None:
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()

    def _start(self, noun: str, config: Path, *options: str) -> Process:
        return self._run(config, "-m", "fedeq_edge", noun, "run", "--config", str(config), *options)

    def _run(self, config: Path, *words: str) -> Process:
        with config.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._started.append(process)
        return process

    # What can be seen from outside

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """The condition holds, or the test fails with the aggregator's log."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s\n{self.log('aggregator')}"
            time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "state" / "status.json").read_text())
        except FileNotFoundError:
            return {"round": 0, "contributed": [], "online": [], "broker": "", "run": ""}
        return found

    def rounds(self) -> list[dict[str, Any]]:
        return [line for line in history(self.folder / "state") if line["kind"] == "round"]

    def reports(self) -> dict[str, dict[str, Any]]:
        return {line["device"]: line for line in history(self.folder / "state") if line["kind"] == "report"}

    def log(self, name: str) -> str:
        """Of "aggregator" or of a device."""
        path = self.folder / "aggregator.log" if name == "aggregator" else self.folder / name / "agent.log"
        return path.read_text()

    def hold(self, device: str) -> None:
        """All others have contributed to a round after the first, and `device` holds it open, frozen."""
        self.until(lambda: len(self.rounds()) >= 1, "the first round closes")
        self.agents[device].send_signal(signal.SIGSTOP)
        others = sorted(set(self.devices) - {device})

        def waits() -> bool:
            status = self.status()  # written now and then, so it may still be that of the round before
            return status["round"] == len(self.rounds()) + 1 and sorted(status["contributed"]) == others

        self.until(waits, f"the round waits for {device} alone")

    def release(self, device: str) -> None:
        self.agents[device].send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def states(self) -> Iterator[Callable[[str], messages.Message]]:
        """A function that gives the first state message of a device, the retained one if there is one."""
        arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()
        transport = MqttTransport(self._endpoint, "watcher", (f"fedeq/v1/{self.name}/dev/+/state",))
        transport.start(arrived.put)

        first: dict[str, messages.Message] = {}

        def of(device: str) -> messages.Message:
            while device not in first:
                event = arrived.get(timeout=PATIENCE_S)
                if isinstance(event, Arrived):
                    first.setdefault(event.topic.split("/")[-2], messages.decode(event.payload).message)
            return first[device]

        try:
            yield of
        finally:
            transport.stop()


def _trainers(link: psutil.Process) -> list[psutil.Process]:
    return [child for child in link.children() if "fedeq_edge.trainer" in child.cmdline()]


class MakeFleet(Protocol):
    """Makes fleets that are gone after the test."""

    def __call__(
        self,
        url: str,
        *,
        version: Literal["3.1.1", "5"] = "5",
        devices: tuple[str, ...] = DEVICES,
        rounds: int = 3,
        by_graph: tuple[str, ...] = (),
        **changes: Any,
    ) -> Fleet: ...


@pytest.fixture(scope="module")
def make_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeFleet]:
    """For a whole module, so that tests can share a federation."""
    with contextlib.ExitStack() as fleets:

        def make(
            url: str,
            *,
            version: Literal["3.1.1", "5"] = "5",
            devices: tuple[str, ...] = DEVICES,
            rounds: int = 3,
            by_graph: tuple[str, ...] = (),
            **changes: Any,
        ) -> Fleet:
            folder = tmp_path_factory.mktemp("fleet")
            fleet = Fleet(folder, url, version=version, devices=devices, rounds=rounds, by_graph=by_graph, **changes)
            fleets.callback(fleet.close)
            return fleet

        yield make
