"""The driver of all solvers: exact budgets, samples that do not influence one another, results as data."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.batch import relative_residual
from fedeq_edge.deq.guaranteed import Guaranteed
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.solution import Result, Solution
from fedeq_edge.deq.solvers import iterate, solve
from fedeq_edge.errors import ConfigError, SolverError

SOLVERS = [
    Picard(),
    Picard(check_every=1),
    Picard(damping=0.7),
    Anderson(),
    Anderson(every=1),
    Anderson(memory=2, mixing=0.8, every=2),
    Adaptive(),
    Guaranteed(),
    Guaranteed(accelerated=Adaptive()),
]
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
@pytest.mark.parametrize("tol", [None, 1e-14])
@pytest.mark.parametrize("budget", range(1, 13))
def test_the_budget_is_spent_exactly(solver: Solver, tol: float | None, budget: int) -> None:
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
    expected = solve(torch.cos, z0, solver=solver, budget=evaluations, tol=None).value if evaluations else z0
    torch.testing.assert_close(z, expected, rtol=0, atol=0)


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 60])
def test_picard_counts_and_answers_as_the_exported_loop_does(budget: int) -> None:
    f, z = slow_batch()
    tol = 1e-3
    found = solve(f, z, solver=Picard(check_every=1), budget=budget, tol=tol)
    residual, evaluations = torch.full((5,), torch.inf, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    for _ in range(budget):
        done, fz = residual <= tol, f(z)
        measured = (fz - z).norm(dim=1) / fz.norm(dim=1).clamp_min(1e-9)
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
    z0 = torch.ones(2, 1, dtype=torch.float64)
    solution = solve(lambda z: factors * z + 1.0, z0, solver=Picard(), budget=30, tol=1e-6)
    assert solution.result.tolist() == [Result.DIVERGED, Result.CONVERGED]
    assert solution.worst is Result.DIVERGED


@every_solver
def test_an_overflow_is_called_diverged_and_ends_with_the_last_finite_state(solver: Solver) -> None:
    factors = torch.tensor([[1e30], [0.5]])
    solution = solve(lambda z: factors * z, torch.ones(2, 1), solver=solver, budget=30, tol=1e-6)
    assert solution.result[0] == Result.DIVERGED
    assert float(solution.state[0]) == 1.0
    assert float(solution.value[0]) == pytest.approx(1e30)
    assert float(solution.residual[0]) == pytest.approx(1.0)


@every_solver
def test_a_start_at_the_fixed_point_stops_at_the_first_look(solver: Solver) -> None:
    solution = solve(torch.zeros_like, torch.zeros(2, 4), solver=solver, budget=8, tol=1e-4)
    assert solution.spent == solver.interval
    assert (solution.result == Result.CONVERGED).all()
    assert (solution.value == 0.0).all()


def test_checking_seldom_notices_later_and_counts_what_was_spent() -> None:
    f, z0 = slow_batch()
    each = solve(f, z0, solver=Picard(check_every=1), budget=400, tol=1e-6)
    fourth = solve(f, z0, solver=Picard(check_every=4), budget=400, tol=1e-6)
    assert (fourth.evaluations % 4 == 0).all()
    assert (each.evaluations <= fourth.evaluations).all()
    assert (fourth.evaluations < each.evaluations + 8).all(), "a sample far from the tolerance may rest for one look"
    assert (fourth.residual <= each.residual).all()


@every_solver
@pytest.mark.parametrize("budget", range(1, 14))
def test_the_reported_residual_belongs_to_the_reported_state(solver: Solver, budget: int) -> None:
    A, b = linear_problem()
    solution = solve(lambda z: torch.tanh(z @ A.T + b), torch.zeros_like(b), solver=solver, budget=budget, tol=1e-5)
    torch.testing.assert_close(solution.value, torch.tanh(solution.state @ A.T + b))
    torch.testing.assert_close(solution.residual, relative_residual(solution.state, solution.value))


def test_a_batch_that_stops_together_gives_every_sample_its_last_state() -> None:
    f, z0 = slow_batch()
    alone, together = (
        solve(f, z0, solver=Picard(), budget=400, tol=1e-6, independent=independent) for independent in (True, False)
    )
    assert together.spent == alone.spent
    assert together.evaluations.tolist() == [together.spent] * 5
    assert (together.residual[:-1] < alone.residual[:-1]).all()
    assert (together.result == Result.CONVERGED).all()


def test_the_contraction_rate_is_measured_per_sample() -> None:
    f, z0 = slow_batch()
    rates = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    measured = solve(f, z0, solver=Picard(), budget=40, tol=None).rate
    torch.testing.assert_close(measured[2:], rates[2:], rtol=0.01, atol=0.0)
    assert (measured[:2] > 0.9).all() or measured[:2].isnan().all(), "these ended long ago, at rounding"
    assert solve(f, z0, solver=Picard(), budget=3, tol=None).rate.isnan().all(), "one look tells no rate"


def test_only_slow_samples_are_accelerated() -> None:
    _, b = linear_problem()
    rates = torch.tensor([[0.1], [0.4], [0.9], [0.9]], dtype=torch.float64)
    spread = torch.linspace(0.2, 1.0, 9, dtype=torch.float64) * rates

    def f(z: Tensor) -> Tensor:
        return z * spread + b[:4]

    plain = solve(f, torch.zeros_like(b[:4]), solver=Picard(check_every=3), budget=300, tol=1e-8)
    adaptive = solve(f, torch.zeros_like(b[:4]), solver=Adaptive(), budget=300, tol=1e-8)
    assert adaptive.evaluations[:2].tolist() == plain.evaluations[:2].tolist()
    torch.testing.assert_close(adaptive.value[:2], plain.value[:2], rtol=0, atol=0)
    assert (3 * adaptive.evaluations[2:] < plain.evaluations[2:]).all()


@every_solver
def test_solving_records_no_graph(solver: Solver) -> None:
    weight = torch.full((1,), 0.5, requires_grad=True)
    solution = solve(lambda z: weight * z + 1.0, torch.zeros(2, 1), solver=solver, budget=3)
    assert not solution.value.requires_grad


def test_throwing_names_the_samples_and_the_remedy() -> None:
    f, z0 = slow_batch()
    with pytest.raises(SolverError, match=r"2 of 5 samples .* in 30 evaluations .* raise the budget"):
        solve(f, z0, solver=Picard(), budget=30, tol=1e-6, throw=True)
    assert isinstance(solve(f, z0, budget=400, tol=1e-6, throw=True), Solution)


def test_throwing_for_nan_says_so() -> None:
    with pytest.raises(SolverError, match=r"none finite.*NaN or infinity"):
        solve(lambda z: z * math.nan, torch.ones(1, 1), budget=3, throw=True)


def test_impossible_limits_are_refused() -> None:
    z0 = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match=r"solve: budget is 0; .* at least 1"):
        solve(torch.cos, z0, budget=0)
    for tol in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"solve: tol is .* above 0, or None"):
            solve(torch.cos, z0, budget=1, tol=tol)


def test_impossible_settings_are_refused_by_name() -> None:
    for settings, fault in (
        (lambda: Picard(damping=0.0), "Picard: damping is 0.0"),
        (lambda: Picard(check_every=0), "Picard: check_every is 0"),
        (lambda: Anderson(memory=0), "Anderson: memory 0"),
        (lambda: Anderson(ridge=0.0), "ridge > 0"),
        (lambda: Adaptive(threshold=1.5), "Adaptive: threshold is 1.5"),
    ):
        with pytest.raises(ConfigError, match=fault):
            settings()
    with pytest.raises(TypeError, match="damp"):
        Picard(damp=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # the point of the test


@pytest.mark.parametrize("run", [lambda f, z: solve(f, z, budget=3), lambda f, z: iterate(f, z, evaluations=3)])
def test_a_cell_that_changes_shape_or_dtype_is_refused(
    run: Callable[[Callable[[Tensor], Tensor], Tensor], object],
) -> None:
    z0 = torch.zeros(2, 4)
    with pytest.raises(ConfigError, match=r"shape \(2, 4\) to \(2, 3\)"):
        run(lambda z: z[:, :3], z0)
    with pytest.raises(ConfigError, match=r"torch.float32 to torch.float64"):
        run(lambda z: z.double(), z0)
