"""From a trained model to a checked ONNX file, or to no file at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import certificate
from fedeq_edge.errors import ExportError, StateError

try:
    import onnx
except ImportError as missing:
    raise ExportError("onnx is not installed; run pip install 'fedeq-edge[onnx,torch]'") from missing

from fedeq_edge.onnx.graph import named_weights
from fedeq_edge.onnx.recipe import Recipe, load_recipe
from fedeq_edge.onnx.runtime import SCHEMA_VERSION
from fedeq_edge.onnx.verify import Verification, verify
from fedeq_edge.onnx.wrap import build
from fedeq_edge.storage import write_atomically


def export(
    spec: ModelSpec,
    theta: NDArray[np.float32],
    head: NDArray[np.float32],
    path: Path,
    *,
    budget: int,
    tol: float | None = None,
    labels: Sequence[str] | None = None,
    round_number: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> Verification:
    """The model with theta (p,) and head (h,) stands in `path`, checked against torch; equal arguments, equal bytes.

    budget, tol: defaults of the file's solver (tol: the recipe's where None); callers may override both per call.
    labels: names of the classes (default "0", "1", ...). metadata: further entries, under their own names.
    Raises ExportError, and leaves `path` as it was, where the parameters do not fit or a check fails.
    """
    recipe = load_recipe()
    accuracy = recipe.tol if tol is None else tol
    if budget < 1 or not accuracy >= 0.0:
        raise ExportError(f"{path}: budget {budget} must be at least 1 and tol {accuracy} at least 0")
    entries = dict(metadata or {}) | {
        "fedeq.schema_version": SCHEMA_VERSION,
        "fedeq.solver": json.dumps({"name": recipe.solver, "tol": accuracy, "max_iter": budget}),
        "fedeq.precision": recipe.precision,
        "fedeq.labels": json.dumps(_labels(spec, labels), ensure_ascii=False),
        "fedeq.round": str(round_number),
    }
    model = _build(spec, theta, head, recipe, entries, budget)
    verification = verify(model, spec, theta, head, budget=budget, tol=accuracy)
    _accept(verification, path, recipe)
    try:
        write_atomically(path, model)
    except StateError as error:
        raise ExportError(str(error)) from error
    return verification


def _labels(spec: ModelSpec, labels: Sequence[str] | None) -> list[str]:
    names = [str(number) for number in range(spec.classes)] if labels is None else list(labels)
    if len(names) != spec.classes:
        raise ExportError(f"export: {len(names)} labels for {spec.classes} classes; give one name per class")
    return names


def _build(
    spec: ModelSpec,
    theta: NDArray[np.float32],
    head: NDArray[np.float32],
    recipe: Recipe,
    entries: Mapping[str, str],
    budget: int,
) -> bytes:
    """The bytes of the model, structurally valid by the rules of onnx."""
    weights = named_weights(spec, theta, head)
    model = build(spec, weights, opset=recipe.opset, ir_version=recipe.ir_version)
    # Sorted, so that the bytes do not depend on the order in which a caller wrote them.
    onnx.helper.set_model_props(model, dict(sorted({**entries, **_facts(spec, theta, head, budget)}.items())))
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"export: onnx refuses the graph: {reason}; set opset = 18 in recipe.toml") from error
    content: bytes = model.SerializeToString()
    return content


def _facts(spec: ModelSpec, theta: NDArray[np.float32], head: NDArray[np.float32], budget: int) -> dict[str, str]:
    """Metadata that follows from the parameters: their digest and, for a well-posed cell, rate and certificate.

    fedeq.certificate: the fields of `wellposed.Certificate` as JSON, for the file's default budget.
    """
    parameters = theta.astype("<f4").tobytes() + head.astype("<f4").tobytes()
    facts = {"fedeq.weights_sha256": hashlib.sha256(parameters).hexdigest()}
    proven = certificate(theta, spec, budget)
    if proven is not None:
        facts["fedeq.gamma"] = f"{proven.gamma:.6g}"
        facts["fedeq.certificate"] = msgspec.json.encode(proven).decode()
    return facts


def _accept(verification: Verification, path: Path, recipe: Recipe) -> None:
    if not verification.max_abs_diff <= recipe.max_abs_diff:
        raise ExportError(
            f"{path}: not written, logits differ from torch by {verification.max_abs_diff:.1e} "
            f"(limit {recipe.max_abs_diff:.0e}); a cell that does not contract amplifies rounding: lower the budget"
        )
    if not verification.iterations_equal:
        raise ExportError(
            f"{path}: not written, iteration counts differ from torch; a tol near float32's noise does that: raise it"
        )
