"""One training step as an ONNX graph: solve, loss, adjoint, optimiser. Built by onnx and numpy, run by onnxruntime.

Theory of operation. The graph is the step of `training/torch_step.py`, w = [theta | head] being an input and an output:

    z       <- K - 1 evaluations of the cell (Loop, nothing measured), one more whose intermediate values stay
    u       <- v + J^T u, k times from u = v = dloss/dz (Loop; a second one that measures, to `tol`, where tol > 0)
    g        = clip(dloss/dw) + curvature w + offset
    velocity = momentum velocity + g,   w <- w - rate velocity

curvature = weight_decay + kappa and offset = nu - kappa z, vectors that are constant in a round, hold weight decay and
ADMM's part, the latter where w is shared.

No number of a device is inside: budgets, rates, duals and weights are inputs, so that one file serves a federation.
What is not in the graph is numpy's (`trainer`): the projection onto the constraint set, a monotone cell's step size,
and the refusal of a step that is not finite.

Beside it travels, in the metadata of the same file, all else that a device needs of the model: its description
(`deq/description`), and the solver, x, theta, K -> the features that a head is fitted to.
"""

import base64
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, checker, helper, shape_inference

from fedeq_edge import __version__
from fedeq_edge.deq.description import Description
from fedeq_edge.deq.layout import size
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ExportError
from fedeq_edge.onnx.autodiff import OPSET, Linearised, added
from fedeq_edge.onnx.contract import (
    DESCRIPTION,
    FOUND,
    IR_VERSION,
    MOMENTS,
    SCHEMA_VERSION,
    SMALLEST_CLIPPED,
    SOLVER_GRAPH,
    STEP_SIZE,
    Optimizer,
)
from fedeq_edge.onnx.graph import Part
from fedeq_edge.onnx.pieces import Pieces, Sizes, loop, pieces_of, placed, value, whole
from fedeq_edge.onnx.rules import Shape
from fedeq_edge.onnx.solving import norms, relative, residual_of, solving, solving_graph, state_axes, unpacked

_SMALLEST_GRADIENT = 1e-30  # below it a gradient counts as zero in a relative residual (deq/adjoints)
# Adam's memory of squares and its room, those of torch (Kingma and Ba, ICLR 2015); `momentum` is its other memory.
_SECOND_MOMENT, _ROOM = 0.999, 1e-8


def build_training(spec: ModelSpec, *, optimizer: Optimizer = "sgd") -> bytes:
    """The training graph of the model that `spec` stands for (`compile_training`)."""
    return compile_training(pieces_of(spec), optimizer=optimizer)


def compile_training(pieces: Pieces, *, optimizer: Optimizer = "sgd") -> bytes:
    """The step of an architecture with its solver, as one ONNX file: equal arguments, equal bytes.

    Raises ExportError where onnx refuses the graph.
    """
    solver = build_solver(pieces)
    told = {"fedeq.optimizer": optimizer, SOLVER_GRAPH: base64.b64encode(solver).decode()}
    step = _model(_Step(pieces, optimizer).graph(), pieces.description, "training", told)
    content: bytes = step.SerializeToString(deterministic=True)
    return content


def build_solver(pieces: Pieces) -> bytes:
    """The solver of an architecture, as an ONNX file of its own."""
    content: bytes = _model(solving_graph(pieces), pieces.description, "solver").SerializeToString(deterministic=True)
    return content


def _model(
    graph: GraphProto, described: Description, kind: str, told: Mapping[str, str] = MappingProxyType({})
) -> ModelProto:
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fedeq-edge",
        producer_version=__version__,
    )
    description = msgspec.json.encode(described, order="deterministic").decode()
    own = {"fedeq.kind": kind, "fedeq.schema_version": SCHEMA_VERSION, DESCRIPTION: description}
    helper.set_model_props(model, {**own, **told})
    try:
        checker.check_model(model, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{kind} graph: onnx refuses it: {reason}; this is a defect, report the model") from error
    return model


class _Step:
    """The step's graph while it grows: `_parts` in the order in which they are computed."""

    def __init__(self, pieces: Pieces, optimizer: Optimizer) -> None:
        self._pieces, self._described, self._optimizer = pieces, pieces.description, optimizer
        self._theta, self._head = self._described.theta_layout, self._described.head_layout
        self._size = size(self._theta) + size(self._head)
        self._state: Shape = (0, *pieces.state_shape)
        self._parts: list[Part] = []

    def graph(self) -> GraphProto:
        """Inputs and outputs by name as in `trainer`."""
        self._parts = [unpacked((*self._theta, *self._head), self._pieces.shapes, "w")]
        stem, evaluation, head = self._forward()
        back = Part("back")
        v, head_gradients = self._loss(head, back)
        u = self._adjoint(evaluation, v, back)
        gradients = head_gradients | self._gradients(stem, evaluation, u, back)
        self._parts += [stem.prepared, evaluation.prepared, head.prepared, back, self._update(gradients)]
        return whole(self._parts, "training_step", self._inputs(), self._outputs())

    def _forward(self) -> tuple[Linearised, Linearised, Linearised]:
        """Solve; stem, last evaluation and head, each with its values in the graph."""
        pieces = self._pieces
        stem = placed(pieces.stem, "in", {"x": "x", "injection": "injection"})
        last = placed(pieces.cell, "last", {"z": "z_before", "injection": "injection", "f": "z_star"})
        head = placed(pieces.head, "out", {"z_star": "z_star", "logits": "logits"})
        residual = residual_of(pieces.state_shape, "residuals")
        residual.apply("ReduceMean", "residuals", keepdims=0, name="residual")
        self._parts += [stem, solving(pieces), last, residual, head]
        return (
            self._linearised(stem, {"x": (0, *self._described.input_shape)}),
            self._linearised(last, {"z_before": self._state, "injection": self._state}),
            self._linearised(head, {"z_star": self._state}),
        )

    def _linearised(self, part: Part, inputs: Mapping[str, Shape]) -> Linearised:
        used = {name for node in part.nodes for name in node.input}
        scalars: dict[str, Shape] = {STEP_SIZE: ()} if STEP_SIZE in used else {}
        weights = {name: shape for name, shape in self._pieces.shapes.items() if name in used}
        return Linearised(part, {**inputs, **weights, **scalars})

    def _loss(self, head: Linearised, back: Part) -> tuple[str, dict[str, str]]:
        """Mean cross-entropy of `logits` and y; v = dloss/dz and the head's gradients."""
        logarithms = back.apply("LogSoftmax", "logits", axis=1)
        column = back.apply("Unsqueeze", "y", back.constant(np.array([1])))
        own = back.apply("GatherElements", logarithms, column, axis=1)
        back.apply("Neg", back.apply("ReduceMean", own, keepdims=0), name="loss")
        depth = back.constant(np.array(self._described.classes))
        ends = back.constant(np.array([0, 1], dtype=np.float32))
        excess = back.apply("Sub", back.apply("Exp", logarithms), back.apply("OneHot", "y", depth, ends, axis=1))
        batch = back.apply("Cast", back.apply("Shape", "y"), to=TensorProto.FLOAT)
        names = [slot.name for slot in self._head]
        found = head.pull({"logits": back.apply("Div", excess, batch)}, ["z_star", *names], back)
        return found.pop("z_star"), found

    def _adjoint(self, evaluation: Linearised, v: str, back: Part) -> str:
        """u, the k-term sum or the solution to `tol`; v in its place for samples where it is not finite."""
        nothing = back.apply("ConstantOfShape", back.apply("Shape", v))
        none, zero = back.constant(np.array(0)), back.constant(np.array(0.0, dtype=np.float32))
        exact = back.apply("Greater", "tol", zero)
        counted = back.apply("Where", exact, none, "adjoint")
        tested = back.apply("Where", exact, "adjoint", none)
        u, before = v, nothing
        for trips, measures in ((counted, False), (tested, True)):
            u, before = self._products(evaluation, v, (trips, u, before), back, measures=measures)
        shape = self._pieces.state_shape
        residual = relative(back, shape, (u, norms(back, shape, u)), before, _SMALLEST_GRADIENT)
        sound = back.apply("Less", residual, back.constant(np.array(np.inf, dtype=np.float32)))
        one = back.constant(np.array(1.0, dtype=np.float32))
        back.apply("ReduceMean", back.apply("Where", sound, residual, one), keepdims=0, name="backward_residual")
        rows = back.apply("Unsqueeze", sound, back.constant(state_axes(shape)))
        return back.apply("Where", rows, u, v)

    def _products(
        self, evaluation: Linearised, v: str, start: tuple[str, str, str], back: Part, *, measures: bool
    ) -> tuple[str, str]:
        """A Loop of u <- v + J^T u from (trips, u, the u before it); its last two values."""
        label = "adjoint_to_tol" if measures else "adjoint_terms"
        body = Part(label)
        u, before = f"{label}/u", f"{label}/before"
        pulled = evaluation.pull({"z_star": u}, ["z_before"], body)["z_before"]
        following = added(body, pulled, v)
        held = body.apply("Identity", u)
        go_on = self._unsettled(body, following, u) if measures else body.apply("Identity", f"{label}/going")
        state: Sizes = ["batch", *self._pieces.state_shape]
        last, held_last = loop(back, body, start[0], start[1:], [(u, state), (before, state)], [go_on, following, held])
        return last, held_last

    def _unsettled(self, body: Part, u: str, before: str) -> str:
        shape = self._pieces.state_shape
        residual = relative(body, shape, (u, norms(body, shape, u)), before, _SMALLEST_GRADIENT)
        # Written so that NaN goes on, to the end of the budget.
        left = body.apply("Cast", body.apply("Not", body.apply("LessOrEqual", residual, "tol")), to=TensorProto.INT32)
        return body.apply("Cast", body.apply("ReduceMax", left, keepdims=0), to=TensorProto.BOOL)

    def _gradients(self, stem: Linearised, evaluation: Linearised, u: str, back: Part) -> dict[str, str]:
        """Gradients of theta by name: u through the last evaluation, and on through the injection."""
        names = [slot.name for slot in self._theta]
        own = [name for name in names if name.startswith("cell.")]
        found = evaluation.pull({"z_star": u}, [*own, "injection"], back)
        into_stem = found.pop("injection")
        return found | stem.pull({"injection": into_stem}, [name for name in names if name not in own], back)

    def _update(self, gradients: Mapping[str, str]) -> Part:
        """gradients by name -> w_next, what the optimiser remembers, gradient_norm."""
        part = Part("update")
        flat = part.constant(np.array([-1]))
        pieces = []
        for slot in (*self._theta, *self._head):
            gradient = part.apply("Reshape", gradients[slot.name], flat)
            pieces.append(part.apply("Mul", gradient, "train_head") if slot.name.startswith("head.") else gradient)
        gradient = part.apply("Concat", *pieces, axis=0)
        norm = part.apply("ReduceL2", gradient, keepdims=0, name="gradient_norm")
        floor = part.constant(np.array(SMALLEST_CLIPPED, dtype=np.float32))
        share = part.apply("Div", "clip", part.apply("Max", norm, floor))
        share = part.apply("Min", share, part.constant(np.array(1.0, dtype=np.float32)))
        # Of additions of two: onnxruntime's Sum is three times slower.
        pull = part.apply("Add", part.apply("Mul", "w", "curvature"), "offset")
        direction = part.apply("Add", part.apply("Mul", gradient, share), pull)
        change = _momentum(part, direction) if self._optimizer == "sgd" else _adam(part, direction)
        part.apply("Sub", "w", part.apply("Mul", change, "rate"), name="w_next")
        return part

    def _inputs(self) -> list[ValueInfoProto]:
        vectors = ("w", *MOMENTS[self._optimizer], "curvature", "offset")
        scalars = ("rate", "momentum", "clip", "train_head", "tol")
        floats = [*scalars, *([STEP_SIZE] if self._described.step_size else [])]
        integers = ["forward", "adjoint", *(["count"] if self._optimizer == "adam" else [])]
        return [
            value("x", ["batch", *self._described.input_shape]),
            value("y", ["batch"], TensorProto.INT64),
            *(value(name, [self._size]) for name in vectors),
            *(value(name, []) for name in floats),
            *(value(name, [], TensorProto.INT64) for name in integers),
        ]

    def _outputs(self) -> list[ValueInfoProto]:
        vectors = ("w", *MOMENTS[self._optimizer])
        return [
            *(value(f"{name}_next", [self._size]) for name in vectors),
            *(value(name, []) for name in FOUND),
        ]


def _momentum(part: Part, direction: str) -> str:
    return part.apply("Add", part.apply("Mul", "velocity", "momentum"), direction, name="velocity_next")


def _adam(part: Part, direction: str) -> str:
    """The bias-corrected step of Adam; count: of this step, from 1."""
    one, second = (part.constant(np.array(number, dtype=np.float32)) for number in (1.0, _SECOND_MOMENT))
    count = part.apply("Cast", "count", to=TensorProto.FLOAT)
    moments = []
    for name, memory, new in (
        ("first", "momentum", direction),
        ("second", second, part.apply("Mul", direction, direction)),
    ):
        fresh = part.apply("Mul", new, part.apply("Sub", one, memory))
        moment = part.apply("Add", part.apply("Mul", name, memory), fresh, name=f"{name}_next")
        moments.append(part.apply("Div", moment, part.apply("Sub", one, part.apply("Pow", memory, count))))
    room = part.constant(np.array(_ROOM, dtype=np.float32))
    return part.apply("Div", moments[0], part.apply("Add", part.apply("Sqrt", moments[1]), room))
