"""A fleet without processes: the real machines on a fake wire and a fake clock, exact local solves on quadratics.

    F_i(theta) = 1/2 (theta - c_i)^T A_i (theta - c_i),  A_i diagonal,  weights n_i

The optimum of sum n_i F_i is known in closed form. `Fleet` carries actions out as the shells do, so a machine can be
killed between any two of them and comes back from what it had stored. `Fleet.oracle` computes the consensus again, by
the algebra alone, from the contributions that were stored.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge import structs
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import DualStore, MemoryDuals
from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.consensus.masked import Masking
from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.protocol.actions import (
    AggregatorAction,
    ClientAction,
    Configure,
    Keep,
    KeepGraph,
    Note,
    Personalise,
    Publish,
    Record,
    Save,
    Settle,
    Snapshot,
    Store,
    Train,
)
from fedeq_edge.protocol.actions import Finished as FederationOver
from fedeq_edge.protocol.aggregator import Aggregator, new_state
from fedeq_edge.protocol.client import Client, Identity, Usage
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.masked import FEATURE
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.protocol.state import AggregatorState, ClientState, Pending, settled
from fedeq_edge.storage import AggregatorFolder, ClientFolder
from fedeq_edge.training.step import Budget, LocalResult, LocalTask, Personal
from fedeq_edge.transport.base import Arrived, Connected, Event, Will
from fedeq_edge.transport.memory import MemoryBroker, MemoryTransport
from fedeq_edge.wire import chunks, coding, messages
from fedeq_edge.wire.topics import Topics

TOPICS = Topics("t")
ADMM = msgspec.structs.replace(METHODS["admm"], rho=1.0, quality="uniform")
SIZE = 12
KEY = bytes(range(32))
PATIENCE_S = 20_000.0  # of the fake clock


@dataclass(frozen=True, slots=True)
class Quadratics:
    """One strongly convex quadratic a device. curvature, centre: (devices, size); samples: (devices,)."""

    curvature: NDArray[np.float64]
    centre: NDArray[np.float64]
    samples: tuple[int, ...]

    @classmethod
    def drawn(cls, devices: int, size: int = SIZE, seed: int = 0) -> "Quadratics":
        rng = np.random.default_rng(seed)
        samples = tuple(10 * (i + 1) for i in range(devices))
        return cls(rng.uniform(0.5, 3.0, (devices, size)), rng.normal(size=(devices, size)), samples)

    def optimum(self) -> NDArray[np.float64]:
        weighted = np.array(self.samples)[:, None] * self.curvature
        best: NDArray[np.float64] = (weighted * self.centre).sum(axis=0) / weighted.sum(axis=0)
        return best

    def difference(self, device: int, task: LocalTask) -> NDArray[np.float32]:
        """argmin F_i + <nu, theta - z> + kappa/2 |theta - z|^2, less z."""
        A, c, z = self.curvature[device], self.centre[device], task.z.astype(np.float64)
        theta = (A * c - task.nu + task.kappa * z) / (A + task.kappa)
        difference: NDArray[np.float32] = (theta - z).astype(np.float32)
        return difference


def result_of(task: LocalTask, difference: NDArray[np.float32]) -> LocalResult:
    """What a trainer would say of a solve that went well."""
    return LocalResult(
        difference=difference,
        head=task.head,
        loss=0.5,
        residual=1e-3,
        backward_residual=1e-3,
        budget=Budget(forward=4, adjoint=2),
        steps=1,
        seconds=0.1,
        reduced=False,
        accuracy_consensus=0.5,
    )


METRICS = messages.Metrics(
    loss=0.5,
    residual=1e-3,
    backward_residual=1e-3,
    forward=4,
    adjoint=2,
    seconds=0.1,
    accuracy=0.5,
    reduced=False,
    wire_up=0,
    wire_down=0,
)


class Device:
    """One device: a client, its disk, and a trainer that works when `Fleet.step` lets it."""

    def __init__(self, fleet: "Fleet", index: int, folder: Path | None) -> None:
        self.name, self._fleet, self._index = f"d{index}", fleet, index
        self._folder = folder
        self._kept = ClientState()
        self._boots = count()
        self.samples = fleet.problem.samples[index]
        self.notes: list[Note] = []
        self.said: list[Publish] = []
        self.trained: list[int] = []  # rounds, in the order of training
        self.configured: list[messages.Manifest] = []
        self.kept: dict[
            int, Pending
        ] = {}  # its own contributions by round, as nobody else may see them in masked rounds
        self.codecs: tuple[str, ...] = (*coding.CODECS, *((FEATURE,) if fleet.masking else ()))
        self.graphs: set[bytes] | None = set() if fleet.graph else None  # sha256 of those on its disk
        self.holds_back = False  # a straggler: its trainer does not come to an end
        self.start()

    def start(self) -> None:
        """Start with what is on the disk."""
        folder = self._folder
        self._disk = ClientFolder(folder) if folder else None
        state = self._disk.load() if self._disk else structs.unpack(structs.pack(self._kept), ClientState)
        identity = Identity(device=self.name, boot=f"boot{next(self._boots)}", samples=self.samples)
        self.work: Train | Personalise | None = None
        holds_graph = None if self.graphs is None else self.graphs.__contains__
        self.client = Client(identity, TOPICS, state, codecs=self.codecs, holds_graph=holds_graph)
        will = Will(topic=TOPICS.state(self.name), payload=self.client.offline())
        subscriptions = (TOPICS.manifest, TOPICS.model, TOPICS.aggregator, TOPICS.down(self.name))
        self.transport = self._fleet.broker.transport(subscriptions, will)
        self.transport.start(self._on_event)

    def crash(self) -> None:
        """Vanish without a word: what was not saved is gone."""
        self.transport.cut()

    def restart(self) -> None:
        self.crash()
        self.start()

    def lose_state(self) -> None:
        """Crash, and come back with an empty disk."""
        self.crash()
        self.save(ClientState())
        self.start()

    def save(self, state: ClientState) -> None:
        if self._disk:
            self._disk.save(state)
        self._kept = state

    def _write(self, action: Save | Keep | Settle) -> None:
        if isinstance(action, Keep):
            self.kept[action.pending.round] = action.pending
        if self._disk:
            self._disk.write(action)
        elif isinstance(action, Save):
            self._kept = action.state
        elif isinstance(action, Keep):
            self._kept = msgspec.structs.replace(self._kept, pending=action.pending, head=action.head)
        else:
            self._kept = settled(self._kept, accepted=action.accepted, factor=action.factor)

    def tick(self) -> None:
        self.carry_out(self.client.tick(self._fleet.now))

    def do_work(self) -> bool:
        """Finish what the trainer has in hand, if anything."""
        if self.work is None or self.holds_back:
            return False
        work, self.work = self.work, None
        now = self._fleet.now
        if isinstance(work, Train):
            self.trained.append(work.task.round + 1)  # a trainer counts the rounds that are done
            difference = self._fleet.problem.difference(self._index, work.task)
            self.carry_out(self.client.trained(result_of(work.task, difference), Usage(), now))
        else:
            self.carry_out(self.client.personalised(_personal(work), Usage(), now))
        return True

    def carry_out(self, actions: list[ClientAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self.said.append(action)
                self.transport.publish(action.topic, action.payload, retain=action.retain)
            elif isinstance(action, Save | Keep | Settle):
                self._write(action)
            elif isinstance(action, KeepGraph):
                assert self.graphs is not None
                self.graphs.add(chunks.digest(action.graph))
            elif isinstance(action, Train | Personalise):
                assert self.work is None, "one thing at a time"
                assert self.graphs is None or self._announced in self.graphs, "trains by no graph"
                self.work = action
            elif isinstance(action, Note):
                self.notes.append(action)
            elif isinstance(action, Configure):
                self.configured.append(action.manifest)

    @property
    def _announced(self) -> bytes:
        """sha256 of the graph to train by."""
        graph = self.configured[-1].graph
        return graph.sha256 if graph else b""

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Connected):
            self.carry_out(self.client.connected(self._fleet.now, event.packet_limit))
        elif isinstance(event, Arrived):
            self.carry_out(self.client.arrived(event.topic, event.payload, self._fleet.now))


def _personal(work: Personalise) -> Personal:
    return Personal(
        theta=work.z,
        head=work.head,
        budget=Budget(forward=4, adjoint=2),
        residual=1e-4,
        certificate=None,
        accuracy_personal=1.0,
        accuracy_consensus=0.9,
        local_only=None,
    )


@dataclass(slots=True)
class Fleet:
    """An aggregator and its devices. folder: where they keep their state; without one the aggregator cannot crash.

    kill_after: so many more actions of the aggregator are carried out, then it is killed and comes back.
    """

    problem: Quadratics
    rounds: int = 40
    codec: coding.Codec = "f32"
    up: tuple[coding.Codec, ...] = ()  # as codec
    method: Method = ADMM
    privacy: Privacy | None = None
    masking: Masking | None = None
    graph: bytes = b""  # by which all devices train, where there is one
    schedule: Schedule | None = None
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    folder: Path | None = None
    device_folders: Path | None = None
    joining: int | None = None  # how many devices are there from the start (all)
    run_name: str = "t-1"
    kill_after: int | None = None
    now: float = 0.0
    finished: bool = False
    kills: int = 0
    carried: int = 0  # actions of the aggregator
    stored: list[Store] = field(default_factory=list)
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    sent: list[Publish] = field(default_factory=list)
    devices: dict[str, Device] = field(default_factory=dict)
    aggregator: Aggregator = field(init=False)
    duals: DualStore = field(init=False)
    _dead: bool = False
    _history: list[tuple[str, Any]] = field(default_factory=list)  # joins, stores and closes, in order
    _disk: AggregatorFolder | None = None
    _transport: MemoryTransport = field(init=False)

    def __post_init__(self) -> None:
        self._start_aggregator()
        for index in range(len(self.problem.samples) if self.joining is None else self.joining):
            self.add(index)

    # People

    def add(self, index: int) -> Device:
        """A device comes to the fleet for the first time."""
        folder = self.device_folders / f"d{index}" if self.device_folders else None
        if folder:
            folder.mkdir(parents=True)
        self.devices[f"d{index}"] = device = Device(self, index, folder)
        return device

    def federation(self) -> Federation:
        return Federation(
            topics=TOPICS,
            model={"name": "quadratic"},
            plan={"rounds": self.rounds},
            seed=0,
            rounds=self.rounds,
            method=self.method,
            schedule=self.schedule or Schedule(min_devices=len(self.problem.samples), deadline_s=40.0, final_s=60.0),
            up=self.up or (self.codec,),
            down=self.codec,
            privacy=self.privacy,
            masking=self.masking,
        )

    # Time

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Go on until the federation has finished, or `until` holds. Fails where that does not happen."""
        while not (until() if until else self.finished):
            assert self.now < PATIENCE_S, f"stuck: {self.aggregator.status()}"
            self.step()

    def run_to_round(self, number: int) -> None:
        self.run(lambda: self.aggregator.state.round >= number)

    def step(self) -> None:
        """What is on the wire arrives and trainers end; where nothing happens a second passes."""
        if self._dead:
            self._come_back()
        delivered = self.broker.deliver()
        worked = [device.do_work() for device in list(self.devices.values())]
        if not (delivered or any(worked)):
            self.now += 1.0
            self._carry_out(self.aggregator.tick(self.now))
            for device in self.devices.values():
                device.tick()

    def settle(self) -> None:
        """Everything that can happen without time passing has happened."""
        while self.broker.deliver() or any(device.do_work() for device in list(self.devices.values())):
            pass

    # The aggregator

    def kill_aggregator(self) -> None:
        self._dead = True
        self._come_back()

    def retire(self, device: str) -> None:
        self._carry_out(self.aggregator.retire(device, self.now))

    def feed(self, device: str, payload: bytes) -> None:
        """A payload of this device arrives, whoever made it."""
        self._carry_out(self.aggregator.arrived(TOPICS.up(device), payload, self.now))

    def send(self, device: str, message: messages.Message) -> None:
        self.feed(device, messages.encode(message))

    def _start_aggregator(self) -> None:
        federation = self.federation()
        self._disk = AggregatorFolder(self.folder) if self.folder else None
        self.duals = self._disk.duals if self._disk else MemoryDuals()
        saved = self._disk.snapshot() if self._disk else None
        consensus, state = self._restored(saved)
        self.aggregator = Aggregator(
            federation=federation,
            consensus=consensus,
            duals=self.duals,
            boot=f"a{self.kills}",
            state=state,
            find_blob=self._disk.find if self._disk else self._find,
            key=self._disk.privacy_key() if self._disk else KEY,
            graph=self.graph,
        )
        self.finished = state.status == "finished"
        if self._disk:
            self.aggregator.resume(self.now)
            for device, blob in self._disk.journal():
                self.aggregator.replay(device, blob)
        will = Will(topic=TOPICS.aggregator, payload=self.aggregator.offline())
        self._transport = self.broker.transport((TOPICS.state("+"), TOPICS.up("+")), will)
        self._transport.start(self._on_event)

    def _find(self, device: str, number: int) -> bytes | None:
        return next((store.blob for store in self.stored if (store.device, store.round) == (device, number)), None)

    def _restored(self, saved: tuple[AggregatorState, dict[str, Any]] | None) -> tuple[Consensus, AggregatorState]:
        if saved is None:
            start = np.zeros(self.problem.centre.shape[1], np.float32)
            consensus = Consensus(start, method=self.method, duals=self.duals, privacy=self.privacy)
            return consensus, new_state(self.run_name)
        restored = Consensus.restore(saved[1], method=self.method, duals=self.duals, privacy=self.privacy)
        return restored, saved[0]

    def _come_back(self) -> None:
        self._dead, self.kill_after = False, None
        self.kills += 1
        self._transport.cut()
        self._start_aggregator()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._carry_out(self.aggregator.connected(self.now))
        elif isinstance(event, Arrived) and not self._dead:
            self._carry_out(self.aggregator.arrived(event.topic, event.payload, self.now))

    def _carry_out(self, actions: list[AggregatorAction]) -> None:
        for action in actions:
            if self.kill_after == 0:
                self._dead = True
            if self._dead:
                return
            if self.kill_after is not None:
                self.kill_after -= 1
            self.carried += 1
            self._do(action)

    def _do(self, action: AggregatorAction) -> None:
        if isinstance(action, Publish):
            self.sent.append(action)
            self._transport.publish(action.topic, action.payload, retain=action.retain)
        elif isinstance(action, Store):
            self.stored.append(action)
            self._history.append(("store", action))
            if self._disk:
                self._disk.store(action.device, action.round, action.kappa, action.blob, factor=action.factor)
        elif isinstance(action, Snapshot):
            self._history.append(("members", dict(action.consensus["scalars"]["members"])))
            if self._disk:
                self._disk.take_snapshot(action.state, action.consensus)
        elif isinstance(action, Record):
            self._record(action)
        elif isinstance(action, Note):
            self.notes.append(action)
        elif isinstance(action, FederationOver):
            self.finished = True

    def _record(self, action: Record) -> None:
        self.lines.append(action.line)
        if self._disk:
            self._disk.record(action.line)
        if action.line["kind"] == "round":
            if self.masking:
                self._store_summed(action.line)
            self._history.append(("close", action.line["round"]))

    def _store_summed(self, line: Mapping[str, Any]) -> None:
        """What the aggregator has counted without seeing it, as the devices have it."""
        number = line["round"]
        known = {(store.device, store.round) for store in self.stored}
        for name in [name for name in line["contributed"] if (name, number) not in known]:
            pending = self.devices[name].kept[number]
            store = Store(device=name, round=number, kappa=pending.kappa, factor=WHOLE, blob=pending.blob)
            self.stored.append(store)
            self._history.append(("store", store))

    # What must be true

    def messages_to(self, device: str, kind: type[messages.Message]) -> list[Any]:
        """What the aggregator has sent to this device."""
        topic = TOPICS.down(device)
        received = (messages.decode(sent.payload).message for sent in self.sent if sent.topic == topic)
        return [message for message in received if isinstance(message, kind)]

    def distance(self) -> float:
        return float(np.abs(self.aggregator.consensus.z_hat - self.problem.optimum()).max())

    def check_duals(self) -> None:
        """Each device holds the dual that the aggregator holds for it, bit for bit, and H is their sum."""
        for name, device in self.devices.items():
            if name in self.aggregator.consensus.members and device.client.state.pending is None:
                held = device.client.state.nu
                expected = self.duals.get(name)
                np.testing.assert_array_equal(held if held.size else np.zeros_like(expected), expected, err_msg=name)
        self.check_sums()

    def check_sums(self) -> None:
        consensus = self.aggregator.consensus
        np.testing.assert_array_equal(consensus.sums[0], consensus.recomputed()[0])
        assert consensus.sums[1] == consensus.recomputed()[1]

    def check_counted_once(self) -> None:
        """No contribution is counted twice, and the consensus is what those that were stored make."""
        counted = [(store.device, store.round) for store in self.stored]
        assert len(counted) == len(set(counted))
        np.testing.assert_array_equal(self.aggregator.consensus.z_hat, self.oracle())

    def oracle(self) -> NDArray[np.floating]:
        """z_hat from the stored contributions by the algebra alone (for fleets that nobody joins or leaves midway)."""
        start = np.zeros(self.problem.centre.shape[1], np.float32)
        consensus = Consensus(start, method=self.method)
        for kind, value in self._without_repeated_closes():
            if kind == "members":
                for device in [name for name in value if name not in consensus.members]:
                    consensus.join(device, value[device]["samples"])
            elif kind == "store":
                self._fold_in(consensus, value)
            else:
                relaxed = self.schedule is not None and self.schedule.mode == "async"
                consensus.close_round(self._transmit, relaxed=relaxed)
        return consensus.z_hat

    def _without_repeated_closes(self) -> Iterator[tuple[str, Any]]:
        """A round that is closed again after a crash counts by its last close."""
        last = {value: position for position, (kind, value) in enumerate(self._history) if kind == "close"}
        for position, (kind, value) in enumerate(self._history):
            if kind != "close" or last[value] == position:
                yield kind, value

    def _fold_in(self, consensus: Consensus, store: Store) -> None:
        received = messages.decode(store.blob)
        message = received.message
        assert isinstance(message, messages.Contribution)
        difference = coding.decode(message.codec, received.body, message.length)
        consensus.accept(store.device, difference, store.kappa)

    def _transmit(self, difference: NDArray[Any]) -> NDArray[Any]:
        return coding.decode(self.codec, coding.encode(self.codec, difference), difference.size)


def contribution(
    fleet: Fleet, device: str, difference: NDArray[np.float32] | None = None, **changes: Any
) -> tuple[messages.Contribution, bytes]:
    """(message, body) of a contribution to the open round that would be accepted, but for the changes."""
    size = fleet.aggregator.consensus.z_hat.size
    values = np.ones(size, np.float32) if difference is None else difference
    codec = changes.get("codec", fleet.codec)
    base = fleet.aggregator.state.bases[fleet.aggregator.state.round]
    message = messages.Contribution(
        run=fleet.aggregator.state.run,
        round=fleet.aggregator.state.round,
        boot="b",
        base=base,
        samples=fleet.devices[device].samples if device in fleet.devices else 1,
        codec=codec,
        length=values.size,
        metrics=METRICS,
    )
    return msgspec.structs.replace(message, **changes), coding.encode(codec, values)


def upload(fleet: Fleet, device: str, blob: bytes) -> None:
    """The aggregator receives this blob, whole, as an upload of the device."""
    name = chunks.digest(blob)
    fleet.send(device, messages.Offer(transfer=name, size=len(blob)))
    for index in range(chunks.block_count(len(blob))):
        piece = blob[index * chunks.BLOCK_BYTES : (index + 1) * chunks.BLOCK_BYTES]
        fleet.feed(device, messages.encode(messages.Chunk(transfer=name, index=index, size=len(blob)), piece))
