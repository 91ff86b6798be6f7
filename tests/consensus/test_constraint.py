import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize

from fedeq_edge.consensus.constraint import RowBound, feasible, project, row_norms
from fedeq_edge.errors import ConfigError

BLOCK = RowBound(offset=3, rows=4, cols=6, radius=0.9)


def test_rows_end_inside_their_ball_and_the_rest_of_the_vector_is_untouched() -> None:
    vector = np.random.default_rng(0).normal(size=40).astype(np.float32)
    before = vector.copy()
    project(vector, [BLOCK])
    assert feasible(vector, [BLOCK])
    assert (vector[:3] == before[:3]).all()
    assert (vector[27:] == before[27:]).all()


def test_a_row_already_inside_keeps_its_bits_beside_one_that_moves() -> None:
    vector = np.random.default_rng(1).normal(size=40).astype(np.float32)
    vector[3:9] *= 0.01
    inside = vector[3:9].copy()
    project(vector, [BLOCK])
    assert (vector[3:9] == inside).all()
    assert row_norms(vector, BLOCK)[1] == pytest.approx(0.9)


def test_the_projection_is_the_nearest_point_that_a_general_solver_finds() -> None:
    row = np.array([0.9, -0.5, 0.2, 0.05])
    projected = row.copy()
    project(projected, [RowBound(offset=0, rows=1, cols=4, radius=0.8)])
    # split x = u - v with u, v >= 0: the l1 ball becomes linear
    found = minimize(
        lambda uv: float(((uv[:4] - uv[4:] - row) ** 2).sum()),
        np.full(8, 0.05),
        bounds=[(0, None)] * 8,
        constraints={"type": "ineq", "fun": lambda uv: 0.8 - uv.sum()},
        tol=1e-12,
    )
    assert projected == pytest.approx(found.x[:4] - found.x[4:], abs=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    x=hnp.arrays(np.float64, 15, elements=st.floats(-10, 10)),
    y=hnp.arrays(np.float64, 15, elements=st.floats(-10, 10)),
)
def test_the_projection_is_idempotent_and_never_moves_two_points_apart(x: np.ndarray, y: np.ndarray) -> None:
    bound = RowBound(offset=0, rows=3, cols=5, radius=1.5)
    apart = np.linalg.norm(x - y)
    project(x, [bound])
    project(y, [bound])
    again = x.copy()
    project(again, [bound])
    assert again == pytest.approx(x, abs=1e-12)
    assert np.linalg.norm(x - y) <= apart + 1e-9


def test_a_mean_of_feasible_vectors_is_feasible() -> None:
    vectors = np.random.default_rng(2).normal(size=(5, 40))
    for vector in vectors:
        project(vector, [BLOCK])
    assert feasible(vectors.mean(axis=0), [BLOCK], tolerance=1e-12)


def test_a_bound_beyond_the_end_of_the_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match="ends at 27, but the vector has 20 entries"):
        project(np.zeros(20), [BLOCK])


@pytest.mark.parametrize("radius", [0.0, -1.0, np.nan, np.inf])
def test_a_bound_without_a_usable_radius_is_refused(radius: float) -> None:
    with pytest.raises(ConfigError, match="radius"):
        RowBound(offset=0, rows=1, cols=1, radius=radius)
