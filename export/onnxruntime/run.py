"""Answer with an exported fedeq-edge model: needs onnxruntime and numpy, nothing else.

    python -m pip install onnxruntime numpy
    python run.py model.onnx samples.npy [--max-iter K] [--tol T] [--check logits.npy]

samples.npy: one sample or a batch of them. One line of JSON per sample on stdout. --check: stored logits of the same
samples; exit 1 where ours differ by more than 1e-5 of the largest of them.
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

AGREEMENT = 1e-5
SCHEMA_VERSION = "1"  # major version of the metadata that this program reads


def main() -> int:
    """Print one answer per sample; exit 1 with one line where the input does not fit."""
    options = _options()
    try:
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3  # errors: version 1.15 warns of constants that its optimiser has folded
        session = onnxruntime.InferenceSession(str(options.model), quiet, providers=["CPUExecutionProvider"])
        answer = _answer(session, np.load(options.samples, allow_pickle=False).astype(np.float32), options)
        logits = np.stack([line.pop("logits") for line in answer])
        for line in answer:
            print(json.dumps(line))
        return 0 if options.check is None or _agrees(logits, np.load(options.check, allow_pickle=False)) else 1
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        print(f"run.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer with an exported fedeq-edge model.")
    parser.add_argument("model", type=Path, help="the .onnx file")
    parser.add_argument("samples", type=Path, help="an .npy file: one sample or a batch")
    parser.add_argument("--max-iter", type=int, help="most iterations of the solver (default: the file's)")
    parser.add_argument("--tol", type=float, help="relative residual at which a sample stops (default: the file's)")
    parser.add_argument("--check", type=Path, help="an .npy file: logits to compare with")
    return parser.parse_args()


def _answer(session: Any, x: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    notes = _metadata(session)
    shape = tuple(session.get_inputs()[0].shape[1:])
    x = x[None] if x.shape == shape else x
    if x.shape[1:] != shape:
        raise ValueError(f"samples have shape {x.shape}, expected (batch, {', '.join(map(str, shape))})")
    solver, labels = json.loads(notes["fedeq.solver"]), json.loads(notes["fedeq.labels"])
    most = solver["max_iter"] if options.max_iter is None else options.max_iter
    tol = solver["tol"] if options.tol is None else options.tol
    feeds = {"x": x, "tol": np.array(tol, np.float32), "max_iter": np.array(most, np.int64)}
    if len(session.get_inputs()) == 1:  # an unrolled file takes x alone
        feeds = {"x": x}
        if (most, tol) != (solver["max_iter"], solver["tol"]):
            raise ValueError(f"unrolled for {solver['max_iter']} iterations; leave out --max-iter and --tol")
    rows = zip(*session.run(["logits", "iterations", "residual"], feeds), strict=True)
    return [
        {
            "label": labels[int(logits.argmax())] if np.isfinite(logits).all() else None,
            "iterations": int(count),
            "residual": float(residual) if np.isfinite(residual) else None,  # JSON has no infinity
            "logits": logits,
        }
        for logits, count, residual in rows
    ]


def _metadata(session: Any) -> dict[str, str]:
    notes: dict[str, str] = session.get_modelmeta().custom_metadata_map
    version = notes.get("fedeq.schema_version")
    if version is None:
        raise ValueError("not a model that fedeq model export has written")
    if version.partition(".")[0] != SCHEMA_VERSION:
        raise ValueError(
            f"the model has schema version {version}, this runner reads {SCHEMA_VERSION}; take a newer one"
        )
    if notes.get("fedeq.kind", "inference") != "inference":
        raise ValueError(f"a {notes['fedeq.kind']} graph, which does not answer; take what fedeq model export writes")
    return notes


def _agrees(logits: Any, stored: Any) -> bool:
    if logits.shape != stored.shape:
        raise ValueError("the stored logits have another shape")
    difference = float(np.abs(logits - stored).max())
    print(f"largest difference from the stored logits: {difference:g}", file=sys.stderr)
    return bool(difference <= AGREEMENT * np.abs(stored).max())


if __name__ == "__main__":
    sys.exit(main())
