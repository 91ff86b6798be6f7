"""Answer with an exported fedeq-edge model: needs onnxruntime and numpy, nothing else.

    python -m pip install onnxruntime numpy
    python run.py model.onnx samples.npy [--max-iter K] [--tol T]

samples.npy: one sample or a batch of them. One line of JSON per sample on stdout.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # has to be set before onnxruntime is loaded
import onnxruntime


def main() -> int:
    """Print one answer per sample; exit 1 with one line where the input does not fit."""
    options = _options()
    try:
        session = onnxruntime.InferenceSession(str(options.model), providers=["CPUExecutionProvider"])
        answer = _answer(session, np.load(options.samples, allow_pickle=False).astype(np.float32), options)
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        print(f"run.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    for line in answer:
        print(json.dumps(line))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer with an exported fedeq-edge model.")
    parser.add_argument("model", type=Path, help="the .onnx file")
    parser.add_argument("samples", type=Path, help="an .npy file: one sample or a batch")
    parser.add_argument("--max-iter", type=int, help="most iterations of the solver (default: the file's)")
    parser.add_argument("--tol", type=float, help="relative residual at which a sample stops (default: the file's)")
    return parser.parse_args()


def _answer(session: Any, x: Any, options: argparse.Namespace) -> list[dict[str, object]]:
    shape = tuple(session.get_inputs()[0].shape[1:])
    x = x[None] if x.shape == shape else x
    if x.shape[1:] != shape:
        raise ValueError(f"samples have shape {x.shape}, expected (batch, {', '.join(map(str, shape))})")
    notes = session.get_modelmeta().custom_metadata_map
    solver, labels = json.loads(notes["fedeq.solver"]), json.loads(notes["fedeq.labels"])
    most = solver["max_iter"] if options.max_iter is None else options.max_iter
    tol = solver["tol"] if options.tol is None else options.tol
    feeds = {"x": x, "tol": np.array(tol, np.float32), "max_iter": np.array(most, np.int64)}
    rows = zip(*session.run(["logits", "iterations", "residual"], feeds), strict=True)
    return [
        {
            "label": labels[int(logits.argmax())] if np.isfinite(logits).all() else None,
            "iterations": int(count),
            "residual": float(residual) if np.isfinite(residual) else None,  # JSON has no infinity
        }
        for logits, count, residual in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
