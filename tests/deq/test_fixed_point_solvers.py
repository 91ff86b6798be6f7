"""The driver of all solvers: exact budgets, samples that do not influence one another, results as data."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq.solution import Result, Solution
from fedeq_edge.deq.solvers import Anderson, Picard, Solver, iterate, relative_residual, solve
from fedeq_edge.errors import ConfigError, SolverError

SOLVERS = [Picard(), Picard(damping=0.7), Anderson(), Anderson(every=3), Anderson(memory=2, mixing=0.8)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


class Counted:
    """A map that counts its evaluations."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.f(z)


def linear_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(A, b) with |A|_2 = 0.8 and six samples."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(9, 9, generator=generator, dtype=dtype)
    return 0.8 * A / torch.linalg.matrix_norm(A, 2), torch.randn(6, 9, generator=generator, dtype=dtype)


def slow_batch() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Scalar maps of contraction rates 0.1 to 0.9, all with fixed point 1, one per sample."""
    rates = torch.tensor([[0.1], [0.3], [0.5], [0.7], [0.9]], dtype=torch.float64)
    return lambda z: 1.0 + rates * (z - 1.0), torch.full((5, 1), 3.0, dtype=torch.float64)


@every_solver
def test_a_linear_cell_is_solved_in_closed_form(solver: Solver) -> None:
    A, b = linear_problem()
    solution = solve(lambda z: z @ A.T + b, torch.zeros_like(b), solver=solver, budget=300, tol=1e-12)
    exact = torch.linalg.solve(torch.eye(9, dtype=torch.float64) - A, b.T).T
    assert (solution.result == Result.CONVERGED).all()
    torch.testing.assert_close(solution.value, exact, rtol=1e-9, atol=1e-9)


@every_solver
@pytest.mark.parametrize("tol", [0.0, 1e-14])
@pytest.mark.parametrize("budget", range(1, 13))
def test_the_budget_is_spent_exactly(solver: Solver, tol: float, budget: int) -> None:
    A, b = linear_problem()
    f, z0 = Counted(lambda z: z @ A.T + b), torch.zeros_like(b)
    solution = solve(f, z0, solver=solver, budget=budget, tol=tol)
    assert f.calls == solution.spent == budget
    assert solution.evaluations.tolist() == [budget] * len(b)
    assert (solution.result == Result.BUDGET_SPENT).all()
    assert not torch.equal(solution.value, z0)


@every_solver
@pytest.mark.parametrize("evaluations", range(7))
def test_iterating_spends_exactly_that_many_and_ends_where_a_solve_does(solver: Solver, evaluations: int) -> None:
    f = Counted(torch.cos)
    z0 = torch.full((2, 3), 0.2, dtype=torch.float64)
    z = iterate(f, z0, evaluations=evaluations, solver=solver)
    assert f.calls == evaluations
    if isinstance(solver, Picard) and solver.damping < 1.0:
        return  # iterate gives the damped point to go on from, solve the last f(z)
    expected = solve(torch.cos, z0, solver=solver, budget=evaluations, tol=0.0).value if evaluations else z0
    torch.testing.assert_close(z, expected, rtol=0, atol=0)


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 60])
def test_picard_counts_and_answers_as_the_exported_loop_does(budget: int) -> None:
    f, z = slow_batch()
    tol = 1e-3
    found = solve(f, z, budget=budget, tol=tol)
    residual, evaluations = torch.full((5,), torch.inf, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    for _ in range(budget):
        done, fz = residual <= tol, f(z)
        measured = (fz - z).norm(dim=1) / fz.norm(dim=1).clamp_min(1e-6)
        z, residual = torch.where(done[:, None], z, fz), torch.where(done, residual, measured)
        evaluations += ~done
        if bool((residual <= tol).all()):
            break
    torch.testing.assert_close(found.value, z, rtol=0, atol=0)
    torch.testing.assert_close(found.residual, residual, rtol=0, atol=0)
    assert found.evaluations.tolist() == evaluations.tolist()


@every_solver
def test_faster_samples_stop_earlier_and_keep_their_answer(solver: Solver) -> None:
    f, z0 = slow_batch()
    solution = solve(f, z0, solver=solver, budget=400, tol=1e-6)
    assert (solution.result == Result.CONVERGED).all()
    assert solution.spent == solution.evaluations.max() <= 400
    if isinstance(solver, Picard):
        assert sorted(solution.evaluations.tolist()) == solution.evaluations.tolist()
        assert solution.evaluations[0] < solution.evaluations[-1]


@every_solver
def test_a_sample_is_solved_alike_alone_and_in_any_batch(solver: Solver) -> None:
    A, b = linear_problem()

    def cell(inputs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.tanh(z @ A.T + inputs)

    b = b * torch.tensor([[5.0], [0.01], [1.0], [0.1], [3.0], [0.3]], dtype=torch.float64)
    together = solve(cell(b), torch.zeros_like(b), solver=solver, budget=80, tol=1e-6)
    for i in range(len(b)):
        alone = solve(cell(b[i : i + 1]), torch.zeros(1, 9, dtype=torch.float64), solver=solver, budget=80, tol=1e-6)
        assert alone.evaluations[0] == together.evaluations[i]
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-9, atol=1e-9)


@every_solver
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_does_not_disturb_its_batch_mates(solver: Solver, poison: float) -> None:
    A, b = linear_problem()
    clean = solve(lambda z: z @ A.T + b, torch.zeros_like(b), solver=solver, budget=80, tol=1e-6)
    spoilt = b.clone()
    spoilt[2] = poison
    found = solve(lambda z: z @ A.T + spoilt, torch.zeros_like(b), solver=solver, budget=80, tol=1e-6)
    mates = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found.value[mates], clean.value[mates], rtol=1e-12, atol=1e-12)
    assert found.evaluations[mates].tolist() == clean.evaluations[mates].tolist()
    assert (found.result[mates] == Result.CONVERGED).all()
    assert found.result[2] == Result.NON_FINITE
    assert found.evaluations[2] == found.spent == 80
    assert found.residual[2] == math.inf
    assert (found.value[2] == 0.0).all(), "the last finite state is the start"


@every_solver
def test_a_nan_that_comes_later_leaves_the_last_finite_state(solver: Solver) -> None:
    calls = [0]

    def f(z: Tensor) -> Tensor:
        calls[0] += 1
        fz = torch.cos(z)
        if calls[0] >= 4:
            fz[0] = math.nan
        return fz

    solution = solve(f, torch.zeros(2, 1, dtype=torch.float64), solver=solver, budget=9, tol=1e-12)
    assert torch.isfinite(solution.value).all()
    assert torch.isfinite(solution.residual).all()
    assert solution.result[0] == Result.NON_FINITE
    assert solution.result[1] != Result.NON_FINITE


def test_plain_iteration_of_an_expanding_map_is_called_diverged() -> None:
    factors = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    solution = solve(lambda z: factors * z + 1.0, torch.ones(2, 1, dtype=torch.float64), budget=30, tol=1e-6)
    assert solution.result.tolist() == [Result.DIVERGED, Result.CONVERGED]
    assert solution.worst is Result.DIVERGED


def test_an_overflow_is_called_non_finite_and_gives_a_finite_state() -> None:
    factors = torch.tensor([[1e30], [0.5]])
    solution = solve(lambda z: factors * z, torch.ones(2, 1), budget=30, tol=1e-6)
    assert solution.result[0] == Result.NON_FINITE
    assert torch.isfinite(solution.value).all()


@every_solver
def test_a_start_at_the_fixed_point_takes_one_evaluation(solver: Solver) -> None:
    solution = solve(torch.zeros_like, torch.zeros(2, 4), solver=solver, budget=8, tol=1e-4)
    assert solution.spent == 1
    assert (solution.result == Result.CONVERGED).all()
    assert (solution.value == 0.0).all()


def test_checking_seldom_notices_later_and_counts_what_was_spent() -> None:
    f, z0 = slow_batch()
    each = solve(f, z0, budget=400, tol=1e-6)
    fourth = solve(f, z0, budget=400, tol=1e-6, check_every=4)
    rounded_up = 4 * torch.ceil(each.evaluations / 4).long()
    assert fourth.evaluations.tolist() == rounded_up.tolist()


def test_the_reported_residual_belongs_to_the_state_before_the_answer() -> None:
    z0 = torch.full((1, 2), 0.3, dtype=torch.float64)
    before = iterate(torch.cos, z0, evaluations=4)
    solution = solve(torch.cos, z0, budget=5, tol=0.0)
    torch.testing.assert_close(solution.residual, relative_residual(before, solution.value))


@every_solver
def test_solving_records_no_graph(solver: Solver) -> None:
    weight = torch.full((1,), 0.5, requires_grad=True)
    solution = solve(lambda z: weight * z + 1.0, torch.zeros(2, 1), solver=solver, budget=3)
    assert not solution.value.requires_grad


def test_throwing_names_the_samples_and_the_remedy() -> None:
    f, z0 = slow_batch()
    with pytest.raises(SolverError, match=r"2 of 5 samples .* in 30 evaluations .* raise the budget"):
        solve(f, z0, budget=30, tol=1e-6, throw=True)
    assert isinstance(solve(f, z0, budget=400, tol=1e-6, throw=True), Solution)


def test_throwing_for_nan_says_so() -> None:
    with pytest.raises(SolverError, match=r"none finite.*NaN or infinity"):
        solve(lambda z: z * math.nan, torch.ones(1, 1), budget=3, throw=True)


def test_impossible_limits_and_settings_are_refused() -> None:
    z0 = torch.zeros(1, 1)
    for budget, tol in ((0, 1e-4), (1, -1.0), (1, math.nan)):
        with pytest.raises(ConfigError, match="solve:"):
            solve(torch.cos, z0, budget=budget, tol=tol)
    with pytest.raises(ConfigError, match="check_every 0"):
        solve(torch.cos, z0, budget=1, check_every=0)
    with pytest.raises(ConfigError, match="damping"):
        Picard(damping=0.0)
    with pytest.raises(ConfigError, match="memory 0"):
        Anderson(memory=0)
    with pytest.raises(ConfigError, match="ridge > 0"):
        Anderson(ridge=0.0)
