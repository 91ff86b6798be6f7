"""Gradients through fixed points against exact ones, in float64."""

import gc
import math
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedeq_edge.deq.acceleration import Anderson
from fedeq_edge.deq.adjoints import Adjoint, AdjointReport, Implicit, KTerm, Unrolled
from fedeq_edge.deq.cell import LinearisableCell
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import solve
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, SolverError

EXACT: dict[str, Adjoint] = {
    "k terms": KTerm(terms=120),
    "implicit": Implicit(budget=200, tol=1e-13),
    "implicit, Picard": Implicit(budget=200, tol=1e-13, solver=Picard()),
    "implicit, Anderson": Implicit(budget=200, tol=1e-13, solver=Anderson()),
    "unrolled": Unrolled(),
    "phantom": Unrolled(steps=160, damping=0.8),
}
exact_methods = pytest.mark.parametrize("adjoint", EXACT.values(), ids=list(EXACT))
MOST: dict[str, Adjoint] = {
    "k terms": KTerm(terms=6),
    "implicit": Implicit(budget=100, tol=1e-5),
    "unrolled": Unrolled(steps=4),
}
most_methods = pytest.mark.parametrize("adjoint", MOST.values(), ids=list(MOST))
# More than enough at a rate of 0.7 for every digit of float64.
BUDGET = 160


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
    found = adjoint.attach(cell, z, evaluations=adjoint.graphed(BUDGET))
    return found.value, found.report


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


# ---- exactness -------------------------------------------------------------------------------------------------


@exact_methods
def test_converged_adjoints_give_the_exact_gradient(adjoint: Adjoint) -> None:
    found_W, found_x, _ = gradients(adjoint)
    exact_W, exact_x = closed_form()
    torch.testing.assert_close(found_W, exact_W, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found_x, exact_x, rtol=1e-10, atol=1e-10)


@exact_methods
def test_finite_differences_agree(adjoint: Adjoint) -> None:
    W, x = problem()
    # check_undefined_grad passes None for a gradient, which no loss that reads the outcome does.
    assert torch.autograd.gradcheck(
        lambda W, x: equilibrium(W, x, adjoint)[0], (W, x), eps=1e-6, atol=1e-6, check_undefined_grad=False
    )


def test_no_terms_is_the_gradient_of_one_evaluation() -> None:
    found_W, found_x, report = gradients(KTerm(terms=0))
    W, x = problem()
    z = equilibrium(W, x, KTerm(terms=0))[0].detach()
    torch.autograd.backward((torch.tanh(z @ W + x) ** 2).sum())
    torch.testing.assert_close(found_W, W.grad)
    torch.testing.assert_close(found_x, x.grad)
    assert (report.terms, report.residual) == (0, 1.0)


@given(rate=st.floats(0.0, 0.97), terms=st.integers(0, 12), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_truncation_error_obeys_its_bound(rate: float, terms: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    J = rate * J / torch.linalg.matrix_norm(J, 2)
    v = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - J, v, left=False)
    found = KTerm(terms=terms).solve(lambda v, u: v + u @ J, v)
    errors = torch.linalg.vector_norm(found.value - exact, dim=1)
    lengths = torch.linalg.vector_norm(v, dim=1)
    assert (errors <= rate ** (terms + 1) / (1 - rate) * lengths + 1e-12).all()
    assert found.terms == terms


def test_damped_unrolling_truncates_the_series_of_the_damped_map() -> None:
    found, _, report = gradients(Unrolled(steps=3, damping=0.5))
    W, x = problem()
    z = equilibrium(W, x, KTerm(terms=0))[0].detach()
    for _ in range(3):
        z = 0.5 * z + 0.5 * torch.tanh(z @ W + x)
    torch.autograd.backward((z**2).sum())
    torch.testing.assert_close(found, W.grad, rtol=1e-12, atol=1e-14)
    assert report.terms == 2


def test_jaxopt_finds_the_same_gradient() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed: nothing to compare with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt announces its own end at import
        jaxopt = pytest.importorskip("jaxopt", reason="jaxopt is not installed: nothing to compare with")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        solver = jaxopt.FixedPointIteration(
            lambda z, W, x: jax.numpy.tanh(z @ W + x),
            maxiter=1000,
            tol=1e-14,
            implicit_diff_solve=partial(jaxopt.linear_solve.solve_normal_cg, tol=1e-14, maxiter=1000),
        )
        W, x = (t.detach().numpy() for t in problem())
        loss = jax.grad(lambda W, x: (solver.run(np.zeros(x.shape), W, x).params ** 2).sum(), argnums=(0, 1))
        theirs = [np.asarray(gradient) for gradient in loss(W, x)]
    finally:
        jax.config.update("jax_enable_x64", before)
    ours = gradients(Implicit(budget=300, tol=1e-13))[:2]
    for mine, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(mine.numpy() - other) <= 1e-8 * np.linalg.norm(other)


# ---- formulas of J^T -------------------------------------------------------------------------------------------

LINEARISABLE = {
    "dense": ModelSpec(input_shape=(12,), classes=3, channels=10),
    "monotone": ModelSpec(input_shape=(12,), classes=3, cell="monotone", channels=10),
    "sequence": ModelSpec(input_shape=(2, 9), classes=3, channels=6),
    "image": ModelSpec(input_shape=(1, 7, 5), classes=4, channels=6),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("spec", LINEARISABLE.values(), ids=list(LINEARISABLE))
def test_a_cells_formula_equals_the_product_by_autograd(spec: ModelSpec, dtype: torch.dtype, tolerance: float) -> None:
    model = DEQ(spec, dtype=dtype)
    model.load(*initial(spec, 3))
    generator = torch.Generator().manual_seed(1)
    z, injection, v, u = (torch.randn(4, *spec.state_shape, generator=generator, dtype=dtype) for _ in range(4))
    z.requires_grad_()
    assert isinstance(model.cell, LinearisableCell)
    fz = model.cell.step(z, injection)
    expected = v + torch.autograd.grad(fz, z, u)[0]
    held = v.clone(), u.clone()
    found = model.cell.linearise(fz.detach())(v, u)
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    assert torch.equal(v, held[0])
    assert torch.equal(u, held[1])


@pytest.mark.parametrize("adjoint", [KTerm(terms=0), KTerm(terms=5), Implicit(budget=60, tol=1e-12)], ids=repr)
@pytest.mark.parametrize("spec", LINEARISABLE.values(), ids=list(LINEARISABLE))
def test_the_gradient_is_the_same_by_formula_and_by_autograd(spec: ModelSpec, adjoint: Adjoint) -> None:
    model = DEQ(spec, dtype=torch.float64)
    model.load(*initial(spec, 3))
    generator = torch.Generator().manual_seed(1)
    injection = torch.randn(4, *spec.state_shape, generator=generator, dtype=torch.float64)
    z = torch.randn(4, *spec.state_shape, generator=generator, dtype=torch.float64)
    found = []
    assert isinstance(model.cell, LinearisableCell)
    for linearise in (None, model.cell.linearise):
        attached = adjoint.attach(lambda z: model.cell.step(z, injection), z, linearise=linearise)
        found.append(torch.autograd.grad(attached.value.square().sum(), [*model.cell.parameters()])[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


# ---- reports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KTerm, lambda terms: Unrolled(steps=terms + 1)], ids=["k terms", "unrolled"])
def test_more_terms_are_reported_as_a_smaller_residual(method: type[KTerm]) -> None:
    reports = [gradients(method(terms=k))[2] for k in (0, 1, 2, 4, 8)]
    residuals = [report.residual for report in reports]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] == 1.0
    assert residuals[-1] < 0.05
    assert [report.terms for report in reports] == [0, 1, 2, 4, 8]


@most_methods
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_accuracy_does_not_depend_on_the_scale_of_the_loss(adjoint: Adjoint, scale: float) -> None:
    reference_W, _, reference = gradients(adjoint)
    found_W, _, report = gradients(adjoint, scale=scale)
    torch.testing.assert_close(found_W / scale, reference_W, rtol=1e-10, atol=0)
    assert report.terms == reference.terms
    assert report.residual == pytest.approx(reference.residual, rel=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_mean_loss_gets_as_exact_a_gradient_as_a_sum(reduction: str) -> None:
    # torchdeq 0.1.0, whose tolerance is absolute, loses four digits on the mean.
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    W = W + W.T
    W = (0.95 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    x = 0.1 * torch.randn(256, 32, generator=generator, dtype=torch.float64)

    def gradient(adjoint: Adjoint) -> Tensor:
        z = solve(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), budget=600, tol=1e-14).value
        out = adjoint.attach(lambda z: torch.tanh(z @ W + x), z).value
        loss = getattr(out.square(), reduction)()
        found: Tensor = torch.autograd.grad(loss, W)[0]
        return found

    exact = gradient(KTerm(terms=700))
    found = gradient(Implicit(budget=400, tol=1e-10))
    assert float((found - exact).norm()) < 1e-8 * float(exact.norm())


def test_an_implicit_solve_reports_its_end() -> None:
    done = gradients(Implicit(budget=100, tol=1e-8))[2]
    assert done.result is Result.CONVERGED
    assert done.residual <= 1e-8


def test_an_implicit_solve_that_ran_out_of_budget_says_so_and_gives_what_it_has() -> None:
    # jaxopt issue 466: zeros in silence
    found_W, _, short = gradients(Implicit(budget=2, tol=1e-8))
    exact_W, _ = closed_form()
    assert (short.terms, short.result) == (2, Result.BUDGET_SPENT)
    assert short.residual > 1e-8
    assert torch.nn.functional.cosine_similarity(found_W.flatten(), exact_W.flatten(), dim=0) > 0.9


def test_without_a_tolerance_the_whole_budget_is_spent() -> None:
    assert gradients(Implicit(budget=37, tol=None))[2].terms == 37


def test_an_accelerated_adjoint_needs_fewer_products_where_the_cell_is_slow() -> None:
    plain, fast = (gradients(Implicit(budget=900, tol=1e-8, solver=s), rate=0.98)[2] for s in (Picard(), Anderson()))
    assert plain.result is fast.result is Result.CONVERGED
    assert fast.terms < plain.terms


# ---- what goes wrong -------------------------------------------------------------------------------------------


@most_methods
def test_a_zero_gradient_stays_zero(adjoint: Adjoint) -> None:
    W, _, report = gradients(adjoint, scale=0.0)
    assert not W.any()
    assert report.residual == 0.0


@pytest.mark.parametrize("scale", [math.nan, math.inf])
@most_methods
def test_a_gradient_that_comes_in_as_nan_or_infinity_is_refused(adjoint: Adjoint, scale: float) -> None:
    with pytest.raises(SolverError, match="not finite for 3 of 3 samples"):
        gradients(adjoint, scale=scale)


def attached_line(slopes: list[float], adjoint: Adjoint) -> tuple[Tensor, AdjointReport]:
    """d(sum z)/dw of z = slope z + w, a sample per slope, w (samples, 1)."""
    a = torch.tensor(slopes)[:, None]
    w = torch.ones(len(slopes), 1, requires_grad=True)
    found = adjoint.attach(lambda z: a * z + w, torch.ones(len(slopes), 1))
    torch.autograd.backward(found.value.sum(), inputs=[w])
    assert w.grad is not None
    return w.grad.flatten(), found.report


@pytest.mark.parametrize("adjoint", [KTerm(terms=3), Implicit(budget=20, solver=Picard())], ids=["k terms", "implicit"])
def test_an_adjoint_that_overflows_falls_back_alone_and_says_so(adjoint: Adjoint) -> None:
    gradient, report = attached_line([1e30, 0.0], adjoint)
    assert report.result >= Result.DIVERGED
    assert gradient.tolist() == [1.0, 1.0]
    assert 0.0 <= report.residual <= 1.0


def test_an_adjoint_that_diverges_falls_back_alone_and_says_so() -> None:
    gradient, report = attached_line([3.0, 0.5], Implicit(budget=60, solver=Picard()))
    assert report.result is Result.DIVERGED
    assert gradient.tolist() == pytest.approx([1.0, 2.0], rel=1e-3)


def test_an_unrolled_gradient_that_overflows_is_reported() -> None:
    W = torch.full((1,), 1e20, requires_grad=True)
    found = Unrolled().attach(lambda z: W * z, torch.full((2, 1), 1e-30), evaluations=4)
    torch.autograd.backward(found.value.sum(), inputs=[W])
    assert found.report.result is Result.NON_FINITE


@pytest.mark.parametrize("linearised", [False, True])
def test_attaching_evaluates_once_and_passes_the_value_on(linearised: bool) -> None:
    calls = []

    def cell(z: Tensor) -> Tensor:
        calls.append(1)
        return torch.cos(z)

    start = torch.ones(2, 1)
    found = KTerm(terms=3).attach(cell, start, linearise=(lambda _: lambda v, u: v) if linearised else None)
    assert torch.equal(found.value, torch.cos(start))
    torch.testing.assert_close(found.residual, torch.full((2,), (1 - math.cos(1)) / math.cos(1)))
    assert len(calls) == 1
    assert not start.requires_grad
    assert math.isnan(found.report.residual), "nothing is claimed before backward"


@pytest.mark.parametrize("evaluations", [1, 4])
def test_unrolling_makes_so_many_evaluations_and_measures_the_last(evaluations: int) -> None:
    states = []

    def cell(z: Tensor) -> Tensor:
        states.append(z)
        return torch.cos(z)

    found = Unrolled().attach(cell, torch.ones(2, 1), evaluations=evaluations)
    assert len(states) == evaluations
    last = states[-1]
    assert torch.equal(found.value, torch.cos(last))
    torch.testing.assert_close(found.residual, ((torch.cos(last) - last).abs() / torch.cos(last)).flatten())


@pytest.mark.parametrize(
    ("adjoint", "graphed"), [(KTerm(terms=4), 1), (Unrolled(steps=3), 3), (Unrolled(), 5)], ids=repr
)
def test_a_method_says_how_many_evaluations_keep_their_graph(adjoint: Adjoint, graphed: int) -> None:
    assert adjoint.graphed(5) == graphed
    assert adjoint.graphed(1) == 1


def test_the_graph_goes_with_the_outcome() -> None:
    # A cycle between the graph and its backward would keep every batch's states until the garbage collector comes.
    W, x = problem()
    made = []

    def cell(z: Tensor) -> Tensor:
        fz = torch.tanh(z @ W + x)
        made.append(weakref.ref(fz))
        return fz

    gc.disable()
    try:
        for adjoint in MOST.values():
            found = adjoint.attach(cell, torch.zeros_like(x), evaluations=adjoint.graphed(5))
            torch.autograd.backward(found.value.sum(), inputs=[W])
            del found
        assert not any(reference() is not None for reference in made)
    finally:
        gc.enable()


def test_second_derivatives_are_refused() -> None:
    W, x = problem()
    z, _ = equilibrium(W, x, KTerm(terms=2))
    with pytest.raises(ConfigError, match="create_graph"):
        torch.autograd.grad(z.square().sum(), W, create_graph=True)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="terms is -1"):
        KTerm(terms=-1)
    with pytest.raises(ConfigError, match="budget 0"):
        Implicit(budget=0)
    for tol in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="tol"):
            Implicit(budget=1, tol=tol)
    with pytest.raises(ConfigError, match="steps is 0"):
        Unrolled(steps=0)
    with pytest.raises(ConfigError, match="damping is 0"):
        Unrolled(damping=0.0)
