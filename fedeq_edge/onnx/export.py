"""From a trained model to a checked ONNX file, or to no file at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import rate
from fedeq_edge.errors import ExportError, StateError

try:
    import onnx
except ImportError as missing:
    raise ExportError("onnx is not installed; run pip install 'fedeq-edge[onnx,torch]'") from missing

from fedeq_edge.onnx import graph
from fedeq_edge.onnx.contract import SCHEMA_VERSION
from fedeq_edge.onnx.precision import quantised, rounded, stored_in_half
from fedeq_edge.onnx.recipe import DEFAULT, Recipe, load_recipe
from fedeq_edge.onnx.verify import Request, Verification, verify
from fedeq_edge.onnx.wrap import looped, model, unrolled
from fedeq_edge.storage import write_atomically

Samples = NDArray[np.float32]

# onnxruntime takes some 8 ms per evaluation to load an unrolled file, again with every start of a program, and a board
# ten times that: 2 s here at this size, 9 s at 1000, 40 s and more at 3000. A cell of use has converged long before.
MOST_UNROLLED = 256

# Operators with a graph inside: what "control flow" means to a runtime that has none.
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


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
    recipe: str = DEFAULT,
    samples: Samples | None = None,
    cross_check: bool = False,
) -> Verification:
    """The model with theta (p,) and head (h,) stands in `path`, checked against torch; equal arguments, equal bytes.

    budget, tol: defaults of the file's solver (tol: the recipe's where None); callers may override both per call,
    except in an unrolled file. labels: names of the classes (default "0", "1", ...). metadata: further entries, under
    their own names. recipe: its name, see recipe.py. samples: real ones (n, *input_shape) for the check, and for the
    calibration of int8, which cannot do without. cross_check: also compare with torch's own exporter (cross.py).
    Raises ExportError, and leaves `path` as it was, where the parameters do not fit or a check fails.
    """
    chosen = load_recipe(recipe)
    order = _Order(
        spec=spec, recipe=chosen, budget=budget, tol=chosen.tol if tol is None else tol, samples=_checked(spec, samples)
    )
    _check(order, path, recipe)
    entries = dict(metadata or {}) | {
        "fedeq.kind": "inference",
        "fedeq.labels": json.dumps(_labels(spec, labels), ensure_ascii=False),
        "fedeq.recipe": recipe,
        "fedeq.round": str(round_number),
    }
    content = _build(order, theta, head, entries)
    request = Request(
        spec=spec,
        theta=theta,
        head=head,
        parameters=_stored(chosen, theta, head),
        recipe=chosen,
        budget=budget,
        tol=order.tol,
        samples=order.samples,
        cross_check=cross_check,
    )
    try:
        verification = verify(content, request)
    except ExportError as error:
        raise ExportError(f"{path}: not written, {error}") from error
    _accept(verification, path, chosen)
    try:
        write_atomically(path, content)
    except StateError as error:
        raise ExportError(str(error)) from error
    return verification


def unchecked(spec: ModelSpec, theta: NDArray[np.float32], head: NDArray[np.float32], *, budget: int) -> bytes:
    """The default recipe's file without its check against torch: for measurements, not for devices."""
    recipe = load_recipe()
    order = _Order(spec=spec, recipe=recipe, budget=budget, tol=recipe.tol, samples=None)
    return _build(order, theta, head, {"fedeq.labels": json.dumps(_labels(spec, None))})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What is asked for, but for the parameters."""

    spec: ModelSpec
    recipe: Recipe
    budget: int
    tol: float
    samples: Samples | None


def _check(order: _Order, path: Path, name: str) -> None:
    if order.budget < 1 or not order.tol >= 0.0:
        raise ExportError(f"{path}: budget {order.budget} must be at least 1 and tol {order.tol} at least 0")
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: the folder {path.parent} does not exist; make it or name another")
    if order.recipe.form == "unrolled" and order.budget > MOST_UNROLLED:
        raise ExportError(
            f"{path}: recipe {name} writes out each evaluation, at most {MOST_UNROLLED} and not {order.budget}; lower "
            f"the budget, or take recipe {DEFAULT}, whose file takes any"
        )
    if order.recipe.form == "unrolled" and order.tol:
        raise ExportError(f"{path}: recipe {name} stops after its budget alone; leave out tol {order.tol}")
    if order.recipe.precision == "int8" and order.samples is None:
        raise ExportError(f"{path}: recipe {name} is calibrated with real samples; name a file of them with --data")


def _checked(spec: ModelSpec, samples: Samples | None) -> Samples | None:
    if samples is not None and (samples.shape[1:] != spec.input_shape or not len(samples)):
        expected = ", ".join(map(str, spec.input_shape))
        raise ExportError(f"export: samples have shape {samples.shape}, the model takes (n, {expected}), n >= 1")
    return samples


def _labels(spec: ModelSpec, labels: Sequence[str] | None) -> list[str]:
    names = [str(number) for number in range(spec.classes)] if labels is None else list(labels)
    if len(names) != spec.classes:
        raise ExportError(f"export: {len(names)} labels for {spec.classes} classes; give one name per class")
    return names


def _stored(
    recipe: Recipe, theta: NDArray[np.float32], head: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The parameters that the file's numbers stand for."""
    return (rounded(theta), rounded(head)) if recipe.precision == "float16" else (theta, head)


def _build(order: _Order, theta: NDArray[np.float32], head: NDArray[np.float32], entries: Mapping[str, str]) -> bytes:
    """The bytes of the model, structurally valid by the rules of onnx."""
    graph.named_weights(order.spec, theta, head)  # refuses what does not fit, before anything rounds it
    kept = _stored(order.recipe, theta, head)
    built = model(_graph(order, *kept), opset=order.recipe.opset, ir_version=order.recipe.ir_version)
    # Sorted, so that the bytes do not depend on the order in which a caller wrote them.
    onnx.helper.set_model_props(built, dict(sorted({**entries, **_facts(order, *kept)}.items())))
    try:
        onnx.checker.check_model(built, full_check=True)
        onnx.shape_inference.infer_shapes(built, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"export: onnx refuses the graph: {reason}; set opset = 18 in the recipe") from error
    content: bytes = built.SerializeToString()
    return content


def _graph(order: _Order, theta: NDArray[np.float32], head: NDArray[np.float32]) -> onnx.GraphProto:
    spec, recipe = order.spec, order.recipe
    weights = graph.named_weights(spec, theta, head)
    first, cell, last = graph.stem(spec, weights), graph.cell(spec, weights), graph.head(spec, weights)
    if recipe.precision == "int8":
        assert order.samples is not None
        cell = quantised(spec, first, cell, order.samples, order.budget)
    elif recipe.precision == "float16":
        first, cell, last = map(stored_in_half, (first, cell, last))
    if recipe.form == "loop":
        return looped(spec, first, cell, last)
    flat = unrolled(spec, first, cell, last, evaluations=order.budget)
    found = _CONTROL_FLOW & {node.op_type for node in flat.node}
    if found:
        raise ExportError(f"export: the target has no control flow, and the graph holds {', '.join(sorted(found))}")
    return flat


def _facts(order: _Order, theta: NDArray[np.float32], head: NDArray[np.float32]) -> dict[str, str]:
    """Metadata that follows from recipe, model and parameters.

    fedeq.input_norm: (x - shift) / scale, which the graph itself computes from raw samples. fedeq.rate: the fields of
    `certificate.Rate`, fedeq.certificate: those of `certificate.Certificate` for the file's default budget; neither for
    an int8 cell, whose rounding no proof covers.
    """
    spec, recipe = order.spec, order.recipe
    norm = {"shift": spec.shift, "scale": spec.scale, "applied": "in the graph"}
    facts = {
        "fedeq.schema_version": SCHEMA_VERSION,
        "fedeq.solver": json.dumps({"name": recipe.solver, "tol": order.tol, "max_iter": order.budget}),
        "fedeq.form": recipe.form,
        "fedeq.precision": recipe.precision,
        "fedeq.input_norm": json.dumps(norm),
        "fedeq.model": msgspec.json.encode(spec).decode(),
        "fedeq.weights_sha256": hashlib.sha256(
            theta.astype("<f4").tobytes() + head.astype("<f4").tobytes()
        ).hexdigest(),
    }
    proven = None if recipe.precision == "int8" else rate(theta, spec)
    if proven is not None:
        facts["fedeq.gamma"] = f"{proven.gamma:.6g}"
        facts["fedeq.rate"] = json.dumps(asdict(proven))
        facts["fedeq.certificate"] = msgspec.json.encode(proven.certificate(order.budget)).decode()
    return facts


def _accept(found: Verification, path: Path, recipe: Recipe) -> None:
    """Raises ExportError naming the first check that failed."""
    limit = recipe.max_abs_diff
    if limit is not None and not found.max_abs_diff <= limit:
        raise ExportError(
            f"{path}: not written, logits differ from torch by {found.max_abs_diff:.1e} (limit {limit:.0e}); "
            "a cell that does not contract amplifies rounding: lower the budget"
        )
    if limit is not None and not found.iterations_equal:
        raise ExportError(
            f"{path}: not written, iteration counts differ from torch; a tol near float32's noise does that: raise it"
        )
    if not found.isolated:
        raise ExportError(f"{path}: not written, a sample's answer depends on its batch mates; report this as a defect")
    if not found.logit_error <= recipe.max_logit_error or not found.agreement >= recipe.min_agreement:
        raise ExportError(
            f"{path}: not written, in {recipe.precision} the logits are off by {found.logit_error:.1%} (limit "
            f"{recipe.max_logit_error:.0%}) and {found.agreement:.1%} of the answers stay (limit "
            f"{recipe.min_agreement:.0%}); take recipe onnxruntime, or for int8 give more samples"
        )
    if found.cross_check_diff is not None and limit is not None and not found.cross_check_diff <= limit:
        raise ExportError(
            f"{path}: not written, torch's own exporter answers otherwise by {found.cross_check_diff:.1e}; "
            "report this as a defect"
        )
