"""A state folder belongs to the federation that began in it."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.gateway import open_aggregator
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.storage import AggregatorFolder
from fedeq_edge.training.step import Plan

BEGUN = AggregatorSettings(federation="mine", model=ModelSpec(input_shape=(4,), classes=2, channels=8))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    folder = AggregatorFolder(tmp_path)
    machine = open_aggregator(BEGUN, folder)
    folder.take_snapshot(machine.state, machine.consensus.snapshot())
    return tmp_path


def test_the_same_settings_go_on_with_the_same_run(begun: Path) -> None:
    first = open_aggregator(BEGUN, AggregatorFolder(begun))
    longer = replace(BEGUN, train=replace(BEGUN.train, rounds=99))
    assert open_aggregator(longer, AggregatorFolder(begun)).state.run == first.state.run


@pytest.mark.parametrize(
    "changed",
    [
        replace(BEGUN, federation="other"),
        replace(BEGUN, seed=1),
        replace(BEGUN, codec="int4"),
        replace(BEGUN, method={"rho": 1.0}),
        replace(BEGUN, method={"preset": "fedper"}),
        replace(BEGUN, model=replace(BEGUN.model, radius=0.5)),
    ],
)
def test_settings_that_would_break_the_sums_are_refused_on_an_old_folder(
    begun: Path, changed: AggregatorSettings
) -> None:
    with pytest.raises(StateError, match="another state folder"):
        open_aggregator(changed, AggregatorFolder(begun))


def test_training_must_leave_a_round_some_time() -> None:
    with pytest.raises(ConfigError, match=r"compute_s .* must be below schedule.deadline_s"):
        replace(BEGUN, train=Plan(compute_s=60.0), schedule=Schedule(deadline_s=60.0))
