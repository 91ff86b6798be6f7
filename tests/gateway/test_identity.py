"""A state folder belongs to the federation that began in it."""

import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.gateway import Gateway, open_aggregator
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
        replace(BEGUN, method={"preset": "fedavg"}, privacy=Privacy(clip=1.0, noise_multiplier=1.0)),
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


PRIVATE = replace(BEGUN, method={"preset": "fedavg"}, privacy=Privacy(clip=1.0, noise_multiplier=1.0))


def test_the_key_of_a_private_federation_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = open_aggregator(PRIVATE, AggregatorFolder(tmp_path))
    assert len(first.key) == 32
    assert (tmp_path / "privacy.key").stat().st_mode & 0o777 == 0o600
    assert open_aggregator(PRIVATE, AggregatorFolder(tmp_path)).key == first.key
    assert str(first.key) not in repr(first)


def test_a_private_federation_whose_key_is_gone_does_not_go_on(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    machine = open_aggregator(PRIVATE, folder)
    folder.take_snapshot(machine.state, machine.consensus.snapshot())
    (tmp_path / "privacy.key").unlink()
    with pytest.raises(StateError, match=r"privacy\.key is gone; restore the whole folder"):
        open_aggregator(PRIVATE, AggregatorFolder(tmp_path))


def test_a_promise_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="server = 'fresh'"):
        Gateway(tmp_path / "aggregator.toml", replace(PRIVATE, method={}))
    unheard = replace(PRIVATE, privacy=Privacy(clip=1.0, noise_multiplier=1.37))  # of no epsilon that is known yet
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'fedeq-edge\[privacy\]'"):
        Gateway(tmp_path / "aggregator.toml", unheard)
    assert not list(tmp_path.iterdir())
