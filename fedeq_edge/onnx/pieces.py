"""The flat parts of a model with its weights as values of the graph, ready to be placed where it trains.

Same formulas, and the same code, as in the files that answer (`graph`): there a weight is a constant.

A new architecture begins here: what is given as `Pieces` is compiled into a training graph (`training`), and devices
learn of it by that graph alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from fedeq_edge.deq.description import Description, describe
from fedeq_edge.deq.layout import head_layout, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.contract import STEP_SIZE
from fedeq_edge.onnx.graph import Part, cell, head, injection
from fedeq_edge.onnx.rules import NARROW, Shape, turned

Sizes = list[int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """An architecture; its weights are free values, called as in the description.

    stem: x -> injection. start: injection -> z_0. cell: z, injection -> f. head: z_star -> logits, by a last node that
    is the linear layer of the description's head. Weights of the cell are called cell.*, of the head head.*, all others
    are the stem's.
    state_shape: of one sample's z. shapes: of the weights, as the operators take them.
    """

    description: Description
    state_shape: Shape
    stem: Part
    start: Part
    cell: Part
    head: Part
    shapes: Mapping[str, Shape]


def pieces_of(spec: ModelSpec) -> Pieces:
    """The model that `spec` stands for."""
    zeros = {slot.name: np.zeros(slot.shape, dtype=np.float32) for slot in (*theta_layout(spec), *head_layout(spec))}
    parts = injection(spec, zeros), cell(spec, zeros), head(spec, zeros)
    shapes = {c.name: _flat(c) for part in parts for c in part.constants if c.name in zeros}
    stem, step, last = (_freed(part, shapes) for part in parts)
    return Pieces(
        description=describe(spec),
        state_shape=spec.state_shape,
        stem=stem,
        start=_start(spec),
        cell=_monotone_cell() if spec.cell == "monotone" else step,
        head=last,
        shapes=shapes,
    )


def _freed(part: Part, shapes: Mapping[str, Shape]) -> Part:
    """`part` without the constants that are weights."""
    left = [constant for constant in part.constants if constant.name not in shapes]
    return _with_affine(Part(part.prefix, part.nodes, left), shapes)


def _flat(weight: TensorProto) -> Shape:
    """Its shape; that of a norm's scale or bias is (channels,)."""
    shape = tuple(weight.dims)
    return shape[:1] if ".norm" in weight.name else shape


def _with_affine(part: Part, shapes: Mapping[str, Shape]) -> Part:
    """`part` with the scale and bias of its norms as one BatchNormalization of mean 0 and variance 1.

    Mul and Add broadcast along the positions, number by number where these are few: 2.5 times slower.
    """
    found = Part(part.prefix, constants=part.constants)
    scaled: dict[str, NodeProto] = {}
    for node in part.nodes:
        if node.op_type == "Mul" and ".norm" in node.input[1]:
            scaled[node.output[0]] = node
        elif node.op_type == "Add" and node.input[0] in scaled:
            _affine(found, scaled[node.input[0]], node, shapes[node.input[1]])
        else:
            found.nodes.append(node)
    return found


def _affine(part: Part, scaled: NodeProto, shifted: NodeProto, channels: Shape) -> None:
    zeros = part.constant(np.zeros(channels, dtype=np.float32), f"{scaled.name}/mean")
    ones = part.constant(np.ones(channels, dtype=np.float32), f"{scaled.name}/variance")
    ends = scaled.input[0], scaled.input[1], shifted.input[1], zeros, ones
    part.apply("BatchNormalization", *ends, name=shifted.output[0], epsilon=0.0)


def swift(cell: Part, shapes: Mapping[str, Shape]) -> tuple[Part, Part]:
    """(weights prepared once, `cell` that uses them): narrow convolutions of images as transposed ones.

    The same sums by another kernel of onnxruntime, which is a seventh faster up to `NARROW` channels and slower beyond.
    """
    prepared, found = Part("turned"), Part(cell.prefix, constants=cell.constants)
    for node in cell.nodes:
        shape = shapes.get(node.input[1], ()) if node.op_type == "Conv" else ()
        if len(shape) == 4 and max(shape[:2]) <= NARROW:
            weight = turned(node.input[1], 2, prepared, f"{node.input[1]}/turned")
            found.nodes.append(_renamed(node, {node.input[1]: weight}))
            found.nodes[-1].op_type = "ConvTranspose"
        else:
            found.nodes.append(node)
    return prepared, found


def placed(part: Part, prefix: str, bound: Mapping[str, str]) -> Part:
    """A copy of `part` whose own names begin with `prefix`; those in `bound` become what it says.

    Names that the part neither makes nor holds (weights) stay, unless bound.
    """
    own = {output for node in part.nodes for output in node.output} | {constant.name for constant in part.constants}
    names = {name: f"{prefix}/{name}" for name in own} | dict(bound)
    copy = Part(prefix)
    for constant in part.constants:
        twin = type(constant)()
        twin.CopyFrom(constant)
        twin.name = names[constant.name]
        copy.constants.append(twin)
    copy.nodes.extend(_renamed(node, names) for node in part.nodes)
    return copy


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    twin = NodeProto()
    twin.CopyFrom(node)
    for ends in (twin.input, twin.output):
        ends[:] = [names.get(name, name) for name in ends]
    twin.name = twin.output[0]
    return twin


def _start(spec: ModelSpec) -> Part:
    """injection -> z_0."""
    part = Part("start")
    if spec.cell == "monotone":
        part.apply("Relu", part.apply("Mul", "injection", STEP_SIZE), name="z_0")
    else:
        part.apply("Tanh" if spec.cell == "contractive" else "Identity", "injection", name="z_0")
    return part


def _monotone_cell() -> Part:
    """relu(z + a (W z + u - z)): W moves, so nothing can be stored but W itself."""
    part = Part("cell")
    mapped = part.apply("Gemm", "z", "cell.weight", "injection", transB=1)
    moved = part.apply("Mul", part.apply("Sub", mapped, "z"), STEP_SIZE)
    part.apply("Relu", part.apply("Add", "z", moved), name="f")
    return part


def loop(
    part: Part, body: Part, trips: str, starts: Sequence[str], state: Sequence[tuple[str, Sizes]], turned: Sequence[str]
) -> list[str]:
    """Append a Loop of at most `trips` turns from `starts`; the names of its last values.

    body: its nodes, with the name of the loop as prefix. state: name and sizes of each value within the body. turned:
    the body's outputs, first whether to go on, which the body may compute from its own input `<prefix>/going`.
    """
    label = body.prefix
    finals = [f"{name}_last" for name, _ in state]
    graph = helper.make_graph(
        fast(body.nodes, body),
        label,
        [
            value(f"{label}/turn", [], TensorProto.INT64),
            value(f"{label}/going", [], TensorProto.BOOL),
            *(value(name, sizes) for name, sizes in state),
        ],
        [
            value(turned[0], [], TensorProto.BOOL),
            *(value(name, sizes) for name, (_, sizes) in zip(turned[1:], state, strict=True)),
        ],
        body.constants,
    )
    part.nodes.append(helper.make_node("Loop", [trips, "", *starts], finals, name=label, body=graph))
    return finals


def value(name: str, sizes: Sizes, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(name, kind, sizes)


def whole(parts: Sequence[Part], name: str, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> GraphProto:
    """The graph of `parts`, computed in their order."""
    ready = [(fast(part.nodes, part), part.constants) for part in parts]
    nodes = [node for own, _ in ready for node in own]
    return helper.make_graph(nodes, name, inputs, outputs, [constant for _, own in ready for constant in own])


def fast(nodes: Sequence[NodeProto], part: Part) -> list[NodeProto]:
    """`nodes` with every Softplus written as max(x, 0) + log(1 + exp(-|x|)); its constant goes to `part`.

    onnxruntime's own kernel computes number by number: five times slower.
    """
    if all(node.op_type != "Softplus" for node in nodes):
        return list(nodes)
    one = part.constant(np.array(1.0, dtype=np.float32), f"{part.prefix}/one")
    spelled: list[NodeProto] = []
    for node in nodes:
        spelled += _softplus(node, one) if node.op_type == "Softplus" else [node]
    return spelled


def _softplus(node: NodeProto, one: str) -> list[NodeProto]:
    x, name = node.input[0], node.output[0]
    part = Part(name)
    decayed = part.apply("Exp", part.apply("Neg", part.apply("Abs", x)))
    rest = part.apply("Log", part.apply("Add", decayed, one))
    part.apply("Add", part.apply("Relu", x), rest, name=name)
    return part.nodes
