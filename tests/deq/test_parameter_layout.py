"""Flat vectors: what lies where, and how it starts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedeq_edge.consensus.constraint import Constraint, MonotoneBound, RowBound, SpectralBound, feasible
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import cell_weight, constraints, head_layout, size, theta_layout
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec


def test_slots_name_the_parameters_of_the_module_with_their_shapes_in_order(spec: ModelSpec) -> None:
    model = DEQ(spec)
    slots = [*theta_layout(spec), *head_layout(spec)]
    assert {slot.name: slot.shape for slot in slots} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert sum(slot.size for slot in slots) == sum(parameter.numel() for parameter in model.parameters())


def test_slots_lie_one_after_the_other_without_gaps(spec: ModelSpec) -> None:
    for layout in (theta_layout(spec), head_layout(spec)):
        assert [slot.offset for slot in layout] == [0, *(slot.end for slot in layout[:-1])]
        assert size(layout) == layout[-1].end


@pytest.mark.parametrize(
    ("spec", "shared", "personal"),
    [
        (ModelSpec(input_shape=(9, 128), classes=6, stem_kernel=12, stem_stride=4), 6560, 198),
        (
            ModelSpec(
                input_shape=(1, 28, 28),
                classes=10,
                cell="residual",
                stem_kernel=5,
                stem_stride=2,
                stem_width=16,
                pool=2,
            ),
            23728,
            1290,
        ),
    ],
    ids=["activity", "digit writers"],
)
def test_payloads_are_those_of_the_studies(spec: ModelSpec, shared: int, personal: int) -> None:
    assert (size(theta_layout(spec)), size(head_layout(spec))) == (shared, personal)


def test_the_same_seed_gives_the_same_start_and_another_seed_another(spec: ModelSpec) -> None:
    theta, head = initial(spec, 5)
    again, head_again = initial(spec, 5)
    other, _ = initial(spec, 6)
    assert theta.dtype == head.dtype == np.float32
    np.testing.assert_array_equal(theta, again)
    np.testing.assert_array_equal(head, head_again)
    assert not np.array_equal(theta, other)


def test_the_start_lies_in_the_constraint_set(spec: ModelSpec) -> None:
    theta, _ = initial(spec, 0)
    assert feasible(theta, constraints(spec), tolerance=0.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"input_shape": (2, 16)}, RowBound(offset=0, rows=6, cols=18, radius=0.9)),
        ({"input_shape": (2, 16), "norm": "spectral"}, SpectralBound(offset=0, rows=6, cols=6, taps=3, radius=0.9)),
        ({"input_shape": (1, 5, 5), "norm": "spectral"}, SpectralBound(offset=0, rows=6, cols=6, taps=9, radius=0.9)),
        ({"input_shape": (5,), "norm": "spectral"}, SpectralBound(offset=0, rows=6, cols=6, radius=0.9)),
        ({"input_shape": (5,), "cell": "monotone", "radius": 0.5}, MonotoneBound(offset=0, size=6, radius=0.5)),
    ],
)
def test_the_weight_of_a_constrained_cell_is_bounded_as_the_spec_says(
    fields: dict[str, Any], expected: Constraint
) -> None:
    spec = ModelSpec(classes=3, channels=6, **fields)
    (constraint,) = constraints(spec)
    assert constraint == replace(expected, offset=cell_weight(spec).offset)
    assert cell_weight(spec).size == np.prod(constraint.shape)


def test_free_and_residual_cells_are_not_constrained() -> None:
    assert constraints(ModelSpec(input_shape=(2, 16), classes=3, radius=None)) == ()
    assert constraints(ModelSpec(input_shape=(2, 16), classes=3, cell="residual")) == ()


def test_norms_start_as_the_identity_and_biases_at_zero() -> None:
    spec = ModelSpec(input_shape=(1, 8, 8), classes=4, cell="residual", channels=8, groups=2, stem_width=4)
    theta, head = initial(spec, 0)
    for slot in theta_layout(spec):
        if ".norm" in slot.name:
            assert np.all(slot.view(theta) == (1.0 if slot.name.endswith("weight") else 0.0))
    assert not head_layout(spec)[1].view(head).any()


def test_published_convolutions_start_narrower_than_compact_ones() -> None:
    def deviation(activation: str) -> float:
        fields = {"input_shape": (1, 8, 8), "classes": 4, "cell": "residual", "activation": activation}
        spec = ModelSpec(**fields)  # type: ignore[arg-type]  # literal fields from a table
        slot = next(slot for slot in theta_layout(spec) if slot.name == "cell.conv1.weight")
        return float(slot.view(initial(spec, 0)[0]).std())

    assert deviation("softplus") == pytest.approx(0.01, rel=0.05)
    assert deviation("relu") == pytest.approx(0.05, rel=0.05)
