"""The convex sets of well-posed weights: feasible, nearest, idempotent, and closed under averages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import minimize

from fedeq_edge.consensus.constraint import Constraint, MonotoneBound, RowBound, SpectralBound, feasible, project
from fedeq_edge.errors import ConfigError

Array = NDArray[np.float64]

BLOCK = RowBound(offset=3, rows=4, cols=6, radius=0.9)
SETS = [
    BLOCK,
    SpectralBound(offset=3, rows=5, cols=5, radius=0.9),
    SpectralBound(offset=3, rows=3, cols=4, taps=3, radius=0.7),
    MonotoneBound(offset=3, size=6, radius=0.5),
]
every_set = pytest.mark.parametrize(
    "constraint", SETS, ids=["rows", "dense spectral", "convolutional spectral", "monotone"]
)
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def drawn(constraint: Constraint, seed: int, width: float = 1.0) -> Array:
    """A vector that holds the block and ten numbers more."""
    size = int(np.prod(constraint.shape))
    return np.random.default_rng(seed).normal(0.0, width, size + 10)


def projected(constraint: Constraint, vector: Array) -> Array:
    moved = vector.copy()
    project(moved, [constraint])
    return moved


@every_set
@pytest.mark.parametrize("width", [1e-3, 0.2, 1.0, 1e3])
def test_a_float32_block_ends_inside_exactly_and_stays_there_bit_for_bit(constraint: Constraint, width: float) -> None:
    for seed in range(10):
        vector = drawn(constraint, seed, width).astype(np.float32)
        before = vector.copy()
        project(vector, [constraint])
        assert feasible(vector, [constraint], tolerance=0.0)
        again = vector.copy()
        project(again, [constraint])
        assert (again == vector).all()
        assert (vector[:3] == before[:3]).all()
        assert (vector[-7:] == before[-7:]).all()


@every_set
def test_what_is_inside_keeps_its_bits(constraint: Constraint) -> None:
    vector = projected(constraint, drawn(constraint, 0)) * 0.999
    assert (projected(constraint, vector) == vector).all()


def test_a_row_already_inside_keeps_its_bits_beside_one_that_moves() -> None:
    vector = drawn(BLOCK, 1)
    vector[3:9] *= 0.01
    moved = projected(BLOCK, vector)
    assert (moved[3:9] == vector[3:9]).all()
    assert np.abs(moved[9:15]).sum() == pytest.approx(0.9)


def test_a_tap_that_holds_less_than_each_other_gives_up_vanishes() -> None:
    constraint = SpectralBound(offset=0, rows=3, cols=3, taps=3, radius=1.0)
    block = np.random.default_rng(0).normal(size=constraint.shape)
    block[..., 0] *= 1e-3
    moved = projected(constraint, block.reshape(-1)).reshape(block.shape)
    before, after = (np.linalg.svd(np.moveaxis(b, 2, 0), compute_uv=False) for b in (block, moved))
    assert after[0] == pytest.approx(0.0, abs=1e-12)
    given = (before - after).sum(axis=1)
    assert given[1] == pytest.approx(given[2])
    assert given[0] < given[1]


@every_set
def test_no_random_point_of_the_set_is_nearer(constraint: Constraint) -> None:
    """The variational inequality <x - p, y - p> <= 0 holds for every y of a convex set at the nearest point p alone."""
    outside = drawn(constraint, 2)
    nearest = projected(constraint, outside)
    assert constraint.level(block_of(constraint, nearest)) == pytest.approx(constraint.radius, rel=1e-12)
    for seed in range(300):
        other = projected(constraint, drawn(constraint, 100 + seed, 10 ** np.random.default_rng(seed).uniform(-2, 1)))
        other[[0, 1, 2, *range(-7, 0)]] = nearest[[0, 1, 2, *range(-7, 0)]]
        assert (outside - nearest) @ (other - nearest) <= 1e-9


def block_of(constraint: Constraint, vector: Array) -> Array:
    return vector[constraint.offset : constraint.offset + int(np.prod(constraint.shape))].reshape(constraint.shape)


def test_the_rows_are_where_a_general_solver_puts_them() -> None:
    row = np.array([0.9, -0.5, 0.2, 0.05])
    moved = projected(RowBound(offset=0, rows=1, cols=4, radius=0.8), row)
    # split x = u - v with u, v >= 0: the l1 ball becomes linear
    found = minimize(
        lambda uv: float(((uv[:4] - uv[4:] - row) ** 2).sum()),
        np.full(8, 0.05),
        bounds=[(0, None)] * 8,
        constraints={"type": "ineq", "fun": lambda uv: 0.8 - uv.sum()},
        tol=1e-12,
    )
    assert moved == pytest.approx(found.x[:4] - found.x[4:], abs=1e-5)


def test_the_singular_values_are_where_a_general_solver_puts_them() -> None:
    """Diagonal taps: the l1,infinity ball written with one cap per tap, which makes it linear."""
    values = np.array([[2.0, 1.5, 0.1], [0.7, 0.6, 0.5], [0.2, 0.1, 0.0]])
    block = np.stack([np.diag(tap) for tap in values], axis=2)
    constraint = SpectralBound(offset=0, rows=3, cols=3, taps=3, radius=1.2)
    moved = projected(constraint, block.reshape(-1)).reshape(3, 3, 3)
    found = minimize(
        lambda x: float(((x[3:].reshape(3, 3) - values) ** 2).sum()),
        np.full(12, 0.1),
        constraints=[
            {"type": "ineq", "fun": lambda x: 1.2 - x[:3].sum()},
            {"type": "ineq", "fun": lambda x: (x[:3, None] - x[3:].reshape(3, 3)).reshape(-1)},
            {"type": "ineq", "fun": lambda x: x},
        ],
        tol=1e-14,
    )
    assert np.stack([np.diag(moved[..., tap]) for tap in range(3)]) == pytest.approx(
        found.x[3:].reshape(3, 3), abs=1e-4
    )


def test_a_dense_spectral_projection_clips_singular_values_and_a_monotone_one_eigenvalues() -> None:
    matrix = np.random.default_rng(3).normal(size=(6, 6))
    left, values, right = np.linalg.svd(matrix)
    clipped = projected(SpectralBound(offset=0, rows=6, cols=6, radius=0.8), matrix.reshape(-1)).reshape(6, 6)
    assert clipped == pytest.approx((left * np.minimum(values, 0.8)) @ right, abs=1e-12)
    moved = projected(MonotoneBound(offset=0, size=6, radius=0.8), matrix.reshape(-1)).reshape(6, 6)
    assert moved - moved.T == pytest.approx(matrix - matrix.T, abs=1e-12)
    before, after = (np.linalg.eigvalsh((m + m.T) / 2) for m in (matrix, moved))
    assert after == pytest.approx(np.minimum(before, 0.8), abs=1e-12)


@every_set
@quick
@given(data=st.data())
def test_the_projection_is_idempotent_and_never_moves_two_points_apart(
    constraint: Constraint, data: st.DataObject
) -> None:
    size = 3 + int(np.prod(constraint.shape))
    x, y = (data.draw(hnp.arrays(np.float64, size, elements=st.floats(-10, 10))) for _ in range(2))
    onto_x, onto_y = projected(constraint, x), projected(constraint, y)
    assert projected(constraint, onto_x) == pytest.approx(onto_x, abs=1e-12)
    assert np.linalg.norm(onto_x - onto_y) <= np.linalg.norm(x - y) + 1e-9


@every_set
@quick
@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5))
def test_a_weighted_mean_of_points_of_the_set_lies_in_it(
    constraint: Constraint, seed: int, weights: list[float]
) -> None:
    points = [projected(constraint, drawn(constraint, seed + i)) for i in range(len(weights))]
    assert feasible(np.average(points, axis=0, weights=weights), [constraint], tolerance=1e-12)


def test_averaging_the_factors_of_a_monotone_weight_is_not_averaging_the_weight() -> None:
    """Why W itself is fused: W = (1 - m) I - A'A + B - B' is quadratic in A, so the mean of A is another model."""

    def weight(A: Array, B: Array) -> Array:
        return 0.5 * np.eye(4) - A.T @ A + B - B.T

    first, second = np.random.default_rng(4).normal(size=(2, 2, 4, 4))
    fused = (weight(*first) + weight(*second)) / 2
    factors = weight(*(first + second) / 2)
    assert feasible(fused.reshape(-1), [MonotoneBound(offset=0, size=4, radius=0.5)], tolerance=1e-12)
    gap = (first[0] - second[0]) / 2
    assert factors - fused == pytest.approx(gap.T @ gap, abs=1e-12)
    assert np.linalg.norm(factors - fused) > 0.5 * np.linalg.norm(fused)
    # A and -A are one model, and their mean is another
    assert weight(0 * first[0], first[1]) != pytest.approx(weight(first[0], first[1]), abs=0.1)


@every_set
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_that_is_not_finite_stays_as_it_is(constraint: Constraint, value: float) -> None:
    vector = drawn(constraint, 5)
    vector[5] = value
    np.testing.assert_array_equal(projected(constraint, vector), vector)


def test_a_constraint_beyond_the_end_of_the_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match="ends at 27, but the vector has 20 entries"):
        project(np.zeros(20), [BLOCK])


@pytest.mark.parametrize("radius", [0.0, -1.0, np.nan, np.inf])
def test_a_constraint_without_a_usable_radius_is_refused(radius: float) -> None:
    with pytest.raises(ConfigError, match="radius"):
        RowBound(offset=0, rows=1, cols=1, radius=radius)
    with pytest.raises(ConfigError, match="radius"):
        MonotoneBound(offset=0, size=1, radius=radius)
