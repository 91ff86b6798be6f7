"""The same federation on our own wire: the real machines in one process, training by real learners, no time passing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedeq_edge.backends import open_backend
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import MemoryDuals
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints
from fedeq_edge.flower.server import run_name
from fedeq_edge.gateway import federation_of, start_of
from fedeq_edge.hardware.clock import Clock
from fedeq_edge.protocol.actions import (
    AggregatorAction,
    ClientAction,
    Finished,
    Personalise,
    Publish,
    Record,
    Store,
    Train,
)
from fedeq_edge.protocol.aggregator import Aggregator, new_state
from fedeq_edge.protocol.client import Client, Identity, Usage
from fedeq_edge.protocol.state import ClientState
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import BackendName, Calibration, LocalTask, Vector
from fedeq_edge.transport.base import Arrived, Connected, Event, Will
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import messages
from fedeq_edge.wire.topics import Topics


@dataclass
class Machines:
    """An aggregator and a client for each data set. backend: one for all, as they take turns."""

    chosen: AggregatorSettings
    data: Mapping[str, ClientData]
    calibration: Calibration
    backend: BackendName = "torch"
    clock: Clock | None = None
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    clients: dict[str, Client] = field(default_factory=dict)
    finished: bool = False
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    _work: list[Callable[[], None]] = field(default_factory=list)
    _stored: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen, topics = self.chosen, Topics(self.chosen.federation)
        self._model = open_backend(self.backend, chosen.model, chosen.train)
        self.duals = MemoryDuals()
        method, sets = chosen.resolved_method(), constraints(chosen.model)
        self.aggregator = Aggregator(
            federation=federation_of(chosen),
            consensus=Consensus(start_of(chosen), method=method, constraints=sets, duals=self.duals),
            duals=self.duals,
            boot="boot",
            state=new_state(run_name(chosen)),
            find_blob=lambda device, number: self._stored.get((device, number)),
        )
        will = Will(topic=topics.aggregator, payload=self.aggregator.offline())
        self._gateway = self.broker.transport((topics.state("+"), topics.up("+")), will)
        self._gateway.start(self._to_aggregator)
        for device in self.data:
            self._add(device, topics)

    def run(self) -> None:
        """Until every device has reported."""
        while not self.finished:
            moved = self.broker.deliver()
            work, self._work = self._work, []
            for done in work:
                done()
            assert moved or work, f"stuck: {self.aggregator.status()}"

    @property
    def z(self) -> Vector:
        """The consensus that everybody holds."""
        return self.aggregator.consensus.z_hat.astype(np.float32)

    @property
    def reports(self) -> Mapping[str, messages.Report]:
        return self.aggregator.reports

    def _add(self, device: str, topics: Topics) -> None:
        identity = Identity(device=device, boot="boot", samples=len(self.data[device].y_train))
        self.clients[device] = client = Client(identity, topics, ClientState())
        subscriptions = (topics.manifest, topics.model, topics.aggregator, topics.down(device))
        transport = self.broker.transport(subscriptions, Will(topic=topics.state(device), payload=client.offline()))
        learner = Learner(
            self._model,
            self.data[device],
            self.chosen.train,
            self.chosen.resolved_method(),
            start=initial(self.chosen.model, self.chosen.seed),
            clock=self.clock,
            calibration=self.calibration,
        )

        def carry_out(actions: list[ClientAction]) -> None:
            for action in actions:
                if isinstance(action, Publish):
                    transport.publish(action.topic, action.payload, retain=action.retain)
                elif isinstance(action, Train | Personalise):
                    self._work.append(lambda action=action: carry_out(_done(client, learner, action)))  # type: ignore[misc]

        def on_event(event: Event) -> None:
            if isinstance(event, Connected):
                carry_out(client.connected(0.0, event.packet_limit))
            elif isinstance(event, Arrived):
                carry_out(client.arrived(event.topic, event.payload, 0.0))

        transport.start(on_event)

    def _to_aggregator(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._carry_out(self.aggregator.connected(0.0))
        elif isinstance(event, Arrived):
            self._carry_out(self.aggregator.arrived(event.topic, event.payload, 0.0))

    def _carry_out(self, actions: list[AggregatorAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self._gateway.publish(action.topic, action.payload, retain=action.retain)
            elif isinstance(action, Store):
                self._stored[action.device, action.round] = action.blob
            elif isinstance(action, Record):
                self.lines.append(action.line)
            elif isinstance(action, Finished):
                self.finished = True


def _done(client: Client, learner: Learner, action: Train | Personalise) -> list[ClientAction]:
    if isinstance(action, Personalise):
        return client.personalised(learner.personalise(action.z, _head(learner, action.head)), Usage(), 0.0)
    return client.trained(learner.train(_with_head(learner, action.task)), Usage(), 0.0)


def _with_head(learner: Learner, task: LocalTask) -> LocalTask:
    return LocalTask(
        round=task.round, z=task.z, nu=task.nu, kappa=task.kappa, head=_head(learner, task.head), seed=task.seed
    )


def _head(learner: Learner, head: Vector) -> Vector:
    return head if head.size else learner.initial_head()
