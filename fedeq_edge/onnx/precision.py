"""Smaller numbers in an exported model: weights in float16, or a cell that multiplies in int8.

float16 stores and does not compute: onnxruntime casts the constants back once, at loading, so the file is half as large
and the answers are exactly those of the rounded parameters. Computing in float16 took 1.2 to 1.7 times as long on x86.

int8 computes. Each product of the cell stands between QuantizeLinear and DequantizeLinear, which runtimes fuse into one
integer kernel; injection, activation, norms and the stopping rule stay in float32, so NaN still spoils its own sample
alone. Ranges are those seen along the solver's way from z_0, where the cell will be asked. Values have 8 bits; weights
have 7, one scale per output: with 8, sums of two products overflow 16 bits on x86 processors without VNNI.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ExportError
from fedeq_edge.onnx.graph import Part
from fedeq_edge.onnx.runtime import evaluate
from fedeq_edge.onnx.wrap import model

Samples = NDArray[np.float32]
Range = tuple[float, float]

_PRODUCTS = ("Conv", "MatMul")
_WEIGHT_STEPS = 63
_VALUE_STEPS = 255
# A range is a largest and a least number: a few hundred samples show it, and bound the memory.
_CALIBRATION_SAMPLES = 512


def rounded(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers that float16 holds. Raises ExportError for a weight beyond its range."""
    with np.errstate(over="ignore"):
        halves = vector.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ExportError("export: a weight is above 65504, the largest float16; take recipe onnxruntime")
    return halves.astype(np.float32)


def stored_in_half(part: Part) -> Part:
    """The same part with every constant that float16 holds exactly stored so, and cast back to float32."""
    stored = Part(part.prefix)
    for constant in part.constants:
        values = numpy_helper.to_array(constant)
        if values.dtype != np.float32 or not np.array_equal(values, values.astype(np.float16)) or values.size == 1:
            stored.constants.append(constant)
            continue
        half = stored.constant(values.astype(np.float16), f"{constant.name}/half")
        stored.apply("Cast", half, name=constant.name, to=TensorProto.FLOAT)
    stored.nodes.extend(part.nodes)
    return stored


def quantised(spec: ModelSpec, stem: Part, cell: Part, samples: Samples, evaluations: int) -> Part:
    """The cell with its products in int8, calibrated over so many evaluations of samples (n, *input_shape)."""
    split = _without_gemm(cell)
    seen = _ranges(spec, stem, split, samples[:_CALIBRATION_SAMPLES], evaluations)
    constants = {constant.name: numpy_helper.to_array(constant) for constant in split.constants}
    weights = {node.input[1] for node in split.nodes if node.op_type in _PRODUCTS}
    part = Part("int8")
    part.constants.extend(constant for constant in split.constants if constant.name not in weights)
    for node in split.nodes:
        if node.op_type in _PRODUCTS:
            _quantised_product(part, node, constants[node.input[1]], seen)
        else:
            part.nodes.append(node)
    return part


def _without_gemm(cell: Part) -> Part:
    """The cell with each Gemm as a product and a sum: only the product is quantised."""
    part = Part(f"{cell.prefix}/split")
    constants = {constant.name: numpy_helper.to_array(constant) for constant in cell.constants}
    for node in cell.nodes:
        if node.op_type != "Gemm":
            part.nodes.append(node)
            continue
        value, weight, injection = node.input
        product = part.apply("MatMul", value, part.constant(np.ascontiguousarray(constants.pop(weight).T), weight))
        beta = next((attribute.f for attribute in node.attribute if attribute.name == "beta"), 1.0)
        if beta != 1.0:
            injection = part.apply("Mul", injection, part.constant(np.array(beta, dtype=np.float32)))
        part.apply("Add", product, injection, name=node.output[0])
    part.constants.extend(constant for constant in cell.constants if constant.name in constants)
    return part


def _quantised_product(part: Part, node: NodeProto, weight: NDArray[np.float32], seen: Mapping[str, Range]) -> None:
    axis = 0 if node.op_type == "Conv" else 1
    scale = np.abs(weight).max(axis=tuple(at for at in range(weight.ndim) if at != axis)) / _WEIGHT_STEPS
    scale = np.where(scale > 0.0, scale, 1.0).astype(np.float32)
    steps = np.rint(weight / np.expand_dims(scale, [at for at in range(weight.ndim) if at != axis]))
    names = [
        part.constant(steps.astype(np.int8), node.input[1]),
        part.constant(scale),
        part.constant(np.zeros(len(scale), dtype=np.int8)),
    ]
    factor = part.apply("DequantizeLinear", *names, axis=axis)
    product = NodeProto()
    product.CopyFrom(node)
    product.input[:] = [_in_steps(part, node.input[0], seen[node.input[0]]), factor]
    product.name = f"{node.output[0]}/product"
    product.output[:] = [product.name]
    part.nodes.append(product)
    _in_steps(part, product.output[0], seen[node.output[0]], name=node.output[0])


def _in_steps(part: Part, value: str, seen: Range, *, name: str | None = None) -> str:
    """Name of the value rounded to the 256 steps of its range."""
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    width = (high - low) / _VALUE_STEPS or 1.0
    scale = part.constant(np.array(width, dtype=np.float32))
    zero = part.constant(np.array(round(-low / width), dtype=np.uint8))
    return part.apply("DequantizeLinear", part.apply("QuantizeLinear", value, scale, zero), scale, zero, name=name)


def _ranges(spec: ModelSpec, stem: Part, cell: Part, samples: Samples, evaluations: int) -> dict[str, Range]:
    """Least and largest number of each product's input and output along the way."""
    watched = list(dict.fromkeys(name for node in cell.nodes if node.op_type in _PRODUCTS for name in _ends(node)))
    first = _flat(stem, {"x": spec.input_shape}, ["injection", "z_0"])
    step = _flat(cell, {"z": spec.state_shape, "injection": spec.state_shape}, ["f", *watched])
    place = evaluate(first, {"x": samples})
    z, ranges = place["z_0"], dict.fromkeys(watched, (np.inf, -np.inf))
    for _ in range(evaluations):
        found = {"z": z} | evaluate(step, {"z": z, "injection": place["injection"]})
        for name in watched:
            low, high = ranges[name]
            ranges[name] = min(low, float(found[name].min())), max(high, float(found[name].max()))
        z = found["f"]
    return ranges


def _ends(node: NodeProto) -> tuple[str, str]:
    return node.input[0], node.output[0]


def _flat(part: Part, inputs: Mapping[str, Sequence[int]], outputs: Sequence[str]) -> bytes:
    """A part as a model of its own that gives all these values."""
    graph = helper.make_graph(
        part.nodes,
        part.prefix,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name not in inputs],
        part.constants,
    )
    flat: ModelProto = model(graph, opset=18, ir_version=8)
    content: bytes = flat.SerializeToString()
    return content
