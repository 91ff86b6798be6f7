"""Reverse-mode differentiation of a `Part`: the nodes that carry cotangents from its outputs back to its inputs.

Theory of operation. `Linearised` is one evaluation whose intermediate values are in the graph. `pull` walks its nodes
backwards; the rule of each (`rules`) says what its inputs get. What a rule needs of the evaluation alone (the slope of
a tanh, the deviation of a norm) is written once, to `prepared`; what depends on the cotangent goes to the part that the
caller gives. So the body of an adjoint Loop holds nothing but the product with J^T: linearised once per step.

Shapes are static but for the batch, which is the first axis of every value that has one.
"""

from collections.abc import Collection, Mapping

from onnx import TensorProto, helper, shape_inference

from fedeq_edge.errors import ExportError
from fedeq_edge.onnx import contract
from fedeq_edge.onnx.graph import Part
from fedeq_edge.onnx.rules import Evaluation, Shape, rule_of

OPSET = contract.OPSET


class Linearised:
    """One evaluation of `part` in the graph, ready to be differentiated.

    inputs: shapes of its free values, the batch's size being 0. prepared: nodes that depend on the evaluation alone, to
    stand behind those of `part`.
    """

    def __init__(self, part: Part, inputs: Mapping[str, Shape]) -> None:
        self.part = part
        self.prepared = Part(f"{part.prefix}/prepared")
        self._evaluation = Evaluation(
            shapes=_shapes(part, inputs),
            constants={constant.name: constant for constant in part.constants},
            prepared=self.prepared,
        )

    def pull(self, seeds: Mapping[str, str], wanted: Collection[str], into: Part) -> dict[str, str]:
        """Names of the cotangents of `wanted`, given those of outputs in `seeds`; nodes are appended to `into`.

        Raises ExportError for an operator without rule, or where no path leads from an output to a wanted value.
        """
        reached = self._reached(wanted)
        found = dict(seeds)
        for node in reversed(self.part.nodes):
            output = node.output[0]
            if output not in found or output not in reached:
                continue
            wanted_here = [name in reached for name in node.input]
            shares = rule_of(node)(self._evaluation, node, found[output], wanted_here, into)
            for name, share in zip(node.input, shares, strict=True):
                if share is not None and name in reached:
                    found[name] = added(into, found[name], share) if name in found else share
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ExportError(f"{self.part.prefix}: nothing leads from {', '.join(seeds)} to {', '.join(missing)}")
        return {name: found[name] for name in wanted}

    def _reached(self, wanted: Collection[str]) -> set[str]:
        """`wanted` and everything that depends on it."""
        reached = set(wanted)
        for node in self.part.nodes:
            if not reached.isdisjoint(node.input):
                reached.update(node.output)
        return reached


def added(part: Part, one: str, other: str) -> str:
    """The sum of two values; the last node of `part` takes it in where it is a product that has room for an addend."""
    last = part.nodes[-1] if part.nodes else None
    if last is not None and last.op_type == "Gemm" and len(last.input) == 2 and last.output[0] in (one, other):
        last.input.append(one if last.output[0] == other else other)
        return str(last.output[0])
    return part.apply("Add", one, other)


def _shapes(part: Part, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of every value of `part`, by onnx's own inference."""
    float_, nodes = TensorProto.FLOAT, part.nodes
    graph = helper.make_graph(
        nodes,
        part.prefix,
        [helper.make_tensor_value_info(name, float_, _named(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], float_, None)] if nodes else [],
        part.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {constant.name: tuple(constant.dims) for constant in part.constants} | dict(inputs)
    for value in [*inferred.value_info, *inferred.output]:
        found[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return found


def _named(shape: Shape) -> list[int | str]:
    return [size or "batch" for size in shape]
