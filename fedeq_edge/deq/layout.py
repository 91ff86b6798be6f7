"""Where each parameter lies in the flat vectors theta (stem and cell) and head: needs no torch.

Names are those of `DEQ.named_parameters()`, arrays lie in C order, one after the other, in the order given here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import Constraint, MonotoneBound, RowBound, SpectralBound
from fedeq_edge.deq.spec import CELL_KERNEL, ModelSpec
from fedeq_edge.errors import ConfigError

Shape = tuple[int, ...]
SetKind = Literal["rows", "spectral", "monotone"]
"""The convex sets of well-posed W: `RowBound`, `SpectralBound`, `MonotoneBound`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One parameter: its name, its shape and the place of its first number in the flat vector."""

    name: str
    shape: Shape
    offset: int

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def end(self) -> int:
        """One past its last number in the flat vector."""
        return self.offset + self.size

    def view(self, vector: NDArray[np.floating]) -> NDArray[np.floating]:
        """This parameter's part of a flat vector, in shape, without a copy."""
        return vector[self.offset : self.end].reshape(self.shape)


Layout = tuple[Slot, ...]


def theta_layout(spec: ModelSpec) -> Layout:
    """Slots of theta: the stem's parameters, then the cell's."""
    return stacked([*_stem_shapes(spec), *_cell_shapes(spec)])


def head_layout(spec: ModelSpec) -> Layout:
    """Slots of the head: weight (classes, features), bias (classes,)."""
    return stacked([("head.weight", (spec.classes, spec.features)), ("head.bias", (spec.classes,))])


def size(layout: Layout) -> int:
    """Numbers in the flat vector that the layout describes."""
    return layout[-1].end


def cell_weight(spec: ModelSpec) -> Slot:
    """The slot of W, (channels, channels, *taps), in a contractive or monotone cell."""
    return next(slot for slot in theta_layout(spec) if slot.name == "cell.weight")


def checked(name: str, vector: NDArray[np.floating], layout: Layout) -> NDArray[np.floating]:
    """`vector`, if it holds one finite number for each place of `layout`. Raises ConfigError naming what does not."""
    expected = (size(layout),)
    if vector.shape != expected:
        raise ConfigError(
            f"model: {name} has shape {vector.shape}, this spec needs {expected}; was it made for another model?"
        )
    finite = np.isfinite(vector)
    if not finite.all():
        first = int(np.argmin(finite))
        slot = next(slot for slot in layout if first < slot.end)
        raise ConfigError(
            f"model: {name}: {slot.name} holds {vector[first]}; take the parameters of a round before it diverged"
        )
    return vector


def constraints(spec: ModelSpec) -> tuple[Constraint, ...]:
    """The convex set that keeps the cell well posed, as a condition on its W; none for a residual or a free cell."""
    kind = set_kind(spec)
    return () if kind is None or spec.radius is None else (constraint(kind, cell_weight(spec), spec.radius),)


def set_kind(spec: ModelSpec) -> SetKind | None:
    """By what the W of this cell is well posed; None for a residual cell, which has no such W."""
    if spec.cell == "residual":
        return None
    if spec.cell == "monotone":
        return "monotone"
    return "spectral" if spec.norm == "spectral" else "rows"


def constraint(kind: SetKind, weight: Slot, radius: float) -> Constraint:
    """The set of that kind and radius for a layer (out, in, *taps); a monotone one is square and has no taps."""
    rows, cols, taps = weight.shape[0], weight.shape[1], prod(weight.shape[2:])
    if kind == "monotone":
        return MonotoneBound(offset=weight.offset, size=rows, radius=radius)
    if kind == "spectral":
        return SpectralBound(offset=weight.offset, rows=rows, cols=cols, taps=taps, radius=radius)
    return RowBound(offset=weight.offset, rows=rows, cols=cols * taps, radius=radius)


def _stem_shapes(spec: ModelSpec) -> list[tuple[str, Shape]]:
    stages = spec.stem_stages
    kernels = [(s.outputs, s.inputs, *(s.kernel,) * spec.spatial) for s in stages]
    if not stages:
        return [("stem.map.weight", (spec.channels, *spec.input_shape)), ("stem.map.bias", (spec.channels,))]
    if len(stages) == 1:
        return [("stem.map.weight", kernels[0]), ("stem.map.bias", (spec.channels,))]
    shapes: list[tuple[str, Shape]] = []
    for number, (stage, kernel) in enumerate(zip(stages, kernels, strict=True), start=1):
        shapes += [(f"stem.conv{number}.weight", kernel), *_norm_shapes(f"stem.norm{number}", stage.outputs)]
    return shapes


def _cell_shapes(spec: ModelSpec) -> list[tuple[str, Shape]]:
    taps = (CELL_KERNEL,) * spec.spatial
    if spec.cell != "residual":
        return [("cell.weight", (spec.channels, spec.channels, *taps))]
    return [
        ("cell.conv1.weight", (spec.inner, spec.channels, *taps)),
        *_norm_shapes("cell.norm1", spec.inner),
        ("cell.conv2.weight", (spec.channels, spec.inner, *taps)),
        *_norm_shapes("cell.norm2", spec.channels),
        *_norm_shapes("cell.norm3", spec.channels),
    ]


def _norm_shapes(name: str, width: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def stacked(shapes: Iterable[tuple[str, Shape]]) -> Layout:
    """Slots of those names and shapes, one after the other."""
    slots: list[Slot] = []
    for name, shape in shapes:
        slots.append(Slot(name=name, shape=shape, offset=slots[-1].end if slots else 0))
    return tuple(slots)
