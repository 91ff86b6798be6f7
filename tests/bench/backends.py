"""Federations on HAR whose devices train by torch, and the same ones by training graphs: what differs in the end.

In one process, with the learners and the consensus of the real programs, differences as float32 and every device
affording the whole menu of budgets: so that the backends see the same seeds, batches and budgets, and what differs is
rounding. It grows over the rounds as any other change does; how far by itself, a third run tells, by torch from a start
whose numbers are moved by a rounding error. A table goes to stderr, one JSON line per figure to stdout.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from fedeq_edge.backends import build_graph, open_onnx, open_torch
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.fixed import dual_step, dual_value, fraction_bits
from fedeq_edge.consensus.methods import Method
from fedeq_edge.data.npz import ClientData, describe, load_fleet
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import BackendName, Calibration, LocalTask, Plan, Vector
from tests.bench.figures import Figure, NotRun, har_file

Fleet = Mapping[str, ClientData]
GOAL: Final = 0.3  # points of a hundred, between the mean accuracies of the personal models
FREE: Final = Calibration(batch=32, fixed_s=0.0, evaluation_s=0.0, adjoint_s=0.0)
RUNS: Final[dict[str, tuple[BackendName, float]]] = {
    "torch": ("torch", 0.0),
    "onnx": ("onnx", 0.0),
    "torch from a start moved by 1e-7": ("torch", 1e-7),
}
"""Backend, and how far the start is moved, relative to each of its numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What its devices train, and on what."""

    fleet: Fleet
    spec: ModelSpec
    plan: Plan
    method: Method

    @classmethod
    def on_har(cls, path: Path, array: str) -> "Federation":
        """Of 30 people, with the recommended model for "F", their features, or "X", their sequences."""
        fleet = load_fleet(path, x=array, y="y", client="subject", test="local_test", classes="0-5")
        told = describe(fleet)
        x = np.concatenate([data.x_train for data in fleet.values()])
        axes = (0, *range(2, x.ndim)) if x.ndim > 2 else None
        shift, scale = (tuple(map(float, np.atleast_1d(found))) for found in (x.mean(axis=axes), x.std(axis=axes)))
        spec, plan, method = recommend(told.shape, told.classes, shift=shift, scale=scale)
        return cls(fleet=fleet, spec=spec, plan=msgspec.structs.replace(plan, compute_s=1e9), method=method)

    def accuracy(self, backend: BackendName, moved: float, seed: int) -> float:
        """Mean accuracy of the personal models on the devices' test parts after all rounds, of a hundred."""
        theta, head = initial(self.spec, seed)
        theta *= 1.0 + moved * np.random.default_rng(seed).standard_normal(theta.size, np.float32)
        learners = self._learners(backend, (theta, head))
        z_hat, heads = self._rounds(learners, (theta, head), seed)
        told = [learner.personalise(z_hat, heads[name]).accuracy_personal for name, learner in learners.items()]
        return 100.0 * float(np.mean(told))

    def _learners(self, backend: BackendName, start: tuple[Vector, Vector]) -> dict[str, Learner]:
        graph = build_graph(self.spec) if backend == "onnx" else b""
        return {
            name: Learner(
                open_onnx(graph, self.plan) if graph else open_torch(self.spec, self.plan),
                data,
                self.plan,
                self.method,
                start=start,
                clock=lambda: 0.0,
                calibration=FREE,
            )
            for name, data in self.fleet.items()
        }

    def _rounds(
        self, learners: Mapping[str, Learner], start: tuple[Vector, Vector], seed: int
    ) -> tuple[Vector, dict[str, Vector]]:
        """The consensus after all rounds, and every device's head."""
        z = start[0] if self.method.heads == "personal" else np.concatenate(start)
        consensus = Consensus(z, method=self.method, constraints=constraints(self.spec))
        heads = dict.fromkeys(learners, start[1])
        duals = {name: np.zeros(z.size, np.int64) for name in learners}
        for name, learner in learners.items():
            consensus.join(name, learner.samples)
        for completed in range(self.plan.rounds):
            z_hat = consensus.z_hat
            for device, (name, learner) in enumerate(learners.items()):
                kappa = consensus.penalty(name)
                task = LocalTask(
                    round=completed,
                    z=z_hat,
                    nu=dual_value(duals[name], np.float32),
                    kappa=kappa,
                    head=heads[name],
                    seed=10_000 * seed + 100 * completed + device,
                )
                result = learner.train(task)
                heads[name] = result.head
                duals[name] += dual_step(result.difference, kappa, fraction_bits(np.float32))
                consensus.accept(name, result.difference, kappa)
            consensus.close_round()
        return consensus.z_hat, heads


def compare(federation: Federation, name: str, seeds: int) -> None:
    """The figures of one data set, means over the seeds."""
    found: dict[str, list[float]] = {run: [] for run in RUNS}
    for seed in range(seeds):
        for run, (backend, moved) in RUNS.items():
            began = time.process_time()
            found[run].append(federation.accuracy(backend, moved, seed))
            told = f"{name}, seed {seed}, {run}: {found[run][-1]:.2f} %, {time.process_time() - began:.0f} s"
            print(told, file=sys.stderr, flush=True)
    first, *others = RUNS
    for run in others:
        gap = float(np.mean(found[run]) - np.mean(found[first]))
        goal = GOAL if run == "onnx" else None
        detail = f"{np.mean(found[first]):.2f} and {np.mean(found[run]):.2f} %, {seeds} seeds"
        what = f"{name}: personal accuracy, {first} to {run}, points"
        Figure(section="federation", name=what, value=abs(gap), goal=goal, detail=detail).show()


def main() -> None:
    """Measure, and say what came of it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("arrays", nargs="*", default=["F", "X"], help="features, sequences")
    chosen = options.parse_args()
    try:
        data = har_file()
    except NotRun as reason:
        sys.exit(f"not run: {reason}")
    for array in chosen.arrays:
        compare(Federation.on_har(data, array), f"HAR {array}", chosen.seeds)


if __name__ == "__main__":
    main()
