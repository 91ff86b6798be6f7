"""A real fleet whose parts are killed and whose links are broken at random moments, and the verdict on what it learned.

Broker, aggregator and agents are processes of their own, as in the field, the last two behind a fault proxy each. The
storm strikes at moments drawn from a seed: kill -9 of the broker (which comes back with an empty memory), the
aggregator, an agent or a trainer; links that are cut, silent, slow or flapping, or that repeat, reorder and damage what
passes. Everything is repaired within seconds. When the storm is over, the fleet runs to a last round, and every
consensus that it ever had is computed again from the contributions that were accepted (audit.py).
"""

import contextlib
import heapq
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import psutil

from fedeq_edge import settings
from fedeq_edge.audit import Audit, audit
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings
from fedeq_edge.storage import ClientFolder, history
from fedeq_edge.training.step import Plan
from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.faults import Conditions, Corrupt, FaultProxy, duplicate

FEDERATION: Final = "chaos"
_FEATURES, _CLASSES = 16, 3
_CHANNELS: Final = 128  # an int8 contribution of 19 kB: several blocks
_POLL_S: Final = 0.05
_BETWEEN_FAULTS_S: Final = 1.5  # in the mean, within a burst: less than a repair takes, so that faults meet
_BURST: Final = 6  # faults at most
_ROUNDS_BETWEEN_BURSTS: Final = 2  # a fleet that is always down proves nothing
_BREATH_S: Final = 60.0  # for them, at most
_AWAY_S: Final = 2.0  # at most, before a killed part is started again
_LONGEST_FAULT_S: Final = 6.0  # of a link
_END_S: Final = 300.0  # backoff after so many lost connections, the trainers' starts, two rounds, personal models
_ENDLESS: Final = 1_000_000  # rounds; the end of the storm lowers it


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user chooses. The storm ends after `minutes`, or after `kills`, whichever is first; None: no such end."""

    out: Path
    minutes: float | None = 5.0
    kills: int | None = None
    seed: int = 0
    devices: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of it. kills and faults: how many of each kind. status: the aggregator's last."""

    audit: Audit
    difference: str
    kills: dict[str, int]
    faults: dict[str, int]
    status: dict[str, Any]
    wall_s: float

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, counted twice, or off by a bit."""
        return not self.difference

    @property
    def sentence(self) -> str:
        """For people."""
        killed, broken = sum(self.kills.values()), sum(self.faults.values())
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items())) or "none"
        storm = f"{killed} kills ({told}), {broken} link fault{'s' * (broken != 1)}"
        return f"{self.difference or self.audit.sentence}; {storm}"

    def summary(self) -> dict[str, Any]:
        """For programs."""
        return {
            "sound": self.sound,
            "sentence": self.sentence,
            "rounds": self.audit.rounds,
            "contributions": self.audit.contributions,
            "starts": self.audit.starts,
            "kills": self.kills,
            "faults": self.faults,
            "wall_s": self.wall_s,
            "status": self.status,
        }


def run(options: Options, says: Callable[[str], None]) -> Verdict:
    """Raise the storm and judge what it left; everything is kept under `options.out`.

    Raises ConfigError where mosquitto is missing or the folder is not empty, StateError where a part ends by itself.
    """
    _check(options)
    began = time.monotonic()
    with _Fleet(options) as fleet:
        storm = _Storm(fleet, random.Random(options.seed), says)
        fleet.start()
        storm.blow(options)
        says("the storm is over: everything is repaired, and the fleet runs to its last round")
        fleet.finish()
        found = audit(fleet.state, fleet.chosen)
        difference = found.difference or fleet.lost(found)
        return Verdict(
            audit=found,
            difference=difference,
            kills=dict(storm.kills),
            faults=dict(storm.faults),
            status=fleet.status(),
            wall_s=time.monotonic() - began,
        )


def _check(options: Options) -> None:
    if options.minutes is None and options.kills is None:
        raise ConfigError("a storm needs an end; give --minutes or --kills")
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        raise ConfigError(f"output folder {options.out} is not empty; remove it or choose another --out")
    if ladder.mosquitto_path() is None:
        raise ConfigError("chaos kills a mosquitto, and there is none on PATH; apt-get install mosquitto")


# The fleet


@dataclass(slots=True)
class _Part:
    """A program that is killed and started again. kind: "broker", "aggregator" or "agent"."""

    kind: str
    name: str
    command: Sequence[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a Ctrl-C on the terminal is ours to pass on
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def leave(self) -> None:
        """SIGTERM, and then the end of its patience."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_LONGEST_FAULT_S)
        self.kill()

    def check(self) -> None:
        """Raises StateError where it has ended though nobody killed it."""
        status = None if self.process is None else self.process.poll()
        if status is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise StateError(f"the {self.kind} {self.name} ended by itself with status {status}: {lines[-1]}")


class _Fleet:
    """Parts, links and folders of one federation; nothing runs before `start` or after the context."""

    def __init__(self, options: Options) -> None:
        self._out = options.out.resolve()
        self._devices = [f"d{number}" for number in range(1, options.devices + 1)]
        self._port = ladder.free_port()
        self.state = self._out / "state"
        self.links: dict[str, FaultProxy] = {}
        self.parts: list[_Part] = []

    def __enter__(self) -> "_Fleet":
        self.links = {name: FaultProxy(self._port) for name in ("aggregator", *self._devices)}
        self._prepare()
        return self

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.kill()  # a trainer leaves when its agent's pipe is closed
        for link in self.links.values():
            link.stop()

    def _prepare(self) -> None:
        self.chosen = _federation(len(self._devices), self._broker("aggregator"))
        config = self._out / "mosquitto.conf"
        config.write_text(ladder.mosquitto_config(self._port))
        mosquitto = (str(ladder.mosquitto_path()), "-c", str(config))
        self.parts = [
            _Part("broker", "mosquitto", mosquitto, self._out / "mosquitto.log"),
            self._program("aggregator", "aggregator", self._out / "aggregator.toml", self.chosen),
            *(self._agent(number, device) for number, device in enumerate(self._devices)),
        ]

    def _agent(self, number: int, device: str) -> _Part:
        home = self._out / device
        home.mkdir()
        save_client(home / "data.npz", _data(number))
        own = AgentSettings(device=device, federation=FEDERATION, data="data.npz", broker=self._broker(device))
        return self._program("agent", device, home / "agent.toml", own)

    def _program(self, noun: str, name: str, config: Path, chosen: msgspec.Struct) -> _Part:
        config.write_text(settings.to_toml(chosen))
        command = (sys.executable, "-m", "fedeq_edge", noun, "run", "--config", str(config))
        return _Part(noun, name, command, config.with_suffix(".log"))

    def _broker(self, name: str) -> BrokerSettings:
        return BrokerSettings(url=self.links[name].url)

    def of(self, kind: str) -> list[_Part]:
        """The running parts of a kind."""
        return [part for part in self.parts if part.kind == kind and part.process is not None]

    def start(self) -> None:
        """Everything runs that does not yet."""
        for part in self.parts:
            if part.process is None:
                part.start()

    def check(self) -> None:
        """Raises StateError where a part has ended by itself."""
        for part in self.parts:
            part.check()

    def trainers(self) -> list[psutil.Process]:
        """Those that run now, children of our agents."""
        agents = [part.process.pid for part in self.of("agent") if part.process is not None]
        return [trainer for pid in agents for trainer in _trainers_of(pid)]

    def status(self) -> dict[str, Any]:
        """The aggregator's last."""
        return _read(self.state / "status.json")

    def round(self) -> int:
        """The open one."""
        return int(self.status().get("round", 0))

    def finish(self) -> None:
        """All run, the links are sound, and two rounds from now the federation has come to its end.

        Raises StateError where it does not.
        """
        aggregator = next(part for part in self.parts if part.kind == "aggregator")
        aggregator.leave()
        plan = msgspec.structs.replace(self.chosen.train, rounds=self.round() + 2)
        self.chosen = msgspec.structs.replace(self.chosen, train=plan)
        (self._out / "aggregator.toml").write_text(settings.to_toml(self.chosen))
        self.start()
        self._await(aggregator)
        for part in self.of("agent"):
            part.leave()

    def _await(self, aggregator: _Part) -> None:
        deadline = time.monotonic() + _END_S
        while aggregator.process is not None and aggregator.process.poll() is None:
            if time.monotonic() > deadline:
                raise StateError(
                    f"the fleet has not come to its end within {_END_S:.0f} s; see the logs in {self._out}"
                )
            for part in self.of("agent") + self.of("broker"):
                part.check()
            time.sleep(_POLL_S)
        if self.status().get("status") != "finished":
            aggregator.check()
        aggregator.process = None

    def lost(self, found: Audit) -> str:
        """A device whose dual is not the one that counts, so that it was told something that is not so; "" if none."""
        reported = {line["device"] for line in history(self.state) if line["kind"] == "report"}
        for device in sorted(reported & found.duals.keys()):
            nu = ClientFolder(self._out / device / "state").load().nu
            if not np.array_equal(nu if nu.size else np.zeros_like(found.duals[device]), found.duals[device]):
                return f"device {device} holds another dual than its accepted contributions make"
        return ""


def _federation(devices: int, broker: BrokerSettings) -> AggregatorSettings:
    return AggregatorSettings(
        federation=FEDERATION,
        model=ModelSpec(input_shape=(_FEATURES,), classes=_CLASSES, channels=_CHANNELS),
        audit=True,
        train=Plan(rounds=_ENDLESS, compute_s=5.0, refit_steps=20),
        schedule=Schedule(min_devices=devices, quorum=0.5, deadline_s=10.0, final_s=60.0),
        broker=broker,
    )


def _data(seed: int) -> ClientData:
    """Three noisy prototypes, the same for all devices."""
    prototypes = np.random.default_rng(0).normal(size=(_CLASSES, _FEATURES))
    rng = np.random.default_rng(1 + seed)
    y = rng.integers(_CLASSES, size=80)
    x = (prototypes[y] + 0.5 * rng.normal(size=(80, _FEATURES))).astype(np.float32)
    return ClientData(x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


def _trainers_of(agent: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(agent).children() if "fedeq_edge.trainer" in child.cmdline()]
    return []


# The storm


@dataclass(order=True)
class _Repair:
    """Something to be set right at `at`. number: tells repairs of the same moment apart."""

    at: float
    number: int
    do: Callable[[], None] = field(compare=False)


@dataclass(slots=True)
class _Storm:
    """Faults at random moments, each with its repair."""

    fleet: _Fleet
    rng: random.Random
    says: Callable[[str], None]
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    _repairs: list[_Repair] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def blow(self, options: Options) -> None:
        """Until its end, in bursts; then everything is repaired."""
        over_at = time.monotonic() + (math.inf if options.minutes is None else 60.0 * options.minutes)

        def over() -> bool:
            return time.monotonic() >= over_at or sum(self.kills.values()) >= (options.kills or math.inf)

        while not over():
            for _ in range(self.rng.randint(1, _BURST)):
                self._wait(self.rng.expovariate(1.0 / _BETWEEN_FAULTS_S), over)
                if not over():
                    self._strike()
            self._breathe(over)
        self._repair(math.inf)

    def _breathe(self, over: Callable[[], bool]) -> None:
        enough = self.fleet.round() + _ROUNDS_BETWEEN_BURSTS
        self._wait(_BREATH_S, lambda: over() or self.fleet.round() >= enough)

    def _wait(self, longest_s: float, over: Callable[[], bool]) -> None:
        """Repair what is due until then, or until `over`."""
        until = time.monotonic() + longest_s
        while time.monotonic() < until and not over():
            self.fleet.check()
            self._repair(time.monotonic())
            time.sleep(_POLL_S)

    def _repair(self, now: float) -> None:
        while self._repairs and self._repairs[0].at <= now:
            heapq.heappop(self._repairs).do()

    def _later(self, longest_s: float, do: Callable[[], None]) -> None:
        at = time.monotonic() + self.rng.uniform(0.0, longest_s)
        heapq.heappush(self._repairs, _Repair(at, next(self._numbers), do))

    def _strike(self) -> None:
        """One fault. Agents and links are many; a broker or an aggregator that is always away would leave no rounds."""
        kinds = {"broker": 1, "aggregator": 2, "agent": 3, "trainer": 2, "link": 4}
        (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
        if kind == "link":
            self._break_a_link()
        elif kind == "trainer":
            self._kill_a_trainer()
        else:
            self._kill_a_part(kind)

    def _kill_a_part(self, kind: str) -> None:
        if running := self.fleet.of(kind):
            part = self.rng.choice(running)
            part.kill()
            self._later(_AWAY_S, part.start)
            self._killed(kind, part.name)

    def _kill_a_trainer(self) -> None:
        if running := self.fleet.trainers():
            trainer = self.rng.choice(running)
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.kill()
                self._killed("trainer", str(trainer.pid))

    def _killed(self, kind: str, name: str) -> None:
        self.kills[kind] += 1
        self.says(f"kill {sum(self.kills.values()):3d}: {kind} {name}; in round {self.fleet.round()}")

    def _break_a_link(self) -> None:
        name, way = self.rng.choice(list(self.fleet.links)), self.rng.choice(list(_WAYS))
        self.faults[way] += 1
        self.says(f"link of {name}: {way}")
        link = self.fleet.links[name]
        _WAYS[way](link, self.rng)
        self._later(_LONGEST_FAULT_S, lambda: _mend(link, way))


def _slow(link: FaultProxy, rng: random.Random) -> None:
    link.conditions.rate = rng.choice((8_000.0, 64_000.0))


def _far(link: FaultProxy, rng: random.Random) -> None:
    link.conditions.latency_s = rng.uniform(0.1, 1.0)


def _repeat(link: FaultProxy, _rng: random.Random) -> None:
    link.conditions.tamper = duplicate


def _reorder(link: FaultProxy, _rng: random.Random) -> None:
    link.conditions.jitter_s = 0.5


def _damage(link: FaultProxy, rng: random.Random) -> None:
    link.conditions.tamper = Corrupt(0.2, rng.getrandbits(32))


_HALF_OPEN: Final = "half-open"
_WAYS: Final[dict[str, Callable[[FaultProxy, random.Random], None]]] = {
    "cut": lambda link, _: link.cut(),
    "unplug": lambda link, _: link.unplug(),
    "stall": lambda link, _: link.stall(),
    "flap": lambda link, _: link.flap(0.5),
    _HALF_OPEN: lambda link, _: link.half_open(),
    "slow": _slow,
    "far": _far,
    "repeat": _repeat,
    "reorder": _reorder,
    "damage": _damage,
}


def _mend(link: FaultProxy, way: str) -> None:
    """The link is sound, whatever else was wrong with it as well."""
    link.conditions = Conditions()
    link.flap(None)
    link.plug()
    link.release()
    if way == _HALF_OPEN:
        link.cut()  # a keepalive finds it out, too, in a minute or two
