"""Never worse than plain iteration: thousands of random cells of every kind, every budget, every way to fail."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.adjoints import Implicit
from fedeq_edge.deq.guaranteed import Guaranteed
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import solve
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.step import Budget

Map = Callable[[Tensor], Tensor]

# Random cells of one kind, every one a sample with a map of its own; (f, z0).
CELLS, SEEDS, WIDTH = 64, 5, 8
# Budgets of 1 to 40 that the cells of one seed get.
BUDGETS = 8
# Two norms of the same numbers, in kernels for B and for 2 B rows.
ULPS = 16

guaranteed_methods = pytest.mark.parametrize("solver", [Guaranteed(), Guaranteed(accelerated=Adaptive())], ids=str)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _between(generator: torch.Generator, low: float, high: float) -> Tensor:
    """(CELLS, 1, 1) numbers, one a cell."""
    return low + (high - low) * torch.rand(CELLS, 1, 1, generator=generator, dtype=torch.float64)


def _apply(maps: Tensor, z: Tensor) -> Tensor:
    """Every sample through its own matrix."""
    return (z[:, None, :] @ maps)[:, 0]


def contractions(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """s tanh(W z / s + b), |W|_2 from 0.3 to 0.999, at scales s from 1e-6 to 1e6."""
    W = _normal(generator, CELLS, WIDTH, WIDTH)
    W = (W * _between(generator, 0.3, 0.999) / torch.linalg.matrix_norm(W, 2)[:, None, None]).to(dtype)
    b, scale = _normal(generator, CELLS, WIDTH).to(dtype), 10.0 ** _between(generator, -6.0, 6.0)[:, 0].to(dtype)
    return lambda z: scale * torch.tanh(_apply(W, z / scale) + b), torch.zeros_like(b)


def non_normal(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """Triangular linear maps of spectral radius below 0.95 and of norms up to about 30."""
    rates = _between(generator, 0.0, 0.95)[..., 0] * _normal(generator, CELLS, WIDTH).clamp(-1.0, 1.0)
    above = _normal(generator, CELLS, WIDTH, WIDTH).triu(1) * _between(generator, 0.0, 5.0)
    maps, b = (torch.diag_embed(rates) + above).to(dtype), _normal(generator, CELLS, WIDTH).to(dtype)
    return lambda z: _apply(maps, z) + b, torch.zeros_like(b)


def convolutions(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """tanh(GroupNorm(conv z + u)): one kernel a seed, not always a contraction."""
    kernel = (_normal(generator, 4, 4, 3, 3) * torch.rand(1, generator=generator)).to(dtype)
    injection = _normal(generator, CELLS, 4, 5, 5).to(dtype)
    return (
        lambda z: torch.tanh(functional.group_norm(functional.conv2d(z, kernel, padding=1) + injection, 2)),
        torch.zeros_like(injection),
    )


def expansions(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """Linear maps whose norm is up to 1e3: some contract, most leave the numbers within the budget."""
    maps = (_normal(generator, CELLS, WIDTH, WIDTH) * 10.0 ** _between(generator, -2.0, 3.0)).to(dtype)
    b = _normal(generator, CELLS, WIDTH).to(dtype)
    return lambda z: _apply(maps, z) + b, torch.zeros_like(b)


def wild_maps(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """Squares that overflow, roots and logarithms that make NaN, poles that come back from infinity, chaos."""
    maps = (_normal(generator, CELLS, WIDTH, WIDTH) * _between(generator, 0.1, 1.5)).to(dtype)

    def f(z: Tensor) -> Tensor:
        mixed = _apply(maps, z)
        parts = mixed[:13] ** 2, mixed[13:26].sqrt() + 1.0, mixed[26:39].log(), 1.0 / mixed[39:52]
        return torch.cat([*parts, torch.sin(4.0 * mixed[52:])])

    return f, _normal(generator, CELLS, WIDTH).to(dtype)


KINDS = [contractions, non_normal, convolutions, expansions, wild_maps]
every_kind = pytest.mark.parametrize("kind", KINDS)


def in_the_same_kernels(f: Map) -> Map:
    """f as a solve with both walks computes it: chaos would make a last bit grow."""
    stacked = torch.vmap(f)
    return lambda z: stacked(torch.stack([z, z]))[0]


def never_above(residual: Tensor, bound: Tensor) -> bool:
    return bool((residual <= bound * (1.0 + ULPS * torch.finfo(bound.dtype).eps)).all())


@guaranteed_methods
@both_dtypes
@every_kind
def test_no_cell_ends_above_plain_iteration_at_any_budget(
    kind: Callable[[torch.Generator, torch.dtype], tuple[Map, Tensor]], dtype: torch.dtype, solver: Guaranteed
) -> None:
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        f, z0 = kind(generator, dtype)
        same = in_the_same_kernels(f)
        for budget in (torch.randperm(40, generator=generator)[:BUDGETS] + 1).tolist():
            found = solve(f, z0, solver=solver, budget=budget, tol=None)
            assert found.spent == budget
            for check_every in (1, 4):
                plain = solve(same, z0, solver=Picard(check_every=check_every), budget=budget, tol=None)
                assert never_above(found.residual, plain.residual), (seed, budget)


@both_dtypes
@every_kind
def test_no_cell_stops_later_than_plain_iteration(
    kind: Callable[[torch.Generator, torch.dtype], tuple[Map, Tensor]], dtype: torch.dtype
) -> None:
    earlier = 0
    for seed in range(SEEDS):
        f, z0 = kind(torch.Generator().manual_seed(seed), dtype)
        for tol in (1e-1, 1e-2, 1e-4):
            found = solve(f, z0, solver=Guaranteed(), budget=40, tol=tol)
            plain = solve(in_the_same_kernels(f), z0, solver=Picard(check_every=1), budget=40, tol=tol)
            assert (found.evaluations <= plain.evaluations).all()
            assert (found.residual[plain.result == Result.CONVERGED] <= tol).all()
            earlier += int((found.evaluations < plain.evaluations).sum())
    assert earlier > 0, "the accelerated walk stops samples too"


def test_acceleration_alone_is_worse_where_the_guarantee_holds() -> None:
    f, z0 = non_normal(torch.Generator().manual_seed(0), torch.float64)
    same, worse, better = in_the_same_kernels(f), 0, 0
    for budget in range(1, 41):
        plain, alone, found = (
            solve(g, z0, solver=solver, budget=budget, tol=None).residual
            for g, solver in ((same, Picard()), (f, Anderson()), (f, Guaranteed()))
        )
        assert never_above(found, plain)
        worse += int((alone > 1.5 * plain).sum())
        better += int((found < 0.5 * plain).sum())
    assert worse > 200, "of 64 cells at 40 budgets"
    assert better > 1000, "and it accelerates as well"


def test_the_guarantee_keeps_what_acceleration_gains() -> None:
    f, z0 = contractions(torch.Generator().manual_seed(1), torch.float64)
    for budget in range(1, 41):
        alone = solve(f, z0, solver=Anderson(), budget=budget, tol=None).residual
        assert (solve(f, z0, solver=Guaranteed(), budget=budget, tol=None).residual <= alone * 1.001 + 1e-12).all()


def test_samples_that_adaptive_leaves_to_plain_steps_are_left_to_them_here_too() -> None:
    rates = torch.tensor([[0.1], [0.4], [0.5]], dtype=torch.float64) * torch.linspace(0.2, 1.0, 9, dtype=torch.float64)
    z0 = torch.ones_like(rates)
    for budget in range(1, 21):
        plain = solve(lambda z: rates * z + 1.0, z0, solver=Picard(), budget=budget, tol=None)
        solver = Guaranteed(accelerated=Adaptive())
        found = solve(lambda z: rates * z + 1.0, z0, solver=solver, budget=budget, tol=None)
        torch.testing.assert_close(found.value, plain.value, rtol=0, atol=1e-14)


def test_no_model_ends_above_plain_iteration(model: DEQ, batch: Tensor) -> None:
    for budget in range(1, 21):
        plain = model.solve(batch, budget=budget, solver=Picard())
        found = model.solve(batch, budget=budget, solver=Guaranteed())
        assert (found.residual <= plain.residual * (1.0 + 1e-9) + 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_compact_block_is_walked_as_the_published_one(dtype: torch.dtype) -> None:
    spec = ModelSpec(
        input_shape=(1, 8, 8), classes=3, cell="residual", channels=8, inner_channels=4, groups=2, stem_stride=2
    )
    model = DEQ(spec, dtype=dtype)
    model.load(*initial(spec, 1))
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    for budget in range(1, 16):
        plain = model.solve(x, budget=budget, solver=Picard())
        found = model.solve(x, budget=budget, solver=Guaranteed())
        assert (found.residual <= plain.residual * 1.001 + 64 * torch.finfo(dtype).eps).all()


def test_what_is_reported_is_that_of_the_better_walk() -> None:
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    shift = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    # Plain iteration turns about the fixed point for ever; the accelerated walk of an affine map in the plane finds it.
    found = solve(lambda z: z @ rotation + shift, torch.zeros_like(shift), solver=Guaranteed(), budget=20, tol=1e-9)
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - rotation.T, shift.T).T
    torch.testing.assert_close(found.value, exact)
    assert (found.result == Result.CONVERGED).all()
    assert found.spent == found.evaluations.max() < 20
    assert len(found.rate) == 2


def test_an_adjoint_can_be_solved_with_the_guarantee(model: DEQ, batch: Tensor) -> None:
    gradients = []
    for solver in (Picard(), Guaranteed()):
        model.zero_grad()
        adjoint = Implicit(budget=200, tol=1e-12, solver=solver)
        output = model.forward(batch, budget=Budget(forward=12, adjoint=0), adjoint=adjoint)
        model.backward(output.logits.square().mean())
        gradients.append(model.theta_grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-10)


class _Doubled(torch.autograd.Function):
    """Twice its input, by a function that torch.vmap knows nothing of."""

    @staticmethod
    def forward(ctx: object, z: Tensor) -> Tensor:
        del ctx
        return 2.0 * z


CAPTURED = torch.zeros(2, 3)
UNSTACKABLE: dict[str, Map] = {
    "branch on a value": lambda z: z if float(z.sum()) > 0.0 else -z,
    "in place on what it captures": CAPTURED.copy_,
    "randomness": lambda z: z + torch.rand_like(z),
    "numpy": lambda z: torch.from_numpy(z.numpy() + 1.0),
    "custom function": _Doubled.apply,
}


@pytest.mark.parametrize("f", UNSTACKABLE.values(), ids=list(UNSTACKABLE))
def test_a_map_that_cannot_be_stacked_is_refused_in_one_line_with_the_remedy(f: Map) -> None:
    with pytest.raises(
        ConfigError, match=r"torch.vmap cannot stack this f \(.+\); .* or solve with Anderson"
    ) as caught:
        solve(f, torch.ones(2, 3), solver=Guaranteed(), budget=5)
    assert "\n" not in str(caught.value)


def test_a_branch_that_comes_late_is_refused_too() -> None:
    calls = [0]

    def f(z: Tensor) -> Tensor:
        calls[0] += 1
        return z if calls[0] > 3 and bool((z > 0.0).all()) else 0.5 * z + 1.0

    with pytest.raises(ConfigError, match="branches on values"):
        solve(f, torch.ones(2, 3), solver=Guaranteed(), budget=9, tol=None)


def test_a_fault_of_the_map_itself_keeps_its_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"\(2x3 and 7x7\)"):
        solve(lambda z: z @ torch.ones(7, 7), torch.ones(2, 3), solver=Guaranteed(), budget=5)
