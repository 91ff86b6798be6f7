"""A federation of real processes whose aggregator never sees a contribution."""

import importlib.util
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.consensus.masked import Masking
from fedeq_edge.storage.contributions import FIRST, ContributionLog

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.system.conftest import MakeFleet

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(importlib.util.find_spec("cryptography") is None, reason="the extra masking is not installed"),
]
ROUNDS = 6


def test_masked_rounds_go_on_over_the_death_of_a_device_and_of_the_aggregator(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(
        shared_mosquitto.url,
        devices=("a", "b", "c", "d"),
        rounds=ROUNDS,
        method={"preset": "fedeq-published"},
        masking=Masking(step_s=5.0),
    )
    fleet.start_aggregator()
    fleet.start_agents()
    fleet.until(lambda: len(fleet.rounds()) >= 1, "the first sum is made")
    fleet.kill_agent("d")
    fleet.kill_aggregator()
    fleet.start_aggregator()
    fleet.start_agent("d")
    fleet.finish()
    lines = {line["round"]: line for line in fleet.rounds()}
    assert sorted(lines) == list(range(1, ROUNDS + 1))
    assert all(line["failed"] is None and len(line["contributed"]) >= 3 for line in lines.values())
    assert lines[ROUNDS]["contributed"] == ["a", "b", "c", "d"]
    assert set(fleet.reports()) == set(fleet.devices)
    assert not list(ContributionLog(fleet.folder / "state" / "contributions", FIRST).journal())
    assert fleet.dismiss() == dict.fromkeys(fleet.devices, 0)
