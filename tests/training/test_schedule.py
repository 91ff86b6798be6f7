import numpy as np
import pytest

from fedeq_edge.training.schedule import batches, draw_forward, learning_rate, steps_per_epoch
from fedeq_edge.training.step import Plan


def test_the_learning_rate_falls_by_half_a_cosine_to_its_final_share() -> None:
    plan = Plan(rounds=10, learning_rate=0.4, final_rate=0.1)
    rates = [learning_rate(plan, completed) for completed in range(11)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[5] == pytest.approx(0.22)
    assert rates[10] == pytest.approx(0.04)
    assert rates == sorted(rates, reverse=True)


def test_a_federation_that_runs_longer_than_planned_stays_at_the_final_rate() -> None:
    plan = Plan(rounds=10, learning_rate=0.4, final_rate=0.1)
    assert learning_rate(plan, 25) == pytest.approx(0.04)


def test_training_of_another_length_has_the_whole_course_of_step_sizes() -> None:
    plan = Plan(rounds=10, learning_rate=0.4, final_rate=0.1)
    assert [learning_rate(plan, at, rounds=4) for at in (0, 2, 4)] == pytest.approx([0.4, 0.22, 0.04])


@pytest.mark.parametrize(("fraction", "rounds"), [(1.0, 30), (0.3, 9), (0.001, 1)])
def test_a_model_alone_gets_the_rounds_that_a_device_is_asked_for(fraction: float, rounds: int) -> None:
    assert Plan(rounds=30).for_share(fraction).alone_rounds == rounds
    assert Plan(rounds=30, alone_rounds=7).for_share(fraction).alone_rounds == 7


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (5, 1), (16, 1), (24, 1), (25, 2), (60, 4), (64, 4)])
def test_a_rest_of_at_most_half_a_batch_makes_no_step_of_its_own(samples: int, steps: int) -> None:
    assert steps_per_epoch(samples, 16) == steps
    assert len(batches(samples, 16, 3, np.random.default_rng(0))) == 3 * steps


def test_an_epoch_shows_every_sample_at_most_once_and_all_when_batches_fit() -> None:
    first, second = np.concatenate(batches(48, 16, 2, np.random.default_rng(0))).reshape(2, 48)
    assert sorted(first) == sorted(second) == list(range(48))
    assert list(first) != list(second)


def test_budgets_are_drawn_from_all_of_the_menu_up_to_the_cap() -> None:
    generator = np.random.default_rng(0)
    assert {draw_forward((2, 3, 4, 6, 8), 4, generator) for _ in range(100)} == {2, 3, 4}
