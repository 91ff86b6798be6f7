"""Explicit networks in torch behind the seam that learners know: budgets change nothing, residuals are 0.

They are over flat vectors, as `DEQ` is, so the very same training step drives both.
"""

from collections.abc import Sequence
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedeq_edge.deq.adjoints import AdjointReport
from fedeq_edge.deq.description import Description, Parameter
from fedeq_edge.deq.flat import FlatModule
from fedeq_edge.deq.model import Budget, Output
from fedeq_edge.deq.solution import Result
from fedeq_edge.simulation.networks import ExplicitSpec
from fedeq_edge.training.backend import Matrix, Samples
from fedeq_edge.training.step import Plan, Vector
from fedeq_edge.training.torch_step import FlatBackend


class Explicit(FlatModule):
    """The network that `spec` describes, all parameters zero until `load`.

    theta (p,): all but the head, in the order of its layers; head_vector (h,): weight (classes, features), then bias.
    """

    def __init__(self, spec: ExplicitSpec) -> None:
        super().__init__()
        self.description = describe(spec)
        self.body, self.head = _body(spec), _head(spec)
        self.flatten(self.description.theta_layout, self.description.head_layout)

    def forward(self, x: Tensor, *, budget: Budget, adjoint: object = None) -> Output:
        """Logits of samples x (B, *input_shape), whatever the budget."""
        del budget, adjoint
        features: Tensor = self.body(x)
        zero = torch.zeros(len(x))
        return Output(
            logits=self.head(features),
            features=features,
            state=features.detach(),
            injection=features,
            residual=zero,
            evaluations=torch.ones(len(x), dtype=torch.int64),
            report=AdjointReport(terms=0, residual=0.0, result=Result.CONVERGED),
        )

    def jacobian_penalty(self, output: Output, generator: torch.Generator) -> Tensor:
        """0: there is no cell whose Jacobian could be penalised."""
        del output, generator
        return torch.zeros(())

    def project(self) -> None:
        """Nothing is constrained."""


class ExplicitBackend(FlatBackend[Explicit]):
    """An explicit network in torch on the CPU: a `Backend`. Of the plan, budgets and adjoint have no meaning for it."""

    def __init__(self, spec: ExplicitSpec, plan: Plan) -> None:
        model = Explicit(spec)
        super().__init__(model, model.description, plan)

    def solve(self, x: Samples, forward: int) -> tuple[Matrix, Vector]:
        """(features (B, spec.features), zeros (B,)) of x (B, *input_shape)."""
        return self.solve_each(x, [forward])[0]

    def solve_each(self, x: Samples, budgets: Sequence[int]) -> list[tuple[Matrix, Vector]]:
        """The same for each budget, computed once."""
        with torch.no_grad():
            features: Matrix = self._model.body(torch.from_numpy(x)).numpy()
        return [(features, np.zeros(len(x), np.float32))] * len(budgets)


def describe(spec: ExplicitSpec) -> Description:
    """Where the parameters lie and how they start (deq/initial.py): nothing is bounded, nothing proven.

    Weights ~ N(0, 2 / fan_in), of the head N(0, 1 / fan_in) (He et al. 2015), GroupNorm scales 1, biases 0.
    """
    theta = [_parameter(f"body.{name}", tensor, gain=2.0) for name, tensor in _body(spec).named_parameters()]
    weight, bias = (_parameter(f"head.{name}", tensor, gain=1.0) for name, tensor in _head(spec).named_parameters())
    return Description(input_shape=spec.input_shape, theta=tuple(theta), head=(weight, bias))


def multiplications(spec: ExplicitSpec) -> int:
    """Multiply-adds of one sample's forward pass, head included: what simulated boards' seconds are counted from."""
    body, counted = _body(spec).to("meta"), [spec.features * spec.classes]

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counted.append(layer.weight.numel() * prod(output.shape[2:]))

    for layer in body.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(count)
    body(torch.empty(1, *spec.input_shape, device="meta"))
    return sum(counted)


def _parameter(name: str, tensor: Tensor, *, gain: float) -> Parameter:
    shape = tuple(tensor.shape)
    if len(shape) > 1:
        return Parameter(name=name, shape=shape, deviation=sqrt(gain / prod(shape[1:])))
    # the one layer with a flat weight is GroupNorm
    return Parameter(name=name, shape=shape, start=1.0 if name.endswith("weight") else 0.0)


# ---- layers ------------------------------------------------------------------------------------------------


def _head(spec: ExplicitSpec) -> nn.Linear:
    return nn.Linear(spec.features, spec.classes, device="meta")


def _body(spec: ExplicitSpec) -> nn.Sequential:
    """From samples to features, its parameters not yet in memory."""
    build = {"mlp": _mlp, "cnn": _cnn, "resnet": _resnet}[spec.network]
    return nn.Sequential(_Normalise(spec), *build(spec))


def _mlp(spec: ExplicitSpec) -> list[nn.Module]:
    return [nn.Flatten(), *_dense_layers(prod(spec.input_shape), (*spec.widths, *spec.dense))]


def _cnn(spec: ExplicitSpec) -> list[nn.Module]:
    image = len(spec.input_shape) == 3
    layers: list[nn.Module] = []
    inputs = spec.input_shape[0]
    for width in spec.widths:
        layer, pool = (nn.Conv2d, nn.MaxPool2d) if image else (nn.Conv1d, nn.MaxPool1d)
        layers += [layer(inputs, width, spec.kernel, padding=spec.kernel // 2, device="meta"), nn.ReLU(), pool(2)]
        inputs = width
    return [*layers, nn.Flatten(), *_dense_layers(spec.pooled, spec.dense)]


def _resnet(spec: ExplicitSpec) -> list[nn.Module]:
    first = spec.widths[0]
    layers: list[nn.Module] = [_convolution(spec.input_shape[0], first, 3, 1), _norm(spec, first), nn.ReLU()]
    inputs = first
    for group, (width, count) in enumerate(zip(spec.widths, spec.blocks, strict=True)):
        for block in range(count):
            layers.append(_Block(spec, inputs, width, stride=2 if group and not block else 1))
            inputs = width
    ended = [_norm(spec, spec.dense[-1])] if spec.dense else []
    return [*layers, _GlobalMean(), *_dense_layers(inputs, spec.dense), *ended]


def _dense_layers(inputs: int, widths: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width, device="meta"), nn.ReLU()]
        inputs = width
    return layers


class _Normalise(nn.Module):
    """(x - shift) / scale, per channel."""

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: ExplicitSpec) -> None:
        super().__init__()
        per_channel = (-1, *(1,) * (len(spec.input_shape) - 1))
        self.register_buffer("shift", torch.tensor(spec.shift or (0.0,)).reshape(per_channel), persistent=False)
        self.register_buffer("scale", torch.tensor(spec.scale or (1.0,)).reshape(per_channel), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class _Block(nn.Module):
    """relu(shortcut(x) + GN(conv(relu(GN(conv x))))), He et al. 2016."""

    def __init__(self, spec: ExplicitSpec, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.norm1 = _norm(spec, outputs)
        self.conv2 = _convolution(outputs, outputs, 3, 1)
        self.norm2 = _norm(spec, outputs)
        self._stride, self._missing = stride, outputs - inputs
        changes = stride != 1 or inputs != outputs
        self.shortcut = (
            nn.Sequential(_convolution(inputs, outputs, 1, stride), _norm(spec, outputs))
            if changes and spec.shortcut == "projected"
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self._short(x) + self.norm2(self.conv2(inner)))

    def _short(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            projected: Tensor = self.shortcut(x)
            return projected
        if self._stride == 1 and not self._missing:
            return x
        before = self._missing // 2
        return functional.pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, before, self._missing - before))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, device="meta")


def _norm(spec: ExplicitSpec, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(spec.groups, width, device="meta")
