"""The end of a federation: reports, devices that cannot make their model or are away, and silence afterwards."""

from fedeq_edge.protocol.actions import Personalise, Publish
from fedeq_edge.protocol.schedule import Schedule
from tests.protocol.fleet import Fleet, Quadratics

THREE = Quadratics.drawn(3)
SCHEDULE = Schedule(min_devices=3, deadline_s=1000.0, final_s=500.0)


def finishing(*, hold_back: str) -> Fleet:
    """A fleet whose rounds are over, in which one device has its last work still in hand."""
    fleet = Fleet(THREE, rounds=2, schedule=SCHEDULE)
    device = fleet.devices[hold_back]

    fleet.run(lambda: fleet.aggregator.state.status == "finishing")
    device.holds_back = True  # its last task is on the way
    fleet.run(lambda: len(fleet.aggregator.reports) == 2)
    assert isinstance(device.work, Personalise)
    return fleet


def test_the_fleet_does_not_wait_for_a_device_that_cannot_make_its_model() -> None:
    fleet = finishing(hold_back="d1")
    device = fleet.devices["d1"]
    device.work = None
    device.carry_out(device.client.failed("out of memory", fleet.now))
    fleet.run()
    assert fleet.aggregator.state.status == "finished"
    assert fleet.now < SCHEDULE.final_s
    assert sorted(fleet.aggregator.reports) == ["d0", "d2"]


def test_a_device_that_is_away_for_a_moment_still_reports() -> None:
    fleet = finishing(hold_back="d1")
    device = fleet.devices["d1"]
    device.crash()
    fleet.settle()
    assert fleet.aggregator.state.status == "finishing"
    device.holds_back = False
    device.start()
    fleet.run()
    assert sorted(fleet.aggregator.reports) == ["d0", "d1", "d2"]


def test_a_device_that_comes_too_late_keeps_its_model_and_falls_silent() -> None:
    fleet = finishing(hold_back="d1")
    fleet.run(lambda: fleet.aggregator.state.status == "finished")
    fleet.settle()
    device = fleet.devices["d1"]
    device.holds_back = False
    device.do_work()
    said = [action for later in range(1, 100) for action in device.client.tick(fleet.now + 60.0 * later)]
    assert not [action for action in said if isinstance(action, Publish)]
