"""The aggregator on a gateway: owns the connection, the clock and the disk; decides nothing (protocol/aggregator.py).

A worker is one as well, and a root has another machine in the same shell (protocol/tree.py).

numpy only: a gateway needs no torch. What it keeps on disk, and how it comes back after kill -9: storage.py.
"""

import contextlib
import hashlib
import logging
import os
import queue
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from fedeq_edge import backends, orders, settings
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.privacy import Accountant
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints
from fedeq_edge.errors import ExportError, StateError, TransportError
from fedeq_edge.hardware.memory import give_back, keep_heap, peak_rss_bytes
from fedeq_edge.protocol import masked
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Note, Publish, Record, Snapshot, Store
from fedeq_edge.protocol.aggregator import Aggregator, new_state
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.graphs import GRAPH_LIMIT_BYTES
from fedeq_edge.protocol.tree import Root
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.storage import AggregatorFolder, locked
from fedeq_edge.training.step import Vector
from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Will
from fedeq_edge.transport.mqtt import MqttTransport
from fedeq_edge.wire.topics import Topics

log = logging.getLogger(__name__)

_TICK_S: Final = 0.5  # deadlines are seconds; finer would only wake the gateway
# Events that are waiting are taken together, so that their contributions share one write to the disk.
_BATCH: Final = 64
_STATUS_S: Final = 0.5


def federation_of(chosen: AggregatorSettings) -> Federation:
    """What the settings fix for the life of a federation."""
    method = chosen.resolved_method()
    return Federation(
        topics=Topics(chosen.federation),
        model=msgspec.to_builtins(chosen.model),
        plan=msgspec.to_builtins(chosen.plan),
        seed=chosen.seed,
        rounds=chosen.train.rounds if method.exchange else 0,
        method=method,
        schedule=chosen.schedule,
        up=chosen.up or (chosen.codec,),
        down=chosen.codec,
        privacy=chosen.privacy,
        masking=chosen.masking,
        audit=chosen.audit,
        root=Topics(chosen.root) if chosen.root else None,
    )


def start_of(chosen: AggregatorSettings) -> Vector:
    """The consensus before the first round, (s,) float32: theta, and the head where heads are shared."""
    theta, head = initial(chosen.model, chosen.seed)
    return theta if chosen.resolved_method().heads == "personal" else np.concatenate([theta, head])


def open_aggregator(chosen: AggregatorSettings, folder: AggregatorFolder, graph: bytes = b"") -> Aggregator:
    """The machine as the folder remembers it, or a new federation. Raises StateError where they do not fit.

    graph: what its devices train by where they have no torch, empty for none.
    """
    federation, sets = federation_of(chosen), constraints(chosen.model)
    method, privacy = federation.method, federation.privacy
    saved = folder.snapshot()
    if saved is None:
        consensus = Consensus(start_of(chosen), method=method, constraints=sets, duals=folder.duals, privacy=privacy)
        state = new_state(f"{chosen.federation}-{secrets.token_hex(4)}")
        state.identity = _identity(federation)
    else:
        state, snapshot = saved
        if state.identity != _identity(federation):
            raise StateError(
                "the state folder holds a federation with another name, model, method, seed, codec, privacy or "
                "masking; restore the settings it began with, or begin another federation in another state folder"
            )
        consensus = Consensus.restore(snapshot, method=method, constraints=sets, duals=folder.duals, privacy=privacy)
    return Aggregator(
        federation=federation,
        consensus=consensus,
        duals=folder.duals,
        boot=secrets.token_hex(8),
        state=state,
        find_blob=folder.find,
        key=b"" if privacy is None else folder.privacy_key(),
        graph=graph,
    )


def open_root(chosen: AggregatorSettings, folder: AggregatorFolder) -> Root:
    """The root as the folder remembers it, or a new one. Raises StateError where they do not fit."""
    machine = open_aggregator(chosen, folder)
    return Root(
        federation=machine.federation,
        consensus=machine.consensus,
        state=machine.state,
        workers=chosen.workers,
        boot=machine.boot,
    )


def _identity(federation: Federation) -> bytes:
    """Digest of what must not change while duals and sums of the federation live."""
    fixed: tuple[object, ...] = (
        federation.topics.federation,
        federation.model,
        federation.method,
        federation.seed,
        federation.down,
    )
    if federation.privacy is not None:  # as sums that are out were noised
        fixed = (*fixed, federation.privacy)
    if federation.masking is not None:
        fixed = (*fixed, federation.masking)
    return hashlib.sha256(msgspec.json.encode(fixed)).digest()


def _training_graph(chosen: AggregatorSettings) -> bytes:
    """What devices without torch train by, the same from every start of this version; empty where none can be made."""
    try:
        graph = backends.build_graph(chosen.model)
    except ExportError as error:
        log.warning("no training graph: devices that train without torch cannot", extra={"reason": str(error)})
        return b""
    if len(graph) > GRAPH_LIMIT_BYTES:
        log.warning("the training graph is larger than devices take", extra={"bytes": len(graph)})
        return b""
    give_back()  # 14 of the 18 MB that building takes
    return graph


def _check_extras(federation: Federation) -> None:
    """Epsilon can be told as long as the federation lives, and masks can be made. Raises ConfigError."""
    if federation.privacy is not None:
        Accountant(federation.privacy).epsilon(planned=1)
    if federation.masking is not None:
        masked.check_installed()


class Gateway:
    """One federation's aggregator until it has finished or is told to stop. Raises ConfigError on unusable settings."""

    def __init__(self, path: Path, chosen: AggregatorSettings) -> None:
        # before anything is written
        _check_extras(federation_of(chosen))
        self._endpoint = chosen.broker.endpoint(path)
        self._endpoint.tls_context()
        self._settings = chosen
        self._place = settings.resolve(path, chosen.state)
        self._topics = Topics(chosen.federation)
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._finished = False
        self._stopping = False
        self._status_at = self._ticked_at = -_STATUS_S
        self._held_back: list[Publish] = []  # what tells somebody of a contribution that is not on the disk yet
        self._uncommitted = False
        self._broker = "connecting"

    def run(self) -> bool:
        """Serve until the federation has finished (True) or SIGTERM or SIGINT came (False)."""
        keep_heap()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._inbox.put(None))
        with locked(self._place):
            self._folder = AggregatorFolder(self._place, audit=self._settings.audit)
            self._machine: Aggregator | Root = self._open()
            if self._machine.state.status == "finished":
                log.warning("this federation has finished; another one needs another state folder")
                return True
            self._come_back()
            self._transport = self._connect()
            try:
                while not (self._finished or self._stopping):
                    self._step()
            finally:
                self._release()
                self._transport.stop(self._farewell())
                self._write_status()
        return self._finished

    def _open(self) -> Aggregator | Root:
        if self._settings.workers:
            return open_root(self._settings, self._folder)
        return open_aggregator(self._settings, self._folder, _training_graph(self._settings))

    def _come_back(self) -> None:
        if isinstance(self._machine, Aggregator):
            self._carry_out(self._machine.resume(time.monotonic()))
            for device, blob in self._folder.journal():
                self._machine.replay(device, blob)
        log.info("aggregator is up", extra={"run": self._machine.state.run, "round": self._machine.state.round})

    def _connect(self) -> MqttTransport:
        name = f"{self._settings.federation}-aggregator"
        transport = MqttTransport(self._endpoint, name, self._subscriptions(), will=self._farewell())
        transport.start(self._inbox.put)
        return transport

    def _subscriptions(self) -> tuple[str, ...]:
        if self._settings.workers:
            return (self._topics.worker_up("+"),)
        from_root = (Topics(self._settings.root).worker_down(self._topics.federation),) if self._settings.root else ()
        return (self._topics.state("+"), self._topics.up("+"), *from_root)

    def _step(self) -> None:
        for event in self._waiting():
            self._on_event(event)
        now = time.monotonic()
        if now - self._ticked_at >= _TICK_S:
            self._ticked_at = now
            self._obey_orders(now)
            self._carry_out(self._machine.tick(now))
        self._release()
        if now - self._status_at >= _STATUS_S:
            self._write_status()

    def _waiting(self) -> Iterator[Event | None]:
        """The events that are there, after a wait for the first."""
        with contextlib.suppress(queue.Empty):
            yield self._inbox.get(timeout=_TICK_S)
            for _ in range(_BATCH):
                yield self._inbox.get_nowait()

    def _obey_orders(self, now: float) -> None:
        for order, device in orders.taken(self._place):
            log.info("order", extra={"order": order, "device": device})
            if isinstance(self._machine, Root):
                log.error("a root has no devices; give the order to the worker of this one", extra={"device": device})
                continue
            self._carry_out(getattr(self._machine, order)(device, now))

    def _on_event(self, event: Event | None) -> None:
        now = time.monotonic()
        if event is None:
            self._stopping = True
        elif isinstance(event, Connected):
            self._broker = "connected"
            self._carry_out(self._machine.connected(now, event.packet_limit))
        elif isinstance(event, Disconnected):
            self._broker = event.reason
            log.warning("disconnected; trying again", extra={"reason": event.reason})
        elif isinstance(event, Arrived):
            self._carry_out(self._machine.arrived(event.topic, event.payload, now))

    def _carry_out(self, actions: list[AggregatorAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                if self._uncommitted:
                    self._held_back.append(action)
                else:
                    self._publish(action)
            elif isinstance(action, Store):
                self._folder.store(action.device, action.round, action.kappa, action.blob, factor=action.factor)
                self._uncommitted = True
            elif isinstance(action, Snapshot):
                self._folder.take_snapshot(action.state, action.consensus)
            elif isinstance(action, Record):
                self._record(action)
            elif isinstance(action, Note):
                log.info(action.event, extra=dict(action.facts))
            elif isinstance(action, Finished):
                self._finished = True

    def _release(self) -> None:
        """What was stored is on the disk, and those who wait for it hear of it."""
        if self._uncommitted:
            self._folder.commit()
            self._uncommitted = False
        held_back, self._held_back = self._held_back, []
        for action in held_back:
            self._publish(action)

    def _record(self, action: Record) -> None:
        self._folder.record(action.line)
        facts = {key: value for key, value in action.line.items() if not isinstance(value, dict)}
        log.info(str(facts.pop("kind")), extra=facts)

    def _publish(self, action: Publish) -> None:
        try:
            self._transport.publish(action.topic, action.payload, retain=action.retain)
        except TransportError as error:
            log.error("cannot publish", extra={"reason": str(error)})

    def _farewell(self) -> Will:
        return Will(topic=self._topics.aggregator, payload=self._machine.offline())

    def _write_status(self) -> None:
        self._status_at = time.monotonic()
        self._folder.write_status(
            {
                **self._machine.status(),
                "broker": self._broker,
                "pid": os.getpid(),
                "rss_peak_bytes": peak_rss_bytes(),
                "cpu_s": time.process_time(),
            }
        )
