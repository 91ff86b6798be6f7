"""What a device says is checked before it is used: refused with a code, counted, named, and the round goes on."""

import hashlib
from typing import Any

import msgspec
import numpy as np
import pytest

from fedeq_edge.protocol.intake import LARGEST_STEP
from fedeq_edge.protocol.refusals import PATIENCE
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.protocol.transfers import AWAY_S
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import BLOCK_BYTES, digest
from tests.protocol.fleet import ADMM, METRICS, TOPICS, Fleet, Quadratics, contribution, upload

THREE = Quadratics.drawn(3)


def in_round_two(**changes: Any) -> Fleet:
    """A fleet in its second round, of which only d0's contribution is missing."""
    fleet = Fleet(THREE, rounds=4, **changes)
    fleet.run_to_round(2)
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    assert list(fleet.aggregator.state.contributed) == ["d1", "d2"]
    return fleet


def go_on(fleet: Fleet) -> None:
    fleet.devices["d0"].holds_back = False
    fleet.run()
    fleet.check_duals()
    fleet.check_counted_once()


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("run", {"run": "another"}),
        ("round", {"round": 17}),
        ("digest", {"base": hashlib.sha256(b"another consensus").digest()}),
        ("wrong_shape", {"difference": np.ones(11, np.float32)}),
        ("wrong_shape", {"codec": "f16"}),
        ("wrong_shape", {"length": 2**53}),
        ("too_large", {"difference": np.full(12, 1.001 * LARGEST_STEP, np.float32)}),
    ],
)
def test_a_contribution_that_does_not_fit_is_refused_by_its_code(code: str, changes: dict[str, Any]) -> None:
    fleet = in_round_two()
    before = fleet.aggregator.consensus.snapshot()
    message, body = contribution(fleet, "d0", **changes)
    upload(fleet, "d0", messages.encode(message, body))
    verdict = fleet.messages_to("d0", messages.Verdict)[-1]
    assert (verdict.accepted, verdict.code, verdict.round) == (False, code, message.round)
    assert fleet.aggregator.refusals == {code: 1}
    assert fleet.notes[-1].facts["code"] == code
    assert fleet.notes[-1].facts["device"] == "d0"
    np.testing.assert_equal(fleet.aggregator.consensus.snapshot(), before)
    go_on(fleet)


@pytest.mark.parametrize(
    "body", [b"", bytes(47), bytes(49), np.full(12, np.nan, "<f4").tobytes(), np.full(12, np.inf, "<f4").tobytes()]
)
def test_a_body_of_another_size_or_with_nan_is_refused(body: bytes) -> None:
    fleet = in_round_two()
    message, _ = contribution(fleet, "d0")
    upload(fleet, "d0", messages.encode(message, body))
    assert fleet.messages_to("d0", messages.Verdict)[-1].code == "size_or_nan"
    assert fleet.aggregator.refusals == {"size_or_nan": 1}
    go_on(fleet)


def test_a_contribution_that_nobody_asked_for_is_refused() -> None:
    schedule = Schedule(min_devices=3, fraction=0.3, deadline_s=40.0)
    fleet = Fleet(THREE, rounds=6, schedule=schedule)
    fleet.run_to_round(2)
    cohort = fleet.aggregator.state.cohort
    outsider = next(name for name in fleet.devices if name not in cohort)
    message, body = contribution(fleet, outsider)
    upload(fleet, outsider, messages.encode(message, body))
    upload(fleet, "stranger", messages.encode(message, body))
    assert fleet.aggregator.refusals == {"not_asked": 2}
    fleet.run()
    fleet.check_counted_once()


@pytest.mark.parametrize("number", [1e200, -1e200, float("inf"), float("nan")])
def test_metrics_that_are_garbage_stop_nothing(number: float) -> None:
    method = msgspec.structs.replace(ADMM, quality="residual")
    fleet = in_round_two(method=method)
    garbage = msgspec.structs.replace(METRICS, residual=number, backward_residual=number, loss=number, accuracy=number)
    message, body = contribution(fleet, "d0", np.zeros(12, np.float32), metrics=garbage)
    upload(fleet, "d0", messages.encode(message, body))
    assert fleet.aggregator.state.round == 3
    assert all(np.isfinite(member.quality) for member in fleet.aggregator.consensus.members.values())


def test_a_repeated_contribution_gets_the_same_verdict_and_counts_once() -> None:
    fleet = in_round_two()
    device = fleet.devices["d0"]
    device.holds_back = False
    device.do_work()
    assert device.client.state.pending is not None
    blob = device.client.state.pending.blob
    for _ in range(3):
        upload(fleet, "d0", blob)
    assert [verdict.accepted for verdict in fleet.messages_to("d0", messages.Verdict)[-3:]] == [True] * 3
    go_on(fleet)
    assert not fleet.aggregator.refusals


def test_a_refused_device_declines_the_round_and_does_not_train_it_again() -> None:
    fleet = in_round_two(schedule=Schedule(min_devices=3, deadline_s=1000.0))
    device = fleet.devices["d0"]
    device.holds_back = False
    fleet.aggregator.state.bases[2] = bytes(32)  # whatever it sends now is refused
    device.do_work()
    fleet.run_to_round(3)
    assert device.trained == [1, 2]
    assert "another consensus" in fleet.lines[1]["declined"]["d0"]
    assert fleet.now < 1000.0


def test_a_birth_that_claims_more_samples_than_the_limit_stays_out() -> None:
    fleet = Fleet(THREE, rounds=3, schedule=Schedule(min_devices=3, samples_limit=1000))
    liar = messages.Birth(boot="b", samples=2**53, profile="", emulated=False, codecs=("f32",))
    fleet.aggregator.arrived(TOPICS.state("liar"), messages.encode(liar), 0.0)
    fleet.run()
    assert fleet.aggregator.refusals == {"samples": 1}
    assert "liar" not in fleet.aggregator.consensus.members
    fleet.check_counted_once()


def test_a_device_that_does_not_speak_the_code_of_the_federation_stays_out() -> None:
    fleet = Fleet(THREE, rounds=3, codec="int4")
    old = messages.Birth(boot="b", samples=5, profile="", emulated=False, codecs=("f32", "int8"))
    fleet.aggregator.arrived(TOPICS.state("old"), messages.encode(old), 0.0)
    fleet.run()
    assert fleet.aggregator.refusals == {"codec": 1}
    assert sorted(fleet.aggregator.status()["online"]) == ["d0", "d1", "d2"]


def test_a_device_ahead_of_an_aggregator_from_an_old_backup_is_named() -> None:
    fleet = in_round_two()
    fleet.send("d0", messages.Differs(run="t-1", round=2, expected=bytes(32), after=9))
    assert fleet.aggregator.refusals == {"rollback": 1}
    assert "round 9, this aggregator has come to 2" in str(fleet.notes[-1].facts["reason"])
    go_on(fleet)


def test_an_old_disagreement_does_not_cost_a_device_its_dual() -> None:
    fleet = in_round_two()
    before = fleet.duals.get("d0")
    fleet.send("d0", messages.Differs(run="t-1", round=1, expected=b"", after=-1))
    np.testing.assert_array_equal(fleet.duals.get("d0"), before)
    go_on(fleet)


def test_a_report_before_the_end_is_passed_over() -> None:
    fleet = in_round_two()
    report = messages.Report(
        run="t-1",
        round=2,
        forward=1,
        adjoint=0,
        residual=float("nan"),
        certificate=None,
        accuracy_personal=1e300,
        accuracy_consensus=-1.0,
        local_only=None,
        rss_idle_bytes=0,
        rss_peak_bytes=0,
        wire_up=0,
        wire_down=0,
    )
    fleet.send("d0", report)
    assert not fleet.aggregator.reports
    go_on(fleet)
    assert fleet.aggregator.reports["d0"].accuracy_personal == 1.0
    fleet.send("d0", report)
    assert fleet.aggregator.reports["d0"].accuracy_personal == 1.0


def test_an_upload_over_the_limit_is_refused_when_it_is_offered() -> None:
    fleet = in_round_two()
    fleet.send("d0", messages.Offer(transfer=bytes(32), size=10_000_000))
    assert fleet.aggregator.refusals == {"malformed": 1}
    assert fleet.aggregator.status()["uploads"] == {"granted": 0, "waiting": 0}
    go_on(fleet)


def test_blocks_that_nobody_has_granted_are_refused() -> None:
    fleet = Fleet(Quadratics.drawn(2, size=40_000), rounds=2)
    fleet.run_to_round(1)
    chunk = messages.Chunk(transfer=bytes(32), index=0, size=100_000)
    fleet.feed("stranger", messages.encode(chunk, bytes(BLOCK_BYTES)))
    assert fleet.aggregator.refusals == {"malformed": 1}
    assert "not granted" in str(fleet.notes[-1].facts["reason"])


def test_an_upload_of_a_device_that_vanishes_waits_for_it_and_not_for_ever() -> None:
    fleet = Fleet(Quadratics.drawn(2, size=40_000), rounds=2)
    fleet.run_to_round(1)
    fleet.send("stranger", messages.Offer(transfer=bytes(32), size=100_000))
    fleet.feed("stranger", messages.encode(messages.Chunk(transfer=bytes(32), index=0, size=100_000), bytes(8192)))
    fleet.aggregator.tick(fleet.now + AWAY_S - 1.0)
    assert fleet.aggregator.status()["uploads"]["granted"] == 1
    fleet.aggregator.tick(fleet.now + AWAY_S)
    assert fleet.aggregator.status()["uploads"]["granted"] == 0


def test_a_contribution_offered_again_after_it_counted_gets_its_verdict_without_being_sent() -> None:
    fleet = in_round_two()
    blob = fleet.stored[0].blob
    device = fleet.stored[-1].device
    fleet.send(device, messages.Offer(transfer=digest(fleet.stored[-1].blob), size=len(blob)))
    assert fleet.messages_to(device, messages.Verdict)[-1].accepted
    assert fleet.aggregator.counters.duplicates == 1
    go_on(fleet)


def test_a_device_that_is_refused_again_and_again_fills_no_log_and_gets_no_more_answers() -> None:
    fleet = in_round_two()
    for _ in range(3 * PATIENCE):
        message, body = contribution(fleet, "d0", run="another")
        upload(fleet, "d0", messages.encode(message, body))
    assert fleet.aggregator.refusals == {"run": 3 * PATIENCE}
    refused = [note for note in fleet.notes if note.event == "refused"]
    assert len(refused) == PATIENCE
    assert "counted only" in str(refused[-1].facts["reason"])
    go_on(fleet)
