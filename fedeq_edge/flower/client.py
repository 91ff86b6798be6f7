"""A client of ours as Flower runs it: one message, one answer, and nothing kept but what memory.py keeps.

The other side and the order of the messages: server.py. Where this side cannot do what it is asked, it says so in one
line (`Decline`) and stays in the fleet; an exception that is not ours stays one, and Flower reports it.
"""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedeq_edge import modelfile
from fedeq_edge.backends import open_backend
from fedeq_edge.consensus.fixed import WHOLE, dual_value
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import head_layout, size, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import FedEqError, RemoteWireError
from fedeq_edge.flower import content
from fedeq_edge.flower.memory import Keeper, Memory
from fedeq_edge.flower.server import check, run_name
from fedeq_edge.hardware.clock import Clock
from fedeq_edge.protocol import statements
from fedeq_edge.protocol.state import ClientState, settled, vector_digest
from fedeq_edge.protocol.statements import Identity, Usage
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import BackendName, Calibration, LocalTask, Personal, Plan, Vector
from fedeq_edge.wire import coding, messages
from fedeq_edge.wire.topics import check_identifier

NodeConfig = Mapping[str, Any]
"""What Flower knows of a node: in a simulation "partition-id" and "num-partitions", else what --node-config gave."""
LoadData = Callable[[NodeConfig], ClientData]
# A consensus whole, or steps that are no longer; with a verdict and a task before them.
_BESIDE_BYTES = 3 * 8192


def client_app(
    chosen: AggregatorSettings,
    data: LoadData,
    *,
    backend: BackendName = "torch",
    folder: Path | None = None,
    clock: Clock | None = None,
    calibration: Calibration | None = None,
) -> ClientApp:
    """A Flower ClientApp whose nodes are devices of this federation; `ConsensusStrategy` is its other side.

    chosen: as the strategy has them. data: of one node, asked at every message, so let it keep what is dear to load.
    A node is called by its "device" in the node's config, or client-N after its "partition-id".
    backend: what trains. folder: where memory and personal models lie, by run and device; without one Flower keeps
    the memory and the models are numbers in a report only. clock, calibration: of `Learner`; None measures the cost of
    a step once and keeps it.
    Raises ConfigError where Flower cannot run these settings.
    """
    check(chosen)
    client = _Client(chosen=chosen, data=data, backend=backend, folder=folder, clock=clock, calibration=calibration)
    app = ClientApp()
    app.query()(client.announce)
    app.train()(client.train)
    app.evaluate()(client.personalise)
    return app


def device_name(context: Context) -> str:
    """What this node is called in the federation. Raises ConfigError where that cannot be a device's id."""
    config = context.node_config
    name = config.get("device", f"client-{config.get('partition-id', context.node_id)}")
    return check_identifier(str(name), "device")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Client:
    """What all nodes of an app have in common; sent to the simulation's processes, so it holds no model."""

    chosen: AggregatorSettings
    data: LoadData
    backend: BackendName
    folder: Path | None
    clock: Clock | None
    calibration: Calibration | None

    def announce(self, message: Message, context: Context) -> Message:
        """Who this node is, and with how many samples."""
        reply = _answer(message, lambda: [_birth(self._identity(context))])
        content.named(reply.content, device_name(context))
        return reply

    def train(self, message: Message, context: Context) -> Message:
        """One round."""
        return _answer(message, lambda: self._round(*self._begin(message, context), context))

    def personalise(self, message: Message, context: Context) -> Message:
        """The personal model of this node, as a file where there is a folder, and its numbers."""
        return _answer(message, lambda: self._final(*self._begin(message, context), context))

    # ---- work ----------------------------------------------------------------------------------------------

    def _begin(self, message: Message, context: Context) -> tuple["_Order", Memory]:
        """What is asked, and the memory in which the last contribution is settled and the newest consensus stands."""
        spec = self.chosen.model
        values = size(theta_layout(spec)) + size(head_layout(spec))
        limit = coding.largest_bytes("f32", values) + _BESIDE_BYTES
        order = _Order.read(content.unpack(message.content, limit))
        keeper = self._keeper(context)
        memory = keeper.load()
        memory = msgspec.structs.replace(memory, state=order.applied(memory.state))
        keeper.save(memory)
        return order, memory

    def _round(self, order: "_Order", memory: Memory, context: Context) -> list[bytes]:
        keeper, identity, task = self._keeper(context), self._identity(context), order.task
        differs, state = _agreed(task, memory.state)
        learner, calibration = self._learner(context, memory)
        local = LocalTask(
            round=task.round - 1,
            z=state.z,
            nu=dual_value(state.nu, np.float32),
            kappa=task.kappa,
            head=state.head if state.head.size else learner.initial_head(),
            seed=statements.seed(task, identity.device),
        )
        result = learner.train(local)
        pending = statements.contribution(identity, task, result, Usage(), 0)
        state = msgspec.structs.replace(state, pending=pending, head=result.head)
        keeper.save(Memory(state=state, calibration=calibration))
        return [*differs, pending.blob]

    def _final(self, order: "_Order", memory: Memory, context: Context) -> list[bytes]:
        keeper, state = self._keeper(context), memory.state
        learner, calibration = self._learner(context, memory)
        personal = learner.personalise(state.z, state.head if state.head.size else learner.initial_head())
        keeper.keep_model(self._model(personal, order.task, context))
        keeper.save(Memory(state=msgspec.structs.replace(state, head=personal.head), calibration=calibration))
        return [messages.encode(statements.report(order.task, personal, Usage()))]

    # ---- parts ---------------------------------------------------------------------------------------------

    def _keeper(self, context: Context) -> Keeper:
        return Keeper(context=context, device=device_name(context), folder=self.folder)

    def _identity(self, context: Context) -> Identity:
        samples = len(self.data(context.node_config).y_train)
        return Identity(device=device_name(context), boot=f"{context.run_id:x}", samples=samples)

    def _learner(self, context: Context, memory: Memory) -> tuple[Learner, Calibration]:
        """This node's learner, and what a step costs here: given, remembered, or measured once in this process."""
        chosen = self.chosen
        host = _opened(self.backend, chosen.model, chosen.plan)
        known = self.calibration or memory.calibration or host.calibration
        learner = Learner(
            host.backend,
            self.data(context.node_config),
            chosen.plan,
            chosen.resolved_method(),
            start=initial(chosen.model, chosen.seed),
            clock=self.clock,
            calibration=known,
        )
        host.calibration = known or learner.calibrate()
        return learner, host.calibration

    def _model(self, personal: Personal, task: messages.Task, context: Context) -> modelfile.ModelFile:
        return modelfile.ModelFile(
            model=msgspec.to_builtins(self.chosen.model),
            theta=personal.theta,
            head=personal.head,
            budget=personal.budget,
            run=run_name(self.chosen),
            round=task.round - 1,
            device=device_name(context),
            solver=_opened(self.backend, self.chosen.model, self.chosen.plan).backend.solver,
        )


@dataclass(slots=True)
class _Host:
    """What the nodes of one process share: Flower gives it one message at a time, of many nodes in a simulation."""

    backend: Backend
    calibration: Calibration | None = None


@lru_cache(maxsize=1)
def _opened(name: BackendName, spec: ModelSpec, plan: Plan) -> _Host:
    return _Host(open_backend(name, spec, plan))


def _birth(identity: Identity) -> bytes:
    return messages.encode(statements.birth(identity, coding.CODECS, None))


def _answer(message: Message, work: Callable[[], Sequence[bytes]]) -> Message:
    try:
        frames = work()
    except FedEqError as error:
        frames = [messages.encode(messages.Decline(run="", round=0, reason=str(error)[:512]))]
    return Message(content.pack(frames), reply_to=message)


@dataclass(frozen=True, slots=True)
class _Order:
    """What the server sent: a task, steps to its consensus, and the verdict on the last contribution, if any."""

    verdict: messages.Verdict | None
    task: messages.Task
    steps: Sequence[messages.Received]

    @classmethod
    def read(cls, frames: Sequence[bytes]) -> "_Order":
        """Raises RemoteWireError where the frames are not these, in this order."""
        received = [messages.decode(frame) for frame in frames]
        first = received[0].message if received else None
        verdict = first if isinstance(first, messages.Verdict) else None
        rest = received[verdict is not None :]
        task = rest[0].message if rest else None
        if not isinstance(task, messages.Task):
            raise RemoteWireError("the server sent no task; do both apps run the same version of fedeq-edge?")
        return cls(verdict, task, rest[1:])

    def applied(self, state: ClientState) -> ClientState:
        """The dual has moved by what counted, and z is the consensus of the task. Raises RemoteWireError."""
        state = state if state.run == self.task.run else ClientState(run=self.task.run)
        counts = state.pending is not None and self.verdict is not None and self.verdict.round == state.pending.round
        factor = self.verdict.factor if self.verdict is not None else WHOLE
        return self._standing(settled(state, accepted=counts, factor=factor))

    def _standing(self, state: ClientState) -> ClientState:
        z, base = state.z, state.base
        for step in self.steps:
            z, base = _stepped(z, base, step)
        if base != self.task.model:
            raise RemoteWireError("the steps do not lead from the consensus held here to that of the task")
        nu = state.nu if state.nu.size == z.size else np.zeros(z.size, np.int64)
        return msgspec.structs.replace(state, z=z, base=base, nu=nu)


def _stepped(z: Vector, base: bytes, step: messages.Received) -> tuple[Vector, bytes]:
    model = step.message
    if not isinstance(model, messages.Model) or (model.base and (model.base != base or model.length != z.size)):
        raise RemoteWireError("a step does not start from the consensus held here")
    decoded = coding.decode(model.codec, step.body, model.length)
    moved = z + decoded if model.base else decoded
    if vector_digest(moved) != model.model:
        raise RemoteWireError(f"the consensus of round {model.round} has another digest than its name")
    return moved, model.model


def _agreed(task: messages.Task, state: ClientState) -> tuple[list[bytes], ClientState]:
    """What to say of our dual, and the state with the one to train with: that of the task, or 0 where it is lost."""
    if task.duals is None or task.duals == state.dual:
        return [], state
    differs = messages.Differs(run=task.run, round=task.round, expected=task.duals, after=state.accepted_round)
    fresh = msgspec.structs.replace(state, nu=np.zeros_like(state.nu), dual=b"")
    return [messages.encode(differs)] if task.duals else [], fresh
