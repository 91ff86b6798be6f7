"""Simulated fleets whose training is solved in closed form: the quadratics of tests/protocol/fleet.py."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedeq_edge.data.npz import ClientData
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.simulation.engine import Simulation
from fedeq_edge.simulation.experiment import Experiment, parse
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.journal import Journal
from fedeq_edge.simulation.scenario import Scenario, Setup, prepare
from fedeq_edge.training.step import LocalTask, Vector
from tests.protocol.fleet import ADMM, SIZE, Fleet, Quadratics, result_of
from tests.simulation.reached import EVALUATION

Line = dict[str, Any]
TABLES = {
    "name": "quadratics",
    "model": {"preset": "plain", "cell": "residual"},  # which has no constraints
    "train": {"rounds": 6, "compute_s": 1.0},
    "method": {"preset": "admm", "rho": 1.0, "quality": "uniform"},
    "wire": {"codec": "f32"},
    "schedule": {"deadline_s": 40.0, "final_s": 60.0},
    "evaluation": {"every": 3},
}


def experiment(**changes: Any) -> Experiment:
    """TABLES with these tables changed."""
    tables = msgspec.to_builtins(TABLES)
    for name, change in changes.items():
        tables[name] = {**tables.get(name, {}), **change} if isinstance(change, Mapping) else change
    return parse(tables, "test")[0].experiment


@dataclass(frozen=True)
class QuadraticScenario(Scenario):
    """A scenario whose consensus is a vector of SIZE zeros at first."""

    @property
    def consensus(self) -> Vector:
        return np.zeros(SIZE, np.float32)


def scenario(devices: int, chosen: Experiment) -> QuadraticScenario:
    """Devices d0, d1, ... with 10, 20, ... samples, as in the protocol's tests."""
    fleet = {f"d{number}": _data(10 * (number + 1)) for number in range(devices)}
    made = prepare(Setup(experiment=chosen, seed=0), fleet)
    return QuadraticScenario(**{name: getattr(made, name) for name in made.__dataclass_fields__})


def _data(samples: int) -> ClientData:
    y = np.arange(samples) % 2
    x = np.ones((samples, 1, 8), np.float32)
    return ClientData(x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])


@dataclass
class Solver:
    """A runner that solves quadratics; each job takes `seconds`, times its device's pace. done: jobs in order."""

    problem: Quadratics
    seconds: float = 10.0
    head: int = 0  # its size
    done: list[Job] = field(default_factory=list)
    _z: Vector = field(default_factory=lambda: np.zeros(0, np.float32))

    def hold(self, base: bytes, z: Vector) -> None:
        self._base, self._z = base, z

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        for job in wanted:
            assert job.base == self._base
            self.done.append(job)
            yield self.outcome(job)

    def outcome(self, job: Job) -> Outcome:
        if job.kind != "train":
            failed = "no data" if job.kind == "personalise" else ""
            return Outcome(number=job.number, name=job.name, evaluation=EVALUATION, failed=failed)
        task = LocalTask(round=job.round, z=self._z, nu=job.nu, kappa=job.kappa, head=job.head, seed=job.seed)
        result = result_of(task, self.problem.difference(int(job.device[1:]), task))
        result = msgspec.structs.replace(result, head=np.zeros(self.head, np.float32))
        return Outcome(number=job.number, name=job.name, result=result, seconds=self.seconds * job.pace)


def simulate(
    made: Scenario, solver: Solver, folder: Path, watch: Callable[[Simulation, Line], None] = lambda *_: None
) -> list[Line]:
    """The lines of a run; watch: sees the simulation at each of them."""
    lines: list[Line] = []

    def say(line: Line) -> None:
        lines.append(line)
        watch(run, line)

    solver.head = made.start[1].size
    journal = Journal(solver, folder / "run.journal", b"test")
    run = Simulation(made, journal, say, folder)
    run.run()
    journal.remove()
    return lines


def live(devices: int, federation: Federation) -> Fleet:
    """The same fleet of the protocol's tests: every client keeps its own vectors."""
    return Fleet(
        Quadratics.drawn(devices), rounds=federation.rounds, method=ADMM, schedule=federation.schedule, codec="f32"
    )
