"""What each operator of our layers does to a cotangent: the table behind `autodiff`.

A rule gets the evaluation, the node, the name of its output's cotangent g, which inputs want one, and the part to write
to. It answers with a name for each input, None where none is wanted.
"""
# ruff: noqa: ARG001  # every rule is asked alike, whatever it needs

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fedeq_edge.errors import ExportError
from fedeq_edge.onnx.graph import Part

Shape = tuple[int, ...]
"""Sizes of a value; the batch's is 0, which is also how Reshape spells "as it was"."""
Cotangents = list[str | None]

# Channels up to which a transposed convolution of images is the faster one, measured on x86 with onnxruntime 1.31.
NARROW = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation in the graph: shapes of its values, its constants, and the part for what is prepared once."""

    shapes: dict[str, Shape]
    constants: dict[str, TensorProto]
    prepared: Part
    memo: dict[tuple[str, str], str] = field(default_factory=dict)

    def once(self, node: NodeProto, what: str, make: Callable[[Part], str]) -> str:
        """The value that `make` writes to `prepared`, when first asked for."""
        key = (node.output[0], what)
        if key not in self.memo:
            self.memo[key] = make(self.prepared)
        return self.memo[key]

    def is_constant(self, name: str, value: float) -> bool:
        """Whether `name` is a constant that is `value` throughout."""
        return name in self.constants and bool((numpy_helper.to_array(self.constants[name]) == value).all())


Rule = Callable[[Evaluation, NodeProto, str, Sequence[bool], Part], Cotangents]


def rule_of(node: NodeProto) -> Rule:
    """The rule for a node. Raises ExportError naming an operator that has none."""
    if node.op_type not in _RULES:
        raise ExportError(f"training graph: {node.op_type} ({node.name}) has no derivative here; add a rule for it")
    return _RULES[node.op_type]


def _gemm(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    a, b = node.input[:2]
    given = attributes(node)
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise ExportError(f"training graph: {node.name} is a Gemm with transA, alpha or beta; write it without")
    flipped = bool(given.get("transB", 0))
    found: Cotangents = [None] * len(node.input)
    if wanted[0]:
        found[0] = into.apply("Gemm", g, b, transB=int(not flipped))
    if wanted[1]:
        found[1] = into.apply("Gemm", *((g, a) if flipped else (a, g)), transA=1)
    if len(found) == 3 and wanted[2]:
        found[2] = summed_to(at, node.output[0], node.input[2], g, into)
    return found


def _conv(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    found: Cotangents = [None] * len(node.input)
    if wanted[0]:
        found[0] = _conv_input(at, node, g, into)
    if wanted[1]:
        found[1] = _conv_weight(at, node, g, into)
    if len(found) == 3 and wanted[2]:
        axes = [0, *range(2, len(at.shapes[node.output[0]]))]
        found[2] = into.apply("ReduceSum", g, into.constant(_sizes(axes)), keepdims=0)
    return found


def _conv_input(at: Evaluation, node: NodeProto, g: str, into: Part) -> str:
    """The transposed convolution; output_padding restores what a stride had cut off."""
    given, x, y = attributes(node), at.shapes[node.input[0]], at.shapes[node.output[0]]
    spatial = len(x) - 2
    if (spatial == 1 or max(x[1], y[1]) > NARROW) and max(given["strides"]) == 1 and x[2:] == y[2:]:
        # There the convolution with the turned weight is the faster one: by a third on sequences.
        weight = at.once(node, "turned", lambda part: turned(node.input[1], spatial, part))
        return into.apply("Conv", g, weight, **given)
    kernel, strides, pads = given["kernel_shape"], given["strides"], given["pads"]
    left = [x[2 + i] - ((y[2 + i] - 1) * strides[i] + kernel[i] - 2 * pads[i]) for i in range(spatial)]
    return into.apply(
        "ConvTranspose",
        g,
        node.input[1],
        kernel_shape=kernel,
        strides=strides,
        pads=pads,
        output_padding=left,
    )


def _conv_weight(at: Evaluation, node: NodeProto, g: str, into: Part) -> str:
    if max(attributes(node)["strides"]) > 1:
        return _strided_weight(at, node, g, into)
    return _product_weight(at, node, g, into)


def _strided_weight(at: Evaluation, node: NodeProto, g: str, into: Part) -> str:
    """dW as a convolution of x with g, batch and channels having changed places; what was a stride is a dilation."""
    given, rank = attributes(node), len(at.shapes[node.input[1]])
    x = at.once(node, "channels first", lambda part: _channels_first(part, node.input[0], rank))
    found = into.apply(
        "Conv",
        x,
        _channels_first(into, g, rank),
        kernel_shape=at.shapes[node.output[0]][2:],
        pads=given["pads"],
        dilations=given["strides"],
    )
    return _cut(at, node, _channels_first(into, found, rank), into)


def _cut(at: Evaluation, node: NodeProto, found: str, into: Part) -> str:
    """`found` without the taps beyond the kernel's: positions that the stride had left over make some."""
    given, x, y = attributes(node), at.shapes[node.input[0]][2:], at.shapes[node.output[0]][2:]
    kernel = given["kernel_shape"]
    pads, strides = given["pads"], given["strides"]
    made = [x[i] + 2 * pads[i] - (y[i] - 1) * strides[i] for i in range(len(kernel))]
    if made == list(kernel):
        return found
    axes = into.constant(_sizes(range(2, 2 + len(kernel))))
    starts, ends = into.constant(_sizes([0] * len(kernel))), into.constant(_sizes(kernel))
    return into.apply("Slice", found, starts, ends, axes)


def _product_weight(at: Evaluation, node: NodeProto, g: str, into: Part) -> str:
    """dW = columns(x) g^T, one product over batch and positions: twice as fast as a Conv with swapped axes."""
    weight = at.shapes[node.input[1]]
    outputs, inputs, *kernel = weight
    columns = at.once(node, "columns", lambda part: _columns(at, node, part))
    rows = into.apply("Reshape", _channels_first(into, g, len(weight)), into.constant(_sizes([outputs, -1])))
    found = into.apply("Gemm", columns, rows, transB=1)
    taps = into.apply("Reshape", found, into.constant(_sizes([prod(kernel), inputs, outputs])))
    turned = into.apply("Transpose", taps, perm=[2, 1, 0])
    return into.apply("Reshape", turned, into.constant(_sizes(weight)))


def _columns(at: Evaluation, node: NodeProto, part: Part) -> str:
    """(taps * inputs, batch * positions): for every tap, what it meets at every position; strides are 1."""
    weight, lengths = at.shapes[node.input[1]], at.shapes[node.output[0]][2:]
    pads, spatial = attributes(node)["pads"][: len(lengths)], len(lengths)
    value = _channels_first(part, node.input[0], len(weight))
    value = part.apply("Pad", value, part.constant(_sizes([0, 0, *pads, 0, 0, *pads])))
    axes = part.constant(_sizes(range(2, 2 + spatial)))
    seen = []
    for tap in product(*map(range, weight[2:])):
        ends = [first + length for first, length in zip(tap, lengths, strict=True)]
        seen.append(part.apply("Slice", value, part.constant(_sizes(tap)), part.constant(_sizes(ends)), axes))
    stacked = part.apply("Concat", *seen, axis=0)
    return part.apply("Reshape", stacked, part.constant(_sizes([prod(weight[2:]) * weight[1], -1])))


def _channels_first(part: Part, value: str, rank: int) -> str:
    return part.apply("Transpose", value, perm=[1, 0, *range(2, rank)])


def _tanh(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    def slope(part: Part) -> str:
        one = part.constant(np.array(1.0, dtype=np.float32))
        return part.apply("Sub", one, part.apply("Mul", node.output[0], node.output[0]))

    return [into.apply("Mul", g, at.once(node, "slope", slope))]


def _relu(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    def slope(part: Part) -> str:
        # Sign would be one node, and takes three times as long as these two.
        above = part.apply("Greater", node.output[0], part.constant(np.array(0.0, dtype=np.float32)))
        return part.apply("Cast", above, to=TensorProto.FLOAT)

    return [into.apply("Mul", g, at.once(node, "slope", slope))]


def _softplus(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    return [into.apply("Mul", g, at.once(node, "slope", lambda part: part.apply("Sigmoid", node.input[0])))]


def _identity(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    return [g]


def _add(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    return [
        summed_to(at, node.output[0], name, g, into) if is_wanted else None
        for name, is_wanted in zip(node.input, wanted, strict=True)
    ]


def _sub(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    found = _add(at, node, g, wanted, into)
    if found[1] is not None:
        found[1] = into.apply("Neg", found[1])
    return found


def _mul(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    found: Cotangents = [None, None]
    for mine, other in ((0, 1), (1, 0)):
        if wanted[mine]:
            scaled = into.apply("Mul", g, node.input[other])
            found[mine] = summed_to(at, node.output[0], node.input[mine], scaled, into)
    return found


def _div(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    if wanted[1]:
        raise ExportError(f"training graph: {node.name} divides by what is differentiated; multiply instead")
    return [summed_to(at, node.output[0], node.input[0], into.apply("Div", g, node.input[1]), into), None]


def _instance_norm(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    """(g - mean(g) - y mean(g y)) / deviation: what is left of g across the directions that a norm removes."""
    if any(wanted[1:]) or not (at.is_constant(node.input[1], 1.0) and at.is_constant(node.input[2], 0.0)):
        raise ExportError(f"training graph: {node.name} scales; write its scale and bias as Mul and Add behind it")
    y = node.output[0]
    axis = into.constant(_sizes([2]))
    inverse = at.once(node, "inverse deviation", lambda part: _inverse_deviation(node, part))
    mean = into.apply("ReduceMean", g, axis, keepdims=1)
    along = into.apply("ReduceMean", into.apply("Mul", g, y), axis, keepdims=1)
    across = into.apply("Sub", into.apply("Sub", g, mean), into.apply("Mul", y, along))
    return [into.apply("Mul", across, inverse), None, None]


def _inverse_deviation(node: NodeProto, part: Part) -> str:
    axis = part.constant(_sizes([2]))
    x, epsilon = node.input[0], attributes(node)["epsilon"]
    # Two passes: the difference of mean square and squared mean would cancel for a nearly constant state.
    centred = part.apply("Sub", x, part.apply("ReduceMean", x, axis, keepdims=1))
    variance = part.apply("ReduceMean", part.apply("Mul", centred, centred), axis, keepdims=1)
    room = part.apply("Add", variance, part.constant(np.array(epsilon, dtype=np.float32)))
    return part.apply("Reciprocal", part.apply("Sqrt", room))


def _affine(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    """Of scale x + bias per channel, which is what a BatchNormalization with mean 0 and variance 1 computes."""
    x, scale, _, mean, variance = node.input
    found: Cotangents = [None] * 5
    axes = into.constant(_sizes([0, *range(2, len(at.shapes[x]))]))
    if wanted[0]:
        found[0] = into.apply("BatchNormalization", g, scale, mean, mean, variance, epsilon=0.0)
    if wanted[1]:
        found[1] = into.apply("ReduceSum", into.apply("Mul", g, x), axes, keepdims=0)
    if wanted[2]:
        found[2] = into.apply("ReduceSum", g, axes, keepdims=0)
    return found


def _reshape(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    found: Cotangents = [None] * len(node.input)
    found[0] = into.apply("Reshape", g, into.constant(_sizes(at.shapes[node.input[0]])))
    return found


def _reduce_mean(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    shape = at.shapes[node.input[0]]
    axes = numpy_helper.to_array(at.constants[node.input[1]]).tolist()
    kept = into.apply("Reshape", g, into.constant(_sizes([1 if i in axes else size for i, size in enumerate(shape)])))
    spread = np.full([shape[i] if i in axes else 1 for i in range(len(shape))], 1.0 / prod(shape[i] for i in axes))
    return [into.apply("Mul", kept, into.constant(spread.astype(np.float32))), None]


def _average_pool(at: Evaluation, node: NodeProto, g: str, wanted: Sequence[bool], into: Part) -> Cotangents:
    """Every window gives its cotangent back in equal shares: one product with a matrix (windows, positions)."""
    given, x, y = attributes(node), at.shapes[node.input[0]], at.shapes[node.output[0]]
    shares = np.ones((1, 1), dtype=np.float32)
    for length, kernel, stride, windows in zip(x[2:], given["kernel_shape"], given["strides"], y[2:], strict=True):
        positions = np.arange(length) - stride * np.arange(windows)[:, None]
        shares = np.kron(shares, ((positions >= 0) & (positions < kernel)).astype(np.float32) / kernel)
    flat = into.apply("Reshape", g, into.constant(_sizes([-1, prod(y[2:])])))
    spread = into.apply("MatMul", flat, into.constant(shares.astype(np.float32)))
    return [into.apply("Reshape", spread, into.constant(_sizes([-1, *x[1:]])))]


def summed_to(at: Evaluation, output: str, name: str, g: str, into: Part) -> str:
    """g, of the shape of `output`, summed over what broadcasting had repeated of `name`."""
    wide, narrow = at.shapes[output], at.shapes[name]
    if wide == narrow:
        return g
    padded = (1,) * (len(wide) - len(narrow)) + narrow
    axes = [i for i, (size, own) in enumerate(zip(wide, padded, strict=True)) if own == 1 and size != 1]
    total = into.apply("ReduceSum", g, into.constant(_sizes(axes)), keepdims=0)
    return into.apply("Reshape", total, into.constant(_sizes(narrow)))


def turned(weight: str, spatial: int, part: Part, name: str | None = None) -> str:
    """(inputs, outputs, *taps) of a weight (outputs, inputs, *taps), the taps in reverse order."""
    axes = np.arange(2, 2 + spatial)
    ends = [part.constant(np.full(spatial, number)) for number in (-1, np.iinfo(np.int64).min)]
    swapped = part.apply("Transpose", weight, perm=[1, 0, *axes])
    return part.apply("Slice", swapped, *ends, part.constant(axes), part.constant(np.full(spatial, -1)), name=name)


# Any: an attribute is a number or a list of them, by the operator.
def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node as numbers and lists."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _sizes(values: Sequence[int] | range) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(tuple(values), dtype=np.int64)


_RULES: dict[str, Rule] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _affine,
    "Conv": _conv,
    "Div": _div,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "Identity": _identity,
    "InstanceNormalization": _instance_norm,
    "Mul": _mul,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Softplus": _softplus,
    "Sub": _sub,
    "Tanh": _tanh,
}
