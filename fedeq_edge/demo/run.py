"""Prepare a fleet, run it, watch it, and say what came of it."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from fedeq_edge import settings
from fedeq_edge.backends import open_backend
from fedeq_edge.consensus.methods import method
from fedeq_edge.data.npz import ClientData, describe, load_fleet, save_client
from fedeq_edge.demo.source import device_ids, statistics
from fedeq_edge.demo.summary import data_summary, export_models, read_status, summarise
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, StateError, TransportError
from fedeq_edge.hardware.budget import PLANNED_SHARE, mean_step_seconds
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.report.page import render
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings
from fedeq_edge.storage import finite, history, write_atomically
from fedeq_edge.training.cost import calibrate_model
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.schedule import steps_per_epoch
from fedeq_edge.training.step import BackendName, Plan
from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.mqtt import without_secrets
from fedeq_edge.wire.coding import Codec

PROFILES: Final = ("raspberry-pi-zero-2w", "raspberry-pi-4", "x86-64")
FEDERATION: Final = "demo"
_POLL_S: Final = 0.2
# Neighbours on the same cores make a step dearer than it was for the demo alone, and a round also evaluates z.
_MARGIN: Final = 1.35
_LEAVE_S: Final = 15.0  # an agent finishes its step and says goodbye
# More trainers at once would only wait for each other on a small machine, and each holds its library in memory.
_LARGEST_COHORT: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the data comes from: "digits", or an .npz of a fleet with the names of its arrays."""

    data: str = "digits"
    x: str = "x"
    y: str = "y"
    client: str = "client"
    test: str | None = None
    where: str | None = None
    classes: str | None = None
    clients: int | None = None

    @property
    def name(self) -> str:
        """For people: "digits", or the file's name."""
        return Path(self.data).name

    def load(self, devices: int, seed: int) -> dict[str, ClientData]:
        """One data set per device, by device id. Raises DataError where the file cannot be used."""
        if self.data == "digits":
            from fedeq_edge.data.digits import digits_fleet  # noqa: PLC0415  # scikit-learn only for this data set

            return digits_fleet(devices=devices, seed=seed)
        path = Path(self.data)
        fleet = load_fleet(
            path,
            x=self.x,
            y=self.y,
            client=self.client,
            test=self.test,
            where=self.where,
            classes=self.classes,
            clients=self.clients,
        )
        describe(fleet)  # the clients fit together, or a DataError says which does not
        return dict(zip(device_ids(list(fleet)), fleet.values(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user chooses. rounds, preset: None takes what is recommended for the data. backend: of all devices."""

    source: Source
    devices: int = 6
    rounds: int | None = None
    broker: str = "auto"
    preset: str | None = None
    codec: Codec = "int8"
    backend: BackendName = "torch"
    seed: int = 0
    out: Path | None = None


class View(Protocol):
    """Somebody who watches."""

    def says(self, text: str) -> None:
        """A step of the demo begins."""
        ...

    def status(self, status: Mapping[str, Any]) -> None:
        """The aggregator's latest status."""
        ...

    def round(self, line: Mapping[str, Any]) -> None:
        """A round has closed, or a device has reported."""
        ...


@dataclass(slots=True)
class _Seconds:
    """Where the time went."""

    parts: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._since
        self._since = now


def run(options: Options, view: View) -> dict[str, Any]:
    """Run the demo and return its summary; everything is under the returned summary's "out".

    Raises FedEqError in one line where data, broker or folder cannot be used, or a part of the fleet has failed.
    """
    seconds = _Seconds()
    ladder.kind_of(options.broker)  # refused before a folder is made
    fleet = options.source.load(options.devices, options.seed)
    chosen = _federation(options, fleet)
    out = _folder(options.out)
    with ladder.running(options.broker, log=out / "broker.log") as broker:
        address = BrokerSettings(url=broker.endpoint.url, version=broker.endpoint.version)
        _prepare(out, fleet, chosen, address, options.backend)
        view.says(
            f"{f'{broker.kind} broker {broker.version}'.strip()} at {broker.endpoint.shown()}; "
            f"{len(fleet)} devices, each in its own process; everything is kept in {out}"
        )
        with _processes(out, list(fleet)) as processes:
            _watch(out, processes, broker, view, seconds)
    view.says("exporting each device's personal model to ONNX and checking it against torch")
    exported = export_models(out, fleet)
    seconds.lap("export")
    summary = {
        "backend": options.backend,
        "command": without_secrets(shlex.join(["fedeq", *sys.argv[1:]])),
        "data": data_summary(options.source.name, fleet),
        "seconds": dict(seconds.parts),
        "wall_s": sum(seconds.parts.values()),
        "broker": {"kind": broker.kind, "version": broker.version},
        **summarise(out, fleet, chosen, exported),
    }
    _write(out, summary)
    return summary


# Preparing


def _federation(options: Options, fleet: Mapping[str, ClientData]) -> AggregatorSettings:
    summary = describe(fleet)
    shift, scale = statistics(fleet)
    spec, plan, advised = recommend(summary.shape, summary.classes, shift=shift, scale=scale)
    chosen = advised if options.preset is None else method(options.preset)
    rounds = plan.rounds if options.rounds is None else options.rounds
    compute_s = _time_to_train(spec, plan, max(len(data.y_train) for data in fleet.values()), options.backend)
    count = len(fleet)
    return AggregatorSettings(
        federation=FEDERATION,
        model=spec,
        codec=options.codec,
        seed=options.seed,
        train=msgspec.structs.replace(plan, rounds=rounds, compute_s=compute_s, compare_local=True),
        method={"preset": chosen.name, **msgspec.to_builtins(chosen)},
        # The first round pays for the start of every trainer, all of them on this one machine.
        schedule=Schedule(
            min_devices=count,
            fraction=min(1.0, _LARGEST_COHORT / count),
            deadline_s=60.0 + 5.0 * count,
            final_s=120.0 + 20.0 * count,
            seed=options.seed,
        ),
    )


def _time_to_train(spec: ModelSpec, plan: Plan, samples: int, backend: BackendName) -> float:
    """Device seconds for a round's training that leave the slowest of the boards the smallest budgets of the menu.

    It depends on this host, as the boards' speeds are relative to it; in the field it is a setting.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: a board is emulated on one core
    opened = open_backend(backend, spec, plan.for_model(spec))
    steps = plan.epochs * steps_per_epoch(samples, plan.batch)
    step_s = mean_step_seconds(calibrate_model(opened, plan), sorted(plan.budgets)[:2], plan.adjoint_ratio)
    slowest = max(1.0 / load_profile(board).relative_speed for board in PROFILES)
    return _MARGIN * slowest * steps * step_s / PLANNED_SHARE


def _folder(wanted: Path | None) -> Path:
    """An empty folder for this run. Raises ConfigError where an earlier run lies there."""
    if wanted is None:
        names = (Path(f"fedeq-demo{suffix}") for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
        wanted = next(name for name in names if not name.exists())
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        taken = any(wanted.iterdir())
    except OSError as error:
        raise ConfigError(f"output folder {wanted} cannot be made: {error.strerror}; choose another --out") from error
    if taken:
        raise ConfigError(f"output folder {wanted} is not empty (an earlier run?); remove it or choose another --out")
    return wanted.resolve()


def _prepare(
    out: Path,
    fleet: Mapping[str, ClientData],
    chosen: AggregatorSettings,
    broker: BrokerSettings,
    backend: BackendName,
) -> None:
    """Every process finds its settings and data, as in the field."""
    gateway = out / "aggregator"
    gateway.mkdir()
    (gateway / "aggregator.toml").write_text(settings.to_toml(msgspec.structs.replace(chosen, broker=broker)))
    for number, (device, data) in enumerate(fleet.items()):
        folder = out / "devices" / device
        folder.mkdir(parents=True)
        save_client(folder / "data.npz", data)
        own = AgentSettings(
            device=device,
            federation=FEDERATION,
            data="data.npz",
            profile=PROFILES[number % len(PROFILES)],
            emulate=True,
            backend=backend,
            trainer_idle_s=300.0,
            broker=broker,
        )
        (folder / "agent.toml").write_text(settings.to_toml(own))


# Running


@dataclass(slots=True)
class _Processes:
    aggregator: "subprocess.Popen[bytes]"
    agents: dict[str, "subprocess.Popen[bytes]"]


@contextlib.contextmanager
def _processes(out: Path, devices: Sequence[str]) -> Iterator[_Processes]:
    """Aggregator and agents; on the way out the agents say goodbye, and nothing is left running."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        aggregator = _start("aggregator", out / "aggregator" / "aggregator.toml")
        started.append(aggregator)
        agents = {device: _start("agent", out / "devices" / device / "agent.toml") for device in devices}
        started.extend(agents.values())
        yield _Processes(aggregator, agents)
    finally:
        _end(started)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """They have left, politely if they can; a second Ctrl-C, or their time being up, kills what is left."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    try:
        until = time.monotonic() + _LEAVE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()  # without effect on one that has left
            process.wait()


def _start(noun: str, config: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with config.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedeq_edge", noun, "run", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # a Ctrl-C on the terminal is ours to pass on
        )


def _watch(out: Path, processes: _Processes, broker: ladder.Broker, view: View, seconds: _Seconds) -> None:
    """Until the aggregator has finished. Raises StateError or TransportError where a part of the fleet has failed."""
    folder, shown = out / "aggregator" / "state", 0
    while True:
        running = processes.aggregator.poll() is None
        status = read_status(folder)
        lines = history(folder)
        for line in lines[shown:]:
            if line["kind"] == "round":
                seconds.lap("start" if line["round"] == 1 else "rounds")
            view.round(line)
        shown = len(lines)
        if status is not None:
            view.status(status)
        if not running:
            break
        _check_agents(processes, out)
        if not broker.alive():
            raise TransportError(f"the {broker.kind} broker died: {_last_line(out / 'broker.log')}")
        time.sleep(_POLL_S)
    seconds.lap("personal")
    if processes.aggregator.returncode != 0:
        raise StateError(f"the aggregator failed: {_last_line(out / 'aggregator' / 'aggregator.log')}")
    if status is None or status["status"] != "finished":
        raise StateError(f"the aggregator left before the end; see {out / 'aggregator' / 'aggregator.log'}")


def _check_agents(processes: _Processes, out: Path) -> None:
    for device, process in processes.agents.items():
        if process.poll() is not None:
            raise StateError(f"the agent of {device} failed: {_last_line(out / 'devices' / device / 'agent.log')}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no message in {log}"


def _write(out: Path, summary: Mapping[str, Any]) -> None:
    lines = history(out / "aggregator" / "state")
    write_atomically(out / "summary.json", json.dumps(finite(summary), indent=2).encode())
    write_atomically(out / "report.html", render(summary, lines).encode())
