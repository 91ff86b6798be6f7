"""The agent on a device: a small always-on link process, and a trainer process only while there is training to do.

With `serve` applications on the device ask its personal model (serving/), by a process that lives while they do.

The link owns the connection, the client's state machine and its state on disk; it imports neither torch nor
onnxruntime and rests below 40 MB. `fedeq agent run` checks settings, data and solver and then becomes this program
(`python -m fedeq_edge.agent SETTINGS SAMPLES`), so that what checking needed is not carried along.
"""

import contextlib
import logging
import math
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge import health, logs, modelfile, settings
from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ConfigError, FedEqError, TransportError
from fedeq_edge.hardware import reading
from fedeq_edge.hardware.memory import give_back, keep_heap, peak_rss_bytes, rss_bytes
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.protocol import masked
from fedeq_edge.protocol.actions import (
    ClientAction,
    Configure,
    Finished,
    Keep,
    KeepGraph,
    Note,
    Personalise,
    Publish,
    Save,
    Settle,
    Train,
)
from fedeq_edge.protocol.client import Client, Identity, Usage
from fedeq_edge.protocol.graphs import GRAPH_LIMIT_BYTES
from fedeq_edge.serving.listener import Listener
from fedeq_edge.settings import AgentSettings
from fedeq_edge.storage.client import ClientFolder
from fedeq_edge.storage.files import locked
from fedeq_edge.storage.graphs import GraphFolder
from fedeq_edge.storage.status import write_status
from fedeq_edge.training import exchange
from fedeq_edge.training.step import Plan
from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Will
from fedeq_edge.transport.mqtt import MqttTransport
from fedeq_edge.wire import coding
from fedeq_edge.wire.messages import Manifest
from fedeq_edge.wire.topics import Topics

log = logging.getLogger("fedeq_edge.agent")  # __name__ is "__main__" when run as a program

PERSONAL: Final = "personal.fedeq"
GRAPH: Final = "training.onnx"
_TICK_S: Final = 2.0  # retries are 10 s apart; a device at rest should hardly wake
_TRAINER_END_S: Final = 5.0
# A trainer plans for the deadline; one that needs three of them hangs. Never less than a slow board's start of torch.
_PATIENCE_DEADLINES: Final = 3.0
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Reply:
    """A reply of the trainer, or None when it has ended."""

    trainer: "TrainerProcess"
    reply: exchange.Reply | None


class TrainerProcess:
    """A running trainer, and the threads that feed it and read its replies into the agent's queue.

    Requests are written by a thread, because a pipe takes 64 kB and a trainer that starts, trains or hangs takes
    nothing from it: the link must not wait for that. busy: a request has not been answered.
    """

    def __init__(self, setup: exchange.Setup, log_path: Path, inbox: "queue.SimpleQueue[object]") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
        with log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedeq_edge.trainer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
            )
        self._inbox = inbox
        self._requests: queue.SimpleQueue[exchange.Request | None] = queue.SimpleQueue()
        self.idle_since: float | None = None
        self.ready = False
        self.busy = False
        self._overdue_at = math.inf
        threading.Thread(target=self._read, name="trainer replies", daemon=True).start()
        self._writer = threading.Thread(target=self._write, name="trainer requests", daemon=True)
        self._writer.start()
        self._requests.put(setup)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, request: exchange.Request, *, deadline_s: float, now: float) -> None:
        """Send a request that is to be answered in `deadline_s`; a trainer that is gone shows in its missing reply."""
        self.idle_since, self.busy = None, True
        self._overdue_at = now + max(_PATIENCE_S, _PATIENCE_DEADLINES * deadline_s)
        self._requests.put(request)

    def answered(self, now: float) -> None:
        """Its work is done; it rests from now on."""
        self.idle_since, self.busy, self._overdue_at = now, False, math.inf

    def overdue(self, now: float) -> bool:
        """Whether it hangs: no answer for three deadlines, and at least a minute."""
        return now >= self._overdue_at

    def end(self) -> int:
        """Close its stdin, at which it leaves even while it trains; kill it if it does not. Returns its exit status."""
        self._requests.put(None)
        try:
            return self._process.wait(_TRAINER_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._writer.join()

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin:
            while (request := self._requests.get()) is not None:
                exchange.write(self._process.stdin, request)  # type: ignore[arg-type]  # a pipe of bytes

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            while (reply := exchange.read_reply(self._process.stdout)) is not None:  # type: ignore[arg-type]
                self._inbox.put(_Reply(self, reply))
        self._inbox.put(_Reply(self, None))


class Agent:
    """One device: its link, its state machine, its trainer. The state folder is locked by whoever makes one."""

    def __init__(
        self, path: Path, chosen: AgentSettings, *, samples: int, slowdown: float, data_age_s: float | None = None
    ) -> None:
        self._settings = chosen
        self._data = settings.resolve(path, chosen.data)
        self._folder = settings.resolve(path, chosen.state)
        self._slowdown = slowdown
        self._topics = Topics(chosen.joins)
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._store = ClientFolder(self._folder)
        identity = Identity(
            device=chosen.device,
            boot=secrets.token_hex(8),
            samples=samples,
            profile=chosen.profile,
            emulated=chosen.emulate,
            data_age_s=data_age_s,
        )
        folders = [settings.resolve(path, folder) for folder in chosen.graphs]
        self._graphs = GraphFolder(self._folder / GRAPH, folders, limit_bytes=GRAPH_LIMIT_BYTES)
        self._client = Client(
            identity,
            self._topics,
            self._store.load(),
            codecs=(*coding.CODECS, *masked.features()),
            holds_graph=self._holds_graph if chosen.backend == "onnx" else None,
        )
        self._transport = MqttTransport(
            chosen.broker.endpoint(path),
            f"{chosen.joins}-{chosen.device}",
            (
                self._topics.manifest,
                self._topics.model,
                self._topics.aggregator,
                self._topics.down(chosen.device),
            ),
            will=self._farewell(),
        )
        self._manifest: Manifest | None = None
        self._rounds = 0  # of the federation, when its final consensus comes
        self._trainer: TrainerProcess | None = None
        self._at_rest = False
        self._rss_idle = 0
        self._rss_peak_trainer = 0
        self._stopping = False
        self._broker = "connecting"
        self._shown: dict[str, object] = {}
        self._watchdog_s = health.watchdog_s()
        self._fed_at = -math.inf
        place = chosen.answers_at(path)
        self._answers = (
            None if place is None else Listener(place, self._folder, idle_s=chosen.trainer_idle_s, graphs=folders)
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        keep_heap()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._inbox.put(None))
        self._transport.start(self._inbox.put)
        log.info("agent is up", extra={"device": self._settings.device, "federation": self._settings.joins})
        health.notify("READY=1")  # whether or not there is a network: a pulled cable is no reason to roll back
        try:
            while not self._stopping:
                self._step()
        finally:
            health.notify("STOPPING=1")
            if self._answers is not None:
                self._answers.stop()
            if self._trainer is not None:
                self._trainer.end()
            self._transport.stop(self._farewell())
            self._store.save(self._client.state)
            self._write_status()
            log.info("agent has left", extra={"device": self._settings.device})

    def _step(self) -> None:
        self._write_status()
        self._feed_watchdog(time.monotonic())
        self._watch_trainer(time.monotonic())
        try:
            event = self._inbox.get(timeout=_TICK_S)
        except queue.Empty:
            self._rest()
            self._carry_out(self._client.tick(time.monotonic()))
            return
        if event is None:
            self._stopping = True
        elif isinstance(event, _Reply):
            self._on_reply(event)
        elif isinstance(event, Connected | Disconnected | Arrived):
            self._on_event(event)

    def _on_event(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Connected):
            if self._trainer is None:
                self._come_to_rest()  # the start is over; work may come in days
            self._broker = "connected"
            self._carry_out(self._client.connected(now, event.packet_limit, self._battery()))
        elif isinstance(event, Disconnected):
            self._broker = event.reason
            log.warning("disconnected; trying again", extra={"reason": event.reason})
        else:
            self._carry_out(self._client.arrived(event.topic, event.payload, now))

    # The trainer

    def _on_reply(self, event: _Reply) -> None:
        if event.trainer is not self._trainer:
            return  # of one that we have ended ourselves
        reply, now = event.reply, time.monotonic()
        if isinstance(reply, exchange.Ready | exchange.Done | exchange.Fitted):
            self._rss_peak_trainer = max(self._rss_peak_trainer, reply.rss_peak)
        if isinstance(reply, exchange.Ready):
            event.trainer.ready = True  # the work it was started for follows in its pipe
            return
        event.trainer.answered(now)
        if isinstance(reply, exchange.Done):
            self._carry_out(self._client.trained(reply.result, self._usage(), now))
        elif isinstance(reply, exchange.Fitted):
            self._keep_personal(reply)
            self._carry_out(self._client.personalised(reply.personal, self._usage(), now))
        elif isinstance(reply, exchange.Failed):
            if not event.trainer.ready:
                self._end_trainer("its set-up failed")  # the next task starts another
            self._carry_out(self._client.failed(reply.reason, now))
        else:
            self._trainer = None
            status = event.trainer.end()
            self._carry_out(self._client.failed(_how_it_ended(status, self._folder / "trainer.log"), now))

    def _ask(self, request: exchange.Request, deadline_s: float) -> None:
        if self._trainer is None:
            self._at_rest = False
            try:
                self._trainer = TrainerProcess(self._setup(), self._folder / "trainer.log", self._inbox)
            except (ConfigError, msgspec.ValidationError) as error:
                self._carry_out(self._client.failed(f"manifest cannot be used here: {error}", time.monotonic()))
                return
        self._trainer.ask(request, deadline_s=deadline_s, now=time.monotonic())

    def _setup(self) -> exchange.Setup:
        assert self._manifest is not None
        name = self._manifest.graph if self._settings.backend == "onnx" else None
        graph = None if name is None else self._graphs.find(name.sha256)
        return exchange.Setup(
            model=self._manifest.model,
            plan=msgspec.convert(self._manifest.plan, Plan),
            method=msgspec.convert(self._manifest.method, Method),
            backend=self._settings.backend,
            graph="" if graph is None else str(graph),
            graph_sha256=b"" if name is None else name.sha256,
            data=str(self._data),
            cache=str(self._folder / "calibration"),
            profile=self._settings.profile,
            slowdown=self._slowdown,
            shared=self._settings.emulate,
            seed=self._manifest.seed,
        )

    def _holds_graph(self, sha256: bytes) -> bool:
        return self._graphs.find(sha256) is not None

    def _watch_trainer(self, now: float) -> None:
        if self._trainer is not None and self._trainer.overdue(now):
            self._end_trainer("trainer did not answer in three times the deadline and was ended")

    def _end_trainer(self, why: str) -> None:
        """No trainer runs; the machine knows that work it waited for will not come, or it would wait for ever."""
        if self._trainer is not None:
            trainer, self._trainer = self._trainer, None
            trainer.end()
            if trainer.busy:
                self._carry_out(self._client.failed(why, time.monotonic()))

    def _feed_watchdog(self, now: float) -> None:
        """Tell systemd that this loop turns, as often as it asks for."""
        if self._watchdog_s is not None and now >= self._fed_at + self._watchdog_s - _TICK_S:
            self._fed_at = now
            health.notify("WATCHDOG=1")

    def _rest(self) -> None:
        """Nothing has happened for a while: let an idle trainer go, note how much we need at rest."""
        trainer = self._trainer
        if trainer is None:
            self._come_to_rest()
        elif trainer.idle_since is not None and time.monotonic() - trainer.idle_since > self._settings.trainer_idle_s:
            self._end_trainer("it was idle")

    # What the machine asks for

    def _carry_out(self, actions: list[ClientAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self._publish(action)
            elif isinstance(action, Save | Keep | Settle):
                self._store.write(action)
            elif isinstance(action, KeepGraph):
                self._graphs.keep(action.graph)
            elif isinstance(action, Note):
                log.info(action.event, extra=dict(action.facts))
            elif isinstance(action, Configure):
                self._manifest = action.manifest
                self._end_trainer("the federation has changed")
                self._check_energy(action.manifest)
            elif isinstance(action, Train):
                self._ask(exchange.Work(task=action.task), action.deadline_s)
            elif isinstance(action, Personalise):
                self._rounds = action.rounds
                self._ask(exchange.Fit(z=action.z, head=action.head), action.deadline_s)
            elif isinstance(action, Finished):
                log.info("the federation has finished")  # a trainer at work makes its model, and ends when idle

    def _check_energy(self, manifest: Manifest) -> None:
        """Say once that we cannot keep a limit in joules, and why."""
        profile = self._settings.profile
        if manifest.plan.get("energy_j") is not None and not (profile and load_profile(profile).active_watts):
            log.warning(
                "the plan limits joules, but our watts are not known: going by seconds",
                extra={"profile": profile or None, "remedy": "set active_watts in the board's profile"},
            )

    def _publish(self, action: Publish) -> None:
        try:
            self._transport.publish(action.topic, action.payload, retain=action.retain)
        except TransportError as error:
            log.error("cannot publish", extra={"reason": str(error)})

    def _keep_personal(self, fitted: exchange.Fitted) -> None:
        assert self._manifest is not None
        personal = fitted.personal
        model = modelfile.ModelFile(
            model=self._manifest.model,
            theta=personal.theta,
            head=personal.head,
            budget=personal.budget,
            run=self._manifest.run,
            round=self._rounds,
            device=self._settings.device,
            solver=fitted.solver,
        )
        modelfile.write(self._folder / PERSONAL, model)

    # Small things

    def _farewell(self) -> Will:
        return Will(topic=self._topics.state(self._settings.device), payload=self._client.offline())

    def _come_to_rest(self) -> None:
        """Without a trainer, hold no more than listening needs; once for every rest."""
        if not self._at_rest:
            self._at_rest = True
            give_back()
        self._rss_idle = rss_bytes()

    def _usage(self) -> Usage:
        traffic = self._transport.traffic()
        return Usage(
            wire_up=traffic.up,
            wire_down=traffic.down,
            rss_idle=self._rss_idle,
            rss_peak=peak_rss_bytes() + self._rss_peak_trainer,
            battery=self._battery(),
        )

    def _battery(self) -> float | None:
        battery = reading.battery_of()
        return None if battery is None or battery.plugged else battery.percent

    def _write_status(self) -> None:
        """For `fedeq agent status`; only where it has changed, as flash wears out."""
        current = {
            "device": self._settings.device,
            "pid": os.getpid(),
            "broker": self._broker,
            **self._client.status(),
            "trainer": None if self._trainer is None else self._trainer.pid,
        }
        if current != self._shown:
            self._shown = current
            write_status(self._folder, current)
            health.notify(f"STATUS=broker: {self._broker}")


def _slowdown(chosen: AgentSettings) -> float:
    if chosen.emulate and not chosen.profile:
        raise ConfigError(f"device {chosen.device}: emulate = true needs a profile; `fedeq device list` shows them")
    # loaded where only its limits count, too: a misspelt board should fail here and not in every round
    speed = load_profile(chosen.profile).relative_speed if chosen.profile else 1.0
    return 1.0 / speed if chosen.emulate else 1.0


def _how_it_ended(status: int, log_path: Path) -> str:
    if status == -signal.SIGKILL:
        return "trainer was killed (out of memory?); use a smaller model or batch, or add swap"
    if status < 0:
        return f"trainer was ended by signal {-status}; what it said before is in {log_path}"
    lines = log_path.read_text(errors="replace").strip().splitlines() if log_path.exists() else []
    return f"trainer ended with status {status}: {lines[-1] if lines else 'no message'} (all of it in {log_path})"


def main(arguments: list[str]) -> int:
    """Run with the settings file and the number of training samples; for `fedeq agent run`, which checks both."""
    logs.configure()
    path = Path(arguments[0])
    try:
        chosen = settings.load(path, AgentSettings)
        slowdown = _slowdown(chosen)
        with locked(settings.resolve(path, chosen.state)):  # before the state is read
            age_s = time.time() - settings.resolve(path, chosen.data).stat().st_mtime
            samples = int(arguments[1])
            Agent(path, chosen, samples=samples, slowdown=slowdown, data_age_s=max(0.0, age_s)).run()
    except FedEqError as error:
        print(f"fedeq: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
