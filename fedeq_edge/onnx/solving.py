"""The forward solve with weights as values of the graph: plain iteration, measured at its last evaluation.

`solving_graph` is a whole graph of it, x, theta, forward -> features, residual: what evaluation, refit and personal
models need of a device's model.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import GraphProto, TensorProto, helper

from fedeq_edge.deq.layout import Slot, size
from fedeq_edge.deq.spec import SMALLEST_NORM
from fedeq_edge.onnx.contract import STEP_SIZE
from fedeq_edge.onnx.graph import Part
from fedeq_edge.onnx.pieces import Pieces, Sizes, loop, placed, swift, value, whole
from fedeq_edge.onnx.rules import Shape

Axes = np.ndarray[tuple[int], np.dtype[np.int64]]


def solving_graph(pieces: Pieces) -> GraphProto:
    """x (batch, *input_shape), theta (p,), forward () -> features (batch, features), residual (batch,)."""
    described = pieces.description
    slots = described.theta_layout
    pool = Part(pieces.head.prefix, pieces.head.nodes[:-1], pieces.head.constants)
    pooled = placed(pool, "out", {"z_star": "z_star"})
    pooled.apply("Identity", pooled.nodes[-1].output[0] if pooled.nodes else "z_star", name="features")
    scalars = [value(STEP_SIZE, [])] if described.step_size else []
    return whole(
        [
            unpacked(slots, pieces.shapes, "theta"),
            placed(pieces.stem, "in", {"x": "x", "injection": "injection"}),
            solving(pieces),
            placed(pieces.cell, "last", {"z": "z_before", "injection": "injection", "f": "z_star"}),
            residual_of(pieces.state_shape, "residual"),
            pooled,
        ],
        "solver",
        [
            value("x", ["batch", *described.input_shape]),
            value("theta", [size(slots)]),
            value("forward", [], TensorProto.INT64),
            *scalars,
        ],
        [value("features", ["batch", described.features]), value("residual", ["batch"])],
    )


def unpacked(slots: Sequence[Slot], shapes: Mapping[str, Shape], vector: str) -> Part:
    """The flat `vector` cut into weights by name, in the shapes that the operators take."""
    part = Part("weights")
    flat = [slot.name if shapes[slot.name] == (slot.size,) else f"{slot.name}/flat" for slot in slots]
    sizes = part.constant(np.array([slot.size for slot in slots]))
    part.nodes.append(helper.make_node("Split", [vector, sizes], flat, name="weights/split"))
    for slot, name in zip(slots, flat, strict=True):
        if name != slot.name:
            part.apply("Reshape", name, part.constant(np.array(shapes[slot.name])), name=slot.name)
    return part


def solving(pieces: Pieces) -> Part:
    """injection, forward = K -> z_before, the state after K - 1 evaluations."""
    part = placed(pieces.start, "start", {"injection": "injection", "z_0": "z_0", STEP_SIZE: STEP_SIZE})
    weights, cell = swift(pieces.cell, pieces.shapes)
    part.nodes.extend(weights.nodes)
    part.constants.extend(weights.constants)
    body = placed(cell, "solve", {"z": "solve/z", "injection": "injection"})
    going = body.apply("Identity", "solve/going")
    state: Sizes = ["batch", *pieces.state_shape]
    trips = part.apply("Sub", "forward", part.constant(np.array(1)))
    (last,) = loop(part, body, trips, ["z_0"], [("solve/z", state)], [going, "solve/f"])
    part.apply("Identity", last, name="z_before")
    return part


def residual_of(shape: Shape, name: str) -> Part:
    """z_star = f(z_before) -> the relative residual (batch,), as `deq/batch.relative_residual` has it."""
    part = Part("residual")
    length = norms(part, shape, "z_star")
    ratio = relative(part, shape, ("z_star", length), "z_before", SMALLEST_NORM)
    infinite = part.constant(np.array(np.inf, dtype=np.float32))
    part.apply("Where", part.apply("IsInf", length), infinite, ratio, name=name)
    return part


def relative(part: Part, shape: Shape, new: tuple[str, str], old: str, floor: float) -> str:
    """|new - old| / max(|new|, floor), (batch,); new: a state and its norm."""
    state, length = new
    change = norms(part, shape, part.apply("Sub", state, old))
    return part.apply("Div", change, part.apply("Max", length, part.constant(np.array(floor, dtype=np.float32))))


def norms(part: Part, shape: Shape, state: str) -> str:
    """L2 norms (batch,) of a state, whose samples are of that shape.

    onnxruntime's ReduceL2 over several axes takes two to three times as long.
    """
    squares = part.apply("Mul", state, state)
    return part.apply("Sqrt", part.apply("ReduceSum", squares, part.constant(state_axes(shape)), keepdims=0))


def state_axes(shape: Shape) -> Axes:
    """All axes of a state but the batch."""
    return np.arange(1, 1 + len(shape), dtype=np.int64)
