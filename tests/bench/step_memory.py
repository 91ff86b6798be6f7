"""Memory and time of one training step on CIFAR-10's shape: equilibrium models against explicit networks.

memory: what a process of its own holds at most while it trains, above what it holds with its library loaded and warm:
parameters, gradients, velocity, what the gradient needs of the forward pass, and workspace. The published equilibrium
model is compared with the ResNet-34 of the same paper (FeDEQ, arXiv 2309.15659); the compact ones are what this project
recommends. step: median process CPU time on one thread. A table goes to stderr, one JSON line per figure to stdout.
boards: a round of 500 samples on each board: the same CPU time over its profile's relative_speed, which is an estimate
until the board is measured, where the whole process fits its memory; what else runs there is not counted.

    python -m tests.bench.step_memory                  # all; two or three minutes
    python -m tests.bench.step_memory --only published
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from fedeq_edge.backends import build_graph
from fedeq_edge.deq.initial import start
from fedeq_edge.deq.spec import ModelSpec, published
from fedeq_edge.hardware.memory import keep_heap, peak_rss_bytes, rss_bytes
from fedeq_edge.hardware.profiles import Profile, profiles
from fedeq_edge.simulation.networks import NETWORKS, ExplicitSpec
from fedeq_edge.training.backend import Backend, Pull
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import Budget, Plan
from tests.bench.figures import Figure

SHAPE: Final = (3, 32, 32)
CLASSES: Final = 10
BATCH: Final = 32
SAMPLES: Final = 500  # of a client, where CIFAR-10 is dealt to 100
BUDGET: Final = Budget(forward=6, adjoint=2)  # the middle of a plan's menu
STEPS: Final = 3
TINY: Final = ModelSpec(input_shape=(8, 4, 4), classes=2, cell="residual", channels=8)  # loads the library
GOAL: Final = 0.5  # of ResNet-34; the papers claim 1 / 1.5
REFERENCE: Final = "ResNet-34 of the paper"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and the library that trains it. goal: the largest share of the reference's memory that counts.

    microbatch: samples differentiated at once, of the batch; 0: all, None: as the plan has it by default for an
    equilibrium model (`Plan.for_model`). explicit: the same parameters as an explicit network, K = 1, so of equal
    payload.
    """

    spec: ModelSpec | ExplicitSpec
    library: Literal["torch", "onnx"] = "torch"
    microbatch: int | None = None
    explicit: bool = False
    goal: float | None = None


_COMPACT: Final = recommend(SHAPE, CLASSES)[0]
CASES: Final = {
    REFERENCE: Case(spec=NETWORKS["resnet34-cifar"](SHAPE, CLASSES)),
    "ResNet-20 of the paper": Case(spec=NETWORKS["resnet20-cifar"](SHAPE, CLASSES)),
    "ResNet-14 of the paper": Case(spec=NETWORKS["resnet14-cifar"](SHAPE, CLASSES)),
    "CNN of FedAvg": Case(spec=NETWORKS["cnn-fedavg"](SHAPE, CLASSES)),
    "DEQ, published M, torch": Case(spec=published(SHAPE, CLASSES, "M"), goal=GOAL),
    "DEQ, published S, torch": Case(spec=published(SHAPE, CLASSES, "S"), goal=GOAL),
    "DEQ, published S, onnx": Case(spec=published(SHAPE, CLASSES, "S"), library="onnx", goal=GOAL),
    "DEQ, recommended, torch": Case(spec=_COMPACT, goal=GOAL),
    "DEQ, recommended, onnx": Case(spec=_COMPACT, library="onnx", goal=GOAL),
    "K = 1, recommended, torch": Case(spec=_COMPACT, explicit=True),
    "ResNet-34 of the paper, 8 at once": Case(spec=NETWORKS["resnet34-cifar"](SHAPE, CLASSES), microbatch=8),
    "DEQ, published M, torch, whole": Case(spec=published(SHAPE, CLASSES, "M"), microbatch=0),
    "DEQ, published S, torch, whole": Case(spec=published(SHAPE, CLASSES, "S"), microbatch=0),
    "DEQ, published S, onnx, whole": Case(spec=published(SHAPE, CLASSES, "S"), library="onnx", microbatch=0),
}


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process. bytes: at most, above its baseline; whole: with it. seconds: CPU of a step.

    parameters: in theta.
    """

    bytes: int
    whole: int
    seconds: float
    parameters: int


def backend_of(case: Case, graph: bytes) -> Backend:
    """The model behind its library, on one thread."""
    plan = Plan(batch=BATCH, microbatch=case.microbatch, unrolled=int(case.explicit))
    if isinstance(case.spec, ModelSpec):
        plan = plan.for_model(case.spec)
    if case.library == "onnx":
        from fedeq_edge.onnx.backend import OnnxBackend  # noqa: PLC0415  # a process of torch must not load it

        return OnnxBackend(graph, plan)
    import torch  # noqa: PLC0415  # as above

    torch.set_num_threads(1)
    if isinstance(case.spec, ModelSpec):
        from fedeq_edge.training.torch_step import TorchBackend  # noqa: PLC0415  # as above

        return TorchBackend(case.spec, plan)
    from fedeq_edge.simulation.explicit import ExplicitBackend  # noqa: PLC0415  # as above

    return ExplicitBackend(case.spec, plan)


def stepper(case: Case, graph: bytes) -> tuple[Callable[[], object], int]:
    """(one training step on a batch of noise, parameters in theta)."""
    backend = backend_of(case, graph)
    theta, head = start(backend.description, 0)
    backend.load(theta, head)
    descent = backend.descent(rate=0.01, pull=Pull(z=theta, nu=np.zeros_like(theta), kappa=0.1))
    draw = np.random.default_rng(0)
    x = draw.standard_normal((BATCH, *case.spec.input_shape)).astype(np.float32)
    y = draw.integers(0, case.spec.classes, BATCH)
    budget = Budget(forward=1, adjoint=0) if case.explicit else BUDGET
    return lambda: descent.step(x, y, budget), theta.size


def graphs_of(case: Case) -> tuple[bytes, bytes]:
    """Training graphs of the small model and of the case's, empty where its library needs none."""
    if case.library == "torch" or not isinstance(case.spec, ModelSpec):
        return b"", b""
    return build_graph(TINY), build_graph(case.spec)


def measure(case: Case, tiny: bytes, graph: bytes) -> Reading:
    """In this process, which has trained nothing yet, and built no graph either: a device gets its graph."""
    keep_heap()  # as the trainer does
    stepper(Case(spec=TINY, library=case.library), tiny)[0]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading a library is not the step's
    baseline = rss_bytes()
    step, parameters = stepper(case, graph)
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    peak = peak_rss_bytes()
    return Reading(bytes=peak - baseline, whole=peak, seconds=statistics.median(seconds), parameters=parameters)


def in_a_process_of_its_own(name: str) -> Reading:
    """What `measure` gives there."""
    command = [sys.executable, "-m", "tests.bench.step_memory", "--child", name]
    graphs = msgspec.msgpack.encode(graphs_of(CASES[name]))
    done = subprocess.run(command, input=graphs, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=Reading)


def memory(only: str = "") -> dict[str, Reading]:
    """A row per model, over the reference; what was read."""
    reference = in_a_process_of_its_own(REFERENCE)
    readings = {REFERENCE: reference}
    for name, case in CASES.items():
        if only not in name and name != REFERENCE:
            continue
        found = readings[name] = reference if name == REFERENCE else in_a_process_of_its_own(name)
        Figure(
            section="memory",
            name=f"{name} / {REFERENCE}" if name != REFERENCE else name,
            value=found.bytes / reference.bytes,
            goal=case.goal,
            detail=f"{found.bytes / 1e6:.0f} MB, {found.seconds:.3f} s a step, {found.parameters:,} shared parameters",
        ).show()
    return readings


def boards(readings: Mapping[str, Reading]) -> None:
    """A row per model: MB of its process, and seconds of a round on each board."""
    chosen = sorted(profiles().values(), key=lambda profile: profile.relative_speed)
    names = "  ".join(profile.id for profile in chosen)
    print(f"{'':36} process  a round of {SAMPLES} samples: {names}", file=sys.stderr)
    for name, found in readings.items():
        rounds = {profile.id: _round(found, profile) for profile in chosen}
        told = [f"{'-' if taken is None else f'{taken:.1f} s':>{len(board)}}" for board, taken in rounds.items()]
        print(f"{name:36} {found.whole / 1e6:4.0f} MB  {'':24}{'  '.join(told)}", file=sys.stderr)
        print(json.dumps({"section": "boards", "name": name, "process_mb": found.whole / 1e6, "round_s": rounds}))


def _round(found: Reading, profile: Profile) -> float | None:
    """Seconds, None where the process does not fit."""
    if found.whole > profile.memory_bytes:
        return None
    return -(-SAMPLES // BATCH) * found.seconds / profile.relative_speed


def main() -> None:
    """The table, or one child's reading on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this, beside the reference")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is None:
        boards(memory(options.only))
        return
    tiny, graph = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=tuple[bytes, bytes])
    print(msgspec.json.encode(measure(CASES[options.child], tiny, graph)).decode())


if __name__ == "__main__":
    main()
