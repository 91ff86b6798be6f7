"""The solver around the flat parts: one ONNX model whose Loop iterates the cell, with tol and max_iter as inputs.

Theory of operation. The Loop's body is one iteration of `deq/solvers.py` with Picard, per sample:

    f = cell(z, injection);  r_n = |f - z| / max(|f|, 1e-6)
    done = r <= tol, of the iteration before;  z, r = (f, r_n) where not done and r_n is finite;  iterations += not done
    go on while any r > tol, at most max_iter times (the Loop's trip count)

so iteration counts equal torch's, and a sample's answer does not depend on its batch mates. Comparisons are written
so that NaN means "not done": a spoilt sample runs to max_iter with its last finite state and an infinite residual
where it never had one. Weights live in the body: onnxruntime packs only those.
"""

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fedeq_edge import __version__
from fedeq_edge.deq.spec import SMALLEST_NORM, ModelSpec
from fedeq_edge.onnx.graph import Part, Weights, cell, head, stem


def build(spec: ModelSpec, weights: Weights, *, opset: int, ir_version: int) -> ModelProto:
    """The model x (batch, *input_shape), tol (), max_iter () -> logits (batch, classes), iterations, residual (batch,).

    tol: float32, relative residual at which a sample stops, 0: never. max_iter: int64, most evaluations; below 1 counts
    as 1. The bytes depend on the arguments alone: no path, no time, no random name.
    """
    first, solver, last = stem(spec, weights), _solver(spec, weights), head(spec, weights)
    graph = helper.make_graph(
        [*first.nodes, *solver.nodes, *last.nodes],
        "deep_equilibrium",
        [
            _value("x", TensorProto.FLOAT, ["batch", *spec.input_shape]),
            _value("tol", TensorProto.FLOAT, []),
            _value("max_iter", TensorProto.INT64, []),
        ],
        [
            _value("logits", TensorProto.FLOAT, ["batch", spec.classes]),
            _value("iterations", TensorProto.INT64, ["batch"]),
            _value("residual", TensorProto.FLOAT, ["batch"]),
        ],
        [*first.constants, *solver.constants, *last.constants],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="fedeq-edge",
        producer_version=__version__,
    )


def _solver(spec: ModelSpec, weights: Weights) -> Part:
    """injection, z_0, tol, max_iter -> z_star, iterations, residual."""
    part = Part("solver")
    zero = part.constant(np.array(0.0, dtype=np.float32))
    never = part.constant(np.array(-1.0, dtype=np.float32))
    # tol = 0 asks for the whole budget, even where a state repeats itself exactly.
    part.apply("Where", part.apply("Greater", "tol", zero), "tol", never, name="tolerance")
    trips = part.apply("Max", "max_iter", part.constant(np.array(1, dtype=np.int64)))
    batch = part.apply("Shape", "injection", start=0, end=1)
    unknown = part.apply("ConstantOfShape", batch, value=numpy_helper.from_array(np.array([np.inf], np.float32)))
    none = part.apply("ConstantOfShape", batch, value=numpy_helper.from_array(np.array([0], np.int64)))
    start = part.constant(np.array(True))
    part.nodes.append(
        helper.make_node(
            "Loop",
            [trips, start, "z_0", unknown, none],
            ["z_star", "residual", "iterations"],
            name="solver/loop",
            body=_body(spec, weights),
        )
    )
    return part


def _body(spec: ModelSpec, weights: Weights) -> GraphProto:
    step, rule = cell(spec, weights), _stopping_rule(spec)
    state: list[int | str] = ["batch", *spec.state_shape]
    return helper.make_graph(
        [*step.nodes, *rule.nodes],
        "iteration",
        [
            _value("trip", TensorProto.INT64, []),
            _value("going", TensorProto.BOOL, []),
            _value("z", TensorProto.FLOAT, state),
            _value("held_residual", TensorProto.FLOAT, ["batch"]),
            _value("count", TensorProto.INT64, ["batch"]),
        ],
        [
            _value("go_on", TensorProto.BOOL, []),
            _value("z_next", TensorProto.FLOAT, state),
            _value("next_residual", TensorProto.FLOAT, ["batch"]),
            _value("next_count", TensorProto.INT64, ["batch"]),
        ],
        [*step.constants, *rule.constants],
    )


def _stopping_rule(spec: ModelSpec) -> Part:
    """z, f, held_residual, count -> z_next, next_residual, next_count, go_on."""
    part = Part("rule")
    residual = _relative_residual(part, spec)
    active = part.apply("Not", part.apply("LessOrEqual", "held_residual", "tolerance"))
    finite = part.apply("Less", residual, part.constant(np.array(np.inf, dtype=np.float32)))
    accepted = part.apply("And", active, finite)
    rows = part.apply("Unsqueeze", accepted, part.constant(_state_axes(spec)))
    part.apply("Where", rows, "f", "z", name="z_next")
    part.apply("Where", accepted, residual, "held_residual", name="next_residual")
    part.apply("Add", "count", part.apply("Cast", active, to=TensorProto.INT64), name="next_count")
    left = part.apply("Not", part.apply("LessOrEqual", "next_residual", "tolerance"))
    any_left = part.apply("ReduceMax", part.apply("Cast", left, to=TensorProto.INT32), keepdims=0)
    part.apply("Cast", any_left, name="go_on", to=TensorProto.BOOL)
    return part


def _relative_residual(part: Part, spec: ModelSpec) -> str:
    axes = part.constant(_state_axes(spec))
    change = part.apply("ReduceL2", part.apply("Sub", "f", "z"), axes, keepdims=0)
    length = part.apply("ReduceL2", "f", axes, keepdims=0)
    floor = part.constant(np.array(SMALLEST_NORM, dtype=np.float32))
    return part.apply("Div", change, part.apply("Max", length, floor))


def _state_axes(spec: ModelSpec) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(1, 1 + len(spec.state_shape), dtype=np.int64)


def _value(name: str, kind: int, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
