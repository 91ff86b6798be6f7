"""The messages, their kinds, and their way to and from payloads.

Every message is a frozen struct that becomes the CBOR header of one frame; tensor bytes are the frame's body.
Decoding is strict in types and lenient in unknown keys: a newer minor version may add keys, a changed meaning gets a
new magic. Who sends what:

    Birth, Offline, Fetch, Offer, Chunk, ChunkAck, Report, Decline, Differs     device -> aggregator
    AggregatorState, Manifest, Task, Chunk, ChunkAck, Verdict, Model            aggregator -> device
    MaskingStep                                                                 both ways, in a masked round
    Contribution, Model                                                         blobs, carried by chunks
    Share                                                                       worker -> root, a blob
"""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire import frame
from fedeq_edge.wire.chunks import DIGEST_BYTES
from fedeq_edge.wire.coding import Codec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Name = Annotated[str, msgspec.Meta(max_length=128)]
Status = Literal["waiting", "running", "finishing", "finished"]
Text = Annotated[str, msgspec.Meta(max_length=512)]
RoundOrNone = Annotated[int, msgspec.Meta(ge=-1, le=2**53)]  # -1: none yet
Integer = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,128}$")]  # sums of products of 64-bit weights and |d|^2
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e10)]
Percent = Annotated[float, msgspec.Meta(ge=0.0, le=100.0)]
Evaluations = Annotated[int, msgspec.Meta(ge=0, le=10_000)]  # a solver budget; nobody affords more for one sample


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages: a struct without behaviour."""


class Birth(Message, frozen=True, kw_only=True):
    """A device is here. boot: new at every start of the agent, so that an old last will can be told from a new one.

    Retained, so the aggregator may read it long after it was written. codecs: the features of wire/coding.py that this
    version speaks. data_age_s: since its data was last written, by its own clock, None where it cannot say. battery:
    percent, None on mains.
    """

    boot: Name
    samples: Positive
    profile: Name
    emulated: bool
    codecs: Annotated[tuple[Name, ...], msgspec.Meta(max_length=32)]
    data_age_s: Seconds | None = None
    battery: Percent | None = None


class Offline(Message, frozen=True, kw_only=True):
    """A device or aggregator is gone: said by itself on leaving, or by the broker as its last will."""

    boot: Name


class AggregatorState(Message, frozen=True, kw_only=True):
    """The aggregator is here."""

    boot: Name


class GraphName(msgspec.Struct, frozen=True, kw_only=True):
    """A training graph: sha256 of the file, and transfer: of the deflated blob that a `Fetch` brings."""

    sha256: Digest
    transfer: Digest


class Manifest(Message, frozen=True, kw_only=True):
    """What the federation trains: retained, small, the same for all.

    model, plan and method are maps (ModelSpec, Plan, Method); seed: of the initial weights, which every device can make
    for itself. graph: what devices without torch train by, None where the aggregator has none.
    """

    run: Name
    status: Status
    model: dict[str, object]
    plan: dict[str, object]
    method: dict[str, object]
    seed: Count
    graph: GraphName | None = None


class MaskingTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a device must know to mask its contribution (masking/terms.py, `Terms`).

    session: of this masked sum. omega: the device's weight, by which it multiplies what its dual moves by. bound: no
    entry of that product is larger in the whole cohort. limit: no entry of what this device's own dual moves by is.
    length: how many entries. threshold: as in the settings.
    """

    session: Digest
    omega: Positive
    bound: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    length: Positive
    threshold: Annotated[float, msgspec.Meta(gt=0.5, le=1.0)]


class Task(Message, frozen=True, kw_only=True):
    """Do round `round` from consensus `model` (digest of z_hat) within `deadline_s` seconds of receipt.

    kappa takes effect here and nu stays as it is (algorithm.md section 4, step 1). codec: how the contribution shall
    travel. after: the last round of which the aggregator had this device's contribution when it wrote the task, -1
    before the first. duals: name of the nu that it counted with then (protocol/state.py, `dual_name`), empty for
    nu = 0, None where its method keeps none. final: no training, personalise with this consensus and report.
    masking: the contribution travels masked, or not at all; None for open rounds.
    """

    run: Name
    round: Count
    model: Digest
    kappa: float
    deadline_s: float
    codec: Codec
    after: RoundOrNone = -1
    duals: bytes | None = b""
    final: bool = False
    masking: MaskingTerms | None = None


class Fetch(Message, frozen=True, kw_only=True):
    """Send me the consensus with digest `model`; I hold the one with digest `base` (empty: none).

    Or the training graph, where `model` is the name of its transfer.
    """

    run: Name
    model: Digest
    base: bytes = b""


class Offer(Message, frozen=True, kw_only=True):
    """I have a blob of `size` bytes with sha256 `transfer`: acknowledge what you hold of it when I may send."""

    transfer: Digest
    size: Positive


class Chunk(Message, frozen=True, kw_only=True):
    """Consecutive blocks of a blob (in the body), the first is block `index`. transfer: sha256 of all `size` bytes."""

    transfer: Digest
    index: Count
    size: Positive


class ChunkAck(Message, frozen=True, kw_only=True):
    """The receiver holds these blocks of a transfer, and takes more."""

    transfer: Digest
    bitmap: bytes


class Metrics(Message, frozen=True, kw_only=True):
    """What a device measured in a round. accuracy: NaN without a test part. battery: percent, None on mains.

    wire_*: bytes since the agent's start, repeated_bytes: those of them that were sent again.
    """

    loss: float
    residual: float
    backward_residual: float
    forward: Evaluations
    adjoint: Evaluations
    seconds: float
    accuracy: float
    reduced: bool
    wire_up: Count
    wire_down: Count
    repeated_bytes: Count = 0
    battery: Percent | None = None


class Contribution(Message, frozen=True, kw_only=True):
    """theta_i - z_hat of one device and round, coded (in the body). base: digest of the z_hat it started from.

    session: of the masked sum that it is for, empty in open rounds. Then the body is omega_i times what the dual moves
    by, after coding and decoding, under masks (masking/).
    """

    run: Name
    round: Count
    boot: Name
    base: Digest
    samples: Positive
    codec: Codec
    length: Positive
    metrics: Metrics
    session: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)] = b""


class Verdict(Message, frozen=True, kw_only=True):
    """The aggregator has stored (accepted) or refused what a device sent. code and reason name a refusal.

    factor: the difference counts scaled by factor / 65536, and the dual moves by the same; less than whole where a
    robust method has clipped it, 0 where it has only been measured.
    """

    run: Name
    subject: Literal["contribution", "report"]
    round: Count
    accepted: bool
    code: Name = ""
    reason: Text = ""
    factor: Annotated[int, msgspec.Meta(ge=0, le=WHOLE)] = WHOLE


class Model(Message, frozen=True, kw_only=True):
    """A consensus vector (in the body): a difference to the z_hat with digest `base`, or whole where base is empty.

    model: digest of the decoded z_hat.
    """

    run: Name
    round: Count
    model: Digest
    base: bytes
    codec: Codec
    length: Positive


class Report(Message, frozen=True, kw_only=True):
    """A device's own model after the federation, in numbers; the model itself never leaves the device.

    certificate: what is proven of its answers at K = `forward`, None without a proof.
    accuracies are NaN without a test part; local_only is None unless the plan asked for it. *_bytes: resident memory
    of the link process at rest and the peak of link and trainer together.
    """

    run: Name
    round: Count
    forward: Evaluations
    adjoint: Evaluations
    residual: float
    certificate: Certificate | None
    accuracy_personal: float
    accuracy_consensus: float
    local_only: float | None
    rss_idle_bytes: Count
    rss_peak_bytes: Count
    wire_up: Count
    wire_down: Count


class Decline(Message, frozen=True, kw_only=True):
    """A device cannot do this round: battery, memory, a failed trainer. It stays in the fleet."""

    run: Name
    round: Count
    reason: Text


class Differs(Message, frozen=True, kw_only=True):
    """The task of round `round` names another dual than I hold: let me join anew, or send me a newer task.

    expected: `duals` of that task. after: the last round for which I have heard that my contribution counts, -1 before
    the first. An aggregator that holds another dual than `expected` by now knows that the task was an old one.
    """

    run: Name
    round: Count
    expected: bytes
    after: RoundOrNone


class MaskingStep(Message, frozen=True, kw_only=True):
    """One message of a masked sum's exchange (in the body: masking/messages.py), to or from one device."""

    session: Digest
    step: Literal["keys", "roster", "shares", "delivery", "survivors", "reveal"]


class Share(Message, frozen=True, kw_only=True):
    """What a worker's devices contribute to round `round` and hold after it (consensus/records.py, `Share`).

    In the body: steps, and duals where the method keeps some, each `length` little-endian int64. base: digest of the
    consensus that the worker holds, and federation: of what it trains, which is the same for root and workers.
    weight, squares, penalties: integers as decimal text, as they may pass 64 bits.
    """

    round: Count
    base: Digest
    federation: Digest
    length: Positive
    weight: Integer
    squares: Integer
    penalties: Integer


_KINDS: Final[dict[int, type[Message]]] = {
    1: Birth,
    2: Offline,
    3: AggregatorState,
    4: Manifest,
    5: Task,
    6: Fetch,
    7: Chunk,
    8: ChunkAck,
    9: Contribution,
    10: Verdict,
    11: Model,
    12: Report,
    13: Decline,
    14: Differs,
    15: Offer,
    16: Share,
    17: MaskingStep,
}
_NUMBERS: Final = {message: kind for kind, message in _KINDS.items()}
KINDS: Final[tuple[type[Message], ...]] = tuple(_KINDS.values())


@dataclass(frozen=True, slots=True)
class Received:
    """A decoded message with its body (a view of the payload)."""

    message: Message
    body: memoryview


def encode(message: Message, body: bytes | memoryview = b"") -> bytes:
    """The payload of a message. Raises LocalWireError where its header is too long."""
    header = msgspec.to_builtins(message, builtin_types=(bytes,))
    return frame.pack(_NUMBERS[type(message)], header, body)


def decode(payload: bytes) -> Received:
    """The message in a payload. Raises RemoteWireError naming the field that does not fit."""
    kind, header, body = frame.unpack(payload)
    expected = _KINDS.get(kind)
    if expected is None:
        raise RemoteWireError(f"message kind {kind} is unknown; this version knows 1 to {max(_KINDS)}")
    try:
        return Received(msgspec.convert(header, expected, builtin_types=(bytes,)), body)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RemoteWireError(f"{expected.__name__.lower()} message: {error}") from error


def contribution(received: Received) -> Contribution:
    """The message of a blob, if it is a contribution. Raises RemoteWireError."""
    if not isinstance(received.message, Contribution):
        raise RemoteWireError(
            f"a {type(received.message).__name__.lower()} message stands where a contribution belongs"
        )
    return received.message
