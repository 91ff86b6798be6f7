"""A device's side of the protocol.

Theory of operation
-------------------
Rule 1: one thing at a time. The machine is fetching a consensus, training, waiting for the verdict on a contribution,
or idle; the newest task waits until the present work is done, and an older one is forgotten.
Rule 2: the dual moves when the aggregator has accepted, never before (`_settle`). Until then the contribution lies in
the state on disk and is sent again after every reconnect; the aggregator knows a repeated one by (device, round).
Rule 3: nothing is remembered of a connection. After `connected` the machine says again who it is and what it owes.
Rule 4: what a code leaves out stays in the problem: the dual moves by the *decoded* difference, as on the server.
In a masked round nothing is sent that tells of it alone (masked_device.py), and the verdict comes with the whole sum;
where that is missed, the next task says what has counted.
Rule 5: no training with a dual that the aggregator does not hold: its task names the one that counts (`_agrees`).

The consensus on its way in: fetching.py; the training graph: graphs.py. The contribution on its way out:
sending.py. What is remembered, and what of it the disk is told: ledger.py. What is said of us and our work:
statements.py. This module takes events, and decides what is next (`_advance`).
"""

import math
from collections import Counter
from typing import Any, Final

import numpy as np

from fedeq_edge.consensus.fixed import dual_value
from fedeq_edge.errors import LocalWireError, RemoteWireError, WireError
from fedeq_edge.protocol import statements
from fedeq_edge.protocol.actions import ClientAction, Configure, Finished, Personalise, Publish, Train
from fedeq_edge.protocol.device_outlet import DeviceOutlet
from fedeq_edge.protocol.fetching import Fetching
from fedeq_edge.protocol.graphs import GraphFetching, HoldsGraph
from fedeq_edge.protocol.ledger import Ledger, Shared
from fedeq_edge.protocol.masked import FEATURE
from fedeq_edge.protocol.sending import Sending
from fedeq_edge.protocol.state import ClientState, Pending
from fedeq_edge.protocol.statements import Identity, Usage
from fedeq_edge.training.step import LocalResult, LocalTask, Personal
from fedeq_edge.wire import chunks, coding, messages
from fedeq_edge.wire.topics import Topics

__all__ = ["RETRY_S", "Client", "Identity", "Usage"]

RETRY_S: Final = 10.0  # an aggregator that answers at all does so within a second; slow links need a few per chunk


class Client:
    """The machine. Every event takes the time in seconds of a monotonic clock and returns actions in order.

    codecs: what this device speaks, and what else it can, as its birth says it. holds_graph: whether a training graph
    lies on its disk, None where its trainer needs none. shared: where many clients of one process keep their vectors.
    link: the way to the aggregator.
    refusals: verdicts against us by code, and messages that were "malformed", since the start.
    """

    def __init__(
        self,
        identity: Identity,
        topics: Topics,
        state: ClientState,
        codecs: tuple[str, ...] = coding.CODECS,
        holds_graph: HoldsGraph | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.identity = identity
        self.topics = topics
        self.codecs = codecs
        self.link = chunks.Link()
        self.refusals: Counter[str] = Counter()
        self.last_refusal = ""
        self._out = DeviceOutlet(topics.up(identity.device))
        self._ledger = Ledger(state, self._out, shared)
        self._fetching = Fetching(self._ledger, self._out)
        self._graphs = GraphFetching(holds_graph, self._out)
        self._sending = Sending(identity.device, FEATURE in codecs, self.link, self._ledger, self._out)
        self._manifest: messages.Manifest | None = None
        self._task: messages.Task | None = None
        self._working: messages.Task | None = None  # what the trainer has in hand; a newer task may be waiting
        self._report: messages.Report | None = None
        self._battery: float | None = None

    @property
    def state(self) -> ClientState:
        """What we remember of the federation, as it is now."""
        return self._ledger.state

    # Events

    def connected(
        self, now: float, packet_limit: int | None = None, battery: float | None = None
    ) -> list[ClientAction]:
        """Say who we are and go on with whatever was under way. packet_limit: of the broker, bytes, if it told one."""
        self.link.packet_limit = packet_limit
        self._battery = battery
        self._publish_birth()
        self._resend(now)
        return self._out.flush()

    def arrived(self, topic: str, payload: bytes, now: float) -> list[ClientAction]:
        """A payload came; one that does not follow the protocol is noted and dropped."""
        try:
            self._dispatch(topic, self._decoded(topic, payload), now)
        except WireError as error:
            self.refusals["malformed"] += 1
            self._out.note("refused a message", topic=topic, reason=str(error))
        return self._out.flush()

    def trained(self, result: LocalResult, usage: Usage, now: float) -> list[ClientAction]:
        """The trainer has done its round: keep the contribution and send it."""
        task, self._working = self._working, None
        if task is not None and task.run == self.state.run:
            try:
                pending = statements.contribution(self.identity, task, result, usage, self.link.repeated_bytes)
                self._ledger.hold(pending, result.head)
            except LocalWireError as error:
                self._decline(task, str(error))
        self._advance(now)
        return self._out.flush()

    def personalised(self, personal: Personal, usage: Usage, now: float) -> list[ClientAction]:
        """The trainer has fitted our own model: report its numbers."""
        task, self._working = self._working, None
        if task is not None and task.run == self.state.run:
            self._ledger.keep(head=personal.head)
            if self._manifest is not None and self._manifest.status != "finished":
                self._report = statements.report(task, personal, usage)
                self._send_report(now)
        self._advance(now)
        return self._out.flush()

    def failed(self, reason: str, now: float) -> list[ClientAction]:
        """The trainer could not do its work: tell the aggregator, stay in the fleet, go on with a newer task."""
        task, self._working = self._working, None
        if task is not None and task.run == self.state.run:
            self._decline(task, reason)
        self._advance(now)
        return self._out.flush()

    def tick(self, now: float) -> list[ClientAction]:
        """Say again what was not answered for `RETRY_S`."""
        waits = self._sending.under_way or self._waits_for_blob or self._report is not None
        if waits and now - self._out.moved_at >= RETRY_S:
            self._resend(now)
        return self._out.flush()

    def offline(self) -> bytes:
        """Payload of our farewell and last will."""
        return messages.encode(messages.Offline(boot=self.identity.boot))

    def status(self) -> dict[str, Any]:
        """How we stand with the aggregator, for status.json."""
        task = self._working or self._task
        return {
            "run": self.state.run,
            "federation": self._manifest.status if self._manifest else "unknown",
            "doing": self._doing(),
            "round": task.round if task else None,
            "accepted_round": self.state.accepted_round,
            "pending_bytes": len(self.state.pending.blob) if self.state.pending else 0,
            "refusals": dict(self.refusals),
            "last_refusal": self.last_refusal,
            "repeated_bytes": self.link.repeated_bytes,
        }

    def _doing(self) -> str:
        if self._working is not None:
            return "personalising" if self._working.final else "training"
        if self._sending.under_way:
            return "sending"
        return "fetching" if self._waits_for_blob else "waiting"

    @property
    def _waits_for_blob(self) -> bool:
        return bool(self._fetching.wanted or self._graphs.wanted)

    # Messages

    def _dispatch(self, topic: str, received: messages.Received, now: float) -> None:
        message = received.message
        if isinstance(message, messages.AggregatorState):
            self._publish_birth()  # a new aggregator, or a new broker, may not have the retained one
            self._resend(now)
        elif isinstance(message, messages.Manifest):
            self._on_manifest(message, now)
        elif isinstance(message, messages.Model) and topic == self.topics.model:
            if self._fetching.step(message, received.body):
                self._advance(now)
        elif topic == self.topics.down(self.identity.device):
            self._on_own(message, received.body, now)

    def _decoded(self, topic: str, payload: bytes) -> messages.Received:
        shared = self._ledger.shared
        if shared is None or topic == self.topics.down(self.identity.device):
            return messages.decode(payload)
        return shared.decode(topic, payload)

    def _on_own(self, message: messages.Message, body: memoryview, now: float) -> None:
        """A message to us alone."""
        if isinstance(message, messages.Task):
            self._on_task(message, now)
        elif isinstance(message, messages.MaskingStep):
            if self._sending.hear(message, body):
                self._advance(now)
        elif isinstance(message, messages.Chunk):
            self._on_chunk(message, body, now)
        elif isinstance(message, messages.ChunkAck):
            self._sending.acknowledged(message, now)
        elif isinstance(message, messages.Verdict):
            self._on_verdict(message, now)

    def _on_chunk(self, chunk: messages.Chunk, body: memoryview, now: float) -> None:
        came = self._on_graph if self._graphs.awaits(chunk) else self._fetching.chunk
        if came(chunk, body, now):
            self._advance(now)

    def _on_graph(self, chunk: messages.Chunk, body: memoryview, now: float) -> bool:
        try:
            return self._graphs.chunk(chunk, body, now)
        except RemoteWireError as error:
            if self._task is not None:
                self._decline(self._task, str(error))
            raise

    def _on_manifest(self, manifest: messages.Manifest, now: float) -> None:
        known = self._manifest
        self._manifest = manifest
        if manifest.run != self.state.run:
            self._begin(manifest.run)
        if known is None or _setup(known) != _setup(manifest):
            self._out.append(Configure(manifest=manifest))
        if manifest.status == "finished":
            self._let_go()
            self._out.append(Finished())
        self._advance(now)

    def _let_go(self) -> None:
        """The federation is over: nobody waits for what we still owed it."""
        self._task = self._report = None
        self._sending.stop()
        self._stop_fetching()
        if self.state.pending is not None:
            self._sending.settle(accepted=False)

    def _begin(self, run: str) -> None:
        """Another federation than the one we remember: start it with nothing."""
        if self.state.run:
            self._out.note("joins another federation", run=run, instead_of=self.state.run)
        self._report = None
        if self._task is not None and self._task.run != run:
            self._task = None
        self._sending.forget()
        self._stop_fetching()
        self._ledger.begin(run)

    def _stop_fetching(self) -> None:
        self._fetching.stop()
        self._graphs.stop()

    def _on_task(self, task: messages.Task, now: float) -> None:
        if not (0.0 < task.kappa < math.inf and 0.0 < task.deadline_s < math.inf):
            raise RemoteWireError(f"task has penalty {task.kappa} and deadline {task.deadline_s} s: both are above 0")
        if self._task is None or task.run != self._task.run or task.round >= self._task.round:
            self._task = task
            self._sending.asked_again(task)
        self._advance(now)

    def _on_verdict(self, verdict: messages.Verdict, now: float) -> None:
        if verdict.run != self.state.run:
            return
        pending = self.state.pending
        if verdict.subject == "report" and self._report is not None:
            self._report = self._task = None
        elif verdict.subject == "contribution" and pending is not None and verdict.round == pending.round:
            self._settle(pending, verdict, now)
        self._advance(now)

    def _settle(self, pending: Pending, verdict: messages.Verdict, now: float) -> None:
        """Move the dual if the contribution counts; forget it either way."""
        self._sending.arrived(now)
        if not verdict.accepted:
            self.refusals[verdict.code] += 1
            self.last_refusal = verdict.reason
            self._out.note("contribution refused", round=pending.round, code=verdict.code, reason=verdict.reason)
            self._sending.settle(accepted=False)
            if self._task is not None and self._task.round == pending.round:
                self._decline(self._task, verdict.reason)  # the same work would be refused again
            return
        self._sending.settle(accepted=True, factor=verdict.factor)

    # Work

    def _advance(self, now: float) -> None:
        """Do the next thing that the newest task asks for."""
        if self._manifest is None or self._manifest.run != self.state.run:
            return
        self._take_part()
        if self.state.pending is not None:
            self._send_pending(now)
            return
        task = self._task
        if task is None or task.run != self.state.run or self._working is not None or self._report is not None:
            return
        if not task.final and (task.round <= self.state.accepted_round or not self._agrees(task)):
            self._task = None
        elif self.state.base != task.model:
            self._fetching.ask(task, now)
        elif self._graphs.lacks(self._manifest):
            self._ask_for_graph(task, self._manifest, now)
        else:
            self._work(task)

    def _ask_for_graph(self, task: messages.Task, manifest: messages.Manifest, now: float) -> None:
        reason = self._graphs.ask(manifest, now)
        if reason is not None:
            self._decline(task, reason)

    def _take_part(self) -> None:
        """Be in the masked sum of the newest task, if it wants one."""
        task = self._task
        if task is not None and task.run == self.state.run:
            reason = self._sending.take_part(task)
            if reason is not None:
                self._decline(task, reason)

    def _send_pending(self, now: float) -> None:
        reason = self._sending.go_on(now)
        if reason is not None and self._task is not None:
            self._decline(self._task, reason)

    def _agrees(self, task: messages.Task) -> bool:
        """Whether our dual is the one that the task counts with, if need be by starting at zero again.

        A task without a dual that was written before our last contribution was counted is an old one: it does not mean
        that the aggregator has forgotten us.
        """
        if task.duals is None or task.duals == self.state.dual:
            return True
        if task.duals or task.after < self.state.accepted_round:
            after = self.state.accepted_round
            self._out.send(messages.Differs(run=task.run, round=task.round, expected=task.duals, after=after))
            return False
        self._out.note("the aggregator counts us as new: the dual starts at zero again", round=task.round)
        self._ledger.keep(nu=np.zeros_like(self.state.nu), dual=b"")
        return True

    def _work(self, task: messages.Task) -> None:
        self._working = task
        if task.final:
            self._out.append(
                Personalise(rounds=task.round - 1, z=self.state.z, head=self.state.head, deadline_s=task.deadline_s)
            )
            return
        local = LocalTask(
            round=task.round - 1,
            z=self.state.z,
            nu=dual_value(self.state.nu, np.float32),
            kappa=task.kappa,
            head=self.state.head,
            seed=statements.seed(task, self.identity.device),
        )
        self._out.append(Train(task=local, deadline_s=task.deadline_s))

    # Sending

    def _publish_birth(self) -> None:
        birth = statements.birth(self.identity, self.codecs, self._battery)
        topic = self.topics.state(self.identity.device)
        self._out.append(Publish(topic=topic, payload=messages.encode(birth), retain=True))

    def _resend(self, now: float) -> None:
        """Say again what nobody has answered, on a new connection or after a silence."""
        self._sending.repeat(now)
        if self._waits_for_blob and self._task is not None:
            self._stop_fetching()
        if self._report is not None:
            self._send_report(now)
        self._advance(now)

    def _send_report(self, now: float) -> None:
        assert self._report is not None
        self._out.moved_at = now
        self._out.send(self._report)

    def _decline(self, task: messages.Task, reason: str) -> None:
        self._out.note("declines a round", round=task.round, reason=reason)
        self._out.send(messages.Decline(run=task.run, round=task.round, reason=reason[:512]))
        if self._task is task:
            self._task = None


def _setup(manifest: messages.Manifest) -> tuple[object, ...]:
    """What a trainer is set up with: when it changes, the trainer starts anew."""
    graph = None if manifest.graph is None else manifest.graph.sha256
    return manifest.run, manifest.model, manifest.plan, manifest.method, manifest.seed, graph
