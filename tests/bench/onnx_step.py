"""The training step as an ONNX graph against the same step in torch: make bench-onnx.

step: process CPU time on one thread, both in this process, in blocks that alternate, so that neighbours on the machine
hit both alike; a figure is the graph's median over torch's. Both are whole steps of a round, projection included.
memory: the most that a process of its own has held while it trained. A table goes to stderr, one JSON line per figure
to stdout.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.training.backend import Pull
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import Budget, Plan
from tests.bench.figures import Figure
from tests.bench.processes import memory_bytes

BLOCKS: Final = 12
STEPS: Final = 12  # of a block: long enough for either program's data to be in the caches that it finds on a device
BUDGET: Final = Budget(forward=6, adjoint=2)  # the middle of a plan's menu
KAPPA: Final = 0.1

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """goal: the largest share of torch's time that counts as reached."""

    spec: ModelSpec
    batch: int
    goal: float | None

    def samples(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """One batch of noise."""
        draw = np.random.default_rng(0)
        x = draw.standard_normal((self.batch, *self.spec.input_shape)).astype(np.float32)
        return x, draw.integers(0, self.spec.classes, self.batch)


MODELS: Final = {
    "dense 64, recommended for 64 features": Model(spec=recommend((64,), 10)[0], batch=32, goal=1 / 3),
    "dense 128": Model(spec=ModelSpec(input_shape=(64,), classes=10, channels=128), batch=32, goal=1 / 3),
    "conv 1-D, recommended for HAR": Model(spec=recommend((9, 128), 6)[0], batch=32, goal=1.0),
    "conv 2-D, contractive, 32 channels of 16 x 16": Model(
        spec=ModelSpec(input_shape=(32, 16, 16), classes=10, channels=32), batch=32, goal=1.0
    ),
    "conv 2-D, recommended for 28 x 28": Model(spec=recommend((1, 28, 28), 10)[0], batch=16, goal=1.0),
    "conv 2-D, residual, 32 channels of 16 x 16": Model(
        spec=ModelSpec(input_shape=(32, 16, 16), classes=10, cell="residual", channels=32), batch=32, goal=1.0
    ),
}
HELD: Final = ("dense 128", "conv 1-D, recommended for HAR")


def by_torch(model: Model) -> Step:
    """One step in torch, repeated on the same batch."""
    import torch  # noqa: PLC0415  # a process that trains by graph must not load it

    from fedeq_edge.deq.model import DEQ  # noqa: PLC0415  # as above
    from fedeq_edge.training.torch_step import Descent  # noqa: PLC0415  # as above

    torch.set_num_threads(1)
    theta, head = initial(model.spec, 0)
    deq = DEQ(model.spec)
    deq.load(theta, head)
    pull = Pull(z=theta, nu=np.zeros_like(theta), kappa=KAPPA)
    descent = Descent(deq, Plan(), rate=0.01, pull=pull, frozen_head=False)
    x, y = model.samples()
    return lambda: descent.step(x, y, BUDGET)


def by_graph(model: Model, content: bytes) -> Step:
    """The same step by the training graph."""
    from fedeq_edge.onnx.trainer import TrainingGraph  # noqa: PLC0415  # a process of torch must not load it

    theta, head = initial(model.spec, 0)
    plan = Plan()
    descent = TrainingGraph(content).descent(
        theta,
        head,
        rate=0.01,
        momentum=plan.momentum,
        clip=plan.clip,
        pull=Pull(z=theta, nu=np.zeros_like(theta), kappa=KAPPA),
    )
    x, y = model.samples()
    return lambda: descent.step(x, y, forward=BUDGET.forward, adjoint=BUDGET.adjoint)


def graph_of(model: Model) -> bytes:
    """The training graph."""
    from fedeq_edge.onnx.training import build_training  # noqa: PLC0415  # a process of torch must not load it

    return build_training(model.spec)


def step() -> Iterator[Figure]:
    """Time of a step, graph over torch."""
    for name, model in MODELS.items():
        ours, theirs = by_graph(model, graph_of(model)), by_torch(model)
        times: dict[str, list[float]] = {"graph": [], "torch": []}
        for _ in range(BLOCKS):
            times["graph"] += block(ours)
            times["torch"] += block(theirs)
        graph, reference = (statistics.median(times[key]) for key in ("graph", "torch"))
        yield Figure(
            section="step",
            name=f"{name}: graph / torch",
            value=graph / reference,
            goal=model.goal,
            detail=f"{1e3 * graph:.2f} ms against {1e3 * reference:.2f}",
        )


def block(run: Step) -> list[float]:
    """CPU seconds of each step."""
    times = []
    for _ in range(STEPS):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return times


def memory() -> Iterator[Figure]:
    """Most resident memory of a process that trains, graph over torch."""
    for name in HELD:
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "graph.onnx"
            graph.write_bytes(graph_of(MODELS[name]))
            ours, theirs = held(name, "--graph", str(graph)), held(name)
        yield Figure(
            section="memory",
            name=f"{name}: graph / torch",
            value=ours / theirs,
            goal=0.3,
            detail=f"{ours / 1e6:.0f} MB against {theirs / 1e6:.0f}",
        )


def held(name: str, *options: str) -> int:
    """Bytes, of a process of its own."""
    command = [sys.executable, __file__, "--train", name, *options]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def train(name: str, graph: str | None) -> None:
    """Some steps; the most memory held, on stdout."""
    model = MODELS[name]
    run = by_torch(model) if graph is None else by_graph(model, Path(graph).read_bytes())
    block(run)
    print(memory_bytes(os.getpid(), "VmHWM"))


SECTIONS: Final[dict[str, Callable[[], Iterator[Figure]]]] = {"step": step, "memory": memory}


def main() -> None:
    """A process of `held`: one model's steps, by torch or by the graph in a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, choices=MODELS)
    parser.add_argument("--graph", help="file; torch if not given")
    options = parser.parse_args()
    train(options.train, options.graph)


if __name__ == "__main__":
    main()
