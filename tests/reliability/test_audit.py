"""The audit finds every way in which a history can differ from its contributions, and names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from fedeq_edge.audit import Audit, audit
from fedeq_edge.consensus.privacy import Accountant, Privacy
from fedeq_edge.errors import StateError
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.storage import Record, audit_trail
from fedeq_edge.storage.contributions import ContributionLog
from tests.reliability.fleet import Fleet, Shape

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet

pytestmark = pytest.mark.broker
ROUNDS, DEVICES = 4, ("a", "b")
Line = dict[str, Any]


class Trail:
    """A copy of a finished federation's folder, to be forged."""

    def __init__(self, folder: Path, chosen: AggregatorSettings) -> None:
        self.folder, self.chosen = folder, chosen

    def audit(self) -> Audit:
        return audit(self.folder, self.chosen)

    def forge_round(self, number: int, change: Callable[[Line], None]) -> None:
        path = self.folder / "rounds.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if (line["kind"], line["round"]) == ("round", number):
                change(line)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def forge_log(self, change: Callable[[list[Record]], object]) -> None:
        records = list(audit_trail(self.folder))
        change(records)
        shutil.rmtree(self.folder / "contributions")
        forged = ContributionLog(self.folder / "contributions")
        for record in records:
            forged.append(record)
        forged.commit()


@pytest.fixture(scope="module")
def past(shared_mosquitto: "RealMosquitto", tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A federation that has ended well."""
    fleet = Fleet(tmp_path_factory.mktemp("audited"), shared_mosquitto.port, Shape(rounds=ROUNDS, devices=DEVICES))
    try:
        fleet.start()
        fleet.finish()
    finally:
        fleet.close()
    return fleet


@pytest.fixture
def trail(past: Fleet, tmp_path: Path) -> Trail:
    shutil.copytree(past.folder / "state", tmp_path / "state")
    return Trail(tmp_path / "state", past.aggregator_settings)


def test_a_sound_history_is_bit_equal_in_every_round(trail: Trail) -> None:
    found = trail.audit()
    assert found.sound
    assert (found.rounds, found.contributions, found.starts) == (ROUNDS, 2 * ROUNDS, 2)
    assert "bit-equal to the oracle over 8 accepted contributions in 4 rounds" in found.sentence
    assert set(found.duals) == set(DEVICES)


def test_another_seed_is_another_beginning(trail: Trail) -> None:
    trail.chosen = msgspec.structs.replace(trail.chosen, seed=1)
    assert "round 1 begins from consensus" in trail.audit().difference


def test_a_consensus_that_is_not_what_the_contributions_make_is_named(trail: Trail) -> None:
    trail.forge_round(3, lambda line: line.update(z="00" * 32))
    found = trail.audit()
    assert not found.sound
    assert found.rounds == 2
    assert "round 3 ends with consensus 0000000000000000, the oracle with" in found.difference


def test_a_weight_that_did_not_count_shows(trail: Trail) -> None:
    trail.forge_round(2, lambda line: line["members"]["a"].__setitem__(0, 11))
    assert "round 2 ends with consensus" in trail.audit().difference


def test_a_contribution_that_is_gone_is_named(trail: Trail) -> None:
    trail.forge_log(lambda records: records.pop())
    assert "round 4 counts one of device" in trail.audit().difference
    assert "which is lost" in trail.audit().difference


def test_a_contribution_that_no_round_counts_is_named(trail: Trail) -> None:
    trail.forge_round(2, lambda line: line["accepted"].pop(0))
    assert "leaves out the contribution of device" in trail.audit().difference


def test_a_contribution_that_counts_twice_is_named(trail: Trail) -> None:
    first = next(audit_trail(trail.folder))
    weight = {"a": 10, "b": 20}[first.device]
    trail.forge_log(lambda records: records.insert(2, first))
    trail.forge_round(2, lambda line: line["accepted"].insert(0, [first.device, 1, weight]))
    assert f"device {first.device}: its contribution for round 1 counts twice, in rounds 1 and 2" in (
        trail.audit().difference
    )


def test_a_contribution_under_another_name_or_to_another_task_is_named(trail: Trail) -> None:
    def swap(records: list[Record]) -> None:
        records[0], records[2] = (
            _with_blob(records[0], records[2].blob),
            _with_blob(records[2], records[0].blob),
        )

    trail.forge_log(swap)
    assert "answers another task than that round's" in trail.audit().difference


def _with_blob(record: Record, blob: bytes) -> Record:
    return Record(device=record.device, round=record.round, kappa=record.kappa, factor=record.factor, blob=blob)


def test_a_contribution_that_cannot_be_decoded_is_named(trail: Trail) -> None:
    def damage(records: list[Record]) -> None:
        records[3] = _with_blob(records[3], records[3].blob[:-1])

    trail.forge_log(damage)
    assert "cannot be decoded" in trail.audit().difference


def test_a_member_that_never_started_is_named(trail: Trail) -> None:
    trail.forge_round(2, lambda line: line["members"].update(z=[1, 1]))
    assert "round 2 has member z, which never started" in trail.audit().difference


def test_a_start_that_is_left_out_or_invented_shows(trail: Trail) -> None:
    trail.forge_round(3, lambda line: line["started"].append(["a", 0]))
    assert "round 3 ends with consensus" in trail.audit().difference


def test_a_round_that_is_missing_is_named(trail: Trail) -> None:
    path = trail.folder / "rounds.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["round"] != 2]
    path.write_text("\n".join(kept) + "\n")
    assert "round 2: rounds.jsonl goes on with round 3" in trail.audit().difference


def test_a_folder_without_a_trail_is_a_state_error(trail: Trail) -> None:
    trail.forge_round(2, lambda line: line.pop("accepted"))
    with pytest.raises(StateError, match="holds no audit trail; set audit = true"):
        trail.audit()


@pytest.mark.parametrize(
    ("method", "schedule", "codec"),
    [
        pytest.param({"preset": "fedavg"}, {}, "f32", id="without-duals"),
        pytest.param({"weighting": "objective"}, {}, "int4", id="weights-that-move"),
        pytest.param({"robust": "clip", "clip": 0.5}, {}, "int8", id="clipped"),
        pytest.param({"preset": "fedavg", "robust": "median", "norm_limit": 100.0}, {}, "int8", id="median"),
        pytest.param({}, {"fraction": 0.5, "late_rounds": 2}, "int4", id="partial-participation"),
        pytest.param({}, {"mode": "async", "buffer": 2}, "int8", id="asynchronous"),
    ],
)
def test_every_kind_of_federation_can_be_audited(
    make_fleet: "MakeFleet",
    shared_mosquitto: "RealMosquitto",
    method: dict[str, Any],
    schedule: dict[str, Any],
    codec: str,
) -> None:
    fleet = make_fleet(shared_mosquitto.port, rounds=6, codec=codec, method=method, schedule=schedule)
    fleet.start()
    assert fleet.finish().contributions >= 6


def test_the_noise_of_a_private_federation_is_audited_with_its_key(
    shared_mosquitto: "RealMosquitto", make_fleet: "MakeFleet"
) -> None:
    """The status of the process tells what the rounds have spent."""
    promise = Privacy(clip=0.5, noise_multiplier=1.0)
    fleet = make_fleet(
        shared_mosquitto.port, rounds=2, devices=DEVICES, privacy=promise, method={"preset": "fedeq-published"}
    )
    fleet.start()
    fleet.finish()
    folder = fleet.folder / "state"
    assert json.loads((folder / "status.json").read_text())["privacy"]["epsilon"] == pytest.approx(
        Accountant(promise, {1.0: 2}).epsilon()
    )
    assert audit(folder, fleet.aggregator_settings).sound
    (folder / "privacy.key").unlink()
    with pytest.raises(StateError, match=r"no privacy\.key"):
        audit(folder, fleet.aggregator_settings)
