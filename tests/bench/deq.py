"""The equilibrium core against torchdeq 0.1.0 and against the bare cell: make bench-deq.

Every time is process CPU time on one thread, the least over interleaved rounds, so that neighbours on the machine and
drift hit all alike. Both libraries run the same plain torch functions in this process. A table goes to stderr, one JSON
line per figure to stdout. Peak memory needs a process of its own: this file with --memory.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torchdeq  # pyright: ignore[reportMissingImports]  # group "bench" alone installs it
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchdeq.solver.anderson import anderson_solver  # pyright: ignore[reportMissingImports]  # as above

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.adjoints import Adjoint, AdjointStep, Implicit, KTerm
from fedeq_edge.deq.batch import relative_residual
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.numeric import NumpyDEQ
from fedeq_edge.deq.solution import Solution
from fedeq_edge.deq.solvers import StepFunction, solve
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.hardware.memory import keep_heap, peak_rss_bytes
from tests.bench.figures import Figure, measure
from tests.deq.problems import published

# The tolerance of every solve, forward and adjoint: relative residual per sample.
TOL = 1e-3
# Evaluations allowed: enough for torchdeq's default ridge to reach the tolerance on the slow cell.
BUDGET = 200
TRAINING_BUDGET = 30
ROUNDS = 7
# A call is repeated until a round takes so long, in seconds.
ROUND_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A cell as plain functions of its parameters, z = step(z, inject()), and its J^T by formula where it has one."""

    name: str
    inject: Callable[[], Tensor]
    step: Callable[[Tensor, Tensor], Tensor]
    z0: Tensor
    parameters: tuple[Tensor, ...]
    linearise: Callable[[Tensor], AdjointStep] | None = None

    def frozen(self) -> StepFunction:
        """f(z), the injection computed once and without graph."""
        injection = self.inject().detach()
        return lambda z: self.step(z, injection)


def dense(*, batch: int = 64, slow: bool = False, dtype: torch.dtype = torch.float32) -> Workload:
    """tanh(W z + U x), 128 wide, |W|_2 = 0.98; slow: symmetric W and inputs a third as large, rate near 0.94."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(128, 128, generator=generator)
    W = (W + W.T) / 2 if slow else W
    W = (0.98 * W / torch.linalg.matrix_norm(W, 2)).to(dtype).requires_grad_()
    U = (torch.rand(128, 128, generator=generator) * 2 - 1).div(128**0.5).to(dtype).requires_grad_()
    x = ((0.1 if slow else 0.3) * torch.randn(batch, 128, generator=generator)).to(dtype)

    def linearise(value: Tensor) -> AdjointStep:
        slope, weight = 1.0 - value * value, W.detach()
        return lambda v, u: torch.addmm(v, u * slope, weight)

    return Workload(
        name=f"dense{' slow' if slow else ''} B{batch}",
        inject=lambda: x @ U.T,
        step=lambda z, injection: torch.tanh(torch.addmm(injection, z, W.T)),
        z0=torch.zeros_like(x),
        parameters=(W, U),
        linearise=linearise,
    )


def conv(*, batch: int = 32, dtype: torch.dtype = torch.float32) -> Workload:
    """tanh(GroupNorm(conv3x3(z) + conv3x3(x))), 32 channels of 16 x 16."""
    generator = torch.Generator().manual_seed(0)
    kernel = (torch.randn(32, 32, 3, 3, generator=generator) * 0.45 / 288**0.5).to(dtype).requires_grad_()
    U = (torch.rand(32, 32, 3, 3, generator=generator) * 2 - 1).div(288**0.5).to(dtype).requires_grad_()
    scale, shift = torch.ones(32, dtype=dtype).requires_grad_(), torch.zeros(32, dtype=dtype).requires_grad_()
    x = torch.randn(batch, 32, 16, 16, generator=generator).to(dtype)

    def step(z: Tensor, injection: Tensor) -> Tensor:
        mapped = functional.conv2d(z, kernel, padding=1) + injection
        return torch.tanh(functional.group_norm(mapped, 8, scale, shift))

    return Workload(
        name=f"conv B{batch}",
        inject=lambda: functional.conv2d(x, U, padding=1),
        step=step,
        z0=torch.zeros_like(x),
        parameters=(kernel, U, scale, shift),
    )


def cpu_seconds(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """CPU seconds of each call: the least over interleaved rounds."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(ROUND_S / max(_timed(call, 1), 1e-7)))
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            least[name] = min(least[name], _timed(call, repeats[name]))
    return least


def _timed(call: Callable[[], object], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def floor() -> Iterator[Figure]:
    """Picard to the tolerance over so many bare calls of the cell."""
    yield _over_floor(dense(), 1.08)
    yield _over_floor(conv(), 1.05)
    yield _over_floor(dense(batch=1), 1.4)


def _over_floor(workload: Workload, goal: float) -> Figure:
    f, z0 = workload.frozen(), workload.z0
    spent = solve(f, z0, solver=Picard(), budget=BUDGET, tol=TOL).spent

    def bare() -> None:
        z = z0
        with torch.no_grad():
            for _ in range(spent):
                z = f(z)

    def ours() -> None:
        solve(f, z0, solver=Picard(), budget=BUDGET, tol=TOL)

    seconds = cpu_seconds({"bare": bare, "ours": ours})
    return Figure(
        section="floor",
        name=f"Picard, {workload.name}",
        value=seconds["ours"] / seconds["bare"],
        goal=goal,
        detail=f"{spent} evaluations, a bare call takes {1e6 * seconds['bare'] / spent:.1f} us",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a forward solve came to: evaluations, and the largest |f(z) - z| / |f(z)| of the state it returned."""

    run: Callable[[], Tensor]
    evaluations: int
    residual: float


def accelerated() -> Iterator[Figure]:
    """Solves to the same residual, ours against torchdeq's Anderson with its default ridge and with its best."""
    yield from _against_torchdeq(dense(), 0.35)
    yield from _against_torchdeq(dense(slow=True), 0.30)
    yield from _against_torchdeq(conv(), 0.60)


def _against_torchdeq(workload: Workload, goal: float) -> Iterator[Figure]:
    f, z0 = workload.frozen(), workload.z0
    outcomes = {
        "torchdeq Anderson": _torchdeq_anderson(f, z0, 1e-4),
        "torchdeq Anderson lam=1e-10": _torchdeq_anderson(f, z0, 1e-10),
        "Adaptive": _ours(f, z0, Adaptive()),
        "Anderson every 3": _ours(f, z0, Anderson()),
        "Picard": _ours(f, z0, Picard()),
    }
    seconds = cpu_seconds({name: outcome.run for name, outcome in outcomes.items()})
    theirs = ("torchdeq Anderson", "torchdeq Anderson lam=1e-10")
    # The faster of the two that reached the tolerance: on slow cells the default ridge does not.
    reference = min(seconds[name] for name in theirs if outcomes[name].residual <= TOL)
    for name, outcome in outcomes.items():
        yield Figure(
            section="accelerated",
            name=f"{name}, {workload.name}",
            value=seconds[name] / reference,
            goal=goal if name in ("Adaptive", "Anderson every 3") else None,
            detail=f"{1e3 * seconds[name]:.2f} ms ({seconds[name] / seconds[theirs[0]]:.2f} of its default ridge), "
            f"{outcome.evaluations} evaluations, residual {outcome.residual:.1e}",
        )


def _ours(f: StepFunction, z0: Tensor, solver: Solver) -> Outcome:
    def run() -> Tensor:
        return solve(f, z0, solver=solver, budget=BUDGET, tol=TOL).value

    return _outcome(f, run, solve(f, z0, solver=solver, budget=BUDGET, tol=TOL).spent)


def _torchdeq_anderson(f: StepFunction, z0: Tensor, ridge: float) -> Outcome:
    calls = 0

    def run(counted: StepFunction = f) -> Tensor:
        with torch.no_grad():
            # The bare function: its module would add argument handling of its own. m as ours.
            state: Tensor = anderson_solver(counted, z0, max_iter=BUDGET, tol=TOL, stop_mode="rel", m=5, lam=ridge)[0]
        return state

    def count(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(z)

    run(count)
    return _outcome(f, run, calls)


def _outcome(f: StepFunction, run: Callable[[], Tensor], evaluations: int) -> Outcome:
    state = run()
    with torch.no_grad():
        residual = float(relative_residual(state, f(state)).max())
    return Outcome(run=run, evaluations=evaluations, residual=residual)


def our_step(
    workload: Workload, target: Tensor, adjoint: Adjoint, *, check_every: int = 4, by_formula: bool = False
) -> None:
    """Injection, Picard solve, one evaluation with a graph, gradient of <z, target>."""
    injection = workload.inject()
    frozen = injection.detach()
    solver = Picard(check_every=check_every)
    found = solve(lambda z: workload.step(z, frozen), workload.z0, solver=solver, budget=TRAINING_BUDGET, tol=TOL)
    linearise = workload.linearise if by_formula else None
    attached = adjoint.attach(lambda z: workload.step(z, injection), found.value, linearise=linearise)
    torch.autograd.backward((attached.value * target).sum(), inputs=workload.parameters)


def torchdeq_step(workload: Workload, target: Tensor, module: torch.nn.Module) -> None:
    """The same through torchdeq's module."""
    injection = workload.inject()
    states, _ = module(lambda z: workload.step(z, injection), workload.z0)
    torch.autograd.backward((states[-1] * target).sum())


def unrolled_step(workload: Workload, target: Tensor, evaluations: int) -> None:
    """The same by back-propagation through every evaluation."""
    injection, z = workload.inject(), workload.z0
    for _ in range(evaluations):
        z = workload.step(z, injection)
    torch.autograd.backward((z * target).sum())


def gradient(workload: Workload, run: Callable[[], None]) -> Tensor:
    """The gradient that a training step leaves, flat, float64."""
    for parameter in workload.parameters:
        parameter.grad = None
    run()
    gradients = [p.grad for p in workload.parameters if p.grad is not None]
    return torch.cat([g.reshape(-1) for g in gradients]).double()


def training() -> Iterator[Figure]:
    """Training steps, Picard forward and adjoint to the same relative tolerance, against torchdeq's implicit one."""
    yield from _steps_against_torchdeq(dense(), dense(dtype=torch.float64), 0.45)
    yield from _steps_against_torchdeq(conv(), conv(dtype=torch.float64), 0.75)


def _steps_against_torchdeq(workload: Workload, exact: Workload, goal: float) -> Iterator[Figure]:
    target = torch.randn(workload.z0.shape, generator=torch.Generator().manual_seed(1))
    truth = gradient(exact, lambda: unrolled_step(exact, target.double(), 60))  # converged to 1e-10 and beyond
    steps = _torchdeq_steps(workload, target) | _our_steps(workload, target)
    seconds = cpu_seconds(steps)
    for name, step in steps.items():
        error = float((gradient(workload, step) - truth).norm() / truth.norm())
        yield Figure(
            section="training",
            name=f"{name}, {workload.name}",
            value=seconds[name] / seconds["torchdeq implicit"],
            goal=goal if name in ("Implicit", "Implicit, check_every 1") else None,
            detail=f"{1e3 * seconds[name]:.2f} ms, gradient error {error:.1e}",
        )


def _torchdeq_steps(workload: Workload, target: Tensor) -> dict[str, Callable[[], None]]:
    forward = {"f_solver": "fixed_point_iter", "f_max_iter": TRAINING_BUDGET, "f_tol": TOL, "f_stop_mode": "rel"}
    backward = {"b_solver": "fixed_point_iter", "b_max_iter": TRAINING_BUDGET, "b_tol": TOL, "b_stop_mode": "rel"}
    implicit = torchdeq.get_deq(ift=True, **forward, **backward)
    jacobian_free = torchdeq.get_deq(grad=1, **forward)
    return {
        "torchdeq implicit": lambda: torchdeq_step(workload, target, implicit),
        "torchdeq JFB": lambda: torchdeq_step(workload, target, jacobian_free),
    }


def _our_steps(workload: Workload, target: Tensor) -> dict[str, Callable[[], None]]:
    implicit = Implicit(budget=TRAINING_BUDGET, tol=TOL, solver=Picard())
    at_once = Implicit(budget=TRAINING_BUDGET, tol=TOL, solver=Picard(check_every=1))
    steps: dict[str, Callable[[], None]] = {
        "Implicit": lambda: our_step(workload, target, implicit),
        # The better setting where an evaluation costs far more than a look; torchdeq looks at every one, too.
        "Implicit, check_every 1": lambda: our_step(workload, target, at_once, check_every=1),
        "KTerm 8": lambda: our_step(workload, target, KTerm(terms=8)),
        "KTerm 0 (JFB)": lambda: our_step(workload, target, KTerm(terms=0)),
        "unrolled": lambda: unrolled_step(workload, target, TRAINING_BUDGET),
    }
    if workload.linearise:
        steps["Implicit by formula"] = lambda: our_step(workload, target, implicit, by_formula=True)
        steps["KTerm 8 by formula"] = lambda: our_step(workload, target, KTerm(terms=8), by_formula=True)
    return steps


MEMORY_STEPS: dict[str, Callable[[Workload, Tensor], None]] = {
    "unrolled": lambda workload, target: unrolled_step(workload, target, TRAINING_BUDGET),
    "implicit": lambda workload, target: our_step(
        workload, target, Implicit(budget=TRAINING_BUDGET, tol=1e-9, solver=Picard())
    ),
    "KTerm 8": lambda workload, target: our_step(workload, target, KTerm(terms=8)),
}


def step_memory(name: str) -> float:
    """Megabytes that training steps of the conv cell add to the peak of this process.

    A step on one sample comes first: it loads code, sympy and kernels, which have nothing to do with the method.
    """
    _memory_step(name, conv(batch=1))
    workload = conv()
    workload.inject()
    before = peak_rss_bytes()
    for _ in range(3):
        _memory_step(name, workload)
    return (peak_rss_bytes() - before) / 1e6


def _memory_step(name: str, workload: Workload) -> None:
    gradient(workload, lambda: MEMORY_STEPS[name](workload, torch.ones_like(workload.z0)))


def memory() -> Iterator[Figure]:
    """Peak memory of a training step against back-propagation through all evaluations; each in its own process."""
    peaks = {}
    for name in MEMORY_STEPS:
        command = [sys.executable, __file__, "--memory", name]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name, peak in peaks.items():
        yield Figure(
            section="memory",
            name=f"{name}, conv B32, K={TRAINING_BUDGET}",
            value=peak / peaks["unrolled"],
            goal=None if name == "unrolled" else 0.5,
            detail=f"{peak:.0f} MB on top of a process that made a step on one sample",
        )


def battery() -> Iterator[Figure]:
    """Failures on the 13 published problems, in float64, with the evaluations of their sources."""
    yield _failures("Adaptive", lambda memory: Adaptive(accelerated=Anderson(memory=memory)))
    yield _failures("Anderson every 3", lambda memory: Anderson(memory=memory))
    yield _failures("Anderson every 1", lambda memory: Anderson(memory=memory, every=1))


def _failures(name: str, solver: Callable[[int], Solver]) -> Figure:
    failed, spent = [], 0
    for title, problem in published().items():
        found = solve(
            problem.f,
            problem.start,
            solver=solver(problem.memory),
            budget=problem.evaluations,
            tol=problem.relative_tol,
        )
        spent += found.spent
        if not problem.solved_by(found.value):
            failed.append(title)
    return Figure(
        section="battery",
        name=f"failures of 13, {name}",
        value=len(failed),
        goal=0,
        detail=f"{spent} evaluations in all" + (f"; not solved: {', '.join(failed)}" if failed else ""),
    )


def warm() -> Iterator[Figure]:
    """Evaluations of the slow cell to 1e-4, started from the equilibrium of weights that differ by so much."""
    workload = dense(slow=True)
    f, W = workload.frozen(), workload.parameters[0].detach()
    cold = _to_four_digits(f, workload.z0)
    yield Figure(section="warm", name="evaluations from zero", value=cold.spent)
    original, direction = W.clone(), torch.randn(W.shape, generator=torch.Generator().manual_seed(2))
    for move in (1e-4, 1e-3, 1e-2, 1e-1):
        W.copy_(original + move * original.norm() / direction.norm() * direction)
        spent = _to_four_digits(f, cold.value).spent
        yield Figure(section="warm", name=f"evaluations after a move of {move:g}", value=spent)


def _to_four_digits(f: StepFunction, z0: Tensor) -> Solution:
    return solve(f, z0, solver=Picard(check_every=1), budget=1000, tol=1e-4)


def numpy_path() -> Iterator[Figure]:
    """Inference of a contractive dense model, numpy against torch: stem, 12 evaluations, head."""
    for width in (64, 128, 256):
        spec = ModelSpec(input_shape=(width,), classes=10, channels=width)
        theta, head = initial(spec, 0)
        model = DEQ(spec)
        model.load(theta, head)
        for batch in (1, 16, 64, 256):
            yield _numpy_over_torch(NumpyDEQ(spec, theta, head), model, batch)


def _numpy_over_torch(plain: NumpyDEQ, model: DEQ, batch: int) -> Figure:
    width = model.spec.channels
    x: NDArray[np.float32] = np.random.default_rng(0).standard_normal((batch, width)).astype(np.float32)
    samples = torch.from_numpy(x)

    def by_torch() -> None:
        with torch.no_grad():
            model.head(model.features(model.solve(samples, budget=12, solver=Picard()).value))

    seconds = cpu_seconds({"numpy": lambda: plain.infer(x, budget=12), "torch": by_torch})
    return Figure(
        section="numpy",
        name=f"numpy over torch, d={width} B={batch}",
        value=seconds["numpy"] / seconds["torch"],
        detail=f"{1e6 * seconds['numpy']:.0f} us against {1e6 * seconds['torch']:.0f} us",
    )


SECTIONS: dict[str, Callable[[], Iterable[Figure]]] = {
    "floor": floor,
    "accelerated": accelerated,
    "training": training,
    "memory": memory,
    "battery": battery,
    "warm": warm,
    "numpy": numpy_path,
}


def main() -> None:
    """Measure the sections named on the command line, all of them when none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--memory", choices=MEMORY_STEPS, help="measure one training step's memory in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_heap()  # as the trainer does: without it both libraries and the bare cell pay for page faults, unevenly
    if options.memory:
        print(step_memory(options.memory))
        return
    measure(SECTIONS, options.sections)


if __name__ == "__main__":
    main()
