"""One device's rounds, on any backend: personal and shared step, the personal model, and training alone.

Time is the device's own (`Clock`): `hardware.budget` plans a round from the calibration and, between steps, lowers K or
ends the round. With the same seed, backend and clock readings a round gives the same bits on the same machine.
Another backend, or another machine, differs by rounding alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.methods import Method
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.description import Description
from fedeq_edge.deq.wellposed import proven
from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.budget import Allowance, Pace, budget_of, choose, for_certificate, round_seconds
from fedeq_edge.hardware.calibrate import calibrate
from fedeq_edge.hardware.clock import Clock, DeviceClock
from fedeq_edge.training.backend import Backend, Descent, Measured, Pull
from fedeq_edge.training.refit import Matrix, accuracy, fit_head
from fedeq_edge.training.schedule import batches, draw_forward, learning_rate, steps_per_epoch
from fedeq_edge.training.step import Budget, Calibration, LocalResult, LocalTask, Personal, Plan, Vector

# Samples solved at once outside training: bounds the memory of an evaluation whatever the size of the test part.
EVALUATION_BATCH = 256
# Whoever lets a device rest does not ask it; one that is asked all the same does the least that a plan can hold.
SLOWEST = 0.01


class Subject(NamedTuple):
    """What a learner works on, for whoever measures it."""

    backend: Backend
    data: ClientData
    plan: Plan
    method: Method


class Learner:
    """One device's data and its model on a `backend`, which is its alone.

    start: (theta (p,), head (h,)) from which the federation begins, and training alone for comparison.
    clock: device seconds. calibration: measured cost, for the clock given; None measures it before first use.
    speed: share of its full speed that the device allows itself now (throttle.derate), asked once per round.
    watts: what the board draws while it computes, for a plan that limits joules; None where nobody knows.
    Raises ConfigError where data, model and start do not fit together.
    """

    def __init__(
        self,
        backend: Backend,
        data: ClientData,
        plan: Plan,
        method: Method,
        *,
        start: tuple[Vector, Vector],
        clock: Clock | None = None,
        calibration: Calibration | None = None,
        speed: Callable[[], float] = lambda: 1.0,
        watts: float | None = None,
    ) -> None:
        _check(backend.description, data)
        self._backend = backend
        self._plan, self._method, self._data, self._start = plan, method, data, start
        self._clock: Clock = DeviceClock() if clock is None else clock
        self._calibration, self._speed = calibration, speed
        self._compute_s = round_seconds(plan.compute_s, plan.energy_j, watts)
        backend.load(*start)
        self.drift = 1.0
        """Actual over calibrated seconds of a step, learnt by past rounds and used for the next."""

    @property
    def subject(self) -> Subject:
        """Its backend, data, plan and method."""
        return Subject(self._backend, self._data, self._plan, self._method)

    @property
    def samples(self) -> int:
        """Number of training samples n_i."""
        return len(self._data.y_train)

    def initial_head(self) -> Vector:
        """The head that a device starts from, (h,) float32."""
        return self._start[1].copy()

    def calibrate(self) -> Calibration:
        """Measure a training step of this model here, in device seconds; later rounds are planned by it."""
        rows = np.resize(np.arange(self.samples), self._plan.batch)
        x, y = self._data.x_train[rows], self._data.y_train[rows]
        held = self._backend.parameters()
        self._backend.load(*self._start)
        still = self._backend.descent(rate=0.0)
        self._calibration = calibrate(
            lambda forward, adjoint: _discard(still.step(x, y, Budget(forward=forward, adjoint=adjoint))),
            self._plan.batch,
            self._plan.budgets,
            clock=self._clock,
        )
        self._backend.load(*held)
        return self._calibration

    def train(self, task: LocalTask) -> LocalResult:
        """Personal step, then shared step from z; the plan's time and energy bound both and the evaluation of z before.

        Raises SolverError when the loss stops being finite, ConfigError for vectors of another model.
        """
        began = self._clock()
        self._backend.load(*self._received(task))
        allowance = self._allowance()
        consensus_accuracy = self._test_accuracy(_middle(allowance.menu))
        if self._method.head_step == "refit":
            self._refit(_middle(allowance.menu), pull=0.0)
        descent = self._backend.descent(
            rate=learning_rate(self._plan, task.round),
            pull=self._pull(task),
            frozen_head=self._method.head_step == "refit",
            seed=task.seed,
        )
        left_s = self._compute_s - (self._clock() - began)
        measured, reduced = self._paced(descent, allowance, left_s, np.random.default_rng(task.seed))
        return self._result(task, measured, reduced, consensus_accuracy, self._clock() - began)

    def personalise(self, z: Vector, head: Vector) -> Personal:
        """The personal model of this device: theta of z (or Ditto's theta near it), the head refitted where that helps.

        A method without exchange has made no consensus: then the model is trained alone, from z as it began. One that
        fine-tunes trains body and head from z, and nothing is refitted after that.

        K is the middle of the affordable menu. With `heads = "consensus_refit"` the head comes from z and `head` is
        not used.
        """
        theta, own_head = self.split(z, head)
        self._backend.load(theta, own_head)
        allowance = self._allowance()
        forward = _middle(allowance.menu)
        consensus_accuracy = self._test_accuracy(forward)
        if not self._method.exchange:
            self._train_alone(allowance, near=None)
        elif self._method.ditto:
            near = Pull(z=theta, nu=np.zeros_like(theta), kappa=self._method.ditto)
            self._train_alone(allowance, near)
        if self._method.finetune_epochs:
            self._finetune(allowance)
        else:
            self._refit(forward, pull=self._plan.refit_pull)
        personal_theta, personal_head = self._backend.parameters()
        rate = proven(personal_theta, self._backend.description)
        return Personal(
            theta=personal_theta,
            head=personal_head,
            budget=budget_of(forward, self._plan.adjoint_ratio),
            residual=self._residual(forward),
            certificate=None if rate is None else rate.certificate(forward),
            accuracy_personal=self._test_accuracy(forward),
            accuracy_consensus=consensus_accuracy,
            # last: it leaves the model with other parameters
            local_only=self._local_only(allowance) if self._plan.compare_local else None,
        )

    def own_forward(self) -> int:
        """The K that this device answers with: the middle of the menu that it affords, for the theta it holds."""
        return _middle(self._allowance().menu)

    # ---- planning ------------------------------------------------------------------------------------------

    def _allowance(self) -> Allowance:
        return choose(
            self._calibration or self.calibrate(),
            steps=self._plan.epochs * steps_per_epoch(self.samples, self._plan.batch),
            compute_s=self._compute_s,
            menu=self._plan.budgets,
            adjoint_ratio=self._plan.adjoint_ratio,
            derate=max(self._speed(), SLOWEST) / self.drift,
            enough=self._enough(),
        )

    def _enough(self) -> int | None:
        """Evaluations that prove the accuracy asked for in the plan, of the theta in the model; None: nothing does."""
        if self._plan.accuracy is None:
            return None
        theta, _ = self._backend.parameters()
        rate = proven(theta, self._backend.description)
        return None if rate is None else for_certificate(rate.certificate(1), self._plan.accuracy).forward

    def _pull(self, task: LocalTask) -> Pull:
        return Pull(
            z=task.z,
            nu=task.nu if self._method.duals else np.zeros_like(task.z),
            kappa=task.kappa if self._method.proximal else 0.0,
        )

    def _batches(self, generator: np.random.Generator) -> list[NDArray[np.int64]]:
        return batches(self.samples, self._plan.batch, self._plan.epochs, generator)

    # ---- vectors -------------------------------------------------------------------------------------------

    @property
    def _shares_head(self) -> bool:
        return self._method.heads == "consensus_refit"

    def _received(self, task: LocalTask) -> tuple[Vector, Vector]:
        if task.z.shape != task.nu.shape:
            raise ConfigError(f"task: z has shape {task.z.shape} and nu {task.nu.shape}; both belong to one consensus")
        return self.split(task.z, task.head)

    def split(self, z: Vector, head: Vector) -> tuple[Vector, Vector]:
        """(theta, head) to start from, of the consensus z and this device's own head."""
        theta_size = len(self._start[0])
        return (z[:theta_size], z[theta_size:]) if self._shares_head else (z, head)

    def _result(
        self, task: LocalTask, measured: Sequence[Measured], reduced: bool, consensus_accuracy: float, seconds: float
    ) -> LocalResult:
        theta, head = self._backend.parameters()
        shared = np.concatenate([theta, head]) if self._shares_head else theta
        last = measured[-steps_per_epoch(self.samples, self._plan.batch) :]
        return LocalResult(
            difference=shared - task.z,
            head=head,
            loss=_mean([step.loss for step in last]),
            residual=_mean([step.residual for step in last]),
            backward_residual=_mean([step.backward_residual for step in last]),
            budget=max((step.budget for step in measured), key=lambda budget: budget.forward),
            steps=len(measured),
            seconds=seconds,
            reduced=reduced,
            accuracy_consensus=consensus_accuracy,
        )

    # ---- training ------------------------------------------------------------------------------------------

    def _paced(
        self, descent: Descent, allowance: Allowance, left_s: float, generator: np.random.Generator
    ) -> tuple[list[Measured], bool]:
        """Steps of one round, at least one, and whether the device's pace cut the plan."""
        began = self._clock()
        pace = self._pace(allowance, left_s)
        measured: list[Measured] = []
        for rows in self._batches(generator):
            cap = pace.cap(self._clock() - began)
            if cap is None:
                break
            measured.append(self._step(descent, rows, draw_forward(allowance.menu, cap, generator)))
            pace.record(measured[-1].budget, self._clock() - began)
        self.drift = pace.drift
        return measured, pace.reduced

    def _pace(self, allowance: Allowance, left_s: float) -> Pace:
        assert self._calibration is not None  # `_allowance` has measured it
        return Pace(
            self._calibration,
            allowance,
            compute_s=left_s,
            adjoint_ratio=self._plan.adjoint_ratio,
            drift=self.drift,
        )

    def _step(self, descent: Descent, rows: NDArray[np.int64], forward: int) -> Measured:
        x, y = self._data.x_train[rows], self._data.y_train[rows]
        return descent.step(x, y, budget_of(forward, self._plan.adjoint_ratio))

    def _train_alone(self, allowance: Allowance, near: Pull | None) -> None:
        """The model has been trained for the plan's `alone_rounds` without exchange, from what it holds.

        near: a fixed point to stay near (Ditto); None is training alone. Steps, budgets and the course of step sizes
        are those of the rounds that this device is asked for when none is cut short.
        """
        generator = np.random.default_rng(0)  # any: devices differ by their data, runs by their start
        rounds = self._plan.alone_rounds or self._plan.rounds
        for completed in range(rounds):
            rate = learning_rate(self._plan, completed, rounds=rounds)
            descent = self._backend.descent(rate=rate, pull=near, seed=completed)
            for rows in self._batches(generator)[: allowance.steps]:
                self._step(descent, rows, draw_forward(allowance.menu, allowance.menu[-1], generator))

    def _finetune(self, allowance: Allowance) -> None:
        """Body and head have been trained for the method's epochs from what the model holds."""
        generator = np.random.default_rng(0)  # as in `_train_alone`
        rate = self._method.finetune_rate or learning_rate(self._plan, self._plan.rounds)
        descent = self._backend.descent(rate=rate)
        for rows in batches(self.samples, self._plan.batch, self._method.finetune_epochs, generator):
            self._step(descent, rows, draw_forward(allowance.menu, allowance.menu[-1], generator))

    def _local_only(self, allowance: Allowance) -> float:
        self._backend.load(*self._start)
        self._train_alone(allowance, near=None)
        self._refit(_middle(allowance.menu), pull=self._plan.refit_pull)
        return self._test_accuracy(_middle(allowance.menu))

    # ---- heads and evaluation ------------------------------------------------------------------------------

    def _refit(self, forward: int, *, pull: float | None) -> None:
        """The model's head is fitted to the training data as K = `forward` evaluations see it, from the head it had.

        pull: as of `fit_head`.
        """
        theta, head = self._backend.parameters()
        fitted = fit_head(
            self._features(self._data.x_train, forward),
            self._data.y_train,
            head,
            steps=self._plan.refit_steps,
            rate=self._plan.refit_rate,
            pull=pull,
        )
        self._backend.load(theta, fitted)

    def _features(self, x: NDArray[np.float32], forward: int) -> Matrix:
        """(n, features) of samples x (n, *input_shape), n >= 1, at K = `forward` evaluations."""
        return np.concatenate([features for features, _ in self._solved(x, forward)])

    def _residual(self, forward: int) -> float:
        """Mean relative residual over the training samples."""
        found = [residual for _, residual in self._solved(self._data.x_train, forward)]
        return float(np.concatenate(found).mean(dtype=np.float64))

    def _solved(self, x: NDArray[np.float32], forward: int) -> Iterator[tuple[Matrix, Vector]]:
        for start in range(0, len(x), EVALUATION_BATCH):
            yield self._backend.solve(x[start : start + EVALUATION_BATCH], forward)

    def _test_accuracy(self, forward: int) -> float:
        """Of what the model holds, on the test part, NaN without one."""
        if not len(self._data.y_test):
            return float("nan")
        _, head = self._backend.parameters()
        return accuracy(self._features(self._data.x_test, forward), self._data.y_test, head)


def _check(model: Description, data: ClientData) -> None:
    if not len(data.y_train):
        raise ConfigError("training: this device has no training samples; give it data or leave it out of the fleet")
    shape = data.x_train.shape[1:]
    if shape != model.input_shape:
        raise ConfigError(
            f"training: samples have shape {shape}, the model takes {model.input_shape}; change one of them"
        )
    labels = np.concatenate([data.y_train, data.y_test])
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < model.classes:
            raise ConfigError(
                f"training: label {label} is outside the model's {model.classes} classes, 0 to {model.classes - 1}; "
                "raise `classes`, or number the labels of the data anew"
            )


def _middle(menu: Sequence[int]) -> int:
    """The K of a personal model: the centre of the budgets that training mixed.

    On validation parts of digits and HAR it was at least as good as the K with the lowest training loss and as the K
    whose head did best on a held-out quarter; those cost a refit per K.
    """
    return menu[len(menu) // 2]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _discard(_: Measured) -> None:
    """A calibrated step has no result."""
