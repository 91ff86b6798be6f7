"""Fixed-point problems of others as tables: what f is, where to start, what comes out.

Every problem is a batch of one sample, (1, n), built in the dtype asked for. `published` are fixed-point problems with
the evaluations, tolerance and memory of their sources, which the solvers were tuned on; `fresh` are problems from
elsewhere that nobody tuned to. Sources: jaxopt 2de13bf tests/{anderson,fixed_point_iteration}_test.py; scipy 1.17
test_minpack.py (TestFixedPoint) and test_nonlin.py (F to F6); optimistix 6415ab1 tests/helpers.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

# Fixed points of cos(x) and exp(-x).
COSINE = 0.7390851332151607
OMEGA = 0.5671432904097838


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """f with f(solution) = solution, both states of shape (1, n).

    tol: of the absolute residual |f(z) - z|. memory: history of the source's Anderson. accuracy: largest error of a
    component that counts as solved. contracts: whether plain iteration from `start` can solve it at all.
    """

    f: Map
    start: Tensor
    solution: Tensor
    evaluations: int
    tol: float
    memory: int = 5
    accuracy: float = 1e-5
    contracts: bool = True

    @property
    def relative_tol(self) -> float:
        """The source's absolute tolerance for our relative residual; a solution shorter than 1 keeps it as it is.

        In float32 no less than rounding lets a residual be.
        """
        return max(self.tol / max(1.0, float(self.solution.norm())), 32 * torch.finfo(self.start.dtype).eps)

    def error(self, z: Tensor) -> float:
        """The largest |z - solution| over the components; NaN where z holds one."""
        return float((z - self.solution).abs().max())

    def solved_by(self, z: Tensor) -> bool:
        """Whether z is the solution, to the accuracy that the problem asks for and the dtype allows."""
        largest = max(1.0, float(self.solution.abs().max()))
        return self.error(z) <= max(self.accuracy, 200 * torch.finfo(self.start.dtype).eps * largest)


@cache
def published(dtype: torch.dtype = torch.float64) -> dict[str, Problem]:
    """The 13 external problems, 5 of which plain iteration cannot solve (no contraction)."""
    return _from_jaxopt(dtype) | _from_scipy(dtype) | _from_optimistix(dtype)


def _from_jaxopt(dtype: torch.dtype) -> dict[str, Problem]:
    rates, shift = _row(dtype, 0.9, 0.99, 0.999), _row(dtype, 0.0, math.pi / 2)
    return {
        # The stopping rule of the source is absolute; a relative one sees 0.001 until |z| underflows the floor.
        "geometric": Problem(
            f=lambda z: rates * z,
            start=_row(dtype, 1.0, 0.4, -0.2),
            solution=_row(dtype, 0.0, 0.0, 0.0),
            evaluations=10_000,
            tol=1e-5,
            accuracy=1e-2,
        ),
        # The second component is neutrally stable: its derivative at the fixed point is -1. The source writes
        # 0.73908614842288, off by 1e-6.
        "neutral cosine": Problem(
            f=lambda z: torch.cos(z) + shift,
            start=_row(dtype, 0.3, math.pi / 4),
            solution=_row(dtype, COSINE, math.pi / 2),
            evaluations=100,
            tol=1e-6,
            memory=4,
            contracts=False,
        ),
        "half": Problem(
            f=lambda z: 0.5 * z + 0.5,
            start=_row(dtype, 0.0),
            solution=_row(dtype, 1.0),
            evaluations=10_000,
            tol=1e-4,
            accuracy=1e-3,
        ),
        "rotations": _rotations(dtype),
        "affine": _affine(dtype),
        "sine and powers": Problem(
            f=lambda z: torch.cat([z[:, :3].sin() * z[:, :3] ** 2, z[:, 3:5] ** 3, -z[:, 5:]], dim=1),
            start=_row(dtype, 0.6, 0.0, -0.1, 0.7, 0.5, -1 / 3, 0.0, 2 / 3, -0.4 / 3),
            solution=torch.zeros(1, 9, dtype=dtype),
            evaluations=2000,
            tol=1e-6,
            memory=3,
            contracts=False,
        ),
    }


def _rotations(dtype: torch.dtype) -> Problem:
    """Seven plane rotations about c: an isometry, so Banach's theorem says nothing."""
    angles = torch.tensor([math.pi / divisor for divisor in (2, 3, 4, 5, 6, 1.27, 1.73)], dtype=dtype)
    turn, centre = torch.zeros(14, 14, dtype=dtype), torch.arange(1.0, 15.0, dtype=dtype)
    for plane, angle in enumerate(angles):
        cos, sin = torch.cos(angle), torch.sin(angle)
        turn[2 * plane : 2 * plane + 2, 2 * plane : 2 * plane + 2] = torch.stack([cos, -sin, sin, cos]).view(2, 2)
    return Problem(
        f=lambda z: (z - centre) @ turn.T + centre,
        start=torch.rand(1, 14, generator=torch.Generator().manual_seed(0), dtype=dtype),
        solution=centre[None],
        evaluations=400,
        tol=1e-4,
        memory=10,
        accuracy=1e-3,
        contracts=False,
    )


def _affine(dtype: torch.dtype) -> Problem:
    """M z + b of dimension 200, M symmetric with spectral radius just below 1/2."""
    generator = torch.Generator().manual_seed(0)
    M = torch.rand(200, 200, generator=generator, dtype=torch.float64) * 2 - 1
    M = M + M.T
    M = M / (2 * torch.linalg.eigvalsh(M)[-1].abs() + 1e-4)
    b = torch.rand(200, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - M, b)[None].to(dtype)
    M, b = M.to(dtype), b.to(dtype)
    return Problem(
        f=lambda z: z @ M.T + b,
        start=torch.zeros(1, 200, dtype=dtype),
        solution=solution,
        evaluations=100,
        tol=1e-6,
    )


def _from_scipy(dtype: torch.dtype) -> dict[str, Problem]:
    c = _row(dtype, 0.75, 1.0, 1.25)
    return {
        "square root": Problem(
            f=lambda z: c * z.clamp_min(0.0).sqrt(),
            start=_row(dtype, 0.8, 1.1, 1.1),
            solution=c**2,
            evaluations=500,
            tol=1e-8,
            accuracy=1e-7,
        ),
        "repelling square": Problem(
            f=lambda z: c * z**2,
            start=_row(dtype, 1.1, 1.15, 0.9),
            solution=1.0 / c,
            evaluations=500,
            tol=1e-8,
            accuracy=1e-7,
            contracts=False,
        ),
        "repelling double": Problem(
            f=lambda z: 2.0 * z,
            start=_row(dtype, 0.3, 0.15),
            solution=_row(dtype, 0.0, 0.0),
            evaluations=500,
            tol=1e-8,
            accuracy=1e-7,
            contracts=False,
        ),
        "Lambert W": Problem(
            f=lambda z: torch.exp(-2.0 * z) / 2.0,
            start=_row(dtype, 1.0),
            solution=_row(dtype, OMEGA / 2),
            evaluations=500,
            tol=1e-12,
            accuracy=1e-11,
        ),
        "gh-5460": Problem(
            f=_issue_5460,
            start=_row(dtype, 1.001),
            solution=_row(dtype, 1.3),
            evaluations=500,
            tol=1e-8,
            accuracy=1e-7,
        ),
    }


def _issue_5460(z: Tensor) -> Tensor:
    """scipy gh-5460: plain iteration takes 6 evaluations, unguarded acceleration leaves the domain and makes NaN."""
    return torch.log(3.0 / z) / torch.log((0.3 / 1.3) * (3.0 / 1.3) ** (1 / 0.3) * z / (z - 1.0)) + 1.0


def _from_optimistix(dtype: torch.dtype) -> dict[str, Problem]:
    start = torch.full((1, 28), 0.5, dtype=dtype)
    maps: dict[str, tuple[Map, float]] = {
        "cosine": (torch.cos, COSINE),
        "exponential": (lambda z: torch.exp(-z), OMEGA),
    }
    return {
        name: Problem(f=f, start=start, solution=torch.full_like(start, root), evaluations=10_000, tol=1e-6)
        for name, (f, root) in maps.items()
    }


def _row(dtype: torch.dtype, *numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=dtype)


@cache
def fresh(dtype: torch.dtype = torch.float64) -> dict[str, Problem]:
    """Root problems F(x) = 0 as damped maps x - c F(x), steps of implicit integrators, stiff and non-normal maps."""
    return _roots(dtype) | _integrators(dtype) | _linear(dtype)


def _roots(dtype: torch.dtype) -> dict[str, Problem]:
    """F, F2, F3, F5, F6; F4 (Powell, badly scaled) is left out: its Jacobian has entries of 1e4 and of 1e-4."""
    d, A, b = _row(dtype, 3.0, 2.0, 1.5, 1.0, 0.5), _second_difference(dtype), _row(dtype, 1.0, 2.0, 3.0)
    start6 = _row(dtype, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    flows = _row(dtype, 2.0, 0.0, 2.0, 0.0)
    return {
        "F": _solve_for(
            lambda x: x - 0.5 * (d * x + 0.01 * (x * x).sum(dim=1, keepdim=True) * x), _row(dtype, 1, 1, 1, 1, 1), 0.0
        ),
        "F2": _solve_for(lambda x: 0.5 * x, start6, 0.0),
        "F2, long steps": _solve_for(lambda x: x - 1.9 * x, start6, 0.0),
        "F2, wrong direction": _solve_for(lambda x: 2.0 * x, start6, 0.0, contracts=False),
        "F3": _solve_for(lambda x: x + 0.3 * (x @ A - b), b, (-2.5, -4.0, -3.5)),
        "F3, too long steps": _solve_for(lambda x: x + x @ A - b, b, (-2.5, -4.0, -3.5), contracts=False),
        "F5": _solve_for(lambda x: x - 0.3 * _pressures(x).roll(1, dims=1), flows, 1.0),
        # Every equation moves another unknown than its own.
        "F5, crossed": _solve_for(lambda x: x - 0.3 * _pressures(x), flows, 1.0, contracts=False),
        "F6": _solve_for(_chord_step, _row(dtype, -0.5, 1.4), (0.0, 1.0)),
    }


def _second_difference(dtype: torch.dtype) -> Tensor:
    return torch.tensor([[-2, 1, 0], [1, -2, 1], [0, 1, -2]], dtype=dtype)


def _pressures(x: Tensor) -> Tensor:
    """Pressures of parallel pipes against the first, and the total flow against 4."""
    pressure = 0.5 * x**2
    return torch.cat([pressure[:, 1:] - pressure[:, :1], x.sum(dim=1, keepdim=True) - 4.0], dim=1)


def _chord_step(x: Tensor) -> Tensor:
    """F6: x - J0^-1 v(x) with a fixed Jacobian J0."""
    J0 = torch.tensor([[-4.256, 14.7], [0.8394989, 0.59964207]], dtype=x.dtype)
    first, second = x[:, 0], x[:, 1]
    v = torch.stack([(first + 3) * (second**5 - 7) + 18, torch.sin(second * torch.exp(first) - 1)], dim=1)
    chord: Tensor = torch.linalg.solve(J0, v.T).T
    return x - chord


def _integrators(dtype: torch.dtype) -> dict[str, Problem]:
    """One step each, as long as plain iteration bears: contraction rates of 0.94, 0.67 and 0.92 at the solution."""
    y0 = torch.linspace(-1, 1, 100, dtype=dtype)[None] ** 2
    generator = torch.Generator().manual_seed(19)
    M = torch.randn(28, 28, generator=generator, dtype=torch.float64).to(dtype)
    rough = torch.rand(1, 100, generator=generator, dtype=torch.float64).to(dtype)
    start, unmixed = torch.full((1, 28), 0.5, dtype=dtype), _row(dtype, 1.0, 0.0, 0.0)
    return {
        # As optimistix computes it: its Laplacian returns its argument.
        "heat, optimistix": _by_newton(lambda y: y0 + 0.5 * ((1 - y) * y + (1 - y0) * y0), torch.ones_like(y0)),
        # A rough start: a smooth one has no part in the slow modes.
        "heat": _by_newton(_crank_nicolson(y0, 0.95), rough),
        "midpoint, linear": _by_newton(lambda y: start + 0.25 * (0.5 * (start + y)) @ M.T, start),
        "midpoint, Robertson": _by_newton(_robertson_step(unmixed, 1.5e-3), unmixed),
    }


def _crank_nicolson(y0: Tensor, courant: float) -> Map:
    """dy/dt = (1 - y) d2y/dx2 from y0 on [-1, 1]; courant: twice the step over the squared spacing."""
    spacing = 2.0 / (y0.shape[1] - 1)

    def slope(y: Tensor) -> Tensor:
        bent = torch.zeros_like(y)
        bent[:, 1:-1] = (y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2]) / spacing**2
        return (1 - y) * bent

    return lambda y: y0 + 0.25 * courant * spacing**2 * (slope(y) + slope(y0))


def _robertson_step(y0: Tensor, dt: float) -> Map:
    """The implicit midpoint rule on Robertson's kinetics, rate constants 0.04, 3e7, 1e4."""

    def midpoint(y: Tensor) -> Tensor:
        a, b, c = (0.5 * (y0 + y)).unbind(dim=1)
        slow, fast, back = 0.04 * a, 3e7 * b**2, 1e4 * b * c
        return y0 + dt * torch.stack([back - slow, slow - fast - back, fast], dim=1)

    return midpoint


def _linear(dtype: torch.dtype) -> dict[str, Problem]:
    near_one, near_minus_one = 1 - torch.logspace(-2, 0, 20, dtype=dtype), torch.logspace(-2, 0, 20, dtype=dtype) - 1
    rates = torch.cat([near_one, near_minus_one])[None]
    chain = 0.5 * torch.eye(12, dtype=dtype) + torch.diag(torch.full((11,), 0.7, dtype=dtype), 1)
    grown = torch.linalg.solve(torch.eye(12, dtype=dtype) - chain, torch.ones(12, dtype=dtype))[None]
    return {
        "stiff both ways": _solve_for(lambda z: rates * z + (1 - rates), torch.zeros_like(rates), 1.0),
        # Spectral radius 1/2 and norm 1.2: steps grow before they shrink.
        "non-normal": _solve_for(lambda z: z @ chain.T + 1.0, torch.zeros_like(grown), tuple(grown[0].tolist())),
    }


def _solve_for(f: Map, start: Tensor, solution: float | tuple[float, ...], *, contracts: bool = True) -> Problem:
    known = _row(start.dtype, *solution) if isinstance(solution, tuple) else torch.full_like(start, solution)
    return Problem(f=f, start=start, solution=known, evaluations=2000, tol=1e-8, contracts=contracts)


def _by_newton(f: Map, start: Tensor) -> Problem:
    """The solution to rounding by Newton's method, which is independent of what is tested."""
    z = start
    identity = torch.eye(start.shape[1], dtype=start.dtype)
    for _ in range(8):
        jacobian: Tensor = torch.autograd.functional.jacobian(f, z)[0, :, 0]  # type: ignore[no-untyped-call]  # torch's
        z = z + torch.linalg.solve(identity - jacobian, (f(z) - z)[0])
    return Problem(f=f, start=start, solution=z, evaluations=2000, tol=1e-8)
