"""Fixed points that other projects test with, for every solver and dtype, and their libraries as a second opinion."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.batch import relative_residual
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import solve
from tests.deq.problems import Problem, fresh, published

FAMILIES: dict[str, Callable[[int], Solver]] = {
    "Picard": lambda memory: Picard(check_every=1),
    "Anderson": lambda memory: Anderson(memory=memory, every=1),
    "Anderson every 3": lambda memory: Anderson(memory=memory),
    "Adaptive": lambda memory: Adaptive(accelerated=Anderson(memory=memory)),
}
each_solver = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
each_published = pytest.mark.parametrize("name", published())
each_fresh = pytest.mark.parametrize("name", fresh())


def expects_a_solution(problem: Problem, family: str) -> bool:
    """Plain iteration cannot solve what does not contract: mathematics, not a defect."""
    return problem.contracts or family != "Picard"


@each_published
@each_dtype
@each_solver
def test_a_published_problem_is_solved_within_the_evaluations_of_its_source(
    name: str, dtype: torch.dtype, family: str
) -> None:
    problem = published(dtype)[name]
    solver = FAMILIES[family](problem.memory)
    found = solve(problem.f, problem.start, solver=solver, budget=problem.evaluations, tol=problem.relative_tol)
    assert found.spent <= problem.evaluations
    if expects_a_solution(problem, family):
        assert problem.solved_by(found.value), f"error {problem.error(found.value):.1e}"
    else:
        assert found.worst is not Result.CONVERGED, "no solution was reached, so none may be claimed"


@each_fresh
@each_dtype
@each_solver
def test_a_problem_that_nobody_tuned_to_is_solved_or_said_not_to_be(name: str, dtype: torch.dtype, family: str) -> None:
    problem = fresh(dtype)[name]
    solver = FAMILIES[family](problem.memory)
    found = solve(problem.f, problem.start, solver=solver, budget=problem.evaluations, tol=problem.relative_tol)
    if not expects_a_solution(problem, family):
        assert found.worst is not Result.CONVERGED, "no solution was reached, so none may be claimed"
        return
    assert found.worst is Result.CONVERGED
    exact = fresh(torch.float64)[name].f
    assert float(relative_residual(found.state.double(), exact(found.state.double()))) <= 2 * problem.relative_tol
    if dtype == torch.float64:  # in float32 the stiff ones turn a residual of rounding into errors of 1e-3
        assert problem.solved_by(found.value), f"error {problem.error(found.value):.1e}"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Picard"])
def test_acceleration_needs_few_evaluations_for_the_published_problems_together(family: str) -> None:
    spent = 0
    for problem in published().values():
        solver = FAMILIES[family](problem.memory)
        found = solve(problem.f, problem.start, solver=solver, budget=problem.evaluations, tol=problem.relative_tol)
        spent += found.spent
    # Measured: 178 to 309. torchdeq 0.1.0's Anderson took 12,000 for the eleven that it solved, plain iteration 10,300
    # for its eight.
    assert spent <= 400


def as_numpy(problem: Problem) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """f on vectors (n,)."""

    def f(z: NDArray[np.float64]) -> NDArray[np.float64]:
        image: NDArray[np.float64] = problem.f(torch.from_numpy(np.atleast_2d(z))).numpy()[0]
        return image

    return f


@pytest.mark.parametrize("name", ["square root", "Lambert W", "cosine", "exponential", "half"])
def test_scipy_fixed_point_finds_the_same(name: str) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy, of the dev group, is the second opinion")
    problem = published()[name]
    theirs = optimize.fixed_point(as_numpy(problem), problem.start[0].numpy(), xtol=1e-10, maxiter=500)
    ours = solve(problem.f, problem.start, budget=problem.evaluations, tol=1e-12)
    np.testing.assert_allclose(ours.value[0].numpy(), theirs, rtol=1e-8)


@pytest.mark.parametrize("name", ["F", "F3", "F5", "F6", "midpoint, linear"])
def test_scipy_anderson_finds_the_same(name: str) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy, of the dev group, is the second opinion")
    problem = fresh()[name]
    f = as_numpy(problem)
    theirs = optimize.anderson(lambda z: f(z) - z, problem.start[0].numpy(), f_tol=1e-10, maxiter=500)
    ours = solve(problem.f, problem.start, budget=problem.evaluations, tol=1e-11)
    np.testing.assert_allclose(ours.value[0].numpy(), theirs, atol=1e-8)


def test_jaxopt_finds_the_same_fixed_point_of_an_equilibrium_layer() -> None:
    jax = pytest.importorskip("jax", reason="jax, of the dev group, is the second opinion")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt announces at import that it is not maintained
        jaxopt = pytest.importorskip("jaxopt", reason="jaxopt, of the dev group, is the second opinion")
        W, u = layer()
        with jax.enable_x64(True):
            weight, injection = jax.numpy.asarray(W.numpy()), jax.numpy.asarray(u.numpy())
            zero = jax.numpy.zeros_like(injection)

            def f(z: object) -> object:
                return jax.numpy.tanh(z @ weight.T + injection)

            plain = jaxopt.FixedPointIteration(f, maxiter=2000, tol=1e-12).run(zero).params
            mixed = jaxopt.AndersonAcceleration(f, maxiter=500, tol=1e-12).run(zero).params
    for solver in (Picard(), Anderson(every=1), Anderson(), Adaptive()):
        ours = solve(
            lambda z: torch.tanh(z @ W.T + u), torch.zeros_like(u), solver=solver, budget=2000, tol=1e-13
        ).value
        np.testing.assert_allclose(ours[0].numpy(), np.asarray(plain)[0], atol=1e-9)
        np.testing.assert_allclose(ours[0].numpy(), np.asarray(mixed)[0], atol=1e-9)


def layer() -> tuple[Tensor, Tensor]:
    """W (32, 32), symmetric with |W|_2 = 0.9, and one injection (1, 32), float64."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    W = 0.9 * (W + W.T) / torch.linalg.matrix_norm(W + W.T, 2)
    return W, 0.3 * torch.randn(1, 32, generator=generator, dtype=torch.float64)
