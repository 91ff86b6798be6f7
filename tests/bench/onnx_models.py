"""Exported models and training steps against torch: make bench-onnx.

Ratios are medians over sweeps that ask both sides in turn, in processor time of one thread, on models whose weights are
drawn (seeded) and then projected: 128 units, and 32 channels of 16 x 16; personal models of HAR are learnt here. A
table goes to stderr, one JSON line per figure to stdout.
"""

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedeq_edge import modelfile
from fedeq_edge.consensus.constraint import project
from fedeq_edge.data.npz import ClientData, load_client
from fedeq_edge.deq.engine import TorchEngine
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import cell_weight, constraints
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.runtime import Predictor
from fedeq_edge.training.curve import noise
from tests.bench.figures import Figure, NotRun, har_file, measure
from tests.bench.onnx_step import SECTIONS as TRAINING

Array = NDArray[np.float32]

SPECS: Final = {
    "dense": ModelSpec(input_shape=(64,), classes=10, channels=128, radius=0.95, norm="spectral"),
    "conv": ModelSpec(input_shape=(3, 16, 16), classes=10, channels=32, radius=0.95, norm="spectral"),
}
TOL: Final = 1e-4
BUDGET: Final = 40  # more than any sample needs
SWEEPS: Final = 40
STARTS: Final = 15


def drawn(spec: ModelSpec) -> tuple[Array, Array]:
    """Parameters at the edge of the constraint set: a cell that takes its time."""
    theta, head = initial(spec, 0)
    weight = cell_weight(spec)
    weight.view(theta)[:] = np.random.default_rng(1).standard_normal(weight.shape)
    project(theta, constraints(spec))
    return theta, head


def exported(spec: ModelSpec, recipe: str = "onnxruntime", budget: int = BUDGET) -> Predictor:
    """The file of that recipe, checked and loaded."""
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        samples = noise(spec, np.random.default_rng(7), 256)
        export(spec, *drawn(spec), path, budget=budget, recipe=recipe, samples=samples)
        return Predictor(path)


def medians_us(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Processor time of each call in microseconds, asked in turn, each twice so that its caches are its own."""
    spans: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SWEEPS):
        for name, call in calls.items():
            call()
            began = time.thread_time()
            call()
            spans[name].append(1e6 * (time.thread_time() - began))
    return {name: statistics.median(found) for name, found in spans.items()}


def loop() -> Iterator[Figure]:
    """Time of the Loop over that of torch's eager solve, both stopping each sample at the same evaluation."""
    goals = {("dense", 1): 1 / 5, ("dense", 32): 1 / 3, ("conv", 1): 1 / 2.5, ("conv", 32): 1 / 1.3}
    for name, spec in SPECS.items():
        predictor, engine = exported(spec), TorchEngine(spec, *drawn(spec))
        for count in (1, 32):
            x = noise(spec, np.random.default_rng(0), count)
            calls: dict[str, Callable[[], object]] = {
                "onnx": partial(predictor.infer, x, budget=BUDGET, tol=TOL),
                "torch": partial(engine.infer, x, budget=BUDGET, tol=TOL),
            }
            found, evaluations = medians_us(calls), predictor.infer(x, budget=BUDGET, tol=TOL).iterations.mean()
            yield Figure(
                section="loop",
                name=f"{name}, batch of {count}: onnx over torch",
                value=found["onnx"] / found["torch"],
                goal=goals[name, count],
                detail=f"{found['onnx']:.0f} and {found['torch']:.0f} us, {evaluations:.1f} evaluations",
            )


def unrolled() -> Iterator[Figure]:
    """Time of the Loop that stops over that of as many evaluations in a row, without any look at them."""
    for name, spec in SPECS.items():
        predictor, x = exported(spec), noise(spec, np.random.default_rng(0), 1)
        evaluations = int(predictor.infer(x, budget=BUDGET, tol=TOL).iterations[0])
        flat = exported(spec, "unrolled", evaluations)
        calls = {"loop": partial(predictor.infer, x, budget=BUDGET, tol=TOL), "flat": partial(flat.infer, x)}
        found = medians_us(calls)
        yield Figure(
            section="unrolled",
            name=f"{name}, batch of 1: Loop over unrolled",
            value=found["loop"] / found["flat"],
            goal=2.0 if name == "dense" else None,
            detail=f"{found['loop']:.0f} and {found['flat']:.0f} us, {evaluations} evaluations",
        )


def start() -> Iterator[Figure]:
    """Seconds of a fresh process to its first answer, imports included; files are in the page cache."""
    program = (
        "import numpy; from pathlib import Path; from fedeq_edge.onnx.runtime import Predictor;"
        "import sys; Predictor(Path(sys.argv[1])).infer(numpy.zeros((1, 3, 16, 16)))"
    )
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        export(SPECS["conv"], *drawn(SPECS["conv"]), path, budget=BUDGET)
        begins = {"first answer": [program, str(path)], "Python alone": [""], "numpy and onnxruntime": [_IMPORTS]}
        spans: dict[str, list[float]] = {name: [] for name in begins}
        for _ in range(STARTS):
            for name, arguments in begins.items():
                spans[name].append(_process_cpu_s([sys.executable, "-c", *arguments]))
    for name, found in spans.items():
        goal = 0.15 if name == "first answer" else None
        yield Figure(section="start", name=f"CPU s to {name}", value=statistics.median(found), goal=goal)


_IMPORTS: Final = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'; import numpy, onnxruntime"


def _process_cpu_s(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def size() -> Iterator[Figure]:
    """Files that a device installs without torch, over those with it: as they lie in this environment."""
    alone, both = (sum(map(_bytes, _closure(packages))) / 1e6 for packages in (_DEVICE, [*_DEVICE, "torch"]))
    detail = f"{alone:.0f} and {both:.0f} MB"
    yield Figure(section="size", name="MB, device over with torch", value=alone / both, goal=0.2, detail=detail)


def _closure(packages: Iterable[str]) -> set[str]:
    """The packages and all that they require here."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needs = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def _bytes(package: str) -> int:
    paths = (Path(str(file.locate())) for file in importlib.metadata.files(package) or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


# What pyproject.toml's base and `device` extra come to, without fedeq-edge itself.
_DEVICE: Final = ["cbor2", "msgspec", "numpy", "paho-mqtt", "psutil", "rich", "tomli-w", "typer", "onnxruntime"]


def int8() -> Iterator[Figure]:
    """The int8 cell over the float32 one, at equal evaluations and at the default tolerance of each."""
    spec = SPECS["conv"]
    files = {recipe: exported(spec, recipe) for recipe in ("onnxruntime", "int8")}
    for count in (1, 32):
        x = noise(spec, np.random.default_rng(0), count)
        for told, (budget, tol) in (("12 evaluations", (12, 0.0)), ("until it stops", (None, None))):
            found = medians_us(
                {recipe: partial(file.infer, x, budget=budget, tol=tol) for recipe, file in files.items()}
            )
            yield Figure(
                section="int8",
                name=f"conv, batch of {count}, {told}: int8 over float32",
                value=found["int8"] / found["onnxruntime"],
                goal=0.65,
                detail=f"{found['int8']:.0f} and {found['onnxruntime']:.0f} us",
            )


def har() -> Iterator[Figure]:
    """Points of accuracy that int8 loses on HAR, over personal models of a short federation."""
    data = har_file()
    with tempfile.TemporaryDirectory(prefix="bench-har-") as folder:
        columns = ["--x", "X", "--client", "subject", "--test", "local_test", "--classes", "0-5"]
        demo = [sys.executable, "-m", "fedeq_edge", "demo", "--data", str(data), *columns]
        more = ["--clients", "10", "--rounds", "15", "--json", "--out", f"{folder}/run"]
        done = subprocess.run([*demo, *more], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotRun((done.stderr.strip().splitlines() or ["the demo failed"])[-1])
        right: dict[str, list[bool]] = {"onnxruntime": [], "int8": []}
        for place in sorted(Path(folder, "run", "devices").iterdir()):
            model, samples = modelfile.read(place / "state" / "personal.fedeq"), load_client(place / "data.npz")
            for recipe, answers in right.items():
                answers.extend(_right(model, samples, recipe, place / "bench.onnx"))
    lost = 100 * (statistics.mean(right["onnxruntime"]) - statistics.mean(right["int8"]))
    yield Figure(
        section="har", name="points that int8 loses", value=lost, goal=0.5, detail=f"{len(right['int8'])} samples"
    )


def _right(model: modelfile.ModelFile, samples: ClientData, recipe: str, path: Path) -> list[bool]:
    budget = model.budget.forward
    export(model.spec, model.theta, model.head, path, budget=budget, recipe=recipe, samples=samples.x_train)
    found: list[bool] = (Predictor(path).infer(samples.x_test).logits.argmax(1) == samples.y_test).tolist()
    return found


SECTIONS: dict[str, Callable[[], Iterable[Figure]]] = {
    "loop": loop,
    "unrolled": unrolled,
    "start": start,
    "size": size,
    "int8": int8,
    "har": har,
    **TRAINING,
}


def main() -> None:
    """Measure the sections named on the command line, all of them when none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    measure(SECTIONS, parser.parse_args().sections)


if __name__ == "__main__":
    main()
