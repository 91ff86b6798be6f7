"""What tests of local rounds share: small models, easy data, clocks that tests wind, learners on either backend."""

from functools import cache
from typing import Any

import numpy as np
from msgspec.structs import replace

from fedeq_edge.backends import build_graph, open_onnx, open_torch
from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import BackendName, Calibration, LocalTask, Plan

SPEC = ModelSpec(input_shape=(6,), classes=3, channels=8)
RESIDUAL = ModelSpec(input_shape=(1, 6, 6), classes=3, cell="residual", channels=8, groups=4, pool=2)
PLAN = Plan(rounds=5, epochs=2, batch=8, learning_rate=0.1, budgets=(2, 4, 8), compute_s=100.0, refit_steps=40)
ADMM = METHODS["admm"]
SHARED = replace(ADMM, heads="consensus_refit")
CHEAP = Calibration(batch=8, fixed_s=1e-3, evaluation_s=1e-4, adjoint_s=1e-4)


class TickingClock:
    """Every reading is `tick_s` later than the one before."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def blobs(spec: ModelSpec, *, classes: tuple[int, ...] = (0, 1, 2), seed: int = 0, tests: int = 30) -> ClientData:
    """30 training samples around one centre per class; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(3, *spec.input_shape))
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.resize(classes, 30 + tests)).astype(np.int64)
    x = (centres[labels] + 0.5 * generator.normal(size=(30 + tests, *spec.input_shape))).astype(np.float32)
    return ClientData(x_train=x[:30], y_train=labels[:30], x_test=x[30:], y_test=labels[30:])


def backend_of(name: BackendName, spec: ModelSpec = SPEC, plan: Plan = PLAN) -> Backend:
    return open_onnx(_graph(spec), plan) if name == "onnx" else open_torch(spec, plan)


@cache
def _graph(spec: ModelSpec) -> bytes:
    return build_graph(spec)


def learner_on(
    name: BackendName,
    spec: ModelSpec = SPEC,
    plan: Plan = PLAN,
    data: ClientData | None = None,
    tick_s: float = 0.0,
    method: Method = ADMM,
    calibration: Calibration | None = CHEAP,
    **changes: Any,
) -> Learner:
    return Learner(
        backend_of(name, spec, plan),
        blobs(spec) if data is None else data,
        plan,
        method,
        start=initial(spec, 0),
        clock=TickingClock(tick_s),
        calibration=calibration,
        **changes,
    )


def first_task(spec: ModelSpec = SPEC, method: Method = ADMM, **changes: object) -> LocalTask:
    theta, head = initial(spec, 0)
    z = np.concatenate([theta, head]) if method.heads == "consensus_refit" else theta
    task = LocalTask(round=0, z=z, nu=np.zeros_like(z), kappa=0.1, head=head, seed=7)
    return replace(task, **changes)
