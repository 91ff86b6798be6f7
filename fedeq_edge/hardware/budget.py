"""From measured cost and what may be spent (seconds, joules), or from what is to be reached, to an iteration budget.

A budget is K forward evaluations and k adjoint terms. `within_seconds` and `within_joules` give the largest that one
training step affords, `for_certificate` the smallest whose answer is proven to be accurate enough; `choose` plans a
whole round.

Theory of operation. One training step costs  fixed + K * evaluation + k * adjoint  seconds (`Calibration`).
During training a device draws K per batch, uniformly from the part of the fleet's menu that it can afford
(algorithm.md, "Practice": mixed K keeps a model accurate at every budget), so it is the *mean* cost over
that part that has to fit. `choose` plans a round; `Pace` corrects the plan while the round runs and
remembers, as `drift`, how far the calibration was off: the next `choose` gets
`derate = throttle factor / drift`. No function here reads a clock: elapsed time is an argument.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.deq.wellposed import adjoint_terms_for, evaluations_for
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.step import Budget, Calibration

# A fifth of the round's time stays free for evaluation, garbage collection and a neighbour's burst.
PLANNED_SHARE = 0.8
# A step begins only if twice its cost, at the pace of the step before, is left: a device that turns slow (or was
# calibrated in a better moment) must not run past a round's time. Steps jitter by less than that.
STEP_RESERVE = 2.0
# About the last ten steps count; a first step that pays for lazy initialisation is soon forgotten.
DRIFT_RATE = 0.1
# One outlier (a page fault, a suspended laptop) must not decide the next round.
DRIFT_RANGE = (0.25, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a device may do in one round.

    budget: the largest K that it affords, and its k. menu: affordable values of K, ascending, never empty.
    steps: training steps, at most those asked for. predicted_s: expected device seconds for all of them.
    """

    budget: Budget
    menu: tuple[int, ...]
    steps: int
    predicted_s: float


def budget_of(forward: int, adjoint_ratio: float) -> Budget:
    """The budget with K = `forward` evaluations and k = round(adjoint_ratio * K) adjoint terms."""
    return Budget(forward=forward, adjoint=max(0, round(adjoint_ratio * forward)))


def step_seconds(calibration: Calibration, budget: Budget) -> float:
    """Expected device seconds of one training step with this budget."""
    return calibration.fixed_s + budget.forward * calibration.evaluation_s + budget.adjoint * calibration.adjoint_s


def mean_step_seconds(calibration: Calibration, menu: Sequence[int], adjoint_ratio: float) -> float:
    """Expected device seconds of one training step whose K is drawn uniformly from `menu`."""
    return sum(step_seconds(calibration, budget_of(K, adjoint_ratio)) for K in menu) / len(menu)


def seconds_of(joules: float, watts: float | None) -> float:
    """How long a board that draws `watts` may compute on `joules`. Raises ConfigError where its watts are not known."""
    if watts is None:
        raise ConfigError(
            f"energy: {joules:g} J cannot be turned into seconds, because the board's profile states no active_watts; "
            "measure the board, write it into devices/<board>/profile.toml, or give seconds"
        )
    return joules / watts


def round_seconds(compute_s: float, energy_j: float | None, watts: float | None) -> float:
    """Seconds that training may take in a round: `compute_s`, or less where `energy_j` joules are spent before.

    A board whose watts are not known goes by `compute_s` alone (whoever runs it says so: agent.py).
    """
    return compute_s if energy_j is None or watts is None else min(compute_s, seconds_of(energy_j, watts))


def within_seconds(calibration: Calibration, seconds: float, adjoint_ratio: float) -> Budget:
    """The largest budget with which one training step costs at most `seconds`; k follows K (`budget_of`).

    K is at most LARGEST_BUDGET. Raises ConfigError where K = 1 costs more already.
    """
    affordable = bisect_right(
        range(1, LARGEST_BUDGET + 1),
        seconds,
        key=lambda K: step_seconds(calibration, budget_of(K, adjoint_ratio)),
    )
    if affordable < 1:
        least = step_seconds(calibration, budget_of(1, adjoint_ratio))
        raise ConfigError(
            f"budget: one training step with a single evaluation takes {least:.2g} s, more than the {seconds:.2g} s "
            "allowed; allow more, or use a smaller batch or model"
        )
    return budget_of(affordable, adjoint_ratio)


def within_joules(calibration: Calibration, joules: float, adjoint_ratio: float, watts: float | None) -> Budget:
    """The largest budget with which one training step costs a board of `watts` at most `joules`.

    Raises ConfigError where K = 1 costs more, or where the board's watts are not known (None).
    """
    return within_seconds(calibration, seconds_of(joules, watts), adjoint_ratio)


def for_certificate(first: Certificate, accuracy: float) -> Budget:
    """The least K that is proven to bring |z_K - z*| to `accuracy`, and the least k whose gradient errs by no more.

    first: the certificate of the fewest evaluations of interest, usually 1; `accuracy` is in its norm and unit.
    |u - u_k| <= accuracy |v| for the k-term adjoint (algorithm.md section 3). Raises ConfigError for accuracy <= 0.
    Rounding sets a floor to the bound (some 1e-6 / (1 - gamma)): below it more evaluations promise nothing.
    """
    terms = adjoint_terms_for(first.gamma, accuracy)
    if first.bound <= accuracy:
        return Budget(forward=first.evaluations, adjoint=terms)
    more = evaluations_for(first.gamma, accuracy, distance=first.bound)
    return Budget(forward=first.evaluations + more, adjoint=terms)


def choose(
    calibration: Calibration,
    *,
    steps: int,
    compute_s: float,
    menu: Sequence[int],
    adjoint_ratio: float,
    derate: float = 1.0,
    enough: int | None = None,
) -> Allowance:
    """The largest budget whose `steps` training steps fit into four fifths of `compute_s` device seconds.

    derate: speed relative to the calibration, > 0 (throttling, drift). enough: evaluations after which the answer is
    proven to be as accurate as was asked (`for_certificate`); larger entries of the menu become this one.
    Where even the smallest K of the menu does not fit, the number of steps falls instead, to 1 at least. K and steps
    never fall when `compute_s` or `derate` grows.
    Raises ConfigError for a menu that is empty or holds a K below 1, ValueError for `derate` <= 0.
    """
    sizes = _ascending(menu if enough is None else [min(K, enough) for K in menu])
    if not derate > 0:
        raise ValueError(f"derate must be positive, got {derate}: a device that abstains chooses no budget")
    available_s = PLANNED_SHARE * compute_s * derate
    affordable = _affordable(calibration, sizes, adjoint_ratio, steps, available_s)
    step_s = mean_step_seconds(calibration, affordable, adjoint_ratio)
    count = _steps_that_fit(steps, step_s, available_s)
    return Allowance(
        budget=budget_of(affordable[-1], adjoint_ratio),
        menu=affordable,
        steps=count,
        predicted_s=count * step_s / derate,
    )


def _ascending(menu: Sequence[int]) -> tuple[int, ...]:
    if not menu or min(menu) < 1:
        raise ConfigError(
            f"plan: budgets {tuple(menu)} must name evaluations K >= 1; write for example budgets = [2, 4, 8]"
        )
    return tuple(sorted(set(menu)))


def _affordable(
    calibration: Calibration, menu: tuple[int, ...], adjoint_ratio: float, steps: int, available_s: float
) -> tuple[int, ...]:
    """The longest beginning of `menu` whose `steps` mean steps fit into `available_s`; one entry at least."""
    for end in range(len(menu), 1, -1):
        if steps * mean_step_seconds(calibration, menu[:end], adjoint_ratio) <= available_s:
            return menu[:end]
    return menu[:1]


def _steps_that_fit(steps: int, step_s: float, available_s: float) -> int:
    if steps * step_s <= available_s:
        return max(steps, 1)
    return max(1, int(available_s / step_s))


class Pace:
    """Keeps one round inside its time: before each step `cap`, after each step `record`.

    drift: running mean of actual over predicted seconds per step; hand it to the next round's `Pace` and
    divide that round's `derate` by it. reduced: whether the round was cut: a smaller K than planned, or an
    early stop.
    """

    def __init__(
        self,
        calibration: Calibration,
        allowance: Allowance,
        *,
        compute_s: float,
        adjoint_ratio: float,
        drift: float = 1.0,
    ) -> None:
        self._calibration = calibration
        self._allowance = allowance
        self._compute_s = compute_s
        self._adjoint_ratio = adjoint_ratio
        self._steps_done = 0
        self._elapsed_s = 0.0
        self._last_ratio = 1.0
        self.drift = drift
        self.reduced = False

    def cap(self, elapsed_s: float) -> int | None:
        """The largest K of the allowance for the next step, or None where the round has to end now.

        elapsed_s: device seconds since the round's training began. K falls while the remaining steps, at the
        pace seen so far, would not end in time; the round ends when the cheapest step might not.
        The very first step is always allowed: a contribution without any step helps nobody.
        """
        left_s = self._compute_s - elapsed_s
        if self._steps_done >= self._allowance.steps:
            return None
        if self._steps_done and left_s < self._reserve(self._allowance.menu[0]):
            self.reduced = True
            return None
        K = self._largest(left_s)
        self.reduced = self.reduced or self._allowance.menu[-1] > K
        return K

    def record(self, budget: Budget, elapsed_s: float) -> None:
        """One step with `budget` has ended, `elapsed_s` device seconds after the round's training began."""
        low, high = DRIFT_RANGE
        ratio = (elapsed_s - self._elapsed_s) / max(step_seconds(self._calibration, budget), 1e-12)
        self.drift += DRIFT_RATE * (min(max(ratio, low), high) - self.drift)
        self._last_ratio = ratio
        self._elapsed_s = elapsed_s
        self._steps_done += 1

    def _largest(self, left_s: float) -> int:
        menu, steps_left = self._allowance.menu, self._allowance.steps - self._steps_done
        for end in range(len(menu), 1, -1):
            step_s = self.drift * mean_step_seconds(self._calibration, menu[:end], self._adjoint_ratio)
            if steps_left * step_s <= left_s and self._reserve(menu[end - 1]) <= left_s:
                return menu[end - 1]
        return menu[0]

    def _reserve(self, K: int) -> float:
        budget = budget_of(K, self._adjoint_ratio)
        pace = max(self.drift, self._last_ratio)
        return STEP_RESERVE * pace * step_seconds(self._calibration, budget)
