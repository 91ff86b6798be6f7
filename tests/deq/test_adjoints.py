"""Gradients through fixed points against exact ones, in float64."""

import math

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq.adjoints import Adjoint, AdjointReport, Implicit, KTerm, attach
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import Anderson, solve
from fedeq_edge.errors import ConfigError

EXACT: list[Adjoint] = [
    KTerm(terms=120),
    Implicit(budget=200, tol=1e-13),
    Implicit(budget=200, tol=1e-13, solver=Anderson()),
]
exact_methods = pytest.mark.parametrize("adjoint", EXACT, ids=["k terms", "implicit", "implicit, Anderson"])


def problem(rate: float = 0.7) -> tuple[Tensor, Tensor]:
    """(W, x) of the cell tanh(z W + x): |W|_2 = rate, three samples of dimension 5."""
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    W = rate * W / torch.linalg.matrix_norm(W, 2)
    return W.requires_grad_(), torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()


def equilibrium(W: Tensor, x: Tensor, adjoint: Adjoint) -> tuple[Tensor, AdjointReport]:
    def cell(z: Tensor) -> Tensor:
        return torch.tanh(z @ W + x)

    z = solve(cell, torch.zeros_like(x), budget=400, tol=1e-15).value
    return attach(cell, z, adjoint=adjoint)


def gradients(adjoint: Adjoint, *, scale: float = 1.0, rate: float = 0.7) -> tuple[Tensor, Tensor, AdjointReport]:
    W, x = problem(rate)
    z, report = equilibrium(W, x, adjoint)
    torch.autograd.backward(scale * (z**2).sum(), inputs=[W, x])
    assert W.grad is not None
    assert x.grad is not None
    return W.grad, x.grad, report


def closed_form(rate: float = 0.7) -> tuple[Tensor, Tensor]:
    """dloss/dW and dloss/dx of loss = |z*|^2 by dense linear algebra: u = (I - J^T)^-1 2 z*."""
    W, x = (t.detach() for t in problem(rate))
    z = solve(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), budget=400, tol=1e-15).value
    slope = 1.0 - z**2
    u = torch.stack(
        [torch.linalg.solve(torch.eye(5, dtype=W.dtype) - W * d[None, :], 2 * v) for d, v in zip(slope, z, strict=True)]
    )
    return z.T @ (u * slope), u * slope


@exact_methods
def test_converged_adjoints_give_the_exact_gradient(adjoint: Adjoint) -> None:
    found_W, found_x, _ = gradients(adjoint)
    exact_W, exact_x = closed_form()
    torch.testing.assert_close(found_W, exact_W, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found_x, exact_x, rtol=1e-10, atol=1e-10)


@exact_methods
def test_finite_differences_agree(adjoint: Adjoint) -> None:
    W, x = problem()
    assert torch.autograd.gradcheck(lambda W, x: equilibrium(W, x, adjoint)[0], (W, x), eps=1e-6, atol=1e-6)


def test_no_terms_is_the_gradient_of_one_evaluation() -> None:
    found_W, found_x, report = gradients(KTerm(terms=0))
    W, x = problem()
    z = equilibrium(W, x, KTerm(terms=0))[0].detach()
    torch.autograd.backward((torch.tanh(z @ W + x) ** 2).sum())
    torch.testing.assert_close(found_W, W.grad)
    torch.testing.assert_close(found_x, x.grad)
    assert (report.terms, report.residual) == (0, 1.0)


@pytest.mark.parametrize("terms", [0, 1, 2, 5, 10])
def test_the_truncation_error_obeys_its_bound(terms: int) -> None:
    rate = 0.7
    _, found, report = gradients(KTerm(terms=terms), rate=rate)
    _, exact = closed_form(rate)
    W, x = problem(rate)
    v = 2 * equilibrium(W, x, KTerm(terms=0))[0].detach()
    # df/dx = diag(slope) with slope <= 1 does not enlarge the error of u.
    assert (found - exact).norm() <= rate ** (terms + 1) / (1 - rate) * v.norm()
    assert report.terms == terms


def test_more_terms_are_reported_as_a_smaller_residual() -> None:
    residuals = [gradients(KTerm(terms=k))[2].residual for k in (0, 1, 2, 4, 8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.05


@pytest.mark.parametrize("adjoint", [KTerm(terms=6), Implicit(budget=100, tol=1e-5)], ids=["k terms", "implicit"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_accuracy_does_not_depend_on_the_scale_of_the_loss(adjoint: Adjoint, scale: float) -> None:
    reference_W, _, reference = gradients(adjoint)
    found_W, _, report = gradients(adjoint, scale=scale)
    torch.testing.assert_close(found_W / scale, reference_W, rtol=1e-10, atol=0)
    assert report.terms == reference.terms
    assert report.residual == pytest.approx(reference.residual, rel=1e-9)


def test_an_implicit_solve_reports_its_end() -> None:
    assert gradients(Implicit(budget=100, tol=1e-8))[2].result is Result.CONVERGED
    short = gradients(Implicit(budget=2, tol=1e-8))[2]
    assert (short.terms, short.result) == (2, Result.BUDGET_SPENT)


def test_a_zero_gradient_stays_zero() -> None:
    for adjoint in (KTerm(terms=3), Implicit(budget=5)):
        W, _, report = gradients(adjoint, scale=0.0)
        assert not W.any()
        assert report.residual == 0.0


@pytest.mark.parametrize("adjoint", [KTerm(terms=4), Implicit(budget=4)], ids=["k terms", "implicit"])
def test_a_nan_gradient_is_reported(adjoint: Adjoint) -> None:
    report = gradients(adjoint, scale=math.nan)[2]
    assert report.result is Result.NON_FINITE


def test_an_adjoint_that_overflows_falls_back_and_says_so() -> None:
    weight = torch.full((1,), 1e30, requires_grad=True)
    out, report = attach(lambda z: weight * z, torch.ones(2, 1), adjoint=KTerm(terms=3))
    torch.autograd.backward(out.sum(), inputs=[weight])
    assert report.result is Result.NON_FINITE
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_attaching_evaluates_once_and_passes_the_value_on() -> None:
    calls = []

    def cell(z: Tensor) -> Tensor:
        calls.append(1)
        return torch.cos(z)

    out, report = attach(cell, torch.zeros(2, 1), adjoint=KTerm(terms=3))
    assert torch.equal(out, torch.ones(2, 1))
    assert len(calls) == 1
    assert math.isnan(report.residual), "nothing is claimed before backward"


def test_negative_terms_are_refused() -> None:
    with pytest.raises(ConfigError, match="terms is -1"):
        KTerm(terms=-1)
