"""Starts from earlier equilibria: they save evaluations near the old weights, and are refused far from them."""

import math

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.solvers import solve
from fedeq_edge.deq.warm import WarmStart
from fedeq_edge.errors import ConfigError

ROWS = torch.arange(4)
FALLBACK = torch.full((4, 3), -1.0)


def states(*numbers: float) -> Tensor:
    """One constant state of width 3 per number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 3).clone()


def cache(theta: Tensor | None = None, *, samples: int = 10, slots: int = 10, limit: float = 1e-2) -> WarmStart:
    theta = torch.ones(100) if theta is None else theta
    return WarmStart(theta, samples=samples, state_shape=(3,), capacity_bytes=slots * 3 * 4, limit=limit)


class SlowCell:
    """tanh(W z + u), symmetric, |W|_2 = 0.98, with weights that can be moved by a relative length."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(64, 64, generator=generator)
        self.W = 0.98 * (W + W.T) / torch.linalg.matrix_norm(W + W.T, 2)
        self.u = 0.1 * torch.randn(8, 64, generator=generator)
        self.direction = torch.randn(64, 64, generator=generator)

    def move(self, relative: float) -> None:
        self.W = self.W + relative * self.W.norm() / self.direction.norm() * self.direction

    def evaluations(self, z0: Tensor) -> tuple[int, Tensor]:
        plain = Picard(check_every=1)
        found = solve(lambda z: torch.tanh(z @ self.W.T + self.u), z0, solver=plain, budget=1000, tol=1e-4)
        return found.spent, found.value


@pytest.mark.parametrize(("move", "share"), [(1e-4, 0.05), (1e-3, 0.15)])
def test_a_start_from_the_cache_saves_most_evaluations_after_a_small_move(move: float, share: float) -> None:
    cell, rows, zero = SlowCell(), torch.arange(8), torch.zeros(8, 64)
    warm = WarmStart(cell.W.flatten(), samples=8, state_shape=(64,), capacity_bytes=1 << 20)
    cold, found = cell.evaluations(zero)
    warm.keep(rows, found)
    cell.move(move)
    warm.moved(cell.W.flatten())
    start = warm.start(rows, zero)
    assert torch.equal(start, found)
    assert cell.evaluations(start)[0] <= share * cold


def test_a_state_is_not_used_once_the_path_of_the_weights_is_longer_than_the_limit() -> None:
    theta = torch.ones(100)
    warm = cache(theta, limit=1e-2)
    warm.keep(ROWS, states(1, 2, 3, 4))
    warm.moved(theta * 1.009)
    assert torch.equal(warm.start(ROWS, FALLBACK), states(1, 2, 3, 4))
    warm.moved(theta)  # back where it was: the path is what counts, not the distance
    assert torch.equal(warm.start(ROWS, FALLBACK), FALLBACK)
    warm.keep(ROWS[:1], states(7))
    assert torch.equal(warm.start(ROWS, FALLBACK), torch.cat([states(7), FALLBACK[1:]]))


@pytest.mark.parametrize("theta", [torch.full((100,), math.nan), torch.full((100,), math.inf), torch.zeros(100)])
def test_weights_that_are_not_finite_or_vanish_make_every_state_stale(theta: Tensor) -> None:
    warm = cache()
    warm.keep(ROWS, states(1, 2, 3, 4))
    warm.moved(theta)
    assert torch.equal(warm.start(ROWS, FALLBACK), FALLBACK)


def test_weights_that_stay_zero_have_not_moved() -> None:
    warm = cache(torch.zeros(100))
    warm.keep(ROWS, states(1, 2, 3, 4))
    warm.moved(torch.zeros(100))
    assert torch.equal(warm.start(ROWS, FALLBACK), states(1, 2, 3, 4))


def test_states_that_are_not_finite_are_never_kept() -> None:
    warm = cache()
    warm.keep(ROWS, states(1, 2, 3, 4))
    warm.keep(ROWS, states(5, math.nan, math.inf, 8))
    assert torch.equal(warm.start(ROWS, FALLBACK), states(5, 2, 3, 8))


def test_samples_that_were_never_solved_start_from_the_fallback() -> None:
    warm = cache()
    warm.keep(torch.tensor([9, 2]), states(9, 2))
    mixed = warm.start(torch.tensor([1, 2, 3, 9]), FALLBACK)
    assert torch.equal(mixed, torch.cat([FALLBACK[:1], states(2), FALLBACK[:1], states(9)]))


def test_the_fallback_and_the_caller_s_states_stay_as_they_are() -> None:
    warm, mine, fallback = cache(), states(1, 2, 3, 4), FALLBACK.clone()
    warm.keep(ROWS, mine)
    warm.start(ROWS, fallback).zero_()
    mine.zero_()
    assert torch.equal(fallback, FALLBACK)
    assert torch.equal(warm.start(ROWS, fallback), states(1, 2, 3, 4))


def test_a_full_cache_keeps_the_samples_that_came_first() -> None:
    warm = cache(slots=3)
    warm.keep(torch.tensor([5, 6]), states(5, 6))
    warm.keep(torch.tensor([7, 8, 6]), states(7, 8, 66))
    found = warm.start(torch.tensor([5, 6, 7, 8]), FALLBACK)
    assert torch.equal(found, torch.cat([states(5, 66, 7), FALLBACK[:1]]))


def test_a_cache_without_room_or_with_an_impossible_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 bytes hold 0 states"):
        cache(slots=0)
    with pytest.raises(ConfigError, match=r"limit is 0\.0"):
        cache(limit=0.0)
