"""The solver around the flat parts: one ONNX model whose Loop iterates the cell, with tol and max_iter as inputs.

Theory of operation. A trip of the Loop makes m evaluations (`BLOCK`) in a row and then looks at all, per sample:

    F = (z, f_1, ..., f_m);  r_j^2 = |f_j - f_(j-1)|^2 / max(|f_j|^2, 1e-18);  R = (r before this trip, r_1, ..., r_m)
    i = the first j with R_j <= tol, or R_(j+1) not finite, or max_iter evaluations made, or j = m
    z, r = F_i, R_i;  count += i;  another trip while any r > tol

so it stops where `deq/solvers.py` with Picard stops that looks at every evaluation: counts equal torch's, a sample's
answer does not depend on its batch mates, and one that has stopped stays where it is (i = 0). Looking costs some twenty
small operations however many evaluations are looked at: one by one it took four times as long as a dense cell itself.
A spoilt sample (NaN) never gets beyond its last finite state and counts max_iter. Residuals are carried squared, which
saves a root per trip. Weights live in the body: onnxruntime packs only those.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fedeq_edge import __version__
from fedeq_edge.deq.spec import SMALLEST_NORM, ModelSpec
from fedeq_edge.onnx.graph import Part

# Evaluations per look, by the spatial dimensions of the state. Those behind a sample's stop are wasted, so a cell that
# costs more gets fewer. Measured over tolerances from 1e-2 to 1e-5 on 128 units: 10 and 12 are fastest for one sample,
# 8 for 32; at 1e-4 on 32 x 32 and 32 x 16 x 16: 2 is fastest or within a tenth of it, but for 32 images, which like 1.
BLOCK = (10, 2, 2)


def looped(spec: ModelSpec, stem: Part, cell: Part, head: Part) -> GraphProto:
    """x (batch, *input_shape), tol (), max_iter () -> logits (batch, classes), iterations, residual (batch,).

    tol: float32, relative residual at which a sample stops, 0: never. max_iter: int64, most evaluations; below 1 counts
    as 1. stem, cell, head: as `graph.py` makes them.
    """
    settings = [_value("tol", TensorProto.FLOAT, []), _value("max_iter", TensorProto.INT64, [])]
    return _graph(spec, settings, (stem, _solver(spec, cell), head))


def unrolled(spec: ModelSpec, stem: Part, cell: Part, head: Part, *, evaluations: int) -> GraphProto:
    """x (batch, *input_shape) -> the outputs of `looped`, after exactly so many evaluations, without control flow."""
    part = Part("solver")
    states = ["z_0", *(f"f_{number}" for number in range(1, evaluations)), "z_star"]
    for before, after in pairwise(states):
        part.nodes.extend(_evaluation(cell, before, after))
    residual = part.apply("Sqrt", _squared_residual(part, spec, states[-2], "z_star"))
    infinity = part.constant(np.array(np.inf, dtype=np.float32))
    part.apply("Where", part.apply("Less", residual, infinity), residual, infinity, name="residual")
    count = numpy_helper.from_array(np.array([evaluations], dtype=np.int64))
    part.apply("ConstantOfShape", part.apply("Shape", "x", start=0, end=1), value=count, name="iterations")
    part.constants.extend(cell.constants)
    return _graph(spec, [], (stem, part, head))


def model(graph: GraphProto, *, opset: int, ir_version: int) -> ModelProto:
    """The graph as a file; its bytes depend on the arguments alone: no path, no time, no random name."""
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="fedeq-edge",
        producer_version=__version__,
    )


def _graph(spec: ModelSpec, settings: Sequence[ValueInfoProto], parts: Sequence[Part]) -> GraphProto:
    return helper.make_graph(
        [node for part in parts for node in part.nodes],
        "deep_equilibrium",
        [_value("x", TensorProto.FLOAT, ["batch", *spec.input_shape]), *settings],
        [
            _value("logits", TensorProto.FLOAT, ["batch", spec.classes]),
            _value("iterations", TensorProto.INT64, ["batch"]),
            _value("residual", TensorProto.FLOAT, ["batch"]),
        ],
        [constant for part in parts for constant in part.constants],
    )


def _solver(spec: ModelSpec, cell: Part) -> Part:
    """injection, z_0, tol, max_iter -> z_star, iterations, residual."""
    part, block = Part("solver"), BLOCK[spec.spatial]
    zero, never = (part.constant(np.array(number, dtype=np.float32)) for number in (0.0, -1.0))
    # tol = 0 asks for the whole budget, even where a state repeats itself exactly.
    part.apply("Where", part.apply("Greater", "tol", zero), part.apply("Mul", "tol", "tol"), never, name="tolerance")
    most = part.apply("Max", "max_iter", part.constant(np.array(1, dtype=np.int64)))
    trips = part.apply("Add", most, part.constant(np.array(block - 1, dtype=np.int64)))
    trips = part.apply("Div", trips, part.constant(np.array(block, dtype=np.int64)))
    batch = part.apply("Shape", "injection", start=0, end=1)
    column = part.apply("Concat", batch, part.constant(np.array([1], dtype=np.int64)), axis=0)
    unknown = numpy_helper.from_array(np.array([np.inf], dtype=np.float32))
    none = numpy_helper.from_array(np.array([0], dtype=np.int64))
    part.apply("ConstantOfShape", column, value=unknown, name="unknown")
    counts = part.apply("ConstantOfShape", column, value=none)
    inputs = [trips, part.constant(np.array(True)), "z_0", "unknown", counts, most]
    outputs = ["z_star", "solver/residual", "solver/count", "solver/left"]
    body = _body(spec, cell, block)
    part.nodes.append(helper.make_node("Loop", inputs, outputs, name="solver/loop", body=body))
    squared = part.apply("Reshape", "solver/residual", batch)
    part.apply("Sqrt", squared, name="residual")
    count = part.apply("Reshape", "solver/count", batch)
    part.apply("Where", part.apply("LessOrEqual", squared, "tolerance"), count, most, name="iterations")
    return part


def _body(spec: ModelSpec, cell: Part, block: int) -> GraphProto:
    """One trip: so many evaluations, and the look at them."""
    images = [f"f_{number}" for number in range(1, block + 1)]
    evaluations = [node for before, after in pairwise(["z", *images]) for node in _evaluation(cell, before, after)]
    look = _look(spec, images)
    state: list[int | str] = ["batch", *spec.state_shape]
    return helper.make_graph(
        [*evaluations, *look.nodes],
        "evaluations",
        [
            _value("trip", TensorProto.INT64, []),
            _value("going", TensorProto.BOOL, []),
            _value("z", TensorProto.FLOAT, state),
            _value("held", TensorProto.FLOAT, ["batch", 1]),
            _value("count", TensorProto.INT64, ["batch", 1]),
            _value("left", TensorProto.INT64, []),
        ],
        [
            _value("go_on", TensorProto.BOOL, []),
            _value("z_next", TensorProto.FLOAT, state),
            _value("next_held", TensorProto.FLOAT, ["batch", 1]),
            _value("next_count", TensorProto.INT64, ["batch", 1]),
            _value("next_left", TensorProto.INT64, []),
        ],
        [*cell.constants, *look.constants],
    )


def _evaluation(cell: Part, before: str, after: str) -> list[NodeProto]:
    """The nodes of `cell` once more, from state `before` to state `after`, with names of their own."""
    inner = {output for node in cell.nodes for output in node.output}
    names = {"z": before, "f": after} | {name: f"{after}/{name}" for name in inner - {"f"}}
    copies = []
    for node in cell.nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{after}/{node.name}"
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names[name] for name in node.output]
        copies.append(copy)
    return copies


def _look(spec: ModelSpec, images: Sequence[str]) -> Part:
    """z, f_1 ... f_m, held, count, left -> z_next, next_held, next_count, next_left, go_on."""
    part, block = Part("look"), len(images)
    infinity = part.constant(np.array(np.inf, dtype=np.float32))
    states, residuals = _residuals(part, spec, images)
    before = part.apply("Concat", "held", residuals, axis=1)
    after = part.apply("Concat", residuals, "unknown", axis=1)  # infinite: nobody gets beyond the last image
    usable = part.apply("And", part.apply("Greater", before, "tolerance"), part.apply("Less", after, infinity))
    paid = part.apply("Less", part.constant(np.arange(block + 1, dtype=np.int64)), "left")
    going = part.apply("Cast", part.apply("And", usable, paid), to=TensorProto.INT32)
    stop = part.apply("ArgMin", going, axis=1, keepdims=1)
    state = part.apply("GatherND", states, stop, batch_dims=1)
    part.apply("Reshape", state, part.constant(np.array([0, *spec.state_shape], dtype=np.int64)), name="z_next")
    part.apply("GatherElements", before, stop, axis=1, name="next_held")
    part.apply("Add", "count", stop, name="next_count")
    part.apply("Sub", "left", part.constant(np.array(block, dtype=np.int64)), name="next_left")
    part.apply("Greater", part.apply("ReduceMax", "next_held", keepdims=0), "tolerance", name="go_on")
    return part


def _residuals(part: Part, spec: ModelSpec, images: Sequence[str]) -> tuple[str, str]:
    """Names of F (batch, m + 1, n), n numbers per state, and of the squared residuals (batch, m)."""
    block, numbers = len(images), int(np.prod(spec.state_shape))
    shape = part.constant(np.array([0, block + 1, numbers], dtype=np.int64))
    states = part.apply("Reshape", part.apply("Concat", "z", *images, axis=1), shape)
    zero, one, last, end = (part.constant(np.array([at], dtype=np.int64)) for at in (0, 1, block, block + 1))
    after = part.apply("Slice", states, one, end, one)
    before = part.apply("Slice", states, zero, last, one)
    return states, _squared_ratio(part, spec, before, after, axis=2)


def _squared_residual(part: Part, spec: ModelSpec, before: str, after: str) -> str:
    """Name of |after - before|^2 / |after|^2 (batch,) of two states."""
    shape = part.constant(np.array([0, int(np.prod(spec.state_shape))], dtype=np.int64))
    first, second = (part.apply("Reshape", state, shape) for state in (before, after))
    return _squared_ratio(part, spec, first, second, axis=1)


def _squared_ratio(part: Part, spec: ModelSpec, before: str, after: str, *, axis: int) -> str:
    """Sums of squares over `axis`: a product and ReduceSum, for ReduceL2 takes nearly twice as long in onnxruntime."""
    axes = part.constant(np.array([axis], dtype=np.int64))
    change = part.apply("Sub", after, before)
    moved, length = (
        part.apply("ReduceSum", part.apply("Mul", value, value), axes, keepdims=0) for value in (change, after)
    )
    floor = part.constant(np.array(SMALLEST_NORM**2, dtype=np.float32))
    ratio = part.apply("Div", moved, part.apply("Max", length, floor))
    if spec.cell != "monotone":
        return ratio
    # A relu grows without limit where W is not constrained: a finite step over an overflown length would be 0.
    infinity = part.constant(np.array(np.inf, dtype=np.float32))
    return part.apply("Where", part.apply("Less", length, infinity), ratio, infinity)


def _value(name: str, kind: int, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
