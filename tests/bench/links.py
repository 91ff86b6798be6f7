"""The links of many devices in one process, for the wire's benches: all of an agent but its trainer.

Each is the real state machine with its real folder on disk on a real MQTT connection; what a trainer would do takes no
time here and gives the same difference each time. The first to be asked for a round prints a reading (processes.py).
"""

import argparse
import math
import os
import queue
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedeq_edge.hardware.memory import keep_heap
from fedeq_edge.protocol import masked
from fedeq_edge.protocol.actions import ClientAction, Finished, Keep, Personalise, Publish, Save, Settle, Train
from fedeq_edge.protocol.client import Client, Identity, Usage
from fedeq_edge.storage.client import ClientFolder
from fedeq_edge.training.step import Budget, LocalResult, LocalTask, Vector
from fedeq_edge.transport.base import Arrived, Connected, Event, Traffic, Will
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from fedeq_edge.wire import coding
from fedeq_edge.wire.topics import Topics
from tests.bench.processes import Recorder, watched

FEDERATION = "bench"
TICK_S = 0.5
STEP = 1e-3  # of one parameter in a round, as on HAR


@dataclass(frozen=True, slots=True)
class Mail:
    """An event for a link."""

    link: "Link"
    event: Event


class Link:
    """One device. Its connection's threads put its mail into `inbox`; `asked` is told the round before it is done."""

    def __init__(
        self,
        device: str,
        endpoint: Endpoint,
        place: Path,
        inbox: "queue.SimpleQueue[Mail]",
        asked: Callable[[int], None],
    ) -> None:
        topics = Topics(FEDERATION)
        self._asked = asked
        self._folder = ClientFolder(place)
        identity = Identity(device=device, boot="bench", samples=100)
        codecs = (*coding.CODECS, *masked.features())
        self.machine = Client(identity, topics, self._folder.load(), codecs=codecs)
        self.finished = False
        self._transport = MqttTransport(
            endpoint,
            f"{FEDERATION}-{device}",
            (topics.manifest, topics.model, topics.aggregator, topics.down(device)),
            will=Will(topic=topics.state(device), payload=self.machine.offline()),
        )
        self._transport.start(lambda event: inbox.put(Mail(self, event)))

    def on_event(self, event: Event) -> None:
        """As the agent does."""
        now = time.monotonic()
        if isinstance(event, Connected):
            self._carry_out(self.machine.connected(now, event.packet_limit))
        elif isinstance(event, Arrived):
            self._carry_out(self.machine.arrived(event.topic, event.payload, now))

    def tick(self) -> None:
        """Time has passed."""
        self._carry_out(self.machine.tick(time.monotonic()))

    def traffic(self) -> Traffic:
        """Of its connection so far."""
        return self._transport.traffic()

    def stop(self) -> None:
        """Leave."""
        self._transport.stop()

    def _carry_out(self, actions: list[ClientAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self._transport.publish(action.topic, action.payload, retain=action.retain)
            elif isinstance(action, Save | Keep | Settle):
                self._folder.write(action)
            elif isinstance(action, Train):
                self._asked(action.task.round + 1)
                self._carry_out(self.machine.trained(trained(action.task), Usage(), time.monotonic()))
            elif isinstance(action, Personalise):
                self._carry_out(self.machine.failed("a bench has no model", time.monotonic()))
            elif isinstance(action, Finished):
                self.finished = True


_differences: dict[int, Vector] = {}


def trained(task: LocalTask) -> LocalResult:
    """What a trainer answers, with the same Gaussian difference each time."""
    size = task.z.size
    if size not in _differences:
        _differences[size] = np.random.default_rng(0).normal(0.0, STEP, size).astype(np.float32)
    return LocalResult(
        difference=_differences[size],
        head=task.head,
        loss=1.0,
        residual=1e-2,
        backward_residual=1e-2,
        budget=Budget(forward=8, adjoint=3),
        steps=4,
        seconds=1.0,
        reduced=False,
        accuracy_consensus=math.nan,
    )


class Links:
    """Links d<first>, d<first+1> ... and the thread that runs their machines."""

    def __init__(self, endpoint: Endpoint, first: int, count: int, place: Path, recorder: Recorder) -> None:
        self._recorder = recorder
        self._inbox: queue.SimpleQueue[Mail] = queue.SimpleQueue()
        self._links: list[Link] = []
        for number in range(first, first + count):
            folder = place / f"d{number:04d}"
            folder.mkdir()
            self._links.append(Link(folder.name, endpoint, folder, self._inbox, self._asked))

    def run(self) -> None:
        """Until the federation has finished."""
        while not all(link.finished for link in self._links):
            try:
                mail = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                for link in self._links:
                    link.tick()
            else:
                mail.link.on_event(mail.event)
        for link in self._links:
            link.stop()

    def _asked(self, number: int) -> None:
        if self._recorder.round_begins(number):
            traffic = [link.traffic() for link in self._links]
            count = len(traffic)
            self._recorder.record(number, sum(t.up for t in traffic) / count, sum(t.down for t in traffic) / count)


def main() -> None:
    """A process of links; pids after --watch are in its readings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", required=True, help="its URL")
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--watch", nargs="*", default=[], metavar="NAME=PID")
    options = parser.parse_args()
    keep_heap()
    recorder = Recorder({**watched(options.watch), f"links-{os.getpid()}": os.getpid()})
    with tempfile.TemporaryDirectory(prefix="bench-links-") as place:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        Links(Endpoint(url=options.broker), options.first, options.count, Path(place), recorder).run()


if __name__ == "__main__":
    main()
