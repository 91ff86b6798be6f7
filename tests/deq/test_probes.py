"""The probes at which torchdeq 0.1.0 fails, numbered as in the notes: each test here would fail on its behaviour."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.batch import relative_residual
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import iterate, solve
from fedeq_edge.deq.spec import ModelSpec

SOLVERS: tuple[Solver, ...] = (
    Picard(),
    Picard(check_every=1),
    Picard(damping=0.7),
    Anderson(),
    Anderson(every=1),
    Adaptive(),
)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
accelerated = pytest.mark.parametrize("solver", [Anderson(), Anderson(every=1), Adaptive()], ids=str)


def slow_weight(width: int, gain: float) -> Tensor:
    """Symmetric, so that plain iteration contracts no faster than |W|_2 = gain."""
    W = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    scaled: Tensor = gain * (W + W.T) / torch.linalg.matrix_norm(W + W.T, 2)
    return scaled


@every_solver
@pytest.mark.parametrize("budget", range(1, 13))
def test_p1_any_budget_is_kept_and_gives_the_state_that_the_residual_belongs_to(solver: Solver, budget: int) -> None:
    seen: list[Tensor] = []

    def cosine(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return torch.cos(z)

    found = solve(cosine, torch.zeros(3, 1), solver=solver, budget=budget, tol=1e-6)
    assert len(seen) == found.spent <= budget
    torch.testing.assert_close(found.value, torch.cos(found.state), rtol=0, atol=0)
    torch.testing.assert_close(found.residual, relative_residual(found.state, found.value), rtol=1e-3, atol=1e-7)
    assert any(torch.equal(found.state, z) for z in seen), "a state that f was evaluated at"
    assert (found.value != 0.0).all(), "the start is no answer: an evaluation was spent"


@every_solver
def test_p2_a_sample_that_overflows_ends_diverged_at_a_finite_state_and_leaves_its_mates_alone(solver: Solver) -> None:
    factor, shift = torch.tensor([[1e30], [0.5], [0.5]]), torch.tensor([[0.0], [1.0], [1.0]])
    found = solve(lambda z: factor * z + shift, torch.ones(3, 1), solver=solver, budget=60, tol=1e-6)
    alone = solve(lambda z: 0.5 * z + 1.0, torch.ones(2, 1), solver=solver, budget=60, tol=1e-6)
    assert found.result.tolist() == [Result.DIVERGED, Result.CONVERGED, Result.CONVERGED]
    assert torch.isfinite(found.value).all()
    assert torch.isfinite(found.state).all()
    torch.testing.assert_close(found.value[1:], alone.value, rtol=1e-6, atol=0)
    assert found.evaluations[1:].tolist() == alone.evaluations.tolist()


@every_solver
def test_p2_an_expanding_map_is_never_called_converged_however_large_its_states_become(solver: Solver) -> None:
    """|f(z) - z| / |f(z)| is 0 where the square in |f(z)| alone overflows."""
    expanding = torch.tensor([[2.0], [-2.0], [3.0]])
    for budget in range(55, 135):
        found = solve(lambda z: expanding * z + 1.0, torch.ones(3, 1), solver=Picard(check_every=1), budget=budget)
        assert (found.result >= Result.DIVERGED).all()
    solved = solve(lambda z: expanding * z + 1.0, torch.ones(3, 1), solver=solver, budget=200)
    exact = torch.tensor([[-1.0], [1.0 / 3.0], [-0.5]])
    right = (solved.value - exact).abs().flatten() < 1e-3
    assert (right | (solved.result != Result.CONVERGED)).all()


@every_solver
def test_p3_a_sample_is_solved_alike_alone_and_among_slow_mates(solver: Solver) -> None:
    W = slow_weight(16, 0.97)
    sizes = torch.tensor([2.0] + [0.05] * 7)[:, None]
    x = sizes * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    together = solve(lambda z: torch.tanh(z @ W + x), torch.zeros(8, 16), solver=solver, budget=60, tol=1e-3)
    alone = solve(lambda z: torch.tanh(z @ W + x[:1]), torch.zeros(1, 16), solver=solver, budget=60, tol=1e-3)
    assert together.evaluations[0] == alone.evaluations[0]
    torch.testing.assert_close(together.value[0], alone.value[0], rtol=0, atol=2e-6)


@accelerated
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 0.001])
def test_p4_acceleration_helps_at_every_scale_of_the_activations(solver: Solver, scale: float) -> None:
    W = slow_weight(128, 0.98)
    x = scale * torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    plain, mixed = (
        solve(lambda z: torch.tanh(z @ W + x), torch.zeros(16, 128), solver=chosen, budget=30, tol=None)
        for chosen in (Picard(), solver)
    )
    # At scale 1 tanh saturates and plain iteration is at rounding by itself.
    assert float(mixed.residual.max()) <= max(0.2 * float(plain.residual.max()), 2e-6)


@accelerated
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_p4_the_unit_of_the_state_does_not_matter(solver: Solver, scale: float, dtype: torch.dtype) -> None:
    W = slow_weight(32, 0.95).to(dtype)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    zero = torch.zeros_like(x)
    one = solve(lambda z: torch.tanh(z @ W + x), zero, solver=solver, budget=200, tol=1e-4)
    other = solve(lambda z: scale * torch.tanh(z / scale @ W + x), zero, solver=solver, budget=200, tol=1e-4)
    assert (one.result == Result.CONVERGED).all()
    assert int((one.evaluations - other.evaluations).abs().max()) <= solver.interval
    torch.testing.assert_close(other.value / scale, one.value, rtol=0, atol=2e-4)


@accelerated
@pytest.mark.parametrize("z0", [0.0, 1.0])
def test_p5_a_singular_system_is_no_error(solver: Solver, z0: float) -> None:
    start = torch.full((2, 4), z0)
    found = solve(torch.ones_like, start, solver=solver, budget=8, tol=None)
    assert (found.value == 1.0).all()
    assert (found.residual == 0.0).all()
    tiny = Anderson(every=1, ridge=1e-300)
    assert (solve(torch.ones_like, start, solver=tiny, budget=8, tol=None).value == 1.0).all()


class FixedDepth(nn.Module):
    """A layer that spends a fixed number of plain evaluations: the path meant for export."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return iterate(lambda z: torch.tanh(0.5 * self.map(z) + x), torch.zeros_like(x), evaluations=6)


# torch.export itself warns of its own internals.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_p6_a_fixed_number_of_plain_evaluations_can_be_exported() -> None:
    torch.manual_seed(0)
    layer, x = FixedDepth().eval(), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@every_solver
def test_p7_settings_travel_between_processes(solver: Solver) -> None:
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert copy.deepcopy(solver) == solver


def test_p7_a_model_can_be_copied_and_its_state_saved() -> None:
    spec = ModelSpec(input_shape=(6,), classes=3, channels=8)
    model = DEQ(spec)
    model.load(*initial(spec, 1))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    twin, other = copy.deepcopy(model), DEQ(spec)
    other.load_state_dict(model.state_dict())
    for copied in (twin, other):
        assert torch.equal(copied.theta, model.theta), "also the flat vector that travels"
        assert torch.equal(copied.solve(x, budget=5).value, model.solve(x, budget=5).value)
    model.theta.fill_(math.nan)
    assert torch.isfinite(twin.theta).all()
