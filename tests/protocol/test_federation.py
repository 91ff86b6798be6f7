"""Whole federations on a fake wire: they reach the optimum, and both sides hold the same numbers, whatever happens."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.consensus.fixed import dual_step, fraction_bits
from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import coding, messages
from tests.protocol.fleet import ADMM, TOPICS, Fleet, Quadratics

CODECS = ("f32", "f16", "int8", "int4", "int4+z")
FOUR = Quadratics.drawn(4)
FIXED_EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("codec", CODECS)
def test_a_federation_reaches_the_optimum_with_every_code(codec: coding.Codec) -> None:
    fleet = Fleet(FOUR, codec=codec, rounds=60)
    fleet.run()
    assert fleet.distance() < 2e-6
    fleet.check_duals()
    fleet.check_counted_once()
    assert len(fleet.stored) == 4 * 60


def test_a_federation_that_sends_a_quarter_of_the_values_reaches_the_same_optimum() -> None:
    fleet = Fleet(FOUR, codec="int8", up=("top25:int8",), rounds=200)
    fleet.run()
    assert fleet.distance() < 2e-6
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_federation_over_several_chunks_reaches_the_optimum() -> None:
    fleet = Fleet(Quadratics.drawn(2, size=40_000), codec="f32", rounds=8)
    fleet.run()
    assert fleet.distance() < 0.05
    fleet.check_duals()
    fleet.check_counted_once()


def test_every_device_reports_once_and_each_round_leaves_one_line() -> None:
    fleet = Fleet(FOUR, rounds=5)
    fleet.run()
    assert [line["round"] for line in fleet.lines if line["kind"] == "round"] == [1, 2, 3, 4, 5]
    assert sorted(line["device"] for line in fleet.lines if line["kind"] == "report") == ["d0", "d1", "d2", "d3"]
    assert all(line["contributed"] == ["d0", "d1", "d2", "d3"] for line in fleet.lines if line["kind"] == "round")
    assert fleet.aggregator.state.status == "finished"


@FIXED_EXAMPLES
@given(
    seed=st.integers(0, 2**16),
    loss=st.sampled_from([0.0, 0.05, 0.2]),
    duplicate=st.sampled_from([0.0, 0.3]),
    reorder=st.booleans(),
    codec=st.sampled_from(CODECS),
    fraction=st.sampled_from([0.5, 1.0]),
)
def test_both_sides_agree_bit_for_bit_on_a_wire_that_loses_repeats_and_reorders(
    seed: int, loss: float, duplicate: float, reorder: bool, codec: coding.Codec, fraction: float
) -> None:
    broker = MemoryBroker(loss=loss, duplicate=duplicate, reorder=reorder, seed=seed)
    schedule = Schedule(min_devices=2, deadline_s=35.0, final_s=200.0, fraction=fraction, late_rounds=2)
    fleet = Fleet(FOUR, codec=codec, rounds=10, broker=broker, schedule=schedule)
    fleet.run()
    broker.loss = 0.0  # verdicts that were lost on the last day are said again
    for device in fleet.devices.values():
        device.restart()
    fleet.settle()
    fleet.check_duals()
    fleet.check_sums()
    counted = [(store.device, store.round) for store in fleet.stored]
    assert len(counted) == len(set(counted))


@FIXED_EXAMPLES
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_devices_may_restart_at_any_point(data: st.DataObject, seed: int) -> None:
    broker = MemoryBroker(loss=0.05, duplicate=0.1, reorder=True, seed=seed)
    fleet = Fleet(FOUR, codec="int8", rounds=6, broker=broker, schedule=Schedule(min_devices=4, deadline_s=35.0))
    crashes = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), max_size=6))
    for step in range(1, 61):
        for _, index in [crash for crash in crashes if crash[0] == step]:
            fleet.devices[f"d{index}"].restart()
        if not fleet.finished:
            fleet.step()
    fleet.run()
    for device in fleet.devices.values():
        device.restart()
    broker.loss = 0.0
    fleet.settle()
    fleet.check_duals()


def test_a_device_restarted_from_its_folder_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    fleet = Fleet(FOUR, rounds=12, device_folders=tmp_path)
    for number in range(1, 12):
        fleet.run_to_round(number)
        fleet.devices[f"d{number % 4}"].restart()
    fleet.run()
    undisturbed = Fleet(FOUR, rounds=12)
    undisturbed.run()
    fleet.check_duals()
    fleet.check_counted_once()
    assert fleet.distance() == pytest.approx(undisturbed.distance(), rel=0.5)


def test_a_device_that_lost_its_state_joins_anew() -> None:
    fleet = Fleet(FOUR, rounds=60)
    fleet.run_to_round(10)
    fleet.devices["d1"].lose_state()
    fleet.run()
    assert [note.facts["device"] for note in fleet.notes if "joins anew" in note.event] == ["d1"]
    fleet.check_duals()
    assert fleet.distance() < 2e-6


def test_a_retained_birth_out_of_the_first_round_costs_nobody_a_dual(tmp_path: Path) -> None:
    """An aggregator that comes back reads births that were written long ago: they must not count as lost state."""
    fleet = Fleet(FOUR, rounds=20, folder=tmp_path)
    fleet.run_to_round(8)
    before = {name: fleet.duals.get(name) for name in fleet.devices}
    fleet.kill_aggregator()
    assert all(np.array_equal(fleet.duals.get(name), nu) for name, nu in before.items())
    fleet.run()
    assert not [note for note in fleet.notes if "joins anew" in note.event]
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_device_may_join_midway_and_the_optimum_becomes_that_of_all() -> None:
    fleet = Fleet(FOUR, rounds=70, joining=3, schedule=Schedule(min_devices=3, deadline_s=40.0))
    fleet.run_to_round(6)
    fleet.add(3)
    fleet.run()
    assert "d3" not in fleet.lines[4]["contributed"]
    assert "d3" in fleet.lines[10]["contributed"]
    assert fleet.distance() < 2e-6
    fleet.check_duals()


def test_a_retired_device_leaves_the_sums_and_the_others_reach_their_own_optimum() -> None:
    fleet = Fleet(FOUR, rounds=80)
    fleet.run_to_round(5)
    fleet.devices["d3"].crash()
    fleet.settle()
    fleet.retire("d3")
    fleet.check_sums()
    del fleet.devices["d3"]
    fleet.run()
    three = Quadratics(FOUR.curvature[:3], FOUR.centre[:3], FOUR.samples[:3])
    assert np.abs(fleet.aggregator.consensus.z_hat - three.optimum()).max() < 2e-6


def test_a_device_that_was_retired_by_mistake_may_come_back() -> None:
    fleet = Fleet(FOUR, rounds=70)
    fleet.run_to_round(5)
    fleet.retire("d2")
    fleet.devices["d2"].restart()
    fleet.run()
    fleet.check_duals()
    assert fleet.distance() < 2e-6


def test_the_cohort_of_a_round_depends_on_seed_round_and_fleet_alone() -> None:
    schedule = Schedule(min_devices=4, fraction=0.5, deadline_s=40.0, seed=3)
    cohorts = []
    for faults in (MemoryBroker(), MemoryBroker(duplicate=0.5, reorder=True, seed=9)):
        fleet = Fleet(FOUR, rounds=12, schedule=schedule, broker=faults)
        fleet.run()
        cohorts.append([line["contributed"] for line in fleet.lines if line["kind"] == "round"])
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 2 for cohort in cohorts[0])
    assert len({tuple(cohort) for cohort in cohorts[0]}) > 2


def test_a_part_of_the_fleet_each_round_reaches_the_same_optimum() -> None:
    fleet = Fleet(FOUR, rounds=150, codec="int8", schedule=Schedule(min_devices=4, fraction=0.5, deadline_s=40.0))
    fleet.run()
    assert fleet.distance() < 1e-4
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_server_without_duals_lets_each_device_keep_its_own() -> None:
    """The published FeDEQ server averages; nu lives on the device alone and no task resets it."""
    published = msgspec.structs.replace(METHODS["fedeq-published"], rho=1.0)
    fleet = Fleet(FOUR, rounds=6, method=published)
    fleet.run()
    expected: dict[str, np.ndarray] = {}
    for store in fleet.stored:
        received = messages.decode(store.blob)
        assert isinstance(received.message, messages.Contribution)
        difference = coding.decode("f32", received.body, received.message.length)
        moved = dual_step(difference, store.kappa, fraction_bits(np.float32))
        expected[store.device] = expected.get(store.device, np.zeros_like(moved)) + moved
    for name, device_ in fleet.devices.items():
        np.testing.assert_array_equal(device_.client.state.nu, expected[name])
        assert not device_.notes


def test_a_new_run_makes_a_client_begin_with_nothing() -> None:
    first = Fleet(FOUR, rounds=5)
    first.run()
    states = {name: device.client.state for name, device in first.devices.items()}
    second = Fleet(FOUR, rounds=60, run_name="t-2", joining=0)
    for index in range(4):
        device = second.add(index)
        device.crash()
        device.save(states[device.name])
        device.start()
    second.run()
    assert all(device.client.state.run == "t-2" for device in second.devices.values())
    assert second.distance() < 2e-6
    second.check_duals()
    second.check_counted_once()


def test_quality_weights_move_and_the_optimum_stays() -> None:
    method = msgspec.structs.replace(ADMM, quality="residual")
    fleet = Fleet(FOUR, rounds=80, method=method)
    fleet.run()
    fleet.check_duals()
    assert fleet.distance() < 2e-6


def test_a_device_that_comes_back_with_more_data_weighs_more() -> None:
    fleet = Fleet(FOUR, rounds=80)
    fleet.run_to_round(5)
    fleet.devices["d0"].samples = 400
    fleet.devices["d0"].restart()
    fleet.run()
    heavier = Quadratics(FOUR.curvature, FOUR.centre, (400, *FOUR.samples[1:]))
    assert np.abs(fleet.aggregator.consensus.z_hat - heavier.optimum()).max() < 2e-6
    fleet.check_sums()


def models_sent(fleet: Fleet, device: str) -> list[messages.Model]:
    """The consensus as it was sent to one device alone, whole or as steps."""
    chunks = [messages.decode(sent.payload) for sent in fleet.sent if sent.topic.endswith(f"{device}/down")]
    blobs = [bytes(chunk.body) for chunk in chunks if isinstance(chunk.message, messages.Chunk)]
    models = [messages.decode(blob).message for blob in blobs]
    return [model for model in models if isinstance(model, messages.Model)]


def test_the_step_is_told_once_for_all_and_the_whole_to_whom_it_does_not_help() -> None:
    fleet = Fleet(FOUR, rounds=16, codec="int8", schedule=Schedule(min_devices=4, deadline_s=30.0))
    fleet.run_to_round(2)
    fleet.devices["d3"].transport.cut()
    fleet.run_to_round(13)  # so many steps are longer than the whole
    fleet.sent.clear()
    fleet.devices["d3"].transport.restore()
    fleet.run()
    assert [model.codec for model in models_sent(fleet, "d3")] == ["f32"]
    assert not models_sent(fleet, "d0")
    assert sum(sent.topic == TOPICS.model for sent in fleet.sent) >= 3
    assert fleet.aggregator.counters.resyncs == 1


def test_a_device_that_is_asked_now_and_then_is_led_by_the_steps_it_has_missed() -> None:
    schedule = Schedule(min_devices=4, fraction=0.25, deadline_s=30.0)
    fleet = Fleet(Quadratics.drawn(4, size=3000), rounds=12, codec="int2", schedule=schedule)
    fleet.run()
    assert not any(sent.topic == TOPICS.model for sent in fleet.sent)
    sent = [model for name in fleet.devices for model in models_sent(fleet, name)]
    assert sum(model.codec == "f32" for model in sent) == 4  # their first
    assert sum(model.codec == "int2" for model in sent) > 8
    assert fleet.aggregator.counters.resyncs == 0
    fleet.check_duals()
    fleet.check_counted_once()


def spoken_codecs(fleet: Fleet, device: str) -> set[str]:
    """How this device's contributions came."""
    received = [messages.decode(store.blob).message for store in fleet.stored if store.device == device]
    return {message.codec for message in received if isinstance(message, messages.Contribution)}


def test_a_device_that_does_not_speak_the_code_of_the_steps_gets_whole_values() -> None:
    fleet = Fleet(FOUR, rounds=5, codec="int2", up=("int4", "f32"))
    fleet.devices["d0"].codecs = ("f32",)
    fleet.devices["d0"].restart()
    fleet.run()
    assert spoken_codecs(fleet, "d0") == {"f32"}
    assert spoken_codecs(fleet, "d1") == {"int4"}
    fleet.check_duals()
    fleet.check_counted_once()
