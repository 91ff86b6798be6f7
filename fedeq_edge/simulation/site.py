"""Where jobs are done: all clients' data, a backend per plan, and a learner for as long as a job lasts."""

import time
from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ConfigError, SolverError
from fedeq_edge.hardware.budget import budget_of
from fedeq_edge.protocol.state import NOTHING
from fedeq_edge.simulation import cost
from fedeq_edge.simulation.evaluation import evaluate
from fedeq_edge.simulation.experiment import Group
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.models import backend_of
from fedeq_edge.simulation.scenario import Board, Scenario, board_of
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import LocalTask, Personal, Plan, Vector


class Site:
    """One process's share of a simulated fleet. Nothing of a client stays here between two of its jobs."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._data = {**scenario.fleet, **scenario.unseen}
        self._backends: dict[Plan, Backend] = {}
        self._base, self._z = b"", NOTHING

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        self._base, self._z = base, z

    def do(self, job: Job) -> Outcome:
        """The job is done, or the outcome says why it could not be."""
        assert job.base == self._base, "a job comes after its consensus"
        kinds: dict[str, Callable[[Job], Outcome]] = {
            "train": self._train,
            "personalise": self._personalise,
            "evaluate": self._evaluate,
        }
        began = time.perf_counter()
        try:
            found = kinds[job.kind](job)
        except (SolverError, ConfigError) as error:
            found = Outcome(number=job.number, name=job.name, failed=str(error))
        return replace(found, cost_s=time.perf_counter() - began)

    # ---- the kinds of jobs ---------------------------------------------------------------------------------

    def _train(self, job: Job) -> Outcome:
        learner, _ = self._learner(job)
        result = learner.train(self._task(job))
        return Outcome(number=job.number, name=job.name, result=result, seconds=result.seconds, drift=learner.drift)

    def _personalise(self, job: Job) -> Outcome:
        """In numbers: the model itself is made and measured here, and nobody asks for it later."""
        learner, clock = self._learner(job)
        found = evaluate(learner, self._task(job), budgets=job.budgets, local=job.local)
        point = found.at(found.own)
        personal = Personal(
            theta=NOTHING,
            head=NOTHING,
            budget=budget_of(found.own, self._board(job).plan.adjoint_ratio),
            residual=point.residual,
            certificate=None,
            accuracy_personal=found.delivered,
            accuracy_consensus=point.consensus,
            local_only=None,
        )
        return Outcome(number=job.number, name=job.name, personal=personal, evaluation=found, seconds=clock.now_s)

    def _evaluate(self, job: Job) -> Outcome:
        method = self._scenario.method
        if not job.deliver:  # in the middle of a run: Ditto's models would train for a whole run each time
            method = replace(method, ditto=0.0, finetune_epochs=0)
        learner, _ = self._learner(job, method)
        found = evaluate(learner, self._task(job), budgets=job.budgets, local=job.local)
        return Outcome(number=job.number, name=job.name, evaluation=found)

    # ---- parts ---------------------------------------------------------------------------------------------

    def _learner(self, job: Job, method: Method | None = None) -> tuple[Learner, cost.VirtualClock]:
        board, clock = self._board(job), cost.VirtualClock()
        learner = Learner(
            cost.Timed(self._backend(board.plan), clock, board.calibration, job.pace),
            self._data[job.device],
            board.plan,
            method or self._scenario.method,
            start=self._scenario.start,
            clock=clock,
            calibration=board.calibration,
            watts=board.watts,
        )
        learner.drift = job.drift
        return learner, clock

    def _task(self, job: Job) -> LocalTask:
        nu = job.nu if job.nu.size else np.zeros_like(self._z)
        return LocalTask(round=job.round, z=self._z, nu=nu, kappa=job.kappa, head=self._head(job), seed=job.seed)

    def _head(self, job: Job) -> Vector:
        return job.head if job.head.size else self._scenario.start[1]

    def _board(self, job: Job) -> Board:
        """The client's; one that takes no part belongs to no group, and has the plan as it stands."""
        scenario = self._scenario
        return scenario.boards.get(job.device) or board_of(Group(), scenario.plan, scenario.reference)

    def _backend(self, plan: Plan) -> Backend:
        """The one for this plan, loaded anew by whoever uses it."""
        if plan not in self._backends:
            name = self._scenario.setup.experiment.backend
            self._backends[plan] = backend_of(self._scenario.spec, plan, name)
        return self._backends[plan]
