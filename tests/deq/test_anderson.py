"""Anderson acceleration: scale, guards and history (published problems: test_external_problems.py)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq import acceleration
from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import solve

FLOAT = torch.float64


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


def affine(maps: Tensor, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """z_i M_i + b_i with a matrix for every sample."""
    b = torch.randn(*maps.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=FLOAT)
    return lambda z: (z[:, None] @ maps)[:, 0] + b, torch.zeros_like(b)


def normal_maps() -> Tensor:
    """64 rotated spectra from -3 to 3, and 64 rotations."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(128, 5, 5, generator=generator, dtype=FLOAT))[0]
    spectra = 6.0 * torch.rand(64, 1, 5, generator=generator, dtype=FLOAT) - 3.0
    return torch.cat([basis[:64] * spectra @ basis[:64].mT, basis[64:]])


def transient_maps() -> Tensor:
    """64 triangular maps of spectral radius below 0.95 and of norms up to about 30."""
    generator = torch.Generator().manual_seed(4)
    rates = 0.95 * (2.0 * torch.rand(64, 8, generator=generator, dtype=FLOAT) - 1.0)
    above = 5.0 * torch.rand(64, 1, 1, generator=generator, dtype=FLOAT)
    return torch.diag_embed(rates) + above * torch.randn(64, 8, 8, generator=generator, dtype=FLOAT).triu(1)


@pytest.mark.parametrize("solver", [Anderson(), Adaptive(), Anderson(every=5, memory=3)], ids=str)
def test_a_normal_map_never_rests(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    f, z0 = affine(normal_maps(), 5)
    found = [solve(f, z0, solver=solver, budget=budget, tol=None).value for budget in range(1, 31)]
    monkeypatch.setattr(acceleration, "RESTS", 0)
    for budget, value in enumerate(found, start=1):
        without = solve(f, z0, solver=solver, budget=budget, tol=None).value
        torch.testing.assert_close(value, without, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [Anderson(), Adaptive()], ids=str)
def test_a_sample_in_a_transient_is_left_to_plain_steps(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    f, z0 = affine(transient_maps(), 6)
    plain = [solve(f, z0, solver=Picard(), budget=budget, tol=None).residual for budget in range(1, 41)]

    def behind() -> tuple[int, float]:
        """Answers above 1.5 times plain iteration's and above 1e-10, and the mean of evaluations to 1e-6."""
        bars = (1.5 * bar.clamp_min(1e-10) for bar in plain)
        worse = (solve(f, z0, solver=solver, budget=k, tol=None).residual > bar for k, bar in enumerate(bars, start=1))
        evaluations = solve(f, z0, solver=solver, budget=300, tol=1e-6).evaluations
        return sum(int(above.sum()) for above in worse), float(evaluations.double().mean())

    resting, evaluations = behind()
    monkeypatch.setattr(acceleration, "RESTS", 0)
    mixing, more = behind()
    assert resting < 0.7 * mixing
    assert evaluations <= more


def test_the_best_evaluation_is_returned() -> None:
    steps = iter([0.5, 0.1, 3.0, 9.0, 70.0])
    start = torch.ones(1, 1, dtype=FLOAT)
    found = solve(lambda z: z + next(steps), start, solver=Anderson(every=2), budget=5, tol=None)
    assert float(found.residual) == pytest.approx(0.1 / 1.6)
    assert float(found.state) == pytest.approx(1.5)
    assert float(found.value) == pytest.approx(1.6)
