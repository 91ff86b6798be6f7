"""The flat parts of a model as ONNX nodes: stem, cell and head of `deq/cell.py` and `deq/model.py`, same formulas.

Our layers are a closed set, so the graph is written directly (onnx.helper): milliseconds, no torch, no exporter that
drops a small constant or writes file paths into the nodes. Opset 18 has no GroupNormalization;
InstanceNormalization over reshaped groups is one kernel in onnxruntime, the later operator some twenty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fedeq_edge.deq.layout import head_layout, size, theta_layout
from fedeq_edge.deq.spec import CELL_KERNEL, Convolution, ModelSpec
from fedeq_edge.deq.wellposed import step_size
from fedeq_edge.errors import ExportError

Weights = Mapping[str, NDArray[np.float32]]

# torch.nn.GroupNorm's default, which the reference model uses.
NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Part:
    """A straight-line piece of graph; `prefix` keeps its value names apart from those of other parts."""

    prefix: str
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    # Any: the kind of an attribute depends on the operator; the checker of onnx sees to it.
    def apply(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append one node; the name of its output (chosen here unless given)."""
        output = name or f"{self.prefix}/{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, value: NDArray[np.generic], name: str | None = None) -> str:
        """Append one constant; its name."""
        label = name or f"{self.prefix}/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), label))
        return label


def named_weights(spec: ModelSpec, theta: NDArray[np.float32], head: NDArray[np.float32]) -> Weights:
    """Parameters by name, views of theta (p,) and head (h,). Raises ExportError for a wrong size or NaN."""
    weights: dict[str, NDArray[np.float32]] = {}
    for label, layout, vector in (("theta", theta_layout(spec), theta), ("head", head_layout(spec), head)):
        if vector.shape != (size(layout),):
            raise ExportError(
                f"export: {label} has shape {vector.shape}, this model needs ({size(layout)},); "
                "was it trained with another model?"
            )
        if not np.isfinite(vector).all():
            raise ExportError(f"export: {label} holds NaN or infinity; take the model of an earlier round")
        values = vector.astype(np.float32, copy=False)
        weights |= {slot.name: values[slot.offset : slot.end].reshape(slot.shape) for slot in layout}
    return weights


def stem(spec: ModelSpec, weights: Weights) -> Part:
    """x (batch, *input_shape) -> injection and z_0, both (batch, *state_shape)."""
    part = injection(spec, weights)
    _start(part, spec, weights)
    return part


def injection(spec: ModelSpec, weights: Weights) -> Part:
    """x (batch, *input_shape) -> injection (batch, *state_shape)."""
    part = Part("stem")
    value = _normalised_input(part, spec)
    if spec.stem_width is not None and spec.spatial:
        _two_stages(part, spec, weights, value)
    else:
        _affine(part, spec, weights, value)
    return part


def cell(spec: ModelSpec, weights: Weights) -> Part:
    """z, injection -> f, all (batch, *state_shape): one evaluation."""
    part = Part("cell")
    if spec.cell == "residual":
        _residual_block(part, spec, weights)
    elif spec.spatial:
        mapped = _convolve(part, weights, "cell.weight", None, "z", _cell_stage(spec.channels, spec.channels))
        part.apply("Tanh", part.apply("Add", mapped, "injection"), name="f")
    elif spec.cell == "monotone":
        _forward_backward(part, weights)
    else:
        weight = part.constant(weights["cell.weight"], "cell.weight")
        part.apply("Tanh", part.apply("Gemm", "z", weight, "injection", transB=1), name="f")
    return part


def head(spec: ModelSpec, weights: Weights) -> Part:
    """z_star (batch, *state_shape) -> logits (batch, classes)."""
    part = Part("head")
    weight = part.constant(weights["head.weight"], "head.weight")
    bias = part.constant(weights["head.bias"], "head.bias")
    part.apply("Gemm", _pooled(part, spec), weight, bias, name="logits", transB=1)
    return part


def _normalised_input(part: Part, spec: ModelSpec) -> str:
    value = "x"
    for op, constants in (("Sub", spec.shift), ("Div", spec.scale)):
        if constants:
            value = part.apply(op, value, part.constant(_per_channel(constants, spec.spatial)))
    return value


def _affine(part: Part, spec: ModelSpec, weights: Weights, value: str) -> None:
    if spec.spatial:
        _convolve(part, weights, "stem.map.weight", "stem.map.bias", value, spec.stem_stages[0], name="injection")
        return
    weight = part.constant(weights["stem.map.weight"], "stem.map.weight")
    bias = part.constant(weights["stem.map.bias"], "stem.map.bias")
    part.apply("Gemm", value, weight, bias, name="injection", transB=1)


def _two_stages(part: Part, spec: ModelSpec, weights: Weights, value: str) -> None:
    first, second = spec.stem_stages
    lengths = tuple(first.length(length) for length in spec.input_shape[1:])
    hidden = _convolve(part, weights, "stem.conv1.weight", None, value, first)
    hidden = part.apply("Relu", _group_norm(part, spec, weights, "stem.norm1", hidden, lengths))
    hidden = _convolve(part, weights, "stem.conv2.weight", None, hidden, second)
    _group_norm(part, spec, weights, "stem.norm2", hidden, spec.state_shape[1:], name="injection")


def _start(part: Part, spec: ModelSpec, weights: Weights) -> None:
    """injection -> z_0."""
    if spec.cell == "monotone":
        a = part.constant(np.array(step_size(weights["cell.weight"]), dtype=np.float32))
        part.apply("Relu", part.apply("Mul", "injection", a), name="z_0")
    else:
        part.apply("Tanh" if spec.cell == "contractive" else "Identity", "injection", name="z_0")


def _forward_backward(part: Part, weights: Weights) -> None:
    """relu((1 - a) z + a (W z + u)) as one product: the file's weights do not move, so (1 - a) I + a W is stored."""
    weight = weights["cell.weight"].astype(np.float64)
    a = step_size(weight)
    blended = (1.0 - a) * np.eye(len(weight)) + a * weight
    constant = part.constant(blended.astype(np.float32), "cell.weight")
    part.apply("Relu", part.apply("Gemm", "z", constant, "injection", transB=1, beta=a), name="f")


def _residual_block(part: Part, spec: ModelSpec, weights: Weights) -> None:
    activation, lengths = spec.activation.capitalize(), spec.state_shape[1:]
    outward, back = _cell_stage(spec.channels, spec.inner), _cell_stage(spec.inner, spec.channels)
    hidden = part.apply(activation, _convolve(part, weights, "cell.conv1.weight", None, "z", outward))
    hidden = _group_norm(part, spec, weights, "cell.norm1", hidden, lengths)
    hidden = _convolve(part, weights, "cell.conv2.weight", None, hidden, back)
    update = part.apply("Add", "injection", hidden)
    update = _group_norm(part, spec, weights, "cell.norm2", update, lengths)
    hidden = part.apply(activation, part.apply("Add", "z", update))
    if spec.damping == 1.0:
        _group_norm(part, spec, weights, "cell.norm3", hidden, lengths, name="f")
        return
    image = _group_norm(part, spec, weights, "cell.norm3", hidden, lengths)
    damping = part.constant(np.array(spec.damping, dtype=np.float32))
    part.apply("Add", "z", part.apply("Mul", part.apply("Sub", image, "z"), damping), name="f")


def _pooled(part: Part, spec: ModelSpec) -> str:
    if not spec.spatial:
        return "z_star"
    if spec.pool == 1:
        axes = part.constant(np.arange(2, 2 + spec.spatial, dtype=np.int64))
        return part.apply("ReduceMean", "z_star", axes, keepdims=0)
    kernels, strides = zip(*spec.pool_windows, strict=True)
    grid = part.apply("AveragePool", "z_star", kernel_shape=kernels, strides=strides)
    return part.apply("Flatten", grid, axis=1)


def _convolve(
    part: Part,
    weights: Weights,
    weight: str,
    bias: str | None,
    value: str,
    stage: Convolution,
    *,
    name: str | None = None,
) -> str:
    constants = [part.constant(weights[key], key) for key in (weight, bias) if key is not None]
    spatial = weights[weight].ndim - 2
    return part.apply(
        "Conv",
        value,
        *constants,
        name=name,
        kernel_shape=[stage.kernel] * spatial,
        strides=[stage.stride] * spatial,
        pads=[stage.padding] * (2 * spatial),
    )


def _group_norm(
    part: Part,
    spec: ModelSpec,
    weights: Weights,
    layer: str,
    value: str,
    lengths: Sequence[int],
    *,
    name: str | None = None,
) -> str:
    """GroupNorm with affine weights: every group of channels is one instance of a reshaped tensor."""
    scale, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
    groups = spec.norm_groups(len(scale))
    grouped = part.apply("Reshape", value, part.constant(np.array([0, groups, -1], dtype=np.int64)))
    ones = part.constant(np.ones(groups, dtype=np.float32))
    zeros = part.constant(np.zeros(groups, dtype=np.float32))
    normal = part.apply("InstanceNormalization", grouped, ones, zeros, epsilon=NORM_EPSILON)
    back = part.apply("Reshape", normal, part.constant(np.array([0, len(scale), *lengths], dtype=np.int64)))
    scaled = part.apply("Mul", back, part.constant(_per_channel(scale, len(lengths)), f"{layer}.weight"))
    return part.apply("Add", scaled, part.constant(_per_channel(bias, len(lengths)), f"{layer}.bias"), name=name)


def _per_channel(values: Sequence[float] | NDArray[np.float32], spatial: int) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32).reshape(-1, *(1,) * spatial)


def _cell_stage(inputs: int, outputs: int) -> Convolution:
    return Convolution(inputs=inputs, outputs=outputs, kernel=CELL_KERNEL, stride=1)
