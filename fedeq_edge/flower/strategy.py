"""Our aggregator as a Flower Strategy."""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedeq_edge.errors import ConfigError, ContributionError, FedEqError
from fedeq_edge.flower import content
from fedeq_edge.flower.server import Frames, Server, check
from fedeq_edge.gateway import start_of
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import messages

log = logging.getLogger(__name__)

_WAIT_S: Final = 1.0  # between looks at who is here, as Flower's own strategies
# Flower's own default: a round lasts until everybody has answered, or so long.
_TIMEOUT_S: Final = 3600.0
_Z: Final = "z"


class ConsensusStrategy(Strategy):  # type: ignore[misc, unused-ignore]  # Flower is an extra; without it this is Any
    """Weighted consensus ADMM, or any other method of ours, driven by Flower's rounds.

    chosen: as `client_app` has them. announce_s: how long nodes that are new may take to say who they are.
    history: a line per round, as in rounds.jsonl of our aggregator. reports: what the devices said of their personal
    models after the last round, by name. Raises ConfigError where Flower cannot run these settings.
    """

    def __init__(self, chosen: AggregatorSettings, *, announce_s: float = 60.0) -> None:
        check(chosen)
        self.history: list[Mapping[str, Any]] = []
        self.reports: dict[str, messages.Report] = {}
        self._chosen = chosen
        self._announce_s = announce_s
        self._last = chosen.train.rounds
        self._server: Server | None = None
        self._names: dict[int, str] = {}
        self._refused: dict[int, str] = {}  # nodes that cannot take part, and why

    @property
    def server(self) -> Server:
        """The federation behind it, from the first round on."""
        assert self._server is not None, "no round has been configured"
        return self._server

    def initial_arrays(self) -> ArrayRecord:
        """The consensus before the first round, by the seed of the settings."""
        return _record(start_of(self._chosen))

    # ---- as Flower calls it --------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = _TIMEOUT_S,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As `Strategy.start`; without them arrays and number of rounds are those of the settings.

        initial_arrays: one array "z", as `Result.arrays` holds the consensus. The configs are not used.
        """
        self._last = self._chosen.train.rounds if num_rounds is None else num_rounds
        arrays = self.initial_arrays() if initial_arrays is None else initial_arrays
        return super().start(grid, arrays, self._last, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002  # names and order of the arguments are Flower's, here and below
        grid: Grid,
    ) -> Iterable[Message]:
        """Tasks for a cohort of those who are here; waits until they are enough."""
        if self._server is None:
            self._server = Server(self._chosen, _vector(arrays, start_of(self._chosen).size))
        self._refused.clear()  # whoever could not take part so far is asked once more in every round
        self._look_around(grid)
        while not self.server.may_open(time.monotonic()):
            self._check_hope()
            time.sleep(_WAIT_S)
            self._look_around(grid)
        return self._messages(self.server.open(time.monotonic()), MessageType.TRAIN, server_round)

    def aggregate_train(
        self,
        server_round: int,  # noqa: ARG002
        replies: Iterable[Message],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The consensus after the round, as one array "z" (s,), and medians over the devices that counted."""
        for reply in replies:
            self._each(reply, self.server.take)
        line = self.server.close(time.monotonic())
        self.history.append(line)
        return _record(self.server.consensus.z_hat), _metrics(line)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,  # noqa: ARG002
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,
    ) -> Iterable[Message]:
        """After the last round every member that is here is asked to make its personal model."""
        if server_round < self._last:
            return []
        self._look_around(grid)
        return self._messages(self.server.final(), MessageType.EVALUATE, server_round)

    def aggregate_evaluate(
        self,
        server_round: int,  # noqa: ARG002
        replies: Iterable[Message],
    ) -> MetricRecord | None:
        """Mean accuracies over the devices that reported, None where nobody was asked."""
        for reply in replies:
            self._each(reply, self._keep_report)
        return _accuracies(self.reports.values()) if self.reports else None

    def summary(self) -> None:
        """One line on what is run."""
        federation = self._chosen.resolved_method()
        log.info("%s for %d rounds, differences as %s", federation.name, self._last, self._chosen.codec)

    # ---- private -------------------------------------------------------------------------------------------

    def _messages(self, frames: Mapping[str, Frames], kind: str, server_round: int) -> list[Message]:
        nodes = {name: node for node, name in self._names.items()}
        return [
            Message(
                content.pack(frames[device]), dst_node_id=nodes[device], message_type=kind, group_id=str(server_round)
            )
            for device in frames
        ]

    def _each(self, reply: Message, take: Callable[[str, Frames], object]) -> None:
        """One reply, whose trouble is told in one line and costs nobody else."""
        device = self._names.get(reply.metadata.src_node_id)
        if device is None:
            log.warning("node %d answers and was not asked", reply.metadata.src_node_id)
            return
        try:
            take(device, self._frames(reply))
        except FedEqError as error:
            self.server.drop(device, error)
            log.warning("refused: %s", _told(device, error))

    def _frames(self, reply: Message) -> Frames:
        """Of an answer. Raises ContributionError where Flower brings an error instead, RemoteWireError as `unpack`."""
        if reply.has_error():
            raise ContributionError("failed", f"it failed: {_last_line(reply.error.reason)}")
        return content.unpack(reply.content, self.server.limit_bytes)

    def _keep_report(self, device: str, frames: Frames) -> None:
        self.reports[device] = self.server.report(device, frames)

    # ---- who is here ---------------------------------------------------------------------------------------

    def _look_around(self, grid: Grid) -> None:
        """Nodes that are gone have left; those that are new have said who they are, or why they cannot take part."""
        here = set(grid.get_node_ids())
        for node in self._names.keys() - here:
            self.server.leave(self._names.pop(node))
        ask = [
            Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(here - self._names.keys() - self._refused.keys())
        ]
        for reply in grid.send_and_receive(ask, timeout=self._announce_s) if ask else ():
            self._welcome(reply)

    def _welcome(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        try:
            frames = self._frames(reply)
            device = content.name_in(reply.content)
            if device in self._names.values():
                raise ConfigError(f'another node is called {device}; give each its own "device" in --node-config')
            self.server.welcome(device, frames)
        except FedEqError as error:
            self._refused[node] = _told(f"node {node}", error)
            log.warning("refused: %s", self._refused[node])
        else:
            self._names[node] = device

    def _check_hope(self) -> None:
        """Where everybody who would be needed has refused, waiting only hides why. Raises ConfigError."""
        needed = self._chosen.schedule.min_devices
        if not self._names and len(self._refused) >= needed:
            last = list(self._refused.values())[-1]
            raise ConfigError(f"{len(self._refused)} nodes are here and none of them can take part; the last: {last}")


def _told(whom: str, error: FedEqError) -> str:
    text = str(error)
    return text if whom in text else f"{whom}: {text}"


def _last_line(reason: str | None) -> str:
    """Flower hands on whole tracebacks."""
    lines = (reason or "it gave no reason").strip().splitlines()
    return lines[-1][:300]


# ---- arrays and metrics ----------------------------------------------------------------------------------------


def _record(z: Vector) -> ArrayRecord:
    return ArrayRecord({_Z: Array(z)})


def _vector(arrays: ArrayRecord, size: int) -> Vector:
    """The consensus to start from. Raises ConfigError where it is of another model."""
    held = arrays.get(_Z)
    z: Vector | None = None if held is None else held.numpy()
    if z is None or z.shape != (size,) or z.dtype != np.float32 or not np.isfinite(z).all():
        raise ConfigError(
            f'initial_arrays: give one array "{_Z}" of {size} finite float32 values, as initial_arrays() makes it and '
            "Result.arrays holds it, or leave it out"
        )
    return z


def _metrics(line: Mapping[str, Any]) -> MetricRecord:
    """Medians, which a device that lies does not move far."""
    devices = line["devices"].values()
    medians = {name: _median([device[name] for device in devices]) for name in ("loss", "accuracy", "residual")}
    known = {"primal-residual": line["primal_residual"], "dual-residual": line["dual_residual"], **medians}
    finite = {name: float(value) for name, value in known.items() if math.isfinite(value)}
    return MetricRecord({"asked": int(line["cohort"]), "counted": len(devices), **finite})


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _accuracies(reports: Iterable[messages.Report]) -> MetricRecord:
    known = list(reports)
    shares = {
        "accuracy-personal": [report.accuracy_personal for report in known],
        "accuracy-consensus": [report.accuracy_consensus for report in known],
        "accuracy-alone": [report.local_only for report in known if report.local_only is not None],
    }
    told = {name: [share for share in values if 0.0 <= share <= 1.0] for name, values in shares.items()}
    return MetricRecord({"devices": len(known), **{name: statistics.fmean(of) for name, of in told.items() if of}})
