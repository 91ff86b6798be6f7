"""Updates of many boards: canaries first, then waves that stop where boards fail."""

import contextlib
from pathlib import Path

import pytest

from fedeq_edge.errors import ConfigError, Exit, FedEqError, ProvisionError
from fedeq_edge.provision import update
from fedeq_edge.provision.update import Plan, Rollout, chosen, publish, roll_out, waves
from tests.provision.update_fleet import Member, Plant


def test_waves_begin_with_the_canaries_and_double() -> None:
    devices = [f"d{number:02}" for number in range(12)]
    assert [len(wave) for wave in waves(devices, 1)] == [1, 2, 4, 5]
    assert [len(wave) for wave in waves(devices, 2)] == [2, 4, 6]
    assert [device for wave in waves(devices, 3) for device in wave] == devices


@pytest.fixture
def five(plant: Plant) -> dict[str, Member]:
    return {f"pi-{number}": plant.board(f"pi-{number}") for number in range(1, 6)}


def rolled_out(
    plant: Plant, members: dict[str, Member], bundle: Path, plan: Plan, off: tuple[str, ...] = ()
) -> Rollout:
    """The update, while all boards take their turns, those apart that are off."""
    clock = iter(range(1000))

    def wait(_seconds: float) -> None:
        for device, member in members.items():
            if device not in off:
                with contextlib.suppress(FedEqError):
                    member.turn()

    devices = chosen(plant.fleet, bundle, [])
    published = publish(plant.fleet, bundle, clock=plant.clock)
    return roll_out(plant.fleet, published, devices, plan, wait=wait, clock=lambda: float(next(clock)))


def test_all_boards_get_an_update_that_is_well(plant: Plant, five: dict[str, Member]) -> None:
    done = rolled_out(plant, five, plant.bundle("1.1+b"), Plan())
    assert {device: outcome.wave for device, outcome in done.devices.items()} == {
        "pi-1": 1,
        "pi-2": 2,
        "pi-3": 2,
        "pi-4": 3,
        "pi-5": 3,
    }
    assert {member.runs for member in five.values()} == {"1.1+b"}
    assert done.exit is Exit.OK


def test_a_broken_release_stops_at_the_canary(plant: Plant, five: dict[str, Member]) -> None:
    done = rolled_out(plant, five, plant.bundle("1.1+b", "broken"), Plan(canary=1))
    assert done.devices["pi-1"].state == "rolled_back"
    assert "Illegal instruction" in done.devices["pi-1"].detail
    assert [outcome.state for outcome in done.devices.values()].count("untold") == 4
    assert done.exit is Exit.ROLLED_BACK
    assert {member.runs for member in five.values()} == {"1.0+a"}
    for member in five.values():
        member.turn()
        assert member.runs == "1.0+a"


def test_a_board_that_is_off_counts_as_failed_and_is_told_nothing_later(plant: Plant, five: dict[str, Member]) -> None:
    plan = Plan(canary=2, max_failures=1, timeout_s=3.0)
    done = rolled_out(plant, five, plant.bundle("1.1+b"), plan, off=("pi-2",))
    assert done.devices["pi-2"].state == "silent"
    assert [outcome.state for outcome in done.devices.values()].count("done") == 4
    assert done.exit is Exit.ACTION_EXPIRED
    five["pi-2"].turn()
    assert five["pi-2"].runs == "1.0+a"
    done = rolled_out(plant, five, plant.bundle("1.2+c"), Plan(canary=2, timeout_s=3.0), off=("pi-2",))
    assert [outcome.state for outcome in done.devices.values()].count("untold") == 3


def test_ctrl_c_takes_back_what_was_not_begun(plant: Plant, five: dict[str, Member]) -> None:
    published = publish(plant.fleet, plant.bundle("1.1+b"), clock=plant.clock)

    def wait(_seconds: float) -> None:
        five["pi-1"].turn()
        raise KeyboardInterrupt

    done = roll_out(plant.fleet, published, sorted(five), Plan(canary=3), wait=wait)
    assert done.interrupted
    assert [outcome.state for outcome in done.devices.values()] == ["done", *["untold"] * 4]
    assert not [device for device in five if plant.fleet.action_for(device)]


def test_a_board_that_has_never_reported_is_nobodys_canary(plant: Plant, five: dict[str, Member]) -> None:
    for member in five.values():
        member.turn()
    plant.fleet.add("a-new", "x86-64")
    assert chosen(plant.fleet, plant.bundle("1.1+b"), []) == [*sorted(five), "a-new"]


def test_it_is_said_at_once_which_boards_of_a_wave_were_never_heard_from(plant: Plant) -> None:
    plant.fleet.add("a-new", "x86-64")
    published = publish(plant.fleet, plant.bundle("1.1+b"), clock=plant.clock)
    said: list[str] = []

    def leave(_seconds: float) -> None:
        raise KeyboardInterrupt

    roll_out(plant.fleet, published, ["a-new"], Plan(timeout_s=60.0), told=said.append, wait=leave)
    assert said[0] == "wave 1: a-new"
    assert "a-new was never heard from: waiting 60 s" in said[1]


def test_a_board_that_was_revoked_is_left_out_of_an_update_and_refused_by_name(
    plant: Plant, five: dict[str, Member]
) -> None:
    plant.fleet.revoke("pi-3")
    assert chosen(plant.fleet, plant.bundle("1.1+b"), []) == ["pi-1", "pi-2", "pi-4", "pi-5"]
    with pytest.raises(ProvisionError, match=r"pi-3 was revoked on 20.*fedeq fleet add pi-3"):
        chosen(plant.fleet, plant.bundle("1.1+b"), ["pi-3"])


def test_a_device_of_another_board_is_refused_before_anything_is_published(plant: Plant) -> None:
    plant.fleet.add("nano", "jetson-orin-nano")
    with pytest.raises(ProvisionError, match="nano is a jetson-orin-nano") as refused:
        chosen(plant.fleet, plant.bundle("1.1+b"), ["nano"])
    assert refused.value.exit is Exit.WRONG_PLATFORM
    with pytest.raises(ConfigError, match="fleet plant has no x86-64; fedeq fleet add ID"):
        chosen(plant.fleet, plant.bundle("1.1+b"), [])


def test_a_bundle_of_another_fleet_is_not_published(plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Plant(tmp_path_factory.mktemp("other"))
    with pytest.raises(ProvisionError) as refused:
        publish(plant.fleet, other.bundle("1.1+b"), clock=plant.clock)
    assert refused.value.exit is Exit.VERIFICATION
    assert not [path for path in (plant.tuf / "targets").rglob("*") if path.is_file()]


def test_two_updates_at_a_time_are_refused(plant: Plant) -> None:
    with update.alone(plant.fleet), pytest.raises(ProvisionError) as refused, update.alone(plant.fleet):
        pass
    assert refused.value.exit is Exit.BUSY
