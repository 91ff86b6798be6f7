"""Random cells and batches that mix easy, slow and hopeless samples: no solver was tuned to any of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.batch import relative_residual
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import StepFunction, solve

SOLVERS: tuple[Solver, ...] = (Picard(), Picard(check_every=1), Anderson(), Anderson(every=1), Adaptive())
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
BATCH = 6


def linear(draw: torch.Generator, dtype: torch.dtype) -> tuple[StepFunction, Tensor]:
    """z A + b with a random spectrum in (-rho, rho), rho from 0.5 to 0.99."""
    basis = torch.linalg.qr(torch.randn(24, 24, generator=draw, dtype=torch.float64))[0]
    spectrum = (torch.rand(24, generator=draw, dtype=torch.float64) * 2 - 1) * _between(0.5, 0.99, draw)
    A = (basis * spectrum @ basis.T).to(dtype)
    b = torch.randn(BATCH, 24, generator=draw).to(dtype)
    return lambda z: z @ A + b, torch.zeros_like(b)


def saturating(draw: torch.Generator, dtype: torch.dtype) -> tuple[StepFunction, Tensor]:
    """tanh(W z + u) with |W|_2 from 0.5 to 0.99 and inputs from 0.01 to 3."""
    W = torch.randn(24, 24, generator=draw)
    W = (_between(0.5, 0.99, draw) * W / torch.linalg.matrix_norm(W, 2)).to(dtype)
    u = (10 ** _between(-2, 0.5, draw) * torch.randn(BATCH, 24, generator=draw)).to(dtype)
    return lambda z: torch.tanh(z @ W.T + u), torch.tanh(u)


def rectified(draw: torch.Generator, dtype: torch.dtype) -> tuple[StepFunction, Tensor]:
    """relu(W z + u), symmetric W with |W|_2 from 0.5 to 0.99."""
    W = torch.randn(24, 24, generator=draw)
    W = (_between(0.5, 0.99, draw) * (W + W.T) / torch.linalg.matrix_norm(W + W.T, 2)).to(dtype)
    u = torch.randn(BATCH, 24, generator=draw).to(dtype)
    return lambda z: torch.relu(z @ W + u), torch.relu(u)


def convolutional(draw: torch.Generator, dtype: torch.dtype) -> tuple[StepFunction, Tensor]:
    """tanh(GroupNorm(conv(z) + x)), 4 channels of 5 x 5."""
    kernel = (_between(0.1, 0.9, draw) / 6 * torch.randn(4, 4, 3, 3, generator=draw)).to(dtype)
    x = torch.randn(BATCH, 4, 5, 5, generator=draw).to(dtype)
    return lambda z: torch.tanh(functional.group_norm(functional.conv2d(z, kernel, padding=1) + x, 2)), x


Family = Callable[[torch.Generator, torch.dtype], tuple[StepFunction, Tensor]]
FAMILIES: tuple[Family, ...] = (linear, saturating, rectified, convolutional)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


def _between(low: float, high: float, draw: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand(1, generator=draw))


@every_solver
@each_family
def test_every_budget_is_kept_and_its_residual_is_that_of_the_state(solver: Solver, family: Family) -> None:
    f, z0 = family(torch.Generator().manual_seed(5), torch.float64)
    for budget in range(1, 13):
        calls = 0

        def counted(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return f(z)

        found = solve(counted, z0, solver=solver, budget=budget, tol=None)
        assert calls == found.spent == budget
        torch.testing.assert_close(f(found.state), found.value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            relative_residual(found.state, f(found.state)), found.residual, rtol=1e-6, atol=1e-14
        )


# Measured: 1.00 for Adaptive, which accelerates slow samples alone; 1.18 and 1.55 for Anderson.
@pytest.mark.parametrize(
    ("solver", "factor"), [(Adaptive(), 1.1), (Anderson(), 2.0), (Anderson(every=1), 2.0)], ids=str
)
@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_acceleration_ends_no_worse_than_plain_iteration_at_any_budget(
    solver: Solver, factor: float, family: Family, dtype: torch.dtype
) -> None:
    for seed in range(12):
        f, z0 = family(torch.Generator().manual_seed(seed), dtype)
        for budget in (3, 5, 8, 12, 13, 20, 40):
            plain = solve(f, z0, solver=Picard(), budget=budget, tol=None).residual
            mixed = solve(f, z0, solver=solver, budget=budget, tol=None).residual
            # Where plain iteration is that far, no caller asks for more.
            assert (mixed <= (factor * plain).clamp_min(2e-5)).all(), (seed, budget)


def mixed_batch() -> tuple[StepFunction, Tensor]:
    """Scalar maps about 1: fast, alternating, slow, constant, repelling, and one that soon makes NaN."""
    rates = torch.tensor([0.01, -0.5, 0.97, 0.0, -3.0, 1.0], dtype=torch.float64)[:, None]
    spoilt = torch.tensor([False, False, False, False, False, True])[:, None]

    def f(z: Tensor) -> Tensor:
        return 1.0 + rates * (z - 1.0) + torch.where(spoilt, (1.5 - z).log() - 1.0, 0.0)

    return f, torch.full((6, 1), 1.2, dtype=torch.float64)


@every_solver
def test_samples_of_every_kind_end_as_they_would_alone(solver: Solver) -> None:
    f, z0 = mixed_batch()
    found = solve(f, z0, solver=solver, budget=600, tol=1e-6)
    assert (found.result[:4] == Result.CONVERGED).all()
    torch.testing.assert_close(found.value[:4], torch.ones(4, 1, dtype=torch.float64), rtol=1e-4, atol=0)
    assert torch.isfinite(found.value).all()
    assert found.evaluations[0] <= found.evaluations[2]
    for i in range(len(z0)):

        def alone(z: Tensor, i: int = i) -> Tensor:
            return f(z.expand(6, 1))[i : i + 1]

        single = solve(alone, z0[i : i + 1], solver=solver, budget=600, tol=1e-6)
        assert single.result[0] == found.result[i]
        assert single.evaluations[0] == found.evaluations[i]
        torch.testing.assert_close(single.value[0], found.value[i], rtol=1e-9, atol=0)


@every_solver
def test_both_precisions_find_the_same_state(solver: Solver) -> None:
    for family in FAMILIES:
        f32, start32 = family(torch.Generator().manual_seed(2), torch.float32)
        f64, start64 = family(torch.Generator().manual_seed(2), torch.float64)
        single = solve(f32, start32, solver=solver, budget=400, tol=2e-6)
        double = solve(f64, start64, solver=solver, budget=400, tol=1e-9)
        assert (single.result == Result.CONVERGED).all()
        torch.testing.assert_close(single.value.double(), double.value, rtol=0, atol=1e-3)
