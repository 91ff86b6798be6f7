"""Memory that a library takes to answer with a model: a process of its own, for what is loaded here is not forgotten.

    python -m fedeq_edge.cli.footprint ENGINE MODEL BUDGET

prints resident bytes once 32 samples are answered.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil

from fedeq_edge import modelfile
from fedeq_edge.errors import FedEqError
from fedeq_edge.training.curve import BATCH, Engine

_PATIENCE_S = 300.0  # torch.compile on a busy small board


def resident_mb(engine: str, model: Path, budget: int) -> float | None:
    """Megabytes resident in a fresh process that has answered; None where that process fails."""
    command = [sys.executable, "-m", "fedeq_edge.cli.footprint", engine, str(model), str(budget)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return None
    return int(done.stdout) / 1e6 if done.returncode == 0 else None


def engine_of(name: str, path: Path) -> tuple[Engine, tuple[int, ...]]:
    """The model behind one library, and the shape of a sample. name: numpy, torch, torch.compile or onnx."""
    if name == "onnx":
        from fedeq_edge.onnx.engine import OnnxEngine  # noqa: PLC0415  # each library where it is asked for alone
        from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415

        predictor = Predictor(path)
        return OnnxEngine(predictor), predictor.input_shape
    found = modelfile.read(path)
    if name == "numpy":
        from fedeq_edge.deq.numeric import NumpyDEQ  # noqa: PLC0415

        return NumpyDEQ(found.spec, found.theta, found.head), found.spec.input_shape
    from fedeq_edge.deq.engine import TorchEngine  # noqa: PLC0415

    compiled = name == "torch.compile"
    return TorchEngine(found.spec, found.theta, found.head, compiled=compiled), found.spec.input_shape


def main() -> int:
    """Print the bytes; 1 where the library cannot answer."""
    name, path, budget = sys.argv[1:]
    try:
        engine, shape = engine_of(name, Path(path))
        engine.infer(np.zeros((BATCH, *shape), dtype=np.float32), budget=int(budget))
    except FedEqError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{psutil.Process().memory_info().rss}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
