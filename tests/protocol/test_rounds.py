"""The rhythm of rounds: quorum, deadline, stragglers, lost messages."""

import msgspec
import pytest

from fedeq_edge.errors import ConfigError
from fedeq_edge.protocol.schedule import Progress, Schedule
from fedeq_edge.protocol.transfers import RETRY_S
from fedeq_edge.wire import messages
from tests.protocol.fleet import TOPICS, Device, Fleet, Quadratics

THREE = Quadratics.drawn(3)


def test_a_round_closes_at_its_deadline_with_a_quorum() -> None:
    fleet = Fleet(THREE, rounds=3, schedule=Schedule(min_devices=3, quorum=0.6, deadline_s=30.0))
    fleet.devices["d2"].holds_back = True
    fleet.run_to_round(2)
    assert fleet.lines[0]["contributed"] == ["d0", "d1"]
    assert fleet.lines[0]["extensions"] == 0
    assert fleet.lines[0]["seconds"] == 30.0


def test_without_a_quorum_a_round_goes_on_and_asks_newcomers() -> None:
    fleet = Fleet(THREE, rounds=3, joining=2, schedule=Schedule(min_devices=2, quorum=1.0, deadline_s=30.0))
    fleet.devices["d1"].holds_back = True
    fleet.run_to_round(1)
    fleet.add(2)
    fleet.run(lambda: fleet.aggregator.status()["extensions"] == 1)
    assert fleet.aggregator.status()["cohort"] == ["d0", "d1", "d2"]
    fleet.devices["d1"].holds_back = False
    fleet.run()
    assert fleet.lines[0]["contributed"] == ["d0", "d1", "d2"]
    assert fleet.lines[0]["cohort"] == 3
    assert not fleet.lines[0]["late"]
    fleet.check_duals()


def test_a_late_contribution_counts_in_the_round_in_which_it_comes() -> None:
    fleet = Fleet(THREE, rounds=40, schedule=Schedule(min_devices=3, quorum=0.5, deadline_s=30.0))
    fleet.devices["d2"].holds_back = True
    fleet.run_to_round(2)
    fleet.devices["d2"].holds_back = False
    fleet.run()
    assert [line["late"] for line in fleet.lines[:3]] == [[], ["d2"], []]
    assert fleet.devices["d2"].trained[:3] == [1, 2, 3]
    fleet.check_duals()
    fleet.check_counted_once()
    assert fleet.distance() < 2e-6


def test_a_late_contribution_does_not_stand_for_the_one_of_the_open_round() -> None:
    fleet = Fleet(THREE, rounds=4, schedule=Schedule(min_devices=3, quorum=0.5, deadline_s=30.0))
    fleet.devices["d2"].holds_back = True
    fleet.run_to_round(2)
    device = fleet.devices["d2"]
    device.holds_back = False
    device.do_work()
    device.holds_back = True
    fleet.settle()
    assert list(fleet.aggregator.state.late) == ["d2"]
    assert fleet.aggregator.state.round == 2
    assert "d2" not in fleet.aggregator.state.contributed


def test_a_contribution_older_than_the_late_rounds_is_refused_and_the_device_goes_on() -> None:
    schedule = Schedule(min_devices=3, quorum=0.5, deadline_s=30.0, late_rounds=1)
    fleet = Fleet(THREE, rounds=30, schedule=schedule)
    fleet.devices["d2"].holds_back = True
    fleet.run_to_round(4)
    fleet.devices["d2"].holds_back = False
    fleet.run()
    assert fleet.aggregator.refusals == {"round": 1}
    assert fleet.devices["d2"].trained[:2] == [1, 4]
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_round_does_not_wait_for_a_device_that_declines() -> None:
    fleet = Fleet(THREE, rounds=2, schedule=Schedule(min_devices=3, deadline_s=1000.0))
    fleet.devices["d1"].holds_back = True
    fleet.settle()
    device = fleet.devices["d1"]
    device.work = None
    device.carry_out(device.client.failed("battery at 4 %", 0.0))
    fleet.run_to_round(2)
    assert fleet.now < 1000.0
    assert fleet.lines[0]["declined"] == {"d1": "battery at 4 %"}
    assert fleet.lines[0]["contributed"] == ["d0", "d2"]


def test_a_round_that_everybody_declines_is_asked_for_again_after_its_deadline() -> None:
    fleet = Fleet(THREE, rounds=2, schedule=Schedule(min_devices=3, deadline_s=30.0))
    for device in fleet.devices.values():
        device.holds_back = True
    fleet.settle()
    for device in fleet.devices.values():
        device.work, device.holds_back = None, False
        device.carry_out(device.client.failed("too hot", 0.0))
    fleet.run()
    assert fleet.lines[0]["extensions"] == 1
    assert fleet.lines[0]["contributed"] == ["d0", "d1", "d2"]


def test_a_task_that_was_lost_is_said_again_before_the_deadline() -> None:
    fleet = Fleet(THREE, rounds=2, schedule=Schedule(min_devices=3, deadline_s=1000.0))
    fleet.run(lambda: fleet.aggregator.state.status == "running")
    fleet.broker.loss = 1.0
    fleet.broker.deliver()
    fleet.broker.loss = 0.0
    fleet.run_to_round(2)
    assert RETRY_S <= fleet.now <= 3 * RETRY_S


def test_a_task_that_was_heard_is_not_said_again() -> None:
    fleet = Fleet(THREE, rounds=2, schedule=Schedule(min_devices=3, deadline_s=500.0))
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    heard = len(fleet.messages_to("d0", messages.Task))
    fleet.run(lambda: fleet.now > 10 * RETRY_S)
    assert len(fleet.messages_to("d0", messages.Task)) == heard


def test_the_last_contribution_settles_by_a_repeated_verdict_after_a_reconnection() -> None:
    fleet = Fleet(THREE, rounds=3)
    fleet.run_to_round(2)
    device = fleet.devices["d1"]
    device.holds_back = True
    fleet.settle()
    device.holds_back = False
    device.do_work()
    fleet.broker.deliver()  # the chunk arrives; acknowledgement and verdict go into the void
    device.transport.cut()
    assert device.client.state.pending is not None
    device.transport.restore()
    fleet.run()
    assert device.client.state.pending is None
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_contribution_on_disk_is_sent_after_a_restart_without_being_asked_for() -> None:
    fleet = Fleet(THREE, rounds=4, schedule=Schedule(min_devices=3, quorum=0.5, deadline_s=30.0, fraction=1.0))
    fleet.run_to_round(2)
    device = fleet.devices["d1"]
    device.holds_back = True
    fleet.settle()
    device.holds_back = False
    device.transport.cut()
    device.do_work()
    assert device.client.state.pending is not None
    device.start()
    task_heard = device.client._task is not None
    fleet.settle()
    assert not task_heard
    assert ("d1", 2) in [(store.device, store.round) for store in fleet.stored]
    fleet.run()
    fleet.check_duals()


def test_a_restarted_aggregator_waits_a_moment_for_its_fleet_before_it_opens_a_round() -> None:
    fleet = Fleet(THREE, rounds=3)
    fleet.run_to_round(1)
    fleet.aggregator.state.open = False  # between two rounds
    for name in fleet.devices:
        fleet.aggregator._roster.leave(name)
    fleet.aggregator.connected(fleet.now)
    birth = messages.Birth(boot="b", samples=10, profile="", emulated=False, codecs=("f32",))
    fleet.aggregator.arrived(TOPICS.state("d0"), messages.encode(birth), fleet.now)
    assert fleet.aggregator.state.round == 1
    fleet.aggregator.tick(fleet.now + 6.0)
    assert fleet.aggregator.state.round == 2


def test_an_old_last_will_does_not_take_a_device_away() -> None:
    fleet = Fleet(THREE, rounds=3)
    fleet.settle()
    old = messages.encode(messages.Offline(boot="boot of yesterday"))
    fleet.aggregator.arrived(TOPICS.state("d0"), old, fleet.now)
    assert "d0" in fleet.aggregator.status()["online"]
    fleet.aggregator.arrived(TOPICS.state("d0"), fleet.devices["d0"].client.offline(), fleet.now)
    assert "d0" not in fleet.aggregator.status()["online"]


def test_the_end_does_not_wait_longer_than_its_time_for_reports() -> None:
    fleet = Fleet(THREE, rounds=2, schedule=Schedule(min_devices=3, final_s=25.0))
    fleet.run(lambda: fleet.aggregator.state.status == "finishing")
    ended = fleet.now
    fleet.devices["d1"].holds_back = True
    fleet.run()
    assert set(fleet.aggregator.reports) == {"d0", "d2"}
    assert 25.0 <= fleet.now - ended <= 26.0


def test_a_cohort_is_a_part_of_who_is_there_and_never_empty() -> None:
    schedule = Schedule(fraction=0.25, seed=1)
    fleet = [f"d{i}" for i in range(8)]
    assert [len(schedule.cohort(fleet[:size], 1)) for size in range(1, 9)] == [1, 1, 1, 1, 1, 2, 2, 2]
    assert schedule.cohort(fleet, 3) == schedule.cohort(fleet[::-1], 3)
    assert set(schedule.cohort(fleet, 3)) < set(fleet)


@pytest.mark.parametrize(
    ("contributed", "declined", "passed", "closes"),
    [
        ("ab", "", False, False),
        ("abc", "", False, True),
        ("ab", "c", False, True),
        ("", "abc", False, False),
        ("", "", True, False),
        ("ab", "", True, True),
        ("a", "", True, False),
        ("xyz", "", True, False),
        ("ax", "", True, False),
    ],
)
def test_a_round_closes_when_all_have_answered_or_enough_at_the_deadline(
    contributed: str, declined: str, passed: bool, closes: bool
) -> None:
    progress = Progress(cohort="abc", contributed=contributed, late="", declined=declined, deadline_passed=passed)
    assert progress.closes(Schedule(quorum=0.5)) is closes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("fraction", float("nan")),
        ("quorum", -0.1),
        ("deadline_s", 0.0),
        ("deadline_s", float("inf")),
        ("final_s", float("nan")),
        ("min_devices", 0),
        ("late_rounds", -1),
        ("samples_limit", 0),
        ("buffer", 0),
        ("battery_percent", 101.0),
        ("data_age_s", 0.0),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_by_the_name_of_its_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{field} is "):
        msgspec.structs.replace(Schedule(), **{field: value})


def _task_for(device: Device, **changes: object) -> bytes:
    task = messages.Task(run="t-1", round=9, model=bytes(32), kappa=1.0, deadline_s=9.0, codec="f32")
    return messages.encode(msgspec.structs.replace(task, **changes))


@pytest.mark.parametrize(
    "changes",
    [{"kappa": value} for value in (0.0, -1.0, float("nan"), float("inf"))]
    + [{"deadline_s": value} for value in (0.0, float("nan"), float("inf"))],
)
def test_a_client_refuses_a_task_with_a_penalty_or_deadline_that_is_no_number(changes: dict[str, float]) -> None:
    fleet = Fleet(THREE, rounds=3)
    fleet.settle()
    device = fleet.devices["d0"]
    before = device.client.state
    device.carry_out(device.client.arrived(TOPICS.down("d0"), _task_for(device, **changes), 0.0))
    assert device.notes[-1].event == "refused a message"
    assert device.client.state is before


def test_a_result_with_nan_is_declined_by_the_device_itself() -> None:
    fleet = Fleet(THREE, rounds=2)
    fleet.problem.centre[0, 0], centre = float("nan"), fleet.problem.centre[0, 0]
    try:
        fleet.run_to_round(2)
    finally:
        fleet.problem.centre[0, 0] = centre
    assert "NaN" in fleet.lines[0]["declined"]["d0"]
    assert fleet.devices["d0"].client.state.pending is None
