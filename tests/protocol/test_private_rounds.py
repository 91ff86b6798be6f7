"""Private rounds through the machines: bounded steps, one noised sum a round, and an epsilon that counts them all."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus import METHODS, dual_step, scaled
from fedeq_edge.consensus.fixed import WHOLE, FixedVector
from fedeq_edge.consensus.privacy import Accountant, Privacy, noised
from fedeq_edge.errors import ConfigError
from fedeq_edge.protocol.actions import Store
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.wire import coding, messages
from tests.protocol.fleet import ADMM, KEY, TOPICS, Fleet, Quadratics, contribution, upload

MEAN = msgspec.structs.replace(METHODS["fedeq-published"], rho=1.0)
PROMISE = Privacy(clip=0.5, noise_multiplier=0.1)
BOUND = 2**31  # the clip in units of 2^-32, with kappa 1
THREE = Quadratics.drawn(3)


def private(
    problem: Quadratics = THREE,
    *,
    rounds: int = 3,
    folder: Path | None = None,
    kill_after: int | None = None,
    **rhythm: Any,
) -> Fleet:
    schedule = Schedule(min_devices=len(problem.samples), **{"deadline_s": 30.0, "final_s": 60.0, **rhythm})
    return Fleet(
        problem,
        rounds=rounds,
        method=MEAN,
        privacy=PROMISE,
        schedule=schedule,
        folder=folder,
        kill_after=kill_after,
    )


def step_of(store: Store) -> FixedVector:
    """What a stored contribution moves the dual of its device by."""
    received = messages.decode(store.blob)
    assert isinstance(received.message, messages.Contribution)
    difference = coding.decode(received.message.codec, received.body, received.message.length)
    return dual_step(scaled(difference, store.factor), store.kappa, 32)


def published(fleet: Fleet) -> dict[int, set[bytes]]:
    """Digests of the consensus that the world was told of, by round."""
    told: dict[int, set[bytes]] = {}
    for sent in fleet.sent:
        if sent.topic == TOPICS.model:
            message = messages.decode(sent.payload).message
            assert isinstance(message, messages.Model)
            told.setdefault(message.round, set()).add(message.model)
    return told


def test_no_step_is_longer_than_the_bound_and_device_and_aggregator_move_by_the_same() -> None:
    fleet = private()
    fleet.run()
    moved = {name: np.zeros(THREE.centre.shape[1], np.int64) for name in fleet.devices}
    for store in fleet.stored:
        step = step_of(store)
        assert sum(int(value) ** 2 for value in step) <= BOUND**2
        moved[store.device] += step
    assert any(store.factor < WHOLE for store in fleet.stored)
    for name, device in fleet.devices.items():
        np.testing.assert_array_equal(device.client.state.nu, moved[name])


def test_every_device_weighs_the_same_however_much_data_it_claims() -> None:
    fleet = private()
    fleet.run_to_round(2)
    assert {fleet.aggregator.consensus.weights(name) for name in fleet.devices} == {(1, 2**32)}


def test_the_consensus_is_the_noised_mean_of_the_bounded_steps_to_the_bit() -> None:
    fleet = private(rounds=2)
    fleet.run()
    z_hat = np.zeros(THREE.centre.shape[1], np.float32)
    for number in (1, 2):
        total = np.sum([step_of(store) for store in fleet.stored if store.round == number], axis=0)
        released = noised(total, 0.1 * BOUND, key=KEY, round_number=number)
        assert np.abs(released - total).max() > 0.01 * BOUND
        z_hat = z_hat + (released.astype(np.float64) / 2**32 / 3).astype(np.float32)
    np.testing.assert_array_equal(fleet.aggregator.consensus.z_hat, z_hat)


def test_the_status_tells_the_accountants_epsilon_so_far_and_planned() -> None:
    fleet = private(Quadratics.drawn(6), rounds=5, fraction=0.7, quorum=0.1)
    fleet.run_to_round(3)
    whole = Accountant(PROMISE, {0.7: 5}).epsilon()
    told = fleet.aggregator.status()["privacy"]
    assert told == {"epsilon": Accountant(PROMISE, {0.7: 2}).epsilon(), "planned": whole, "delta": 1e-5}
    fleet.run()
    assert fleet.aggregator.status()["privacy"]["epsilon"] == whole


def test_a_federation_that_promises_nothing_tells_no_epsilon() -> None:
    assert Fleet(THREE).aggregator.status()["privacy"] is None


def _undisturbed_actions() -> int:
    fleet = private()
    fleet.run()
    return fleet.carried


@pytest.mark.parametrize("boundary", range(_undisturbed_actions()))
def test_a_kill_between_any_two_actions_lets_out_no_second_sum_of_a_round(boundary: int, tmp_path: Path) -> None:
    """The straggler comes in time for a round only where the aggregator closes it a second time."""
    fleet = private(folder=tmp_path, kill_after=boundary)
    fleet.devices["d2"].holds_back = True
    fleet.run(lambda: fleet.kills == 1 or fleet.finished)
    fleet.devices["d2"].holds_back = False
    fleet.run()
    assert {len(digests) for digests in published(fleet).values()} == {1}
    assert fleet.aggregator.state.spent == {1.0: 3}


def test_a_contribution_after_the_close_is_refused_and_moves_no_dual() -> None:
    fleet = private(rounds=4)
    late = fleet.devices["d2"]
    fleet.run_to_round(2)
    late.holds_back = True
    fleet.run_to_round(3)
    late.holds_back = False
    late.do_work()
    fleet.settle()
    assert late.client.refusals["late"] == 1
    assert fleet.aggregator.refusals["late"] == 1
    assert ("d2", 2) not in {(store.device, store.round) for store in fleet.stored}
    counted = np.sum([step_of(store) for store in fleet.stored if store.device == "d2"], axis=0)
    np.testing.assert_array_equal(late.client.state.nu, counted)


def test_a_device_that_was_retired_and_came_back_is_not_in_one_sum_twice() -> None:
    fleet = private(quorum=1.0)
    fleet.devices["d2"].holds_back = True
    fleet.settle()
    fleet.retire("d0")
    fleet.devices["d0"].restart()
    fleet.run(lambda: fleet.aggregator.status()["extensions"] == 1)  # which asks everybody who is here
    message, body = contribution(fleet, "d0")
    upload(fleet, "d0", messages.encode(message, body))
    assert fleet.aggregator.refusals["twice"] == 1
    assert [store.device for store in fleet.stored] == ["d0", "d1"]


def test_a_round_for_which_nobody_was_drawn_closes_with_noise_alone() -> None:
    fleet = private(rounds=3, fraction=1e-6)
    fleet.run()
    assert not fleet.stored
    assert fleet.aggregator.state.spent == {1e-6: 3}
    assert fleet.now < 30.0  # nobody was waited for
    assert fleet.aggregator.consensus.z_hat.any()


def test_a_round_that_asks_everybody_in_the_end_counts_as_one_that_did() -> None:
    fleet = private(Quadratics.drawn(6), rounds=1, fraction=0.5, quorum=1.0)
    for device in fleet.devices.values():
        device.holds_back = True
    fleet.run(lambda: fleet.aggregator.status()["extensions"] == 1)
    for device in fleet.devices.values():
        device.holds_back = False
    fleet.run()
    assert len(fleet.stored) == 6
    assert fleet.aggregator.state.spent == {1.0: 1}


def test_a_cohort_that_is_chosen_by_battery_counts_at_rate_one() -> None:
    fleet = private(Quadratics.drawn(6), rounds=2, fraction=0.5, quorum=0.1, battery_percent=20.0)
    fleet.run()
    assert fleet.aggregator.state.spent == {1.0: 2}


def test_who_is_denied_is_taken_out_of_the_sum_before_it_goes_out() -> None:
    fleet = private(rounds=1)
    fleet.devices["d2"].holds_back = True
    fleet.settle()
    fleet._carry_out(fleet.aggregator.deny("d0", fleet.now))
    fleet.devices["d2"].holds_back = False
    fleet.run()
    total: NDArray[np.int64] = np.sum([step_of(store) for store in fleet.stored if store.device != "d0"], axis=0)
    released = noised(total, 0.1 * BOUND, key=KEY, round_number=1)
    expected = (released.astype(np.float64) / 2**32 / 3).astype(np.float32)
    np.testing.assert_array_equal(fleet.aggregator.consensus.z_hat, expected)


def test_methods_and_schedules_that_cannot_keep_the_promise_are_refused() -> None:
    with pytest.raises(ConfigError, match="server = 'fresh'"):
        Fleet(THREE, method=ADMM, privacy=PROMISE)
    with pytest.raises(ConfigError, match=r"schedule\.mode"):
        Fleet(THREE, method=MEAN, privacy=PROMISE, schedule=Schedule(mode="async"))
