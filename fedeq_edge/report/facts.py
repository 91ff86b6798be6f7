"""What the report reads: summary.json and the round lines of rounds.jsonl. A number that nobody measured is None."""

import msgspec

from fedeq_edge.consensus.methods import Heads
from fedeq_edge.deq.certificate import Certificate


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet learned from. input_shape: of one sample."""

    name: str
    clients: int
    classes: int
    train_samples: int | None = None
    test_samples: int | None = None
    input_shape: tuple[int, ...] = ()


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What was trained."""

    cell: str
    channels: int
    theta_parameters: int
    head_parameters: int


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """What carried the messages."""

    kind: str
    version: str | None = None


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of right answers on the test parts, 0 to 1."""

    personal: float | None = None
    consensus: float | None = None
    local_only: float | None = None
    worst_five_personal: float | None = None


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per client and round."""

    up: float | None = None
    down: float | None = None


class RoundTraffic(Traffic, frozen=True, kw_only=True):
    """The same, beside the whole model as float32 each way."""

    float32_full_model: Traffic = Traffic()


class Aggregator(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway's program needed."""

    rss_peak_bytes: float | None = None
    cpu_s: float | None = None


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """K forward evaluations and k adjoint terms."""

    forward: int | None = None
    adjoint: int | None = None


class Onnx(msgspec.Struct, frozen=True, kw_only=True):
    """A personal model as a file, and what its check found."""

    path: str
    max_abs_diff: float | None = None
    iterations: float | None = None
    latency_ms: float | None = None
    accuracy: float | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device over the whole run. certificate: of its personal model at its K, None without a proof."""

    id: str
    profile: str
    emulated: bool
    samples: int | None = None
    budget: Budget = Budget()
    residual_mean: float | None = None
    certificate: Certificate | None = None
    seconds_per_round: float | None = None
    rss_idle_bytes: float | None = None
    rss_peak_bytes: float | None = None
    accuracy: Accuracy = Accuracy()
    onnx: Onnx | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """summary.json."""

    version: str
    command: str
    data: Data
    model: Model
    method: str
    codec: str
    heads: Heads
    rounds: int
    broker: Broker
    accuracy: Accuracy
    bytes_per_client_round: RoundTraffic
    devices: tuple[Device, ...]
    wall_s: float | None = None
    seconds: dict[str, float | None] = {}
    errors_saved: float | None = None
    aggregator: Aggregator = Aggregator()


class DeviceRound(msgspec.Struct, frozen=True, kw_only=True):
    """What one device measured in one round."""

    accuracy: float | None = None
    reduced: bool = False


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One closed round."""

    round: int
    cohort: int
    contributed: tuple[str, ...]
    late: tuple[str, ...] = ()
    declined: dict[str, str] = {}
    extensions: int = 0
    seconds: float | None = None
    primal_residual: float | None = None
    dual_residual: float | None = None
    devices: dict[str, DeviceRound] = {}

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of the consensus on the test part of each device that measured it."""
        return [device.accuracy for device in self.devices.values() if device.accuracy is not None]
