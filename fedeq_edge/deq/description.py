"""What training needs of a model besides its formula: where parameters lie, how they start, what keeps them well posed.

A value that travels inside a training graph (onnx/training.py), which is the formula: a device that has both trains an
architecture of which its program has never heard. Whoever has the spec makes it with `describe`.

A reader passes over fields that it does not know, so that a later minor version may add some.
"""

from collections import Counter
from collections.abc import Mapping
from math import prod, sqrt
from typing import Annotated, Final, get_args

import msgspec

from fedeq_edge.consensus.constraint import Constraint
from fedeq_edge.deq.layout import (
    Layout,
    SetKind,
    Shape,
    Slot,
    cell_weight,
    constraint,
    head_layout,
    set_kind,
    stacked,
    theta_layout,
)
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError

LARGEST_SIZE: Final = 2**24
"""Numbers in theta and head together, and in a sample: a device takes no larger consensus."""
PROOFS: Final[tuple[str, ...]] = get_args(SetKind)
"""Kinds of proof that this version can follow."""
_MOST_PARAMETERS: Final = 1000
# Published: N(0, 0.01^2) with softplus (algorithm.md section 1). The compact ReLU block starts at 0.05.
_RESIDUAL_DEVIATION: Final = {"softplus": 0.01, "relu": 0.05}
# Half of the usual 1/sqrt(fan_in): a dense W then starts near |W|_2 = 1 and its symmetric part near 0.7, so that
# projection only trims it.
_WELL_POSED_GAIN: Final = 0.5

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Length = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_SIZE)]
Sizes = Annotated[tuple[Length, ...], msgspec.Meta(min_length=1, max_length=5)]


class Parameter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One array. It starts as N(0, deviation^2) where deviation > 0, else as `start` everywhere."""

    name: Name
    shape: Sizes
    start: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)] = 0.0
    deviation: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 0.0


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """The convex set (consensus/constraint.py) in which a parameter of theta is kept, by projection after every step.

    Taps, where there are any, are the parameter's last axes.
    """

    kind: SetKind
    parameter: Name
    radius: float


class Proof(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why the cell contracts: `wellposed.proven` has the argument of each kind, by the layer W that is `parameter`.

    lengths: of a state in its spatial dimensions, for a spectral one. A reader that does not know the kind certifies
    nothing.
    """

    kind: Name
    parameter: Name
    lengths: tuple[Length, ...] = ()


class Description(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model without its formula. Raises ConfigError where the parts do not fit.

    input_shape: of one sample. theta, head: what lies in the flat vectors, in order; head: weight (classes, features)
    and bias (classes,) of the last, linear layer. step_size: the W of a monotone cell, for which each step needs
    `wellposed.step_size`; empty in all others.
    """

    input_shape: Sizes
    theta: Annotated[tuple[Parameter, ...], msgspec.Meta(min_length=1, max_length=_MOST_PARAMETERS)]
    head: tuple[Parameter, Parameter]
    bounds: Annotated[tuple[Bound, ...], msgspec.Meta(max_length=_MOST_PARAMETERS)] = ()
    proof: Proof | None = None
    step_size: str = ""

    def __post_init__(self) -> None:
        """Refuse what nobody could train."""
        _check_names(self)
        _check_sizes(self)
        _check_layers(self)

    @property
    def classes(self) -> int:
        """Numbers of a sample's logits."""
        return self.head[0].shape[0]

    @property
    def features(self) -> int:
        """Numbers per sample that the head reads."""
        return self.head[0].shape[1]

    @property
    def theta_layout(self) -> Layout:
        """Slots of theta."""
        return stacked((parameter.name, parameter.shape) for parameter in self.theta)

    @property
    def head_layout(self) -> Layout:
        """Slots of the head."""
        return stacked((parameter.name, parameter.shape) for parameter in self.head)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The sets in which theta is kept."""
        return tuple(constraint(bound.kind, self.slot(bound.parameter), bound.radius) for bound in self.bounds)

    def slot(self, name: str) -> Slot:
        """The slot of that parameter of theta."""
        return next(slot for slot in self.theta_layout if slot.name == name)


def describe(spec: ModelSpec) -> Description:
    """The description of the model that `spec` stands for."""
    kind = set_kind(spec)
    weight = "" if kind is None else cell_weight(spec).name
    return Description(
        input_shape=spec.input_shape,
        theta=tuple(_parameter(spec, slot) for slot in theta_layout(spec)),
        head=tuple(_parameter(spec, slot) for slot in head_layout(spec)),  # type: ignore[arg-type]  # two of them
        bounds=() if kind is None or spec.radius is None else (Bound(kind=kind, parameter=weight, radius=spec.radius),),
        proof=None if kind is None else _proof(spec, kind, weight),
        step_size=weight if kind == "monotone" else "",
    )


def _proof(spec: ModelSpec, kind: SetKind, weight: str) -> Proof:
    return Proof(kind=kind, parameter=weight, lengths=spec.state_shape[1:] if kind == "spectral" else ())


def _parameter(spec: ModelSpec, slot: Slot) -> Parameter:
    if not slot.name.endswith("weight"):
        return Parameter(name=slot.name, shape=slot.shape)
    if ".norm" in slot.name:
        return Parameter(name=slot.name, shape=slot.shape, start=1.0)
    return Parameter(name=slot.name, shape=slot.shape, deviation=_deviation(spec, slot))


def _deviation(spec: ModelSpec, slot: Slot) -> float:
    fan_in = slot.size // slot.shape[0]
    if slot.name == "cell.weight":
        return _WELL_POSED_GAIN / sqrt(fan_in)
    if slot.name.startswith("cell."):
        return _RESIDUAL_DEVIATION[spec.activation]
    return 1.0 / sqrt(fan_in)


def _check_names(described: Description) -> None:
    counted = Counter(parameter.name for parameter in (*described.theta, *described.head))
    twice = [name for name, times in counted.items() if times > 1]
    if twice:
        raise ConfigError(f"description: two parameters are called {twice[0]!r}; give each a name of its own")


def _check_sizes(described: Description) -> None:
    total = sum(prod(parameter.shape) for parameter in (*described.theta, *described.head))
    if max(total, prod(described.input_shape)) > LARGEST_SIZE:
        raise ConfigError(
            f"description: {total} parameters and samples of {described.input_shape}; a device takes {LARGEST_SIZE} "
            "numbers at most, use a smaller model"
        )
    weight, bias = (parameter.shape for parameter in described.head)
    if len(weight) != 2 or bias != weight[:1] or weight[0] < 2:
        raise ConfigError(
            f"description: a head of {weight} and {bias} is no linear layer; give it a weight (classes, features) and "
            "a bias (classes,), of at least 2 classes"
        )


def _check_layers(described: Description) -> None:
    """What is bounded, proven or stepped by is there and of the shape that takes."""
    shapes: dict[str, Shape] = {parameter.name: parameter.shape for parameter in described.theta}
    asked: list[tuple[str, str]] = [(bound.kind, bound.parameter) for bound in described.bounds]
    proof = described.proof
    asked += [(proof.kind, proof.parameter)] if proof is not None and proof.kind in PROOFS else []
    asked += [("monotone", described.step_size)] if described.step_size else []
    for kind, name in asked:
        shape = shapes.get(name, ())
        square = len(shape) == 2 and shape[0] == shape[1]
        if len(shape) < 2 or (kind == "monotone" and not square):
            raise ConfigError(f"description: {kind} needs a layer, and {name!r} has shape {shape}; name another")
    _check_state(proof, shapes)
    described.constraints  # noqa: B018  # refuses a radius that is none


def _check_state(proof: Proof | None, shapes: Mapping[str, Shape]) -> None:
    """A spectral norm is of a layer over states that a device can hold."""
    if proof is None or proof.kind != "spectral":
        return
    shape = shapes[proof.parameter]
    if len(proof.lengths) != len(shape) - 2 or shape[0] * prod(proof.lengths) > LARGEST_SIZE:
        raise ConfigError(
            f"description: states of {proof.lengths} do not fit the layer {proof.parameter!r} of shape {shape}; give a "
            "length for each dimension of its taps"
        )
