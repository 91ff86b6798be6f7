"""Messages: strict in types, lenient in unknown keys."""

import re
from typing import Any

import msgspec
import pytest

from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire import frame, messages

DIGEST = bytes(range(32))
METRICS = messages.Metrics(
    loss=float("inf"),
    residual=1e-3,
    backward_residual=2.0,
    forward=8,
    adjoint=3,
    seconds=1.5,
    accuracy=0.25,
    reduced=True,
    wire_up=10**9,
    wire_down=0,
)
EXAMPLES: list[messages.Message] = [
    messages.Birth(boot="b", samples=60, profile="pi-zero-2", emulated=True, codecs=("f32", "int8")),
    messages.Offline(boot="b"),
    messages.AggregatorState(boot="a"),
    messages.Manifest(
        run="r",
        status="running",
        model={"cell": "dense", "sizes": [1, 2], "nothing": None},
        plan={"rounds": 15, "rate": 0.1},
        method={"name": "admm"},
        seed=2**53,
    ),
    messages.Task(run="r", round=3, model=DIGEST, kappa=0.1, deadline_s=60.0, codec="int4+z", after=2, duals=DIGEST),
    messages.Task(run="r", round=3, model=DIGEST, kappa=0.1, deadline_s=60.0, codec="f32", duals=None, final=True),
    messages.Fetch(run="r", model=DIGEST, base=b""),
    messages.Chunk(transfer=DIGEST, index=0, size=1),
    messages.ChunkAck(transfer=DIGEST, bitmap=b"\x01"),
    messages.Contribution(
        run="r", round=3, boot="b", base=DIGEST, samples=60, codec="int8", length=100, metrics=METRICS
    ),
    messages.Verdict(run="r", subject="contribution", round=3, accepted=False, code="digest", reason="Ω" * 256),
    messages.Model(run="r", round=3, model=DIGEST, base=b"", codec="f32", length=100),
    messages.Report(
        run="r",
        round=16,
        forward=8,
        adjoint=3,
        residual=1e-4,
        certificate=Certificate(norm="max", gamma=0.9, evaluations=8, bound=0.39, unit="state"),
        accuracy_personal=1.0,
        accuracy_consensus=0.5,
        local_only=None,
        rss_idle_bytes=40_000_000,
        rss_peak_bytes=300_000_000,
        wire_up=1,
        wire_down=2,
    ),
    messages.Decline(run="r", round=3, reason="battery at 4 %"),
    messages.Differs(run="r", round=3, expected=DIGEST, after=-1),
    messages.Offer(transfer=DIGEST, size=1),
    messages.Share(
        round=3, base=DIGEST, federation=DIGEST, length=4, weight="7", squares=str(2**200), penalties=str(2**70)
    ),
    messages.Task(
        run="r",
        round=3,
        model=DIGEST,
        kappa=0.1,
        deadline_s=60.0,
        codec="f32",
        masking=messages.MaskingTerms(session=DIGEST, omega=60, bound=2**62, limit=2**40, length=100, threshold=2 / 3),
    ),
    messages.MaskingStep(session=DIGEST, step="keys"),
    messages.Contribution(
        run="r", round=3, boot="b", base=DIGEST, samples=60, codec="int8", length=9, metrics=METRICS, session=DIGEST
    ),
    messages.Manifest(
        run="r",
        status="waiting",
        model={},
        plan={},
        method={},
        seed=0,
        graph=messages.GraphName(sha256=DIGEST, transfer=DIGEST),
    ),
]


def test_there_is_an_example_of_every_kind() -> None:
    assert {type(example) for example in EXAMPLES} == set(messages.KINDS)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message: messages.Message) -> None:
    received = messages.decode(messages.encode(message, b"tensor"))
    assert received.message == message
    assert bytes(received.body) == b"tensor"


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_key_of_a_newer_version_is_passed_over(message: messages.Message) -> None:
    kind, header, _ = frame.unpack(messages.encode(message))
    assert isinstance(header, dict)
    assert messages.decode(frame.pack(kind, {**header, "new_in_1_7": [1]})).message == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_without_a_required_key_is_refused_with_its_name(message: messages.Message) -> None:
    kind, header, _ = frame.unpack(messages.encode(message))
    assert isinstance(header, dict)
    for field in msgspec.structs.fields(message):
        if field.required:
            without = {key: value for key, value in header.items() if key != field.name}
            with pytest.raises(RemoteWireError, match=f"{type(message).__name__.lower()} message.*`{field.name}`"):
                messages.decode(frame.pack(kind, without))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("wrong", [True, "7", [1], {"a": 1}, 2**63], ids=repr)
def test_a_value_of_another_type_is_refused_or_was_right(message: messages.Message, wrong: Any) -> None:
    kind, header, _ = frame.unpack(messages.encode(message))
    assert isinstance(header, dict)
    for name, value in header.items():
        if value is None or isinstance(value, float | type(wrong)):  # an integer stands for a float
            continue
        with pytest.raises(RemoteWireError, match=re.escape(f"$.{name}")):
            messages.decode(frame.pack(kind, {**header, name: wrong}))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (EXAMPLES[0], {"samples": 0}),
        (EXAMPLES[0], {"samples": 2**53 + 1}),
        (EXAMPLES[0], {"codecs": ["x"] * 33}),
        (EXAMPLES[0], {"battery": 101.0}),
        (EXAMPLES[0], {"data_age_s": -1.0}),
        (EXAMPLES[0], {"profile": "x" * 129}),
        (EXAMPLES[4], {"model": b"short"}),
        (EXAMPLES[4], {"round": -1}),
        (EXAMPLES[4], {"after": -2}),
        (EXAMPLES[4], {"codec": "int4; rm"}),
        (EXAMPLES[7], {"size": 0}),
        (EXAMPLES[9], {"length": 0}),
        (EXAMPLES[10], {"reason": "x" * 513}),
        (EXAMPLES[10], {"factor": -1}),
        (EXAMPLES[10], {"factor": 65537}),
        (EXAMPLES[12], {"forward": 10_001}),
    ],
)
def test_a_value_out_of_its_range_is_refused(message: messages.Message, change: dict[str, object]) -> None:
    kind, header, _ = frame.unpack(messages.encode(message))
    assert isinstance(header, dict)
    with pytest.raises(RemoteWireError, match=next(iter(change))):
        messages.decode(frame.pack(kind, {**header, **change}))


@pytest.mark.parametrize("kind", [0, max(range(1, len(messages.KINDS) + 1)) + 1, 255])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(RemoteWireError, match=f"kind {kind} is unknown; this version knows 1 to {len(messages.KINDS)}"):
        messages.decode(frame.pack(kind, {}))


@pytest.mark.parametrize("header", [[], 5, None, "x"], ids=repr)
def test_a_header_that_is_no_map_is_refused(header: Any) -> None:
    with pytest.raises(RemoteWireError, match="offline message: Expected `object`"):
        messages.decode(frame.pack(2, header))
