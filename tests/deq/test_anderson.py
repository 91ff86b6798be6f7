"""Anderson acceleration on problems that others published, and on those that broke other implementations."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq.acceleration import Anderson
from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import solve

FLOAT = torch.float64


class Problem(NamedTuple):
    """f, its start and solution (1, n), and limits as in the suite that it is taken from."""

    f: Callable[[Tensor], Tensor]
    start: Tensor
    solution: Tensor
    budget: int
    tol: float
    memory: int
    contracts: bool


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=FLOAT)


def rotations() -> Problem:
    """Seven plane rotations about c: no contraction, so Banach does not help. jaxopt, tests/anderson_test.py."""
    angles = [math.pi / divisor for divisor in (2, 3, 4, 5, 6, 1.27, 1.73)]
    planes = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=FLOAT) for a in angles]
    centre = torch.arange(1.0, 15.0, dtype=FLOAT)
    turn = torch.block_diag(*planes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    start = torch.rand(1, 14, generator=torch.Generator().manual_seed(0), dtype=FLOAT)
    return Problem(lambda z: (z - centre) @ turn.T + centre, start, centre[None], 400, 1e-4, 10, contracts=False)


def affine() -> Problem:
    """M z + b of dimension 200 with spectral radius below 1/2. jaxopt, tests/fixed_point_iteration_test.py."""
    generator = torch.Generator().manual_seed(0)
    M = torch.rand(200, 200, generator=generator, dtype=FLOAT) * 2 - 1
    M = M + M.T
    M = M / (2 * torch.linalg.eigvalsh(M)[-1].abs() + 1e-4)
    b = torch.rand(200, generator=generator, dtype=FLOAT)
    solution = torch.linalg.solve(torch.eye(200, dtype=FLOAT) - M, b)[None]
    return Problem(lambda z: z @ M.T + b, torch.zeros(1, 200, dtype=FLOAT), solution, 100, 1e-6, 5, contracts=True)


def issue_5460(z: Tensor) -> Tensor:
    """scipy gh-5460: plain iteration solves it, acceleration leaves the domain and makes NaN."""
    return torch.log(3.0 / z) / torch.log((0.3 / 1.3) * (3.0 / 1.3) ** (1 / 0.3) * z / (z - 1.0)) + 1.0


THIRDS = row(0.75, 1.0, 1.25)
COSINE = 0.7390851332151607
OMEGA = 0.5671432904097838
PROBLEMS = {
    "geometric (jaxopt)": Problem(
        lambda z: row(0.9, 0.99, 0.999) * z, row(1.0, 0.4, -0.2), torch.zeros(1, 3, dtype=FLOAT), 200, 1e-5, 5, False
    ),
    "neutral cosine (jaxopt)": Problem(
        lambda z: torch.cos(z) + row(0.0, math.pi / 2),
        row(0.3, math.pi / 4),
        row(COSINE, math.pi / 2),
        100,
        1e-6,
        4,
        False,
    ),
    "half (jaxopt)": Problem(lambda z: 0.5 * z + 0.5, row(0.0), row(1.0), 100, 1e-6, 5, contracts=True),
    "rotations (jaxopt)": rotations(),
    "affine (jaxopt)": affine(),
    "square root (scipy)": Problem(
        lambda z: THIRDS * z.clamp_min(0.0).sqrt(), row(0.8, 1.1, 1.1), THIRDS**2, 100, 1e-8, 5, contracts=True
    ),
    "repelling square (scipy)": Problem(
        lambda z: THIRDS * z**2, row(1.1, 1.15, 0.9), 1.0 / THIRDS, 100, 1e-8, 5, contracts=False
    ),
    "repelling double (scipy)": Problem(lambda z: 2.0 * z, row(0.3, 0.15), row(0.0, 0.0), 100, 1e-8, 5, False),
    "Lambert W (scipy)": Problem(
        lambda z: torch.exp(-2.0 * z) / 2.0, row(1.0), row(OMEGA / 2), 100, 1e-12, 5, contracts=True
    ),
    "gh-5460 (scipy)": Problem(issue_5460, row(1.001), row(1.3), 100, 1e-8, 5, contracts=True),
    "cosine (optimistix)": Problem(
        torch.cos, torch.full((1, 28), 0.5, dtype=FLOAT), torch.full((1, 28), COSINE, dtype=FLOAT), 100, 1e-6, 5, True
    ),
    "exponential (optimistix)": Problem(
        lambda z: torch.exp(-z),
        torch.full((1, 28), 0.5, dtype=FLOAT),
        torch.full((1, 28), OMEGA, dtype=FLOAT),
        100,
        1e-6,
        5,
        True,
    ),
}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


@each_problem
@pytest.mark.parametrize("every", [1, 3])
def test_the_battery_of_published_problems_is_solved(problem: Problem, every: int) -> None:
    tol = problem.tol / max(1.0, float(problem.solution.norm()))
    found = solve(
        problem.f,
        problem.start,
        solver=Anderson(memory=problem.memory, every=every),
        budget=problem.budget,
        tol=tol,
    )
    assert found.worst is Result.CONVERGED
    torch.testing.assert_close(found.value, problem.solution, rtol=1e-3, atol=10 * problem.tol)


@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS.values() if p.contracts], ids=[n for n, p in PROBLEMS.items() if p.contracts]
)
def test_plain_iteration_solves_what_contracts(problem: Problem) -> None:
    found = solve(problem.f, problem.start, budget=problem.budget, tol=problem.tol / 10)
    assert found.worst is Result.CONVERGED
    torch.testing.assert_close(found.value, problem.solution, rtol=1e-3, atol=10 * problem.tol)


def slow_cell(scale: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A float32 tanh cell with |W|_2 = 0.98, symmetric, and activations of the given size."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 64, generator=generator)
    W = (W + W.T) / 2
    W = 0.98 * W / torch.linalg.matrix_norm(W, 2)
    inputs = scale * torch.randn(8, 64, generator=generator)
    return lambda z: torch.tanh(z @ W + inputs), torch.zeros(8, 64)


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("every", [1, 3])
def test_a_slow_cell_is_accelerated_at_every_scale_of_its_activations(scale: float, every: int) -> None:
    f, z0 = slow_cell(scale)
    plain = solve(f, z0, solver=Picard(), budget=30, tol=None)
    accelerated = solve(f, z0, solver=Anderson(every=every), budget=30, tol=None)
    assert (accelerated.residual < 0.2 * plain.residual).all()


def test_acceleration_saves_evaluations() -> None:
    f, z0 = slow_cell(0.1)
    plain = solve(f, z0, solver=Picard(), budget=400, tol=1e-3)
    accelerated = solve(f, z0, solver=Anderson(every=3), budget=400, tol=1e-3)
    assert 2 * accelerated.spent < plain.spent


def test_one_wild_sample_does_not_clear_the_history_of_others() -> None:
    f, z0 = slow_cell(0.1)
    alone = solve(f, z0, solver=Anderson(), budget=30, tol=1e-3)

    def with_wild(z: Tensor) -> Tensor:
        return torch.cat([f(z[:-1]), 1e20 * z[-1:] + 1.0])

    together = solve(with_wild, torch.cat([z0, torch.ones(1, 64)]), solver=Anderson(), budget=30, tol=1e-3)
    assert together.evaluations[:-1].tolist() == alone.evaluations.tolist()
    torch.testing.assert_close(together.value[:-1], alone.value, rtol=1e-4, atol=1e-6)
    assert together.result[-1] != Result.CONVERGED


def test_a_constant_map_makes_a_singular_system_and_no_error() -> None:
    found = solve(torch.ones_like, torch.zeros(2, 4), solver=Anderson(), budget=8, tol=None)
    assert (found.value == 1.0).all()


def test_the_best_evaluation_is_returned() -> None:
    steps = iter([0.5, 0.1, 3.0, 9.0, 70.0])
    start = torch.ones(1, 1, dtype=FLOAT)
    found = solve(lambda z: z + next(steps), start, solver=Anderson(every=2), budget=5, tol=None)
    assert float(found.residual) == pytest.approx(0.1 / 1.6)
    assert float(found.state) == pytest.approx(1.5)
    assert float(found.value) == pytest.approx(1.6)
