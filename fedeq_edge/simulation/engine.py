"""One run: the aggregator's machine and every client's, on the in-memory broker, in virtual time.

Theory of operation
-------------------
Time stands still while messages are delivered. Whoever is to train is given to the workers together with all others at
that instant, real training as on a board; when it has ended in virtual time follows from what has come down the
client's link, the device seconds that the learner counted (cost.py), and what goes up. Those ends wait in a queue
ordered by (time, number), beside deadlines and ticks, so that a run is the same on one worker or many.

A client that is not at work holds no vector: its dual is the server's, its head lies in a file (vectors.py), and z is
one array for all who hold the same (protocol/ledger.py, `Shared`).
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Publish, Record, Store, Train
from fedeq_edge.protocol.aggregator import Aggregator, new_state
from fedeq_edge.protocol.client import RETRY_S
from fedeq_edge.protocol.ledger import Shared
from fedeq_edge.protocol.state import NOTHING, vector_digest
from fedeq_edge.simulation.device import Device, Order
from fedeq_edge.simulation.evaluation import Evaluation, mean_head
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.journal import Journal, Waiting
from fedeq_edge.simulation.measures import mean, means, measured
from fedeq_edge.simulation.models import constraints_of
from fedeq_edge.simulation.scenario import Scenario
from fedeq_edge.simulation.vectors import FleetDuals, VectorFile
from fedeq_edge.training.step import Vector
from fedeq_edge.transport.base import Arrived, Connected, Event, Will
from fedeq_edge.transport.memory import MemoryBroker

# So many deadlines without a contribution and nothing will come any more.
_PATIENCE: Final = 50
# So many jobs of each client in a row that failed, and no other will succeed.
_FAILURES: Final = 3
Line = dict[str, Any]


@dataclass(slots=True)
class Totals:
    """Of all clients, bytes as on the wire since the last line."""

    up: int = 0
    down: int = 0


class Simulation:
    """One run. journal: does the jobs; say: takes the lines of the result as they come. folder: for temporary files."""

    def __init__(self, scenario: Scenario, journal: Journal, say: Callable[[Line], None], folder: Path) -> None:
        self.now = 0.0
        self.finished = False
        self.scenario = scenario
        self.federation = scenario.federation
        self.shared = Shared()
        self.broker = MemoryBroker()
        start = scenario.consensus
        self.duals = FleetDuals(folder, start.size)
        self.heads = VectorFile(folder, scenario.start[1].size, np.float32)
        self.aggregator = Aggregator(
            federation=self.federation,
            consensus=Consensus(
                start, method=scenario.method, constraints=constraints_of(scenario.spec), duals=self.duals
            ),
            duals=self.duals,
            boot="simulation",
            state=new_state(f"simulation-{scenario.setup.seed}"),
            find_blob=self._blob,
        )
        self._journal, self._say = journal, say
        self._waiting = Waiting(folder, start.size)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count, self._jobs = itertools.count(), itertools.count()
        self._orders: list[Order] = []
        self._watched: tuple[object, ...] = ()
        self._moved_at = 0.0
        self._failures = 0
        self._base = b""
        self._blobs: dict[tuple[str, int], bytes] = {}
        self._counted = Totals()
        self.devices: dict[str, Device] = {}

    # ---- the run -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """The federation has finished, every client has its personal model, and all lines but the last are said."""
        try:
            self._start()
            while not self.finished:
                if not self.broker.deliver():
                    self._go_on()
            self._conclude()
        finally:
            self.duals.close()
            self.heads.close()
            self._waiting.close()

    def _start(self) -> None:
        topics = self.federation.topics
        will = Will(topic=topics.aggregator, payload=self.aggregator.offline())
        self._transport = self.broker.transport((topics.state("+"), topics.up("+")), will)
        self._transport.start(self._on_event)
        for name, board in self.scenario.boards.items():
            samples = len(self.scenario.fleet[name].y_train)
            self.devices[name] = Device(self, name, board, samples)
        self._tick_for_ever()

    def _go_on(self) -> None:
        if self._orders:
            self._work()
            return
        self.now, _, act = heapq.heappop(self._events)
        schedule = self.federation.schedule
        if self.now > self._moved_at + _PATIENCE * (schedule.deadline_s + schedule.final_s):
            status = self.aggregator.status()
            raise StateError(
                f"simulation: nothing has happened for {self.now - self._moved_at:.0f} virtual seconds in round "
                f"{status['round']} ({len(status['online'])} clients online); lower dropout or schedule.quorum, or let "
                "more clients pass schedule.profiles"
            )
        act()

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """This happens so many virtual seconds from now."""
        heapq.heappush(self._events, (self.now + seconds, next(self._count), act))

    def _tick_for_ever(self) -> None:
        self.after(RETRY_S, self._tick_for_ever)
        self._tick()

    def _tick(self) -> None:
        self._carry_out(self.aggregator.tick(self.now))

    # ---- training ------------------------------------------------------------------------------------------

    def order(self, order: Order) -> None:
        """A client is to work, with all others that are told so before time goes on."""
        self._orders.append(order)

    def _work(self) -> None:
        orders, self._orders = self._orders, []
        for order, outcome in zip(orders, self._journal.run(map(self._job, orders)), strict=True):
            device, number = order.device, outcome.number
            self._waiting.put(outcome)
            seconds = 0.0 if outcome.failed else device.transfer_s(outcome) + outcome.seconds
            self.after(seconds, lambda device=device, number=number: self._done(device, number))  # type: ignore[misc]

    def _done(self, device: Device, number: int) -> None:
        outcome = self._waiting.take(number)
        self._failures = self._failures + 1 if outcome.failed else 0
        if self._failures >= _FAILURES * len(self.devices):
            raise StateError(f"simulation: no client can do its work; the last, {device.name}: {outcome.failed}")
        self._moved_at = self.now
        device.done(outcome)

    def _job(self, order: Order) -> Job:
        """What a worker must know, with the client's vectors read from their files."""
        action, device = order.action, order.device
        job = Job(
            number=next(self._jobs),
            kind="train",
            device=device.name,
            round=0,
            base=order.base,
            nu=self._dual(device.name),
            head=self.heads.get(device.name) if device.name in self.heads else NOTHING,
            pace=order.pace,
            drift=device.drift,
        )
        if isinstance(action, Train):
            task = action.task
            self._hold(task.z, order.base)
            return replace(job, round=task.round, kappa=task.kappa, seed=task.seed)
        self._hold(action.z, order.base)
        chosen, exchange = self.scenario.setup.experiment.evaluation, self.scenario.method.exchange
        return replace(
            job,
            kind="personalise",
            round=action.rounds,
            kappa=self.scenario.method.rho,
            seed=random.Random(f"{self.scenario.setup.seed}/{device.name}/last").getrandbits(32),
            budgets=chosen.budgets,
            local=chosen.local and exchange,
        )

    def _dual(self, name: str) -> Vector:
        """nu of this client as its trainer wants it, (s,); empty where its method keeps none."""
        if not self.scenario.method.keeps_duals:
            return NOTHING
        return self.duals.value(name)

    def _hold(self, z: Vector, base: bytes) -> None:
        """The workers have z, which all jobs of a round have in common."""
        if base != self._base:
            self._base = base
            self._journal.hold(base, z)

    # ---- the aggregator ------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._carry_out(self.aggregator.connected(self.now))
        elif isinstance(event, Arrived):
            self._carry_out(self.aggregator.arrived(event.topic, event.payload, self.now))

    def _carry_out(self, actions: list[AggregatorAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self._transport.publish(action.topic, action.payload, retain=action.retain)
            elif isinstance(action, Store):
                self._keep(action)
            elif isinstance(action, Record):
                self._record(action.line)
            elif isinstance(action, Finished):
                self.finished = True
        self._watch()

    def _watch(self) -> None:
        """A tick comes when the deadline that has just begun is over."""
        state, schedule = self.aggregator.state, self.federation.schedule
        seen = (state.status, state.round, self.aggregator.extensions)
        if seen != self._watched:
            self._watched = seen
            self.after(schedule.final_s if state.status == "finishing" else schedule.deadline_s, self._tick)

    def _keep(self, action: Store) -> None:
        if self.scenario.method.robust in ("trimmed", "median"):  # which look at every contribution again
            self._blobs[action.device, action.round] = action.blob

    def _blob(self, device: str, number: int) -> bytes | None:
        return self._blobs.get((device, number))

    def _record(self, line: Mapping[str, object]) -> None:
        self._moved_at = self.now
        if line["kind"] != "round":
            return
        self._blobs.clear()
        self._say(self._round(line))
        # the next round may be open already: the line says which one is over
        every, number = self.scenario.setup.experiment.evaluation.every, int(str(line["round"]))
        if every and number % every == 0:
            found = self._evaluate(list(self.devices), number, deliver=False)
            self._say({"kind": "evaluation", "round": number, **means([measured(one) for one in found.values()])})

    def _round(self, line: Mapping[str, Any]) -> Line:
        told = list(line["devices"].values())
        accuracy = [device["accuracy"] for device in told if not math.isnan(device["accuracy"])]
        up, down = self._bytes()
        counted, self._counted = self._counted, Totals(up, down)
        kept = ("round", "cohort", "extensions", "seconds", "primal_residual", "dual_residual", "step", "correction")
        return {
            "kind": "round",
            **{key: line[key] for key in kept},
            "virtual_s": self.now,
            "contributed": len(line["contributed"]),
            "late": len(line["late"]),
            "declined": len(line["declined"]),
            "bytes_up": up - counted.up,
            "bytes_down": down - counted.down,
            "loss": mean([device["loss"] for device in told]),
            "residual": mean([device["residual"] for device in told]),
            "forward": [min(d["forward"] for d in told), max(d["forward"] for d in told)] if told else [],
            "accuracy": mean(accuracy),
        }

    def _bytes(self) -> tuple[int, int]:
        return sum(d.up for d in self.devices.values()), sum(d.down for d in self.devices.values())

    # ---- the end -------------------------------------------------------------------------------------------

    def _conclude(self) -> None:
        """Lines of what each client has come to, and of those that took no part."""
        without = [name for name, device in self.devices.items() if device.evaluation is None]
        number = self.aggregator.state.round
        found = self._evaluate(without, number, deliver=True)
        for name, device in self.devices.items():
            self._say(self._client(device, device.evaluation or found[name]))
        unseen = self._evaluate(list(self.scenario.unseen), number, deliver=True)
        for name, one in unseen.items():
            self._say({"kind": "unseen", "client": name, **measured(one)})

    def _client(self, device: Device, found: Evaluation) -> Line:
        return {
            "kind": "client",
            "client": device.name,
            "profile": device.board.group.profile,
            "rounds": device.accepted,
            "bytes_up": device.up,
            "bytes_down": device.down,
            "forward": device.forward,
            "seconds": device.seconds,
            **measured(found),
        }

    def _evaluate(self, names: list[str], number: int, *, deliver: bool) -> dict[str, Evaluation]:
        """What the consensus in force, of round `number`, is worth to them; who never trained has a mean head."""
        z = self.aggregator.consensus.z_hat
        self._hold(z, vector_digest(z))
        found = self._journal.run(self._evaluations(names, number, deliver))
        return {name: _evaluation(outcome) for name, outcome in zip(names, found, strict=True)}

    def _evaluations(self, names: list[str], number: int, deliver: bool) -> Iterator[Job]:
        common, chosen = self._mean_head(), self.scenario.setup.experiment.evaluation
        for name in names:
            yield Job(
                number=next(self._jobs),
                kind="evaluate",
                device=name,
                round=number,
                base=self._base,
                head=self.heads.get(name) if name in self.heads else common,
                budgets=chosen.budgets if deliver else (),
                deliver=deliver,
            )

    def _mean_head(self) -> Vector:
        """For a client that has none of its own, (h,); empty before anybody has one: the initial head."""
        trained = [name for name in self.devices if name in self.heads]
        heads = ((self.heads.get(name), len(self.scenario.fleet[name].y_train)) for name in trained)
        return mean_head(heads) if trained else NOTHING


def _evaluation(outcome: Outcome) -> Evaluation:
    if outcome.evaluation is None:
        raise StateError(f"simulation: client {outcome.name[1]} could not be evaluated: {outcome.failed}")
    return outcome.evaluation
