"""The layers of an equilibrium model: a stem computes the injection once, a cell's `step` is one evaluation of f.

Nothing that the loop leaves unchanged happens inside `step`. Parameters are made on the meta device, which draws no
random numbers; `model.DEQ` puts views of its flat vectors in their place. z, injection: shape (B, *spec.state_shape).
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedeq_edge.deq.adjoints import AdjointStep
from fedeq_edge.deq.spec import CELL_KERNEL, Convolution, ModelSpec
from fedeq_edge.deq.wellposed import step_size

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "softplus": functional.softplus}


class Cell(Protocol):
    """One equilibrium layer z = f(z, injection), batched: samples do not influence one another."""

    def start(self, injection: Tensor) -> Tensor:
        """z_0."""
        ...

    def step(self, z: Tensor, injection: Tensor) -> Tensor:
        """f(z, injection): the unit in which budgets count."""
        ...


@runtime_checkable
class LinearisableCell(Cell, Protocol):
    """A cell whose products with J^T = (df/dz)^T have a formula: backward then needs no graph of z."""

    def linearise(self, value: Tensor) -> AdjointStep:
        """(v, u) -> v + J^T u at the z with f(z, injection) = `value` (B, ...)."""
        ...


class Stem(nn.Module):
    """From samples x (B, *input_shape) to the injection: fixed normalisation, then the learned map."""

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.normalises = bool(spec.shift or spec.scale)
        self.register_buffer("shift", _per_channel(spec.shift or (0.0,), spec.spatial), persistent=False)
        self.register_buffer("scale", _per_channel(spec.scale or (1.0,), spec.spatial), persistent=False)

    def normalise(self, x: Tensor) -> Tensor:
        """(x - shift) / scale, per channel."""
        return (x - self.shift) / self.scale if self.normalises else x


class AffineStem(Stem):
    """u = U x + b with U dense or one strided convolution."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.map = (
            _convolution(spec.stem_stages[0], spec.spatial, bias=True)
            if spec.spatial
            else nn.Linear(spec.input_shape[0], spec.channels, device="meta")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Injection (B, *state_shape)."""
        injection: Tensor = self.map(self.normalise(x))
        return injection


class TwoStageStem(Stem):
    """u = GN(conv(relu(GN(conv x)))), both convolutions strided and without bias."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        first, second = spec.stem_stages
        self.conv1 = _convolution(first, spec.spatial, bias=False)
        self.norm1 = _norm(spec, first.outputs)
        self.conv2 = _convolution(second, spec.spatial, bias=False)
        self.norm2 = _norm(spec, second.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Injection (B, *state_shape)."""
        hidden = torch.relu(self.norm1(self.conv1(self.normalise(x))))
        injection: Tensor = self.norm2(self.conv2(hidden))
        return injection


class ContractiveCell(nn.Module):
    """f(z, u) = tanh(W * z + u): a contraction while theta is constrained (wellposed.py). The stem carries the bias."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        taps = (CELL_KERNEL,) * spec.spatial
        self.weight = nn.Parameter(torch.empty(spec.channels, spec.channels, *taps, device="meta"))
        self._linear = (_dense, _conv1d, _conv2d)[spec.spatial]
        self._transposed = (_dense_transposed, _conv1d_transposed, _conv2d_transposed)[spec.spatial]

    def start(self, injection: Tensor) -> Tensor:
        """tanh(u): the answer without W, within gamma of the fixed point and free of an evaluation."""
        return torch.tanh(injection)

    def step(self, z: Tensor, injection: Tensor) -> Tensor:
        """tanh(W * z + u)."""
        return torch.tanh(self._linear(z, self.weight, injection))

    def linearise(self, value: Tensor) -> AdjointStep:
        """J^T u = W^T * (u (1 - value^2)): one fused product, or one transposed convolution."""
        slope, weight, transposed = 1.0 - value * value, self.weight.detach(), self._transposed
        return lambda v, u: transposed(v, u * slope, weight)


class MonotoneCell(nn.Module):
    """z = relu(W z + u), solved by f_a(z, u) = relu((1 - a) z + a (W z + u)): the same z* for every step a > 0.

    Forward-backward splitting of a monotone inclusion: a contraction while theta is constrained, even where |W| > 1
    (wellposed.py; Winston & Kolter, NeurIPS 2020). W is used as it travels, a is a scalar of each product.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.channels, spec.channels, device="meta"))
        self.step_size = 1.0

    def choose_step(self) -> None:
        """a is the one for the present W: to be called whenever W has moved, or f_a may stop contracting."""
        self.step_size = step_size(self.weight.detach().numpy())

    def start(self, injection: Tensor) -> Tensor:
        """relu(a u) = f_a(0): an evaluation from zero that costs none."""
        return torch.relu(self.step_size * injection)

    def step(self, z: Tensor, injection: Tensor) -> Tensor:
        """relu((1 - a) z + a (W z + u))."""
        a = self.step_size
        return torch.addmm(injection, z, self.weight.t(), beta=a, alpha=a).add_(z, alpha=1.0 - a).relu_()

    def linearise(self, value: Tensor) -> AdjointStep:
        """J^T u = (1 - a) u_+ + a W^T u_+, where u_+ is u at the states above 0."""
        a, above, weight = self.step_size, value > 0.0, self.weight.detach()

        def adjoint(v: Tensor, u: Tensor) -> Tensor:
            passed = u * above
            return torch.addmm(v, passed, weight, alpha=a).add_(passed, alpha=1.0 - a)

        return adjoint


class ResidualCell(nn.Module):
    """The published block f(z, u) = GN(act(z + GN(u + conv(GN(act(conv z)))))).

    Source: algorithm.md section 1; FeDEQ, arXiv 2309.15659.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        outward = Convolution(inputs=spec.channels, outputs=spec.inner, kernel=CELL_KERNEL, stride=1)
        back = Convolution(inputs=spec.inner, outputs=spec.channels, kernel=CELL_KERNEL, stride=1)
        self.conv1 = _convolution(outward, spec.spatial, bias=False)
        self.norm1 = _norm(spec, spec.inner)
        self.conv2 = _convolution(back, spec.spatial, bias=False)
        self.norm2 = _norm(spec, spec.channels)
        self.norm3 = _norm(spec, spec.channels)
        self._activation = _ACTIVATIONS[spec.activation]
        self._damping = spec.damping

    def start(self, injection: Tensor) -> Tensor:
        """u, as published."""
        return injection

    def step(self, z: Tensor, injection: Tensor) -> Tensor:
        """One pass of the block, and the share `damping` of the way there."""
        hidden = self.norm1(self._activation(self.conv1(z)))
        update = self.norm2(injection + self.conv2(hidden))
        z_next: Tensor = self.norm3(self._activation(z + update))
        return z_next if self._damping == 1.0 else z.lerp(z_next, self._damping)


def build_stem(spec: ModelSpec) -> AffineStem | TwoStageStem:
    """The stem that the spec describes, its parameters not yet in memory."""
    return TwoStageStem(spec) if spec.spatial and spec.stem_width is not None else AffineStem(spec)


def build_cell(spec: ModelSpec) -> ContractiveCell | MonotoneCell | ResidualCell:
    """The cell that the spec describes, its parameters not yet in memory."""
    if spec.cell == "monotone":
        return MonotoneCell(spec)
    return ContractiveCell(spec) if spec.cell == "contractive" else ResidualCell(spec)


def _dense(z: Tensor, weight: Tensor, injection: Tensor) -> Tensor:
    return torch.addmm(injection, z, weight.t())


def _conv1d(z: Tensor, weight: Tensor, injection: Tensor) -> Tensor:
    return functional.conv1d(z, weight, padding=CELL_KERNEL // 2) + injection


def _conv2d(z: Tensor, weight: Tensor, injection: Tensor) -> Tensor:
    return functional.conv2d(z, weight, padding=CELL_KERNEL // 2) + injection


def _dense_transposed(v: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(v, u, weight)


def _conv1d_transposed(v: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    return functional.conv_transpose1d(u, weight, padding=CELL_KERNEL // 2).add_(v)


def _conv2d_transposed(v: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    return functional.conv_transpose2d(u, weight, padding=CELL_KERNEL // 2).add_(v)


def _convolution(stage: Convolution, spatial: int, *, bias: bool) -> nn.Conv1d | nn.Conv2d:
    layer = nn.Conv1d if spatial == 1 else nn.Conv2d
    return layer(stage.inputs, stage.outputs, stage.kernel, stage.stride, stage.padding, bias=bias, device="meta")


def _norm(spec: ModelSpec, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(spec.norm_groups(width), width, device="meta")


def _per_channel(values: tuple[float, ...], spatial: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, *(1,) * spatial)
