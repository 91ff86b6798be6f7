"""Memory and CPU of the aggregator for 10, 50 and 200 clients, and memory of an agent at rest: make bench-memory.

The aggregator is the real machine with the real folder on disk; clients are puppets on the in-memory transport that
answer their tasks one after the other with a coded contribution and hold nothing, so that the memory measured is the
aggregator's and not that of a fleet in the same process. The agent is the real program, connected to a real broker,
before its first task.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.gateway import open_aggregator
from fedeq_edge.hardware.memory import peak_rss_bytes
from fedeq_edge.protocol.actions import AggregatorAction, Publish, Snapshot, Store
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings, to_toml
from fedeq_edge.storage import AggregatorFolder
from fedeq_edge.training.step import Plan
from fedeq_edge.transport import broker
from fedeq_edge.transport.base import Arrived, Connected, Event
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import chunks, coding, messages
from fedeq_edge.wire.topics import Topics

ROUNDS = 5
# HAR's 1-D model, widened to the 100,000 parameters at which the peers were measured.
SPEC = ModelSpec(input_shape=(9, 128), classes=6, cell="residual", channels=112, stem_kernel=12, stem_stride=4)
TOPICS = Topics("bench")
METRICS = messages.Metrics(
    loss=1.0,
    residual=1e-2,
    backward_residual=1e-2,
    forward=8,
    adjoint=3,
    seconds=1.0,
    accuracy=0.5,
    reduced=False,
    wire_up=0,
    wire_down=0,
)


@dataclass
class Puppet:
    """A client without a model: it answers tasks with the same coded difference and keeps nothing."""

    device: str
    body: bytes
    length: int

    def answers(self, payload: bytes) -> list[bytes]:
        """What it publishes after a message from the aggregator."""
        message = messages.decode(payload).message
        if not isinstance(message, messages.Task) or message.final:
            return []
        blob = messages.encode(
            messages.Contribution(
                run=message.run,
                round=message.round,
                boot="bench",
                base=message.model,
                samples=100,
                codec=message.codec,
                length=self.length,
                metrics=METRICS,
            ),
            self.body,
        )
        outgoing = chunks.Outgoing(blob, chunks.Link(packet_limit=2**20))
        offer = messages.encode(messages.Offer(transfer=outgoing.name, size=len(blob)))
        runs = []
        while not outgoing.done:
            runs += outgoing.due(0.0)
            outgoing.acknowledge(b"\xff" * len(outgoing.bitmap), 0.0)
        pieces = (messages.Chunk(transfer=outgoing.name, index=index, size=len(blob)) for index, _ in runs)
        return [offer, *(messages.encode(chunk, piece) for chunk, (_, piece) in zip(pieces, runs, strict=True))]


class Bench:
    """An aggregator with its folder, and so many puppets."""

    def __init__(self, place: Path, clients: int) -> None:
        self._folder = AggregatorFolder(place)
        schedule = Schedule(min_devices=clients, final_s=1.0)
        settings = AggregatorSettings(federation="bench", model=SPEC, train=Plan(rounds=ROUNDS), schedule=schedule)
        self.machine = open_aggregator(settings, self._folder)
        self.length = self.machine.consensus.z_hat.size
        self._wire = MemoryBroker()
        self._now = 0.0
        self._waiting: deque[tuple[Puppet, bytes]] = deque()
        self._gateway = self._wire.transport((TOPICS.state("+"), TOPICS.up("+")))
        self._gateway.start(self._on_event)
        body = coding.encode("int8", np.random.default_rng(0).normal(0, 1e-3, self.length).astype(np.float32))
        for number in range(clients):
            self._join(Puppet(f"d{number:03d}", body, self.length))

    def run(self) -> None:
        """All rounds; a puppet answers when everything before it has been delivered."""
        while self.machine.state.status != "finished":
            if self._wire.deliver():
                continue
            if self._waiting:
                puppet, payload = self._waiting.popleft()
                for answer in puppet.answers(payload):
                    self._wire.publish(TOPICS.up(puppet.device), answer, retain=False)
            else:
                self._now += 1.0
                self._carry_out(self.machine.tick(self._now))

    def _join(self, puppet: Puppet) -> None:
        client = self._wire.transport((TOPICS.down(puppet.device),))
        client.start(
            lambda event: self._waiting.append((puppet, event.payload)) if isinstance(event, Arrived) else None
        )
        birth = messages.Birth(boot="bench", samples=100, profile="", emulated=False, codecs=coding.CODECS)
        client.publish(TOPICS.state(puppet.device), messages.encode(birth), retain=True)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._carry_out(self.machine.connected(self._now))
        elif isinstance(event, Arrived):
            self._carry_out(self.machine.arrived(event.topic, event.payload, self._now))

    def _carry_out(self, actions: list[AggregatorAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self._gateway.publish(action.topic, action.payload, retain=action.retain)
            elif isinstance(action, Store):
                self._folder.store(action.device, action.round, action.kappa, action.blob, factor=action.factor)
            elif isinstance(action, Snapshot):
                self._folder.take_snapshot(action.state, action.consensus)


def aggregator(clients: int) -> dict[str, float]:
    """Peak memory and CPU of an aggregator with so many clients, for `ROUNDS` rounds."""
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), clients)
        began = time.process_time()
        bench.run()
        return {
            "clients": clients,
            "parameters": bench.length,
            "peak_rss_mb": peak_rss_bytes() / 1e6,
            "cpu_ms_per_client_round": 1e3 * (time.process_time() - began) / clients / ROUNDS,
        }


def idle_agent() -> float:
    """Resident megabytes of a connected agent that has nothing to do."""
    with tempfile.TemporaryDirectory() as place, broker.running("auto") as running:
        rows = np.zeros((10, 4), np.float32)
        labels = np.arange(10) % 2
        path = Path(place) / "agent.toml"
        save_client(
            Path(place) / "data.npz", ClientData(x_train=rows, y_train=labels, x_test=rows[:2], y_test=labels[:2])
        )
        settings = AgentSettings(
            device="idle",
            federation="bench",
            data="data.npz",
            broker=BrokerSettings(url=running.endpoint.url, version=running.endpoint.version),
        )
        path.write_text(to_toml(settings))
        command = [sys.executable, "-m", "fedeq_edge", "agent", "run", "--config", str(path)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            time.sleep(8.0)  # start, connect, come to rest
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            return pages * 4096 / 1e6
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """Each size in a process of its own, because a peak is a process's."""
    if len(sys.argv) == 2:
        print(json.dumps(aggregator(int(sys.argv[1]))))
        return
    print("clients  parameters  aggregator peak MB  CPU ms per client and round")
    for clients in (10, 50, 200):
        done = subprocess.run([sys.executable, __file__, str(clients)], capture_output=True, text=True, check=True)
        row = msgspec.json.decode(done.stdout)
        print(
            f"{row['clients']:7d}  {row['parameters']:10d}  {row['peak_rss_mb']:18.1f}  "
            f"{row['cpu_ms_per_client_round']:27.2f}"
        )
    print(f"agent at rest: {idle_agent():.1f} MB resident")


if __name__ == "__main__":
    main()
