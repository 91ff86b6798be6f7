"""The wire against paho that only sends and receives: make bench-wire.

Everything is the real thing in processes of its own: mosquitto, the aggregator by its command, and the links of many
devices (links.py) over TCP on this machine. CPU is the kernel's clock of each process, the mean over a period of rounds
once files are written over. A table goes to stderr, one JSON line per figure to stdout.
"""

import argparse
import contextlib
import json
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from fedeq_edge.consensus.masked import Masking
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings, to_toml
from fedeq_edge.training.step import Plan
from fedeq_edge.transport import broker
from fedeq_edge.transport.faults import FaultProxy
from fedeq_edge.transport.mqtt import Endpoint
from tests.bench import raw
from tests.bench.figures import Figure, har_file, measure
from tests.bench.floor import required
from tests.bench.links import FEDERATION, Link, Mail
from tests.bench.processes import Reading, child, memory_bytes

CLIENTS: Final = 100
LINK_PROCESSES: Final = 10  # a process of 100 links spends a third of its time on its own threads' lock
PARTS: Final = ("broker", "aggregator", "links")
WARM_UP: Final = 2  # rounds: connections, first consensus, first touch of memory
ROUNDS: Final = 10
STEADY: Final = 34  # rounds until files are written over and duals are folded (storage/), twice the longest period
PERIOD: Final = 16  # rounds after which a client has written its whole state once, and an aggregator every dual
PATIENCE_S: Final = 300
HEADERS_BYTES: Final = 52  # of a TCP segment over IPv4 with timestamps, without the link layer's


def model(channels: int) -> ModelSpec:
    """HAR's 1-D model, as wide as asked: 120 channels are 100,200 shared parameters, 200 are 263,000."""
    return ModelSpec(input_shape=(9, 128), classes=6, cell="residual", channels=channels, stem_kernel=12, stem_stride=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A fleet's readings, and what its aggregator's memory came to."""

    readings: list[Reading]
    aggregator_peak_bytes: int = 0

    def rounds(self) -> list[tuple[Reading, Reading]]:
        """Beginning and end of every round after the first few."""
        return list(zip(self.readings[WARM_UP:-1], self.readings[WARM_UP + 1 :], strict=True))

    def cpu(self, name: str) -> float:
        """Seconds a round, of all processes whose names begin with `name`; the mean over the last period, or less."""
        rounds = min(PERIOD, len(self.readings) - 1 - WARM_UP)
        before, after = self.readings[-rounds - 1].cpu, self.readings[-1].cpu
        return sum(after[key] - before[key] for key in before if key.startswith(name)) / rounds

    def total_cpu(self) -> float:
        """Seconds a round, of all parts."""
        return sum(self.cpu(part) for part in PARTS)

    def bytes(self) -> tuple[float, float]:
        """(up, down) a client and round; the median."""
        pairs = self.rounds()
        up = statistics.median(after.up - before.up for before, after in pairs)
        return up, statistics.median(after.down - before.down for before, after in pairs)


class Place:
    """A temporary folder, a mosquitto, and the processes that are started beside it."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.port = broker.free_port()
        self._stack = stack
        self._log = stack.enter_context((folder / "log").open("wb"))
        config = folder / "mosquitto.conf"
        config.write_text(
            # packets as in broker/mosquitto.conf; nothing is dropped from a queue, or bare paho would lose messages
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_queued_messages 0\n"
            f"max_packet_size {broker.MAX_PACKET_BYTES}\n"
        )
        self.broker = self.start([str(broker.mosquitto_path()), "-c", str(config)])
        raw.wait_until_it_listens(self.port)

    @property
    def url(self) -> str:
        """The broker's."""
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self, command: Sequence[str]) -> "subprocess.Popen[str]":
        """A process that ends when the place is left."""
        return self._stack.enter_context(child(command, self._log))

    def python(self, *arguments: str) -> "subprocess.Popen[str]":
        """The same, of this interpreter."""
        return self.start([sys.executable, *arguments])

    def aggregator(self, **changes: object) -> "subprocess.Popen[str]":
        """`fedeq aggregator run` of a federation that waits for nobody's training."""
        chosen = {"train": Plan(), "model": model(120), "broker": BrokerSettings(url=self.url), **changes}
        path = self.folder / "aggregator.toml"
        path.write_text(to_toml(AggregatorSettings(federation=FEDERATION, **chosen)))  # type: ignore[arg-type]
        return self.python("-m", "fedeq_edge", "aggregator", "run", "--config", str(path))

    def readings(self, module: str, options: Sequence[str], watch: dict[str, int], count: int) -> Iterator[Reading]:
        """Of `count` links in several processes of `module`; the last one to be started reads them all."""
        share = -(-count // LINK_PROCESSES)
        *others, last = range(0, count, share)
        for first in others:
            process = self.python("-m", module, *options, "--first", str(first), "--count", str(share))
            watch = {**watch, f"links-{process.pid}": process.pid}
        told = (f"{name}={pid}" for name, pid in watch.items())
        reader = self.python(
            "-m", module, *options, "--first", str(last), "--count", str(count - last), "--watch", *told
        )
        assert reader.stdout is not None
        return (msgspec.json.decode(line, type=Reading) for line in reader.stdout)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """For one measurement."""
    with tempfile.TemporaryDirectory(prefix="bench-wire-") as folder, contextlib.ExitStack() as stack:
        yield Place(Path(folder), stack)


def ours(codec: str, clients: int = CLIENTS, rounds: int = ROUNDS, **changes: object) -> Run:
    """A federation with everything on but TLS. changes: further AggregatorSettings."""
    schedule = Schedule(min_devices=clients, deadline_s=PATIENCE_S, final_s=1.0)
    with place() as here:
        aggregator = here.aggregator(codec=codec, train=Plan(rounds=rounds + 1), schedule=schedule, **changes)
        watch = {"broker": here.broker.pid, "aggregator": aggregator.pid}
        found = _first(here.readings("tests.bench.links", ["--broker", here.url], watch, clients), rounds)
        return Run(readings=found, aggregator_peak_bytes=memory_bytes(aggregator.pid, "VmHWM"))


def bare(size: int, clients: int = CLIENTS, rounds: int = ROUNDS) -> Run:
    """Paho alone: one retained payload of `size` bytes down, one up from every client."""
    options = ["--port", str(0), "--bytes", str(size)]
    with place() as here:
        options[1] = str(here.port)
        counts = ["--count", str(clients), "--rounds", str(rounds + 1)]
        aggregator = here.python("-m", "tests.bench.bare", "aggregator", *options, *counts)
        watch = {"broker": here.broker.pid, "aggregator": aggregator.pid}
        return Run(readings=_first(here.readings("tests.bench.bare", ["links", *options], watch, clients), rounds))


def _first(readings: Iterator[Reading], rounds: int) -> list[Reading]:
    found = []
    signal.alarm(PATIENCE_S)  # an aggregator that has died leaves its links waiting
    for reading in readings:
        found.append(reading)
        if len(found) == rounds:
            break
    signal.alarm(0)
    return found


def parameters(spec: ModelSpec) -> int:
    """Length of the shared vector."""
    return initial(spec, 0)[0].size


def cpu() -> Iterator[Figure]:
    """CPU seconds of a round, all parts, ours over bare; and what a contribution of few bits costs the aggregator.

    floor: bare, and what a contribution needs in any protocol that names, keeps and adds it exactly (floor.py).
    """
    size, rounds = parameters(model(120)), STEADY + PERIOD
    plain, float32 = bare(4 * size, rounds=rounds), ours("f32", rounds=rounds)
    with tempfile.TemporaryDirectory(prefix="bench-floor-") as folder:
        client, aggregator = required(size, Path(folder))
    floor = plain.total_cpu() + CLIENTS * (client + aggregator)
    yield _cost("bare", plain)
    yield Figure(
        section="cpu",
        name=f"CPU s a round, {CLIENTS} clients, floor",
        value=floor,
        detail=f"ms a client on top of bare: aggregator {1e3 * aggregator:.2f}, links {1e3 * client:.2f}",
    )
    yield _cost("ours, f32", float32)
    yield Figure(section="cpu", name="floor over bare", value=floor / plain.total_cpu())
    yield Figure(section="cpu", name="ours over bare", value=float32.total_cpu() / plain.total_cpu(), goal=1.5)
    yield _cost("ours, int4", ours("int4", rounds=rounds))


def _cost(name: str, run: Run) -> Figure:
    detail = ", ".join(f"{part} {1e3 * run.cpu(part) / CLIENTS:.2f}" for part in PARTS)
    return Figure(
        section="cpu",
        name=f"CPU s a round, {CLIENTS} clients, {name}",
        value=run.total_cpu(),
        detail=f"ms a client: {detail}",
    )


def payload() -> Iterator[Figure]:
    """Bytes of a client and round on the wire, headers and acknowledgements included, over float32's two vectors."""
    plain = 4 * parameters(model(120))
    for codec, goal in (("f32", None), ("int8", 0.26), ("int4", 0.135), ("int4+z", None), ("int2", None)):
        up, down = ours(codec, clients=10, rounds=8).bytes()
        detail = f"up {up / plain:.4f} ({up:.0f} bytes), down {down / plain:.4f} ({down:.0f} bytes)"
        yield Figure(
            section="payload", name=f"{codec} over float32", value=(up + down) / 2 / plain, goal=goal, detail=detail
        )


def masking() -> Iterator[Figure]:
    """Bytes up of a client and masked round over float32's vector, and what a masked round costs in CPU."""
    plain = 4 * parameters(model(120))
    for clients in (10, CLIENTS):
        method = {"preset": "fedeq-published"}
        run = ours("int8", clients=clients, rounds=WARM_UP + 3, method=method, masking=Masking())
        up, _ = run.bytes()
        cost = ", ".join(f"{part} {1e3 * run.cpu(part) / clients:.1f}" for part in PARTS)
        yield Figure(
            section="masking",
            name=f"{clients} clients: bytes up over float32",
            value=up / plain,
            detail=f"{up:.0f} bytes; CPU ms a client: {cost}",
        )


def memory() -> Iterator[Figure]:
    """Peak resident memory of the aggregator, 1000 clients over 100."""
    peaks = {clients: ours("int4", clients=clients, rounds=4).aggregator_peak_bytes for clients in (100, 1000)}
    for clients, peak in peaks.items():
        yield Figure(section="memory", name=f"aggregator with {clients} clients, peak MB resident", value=peak / 1e6)
    yield Figure(section="memory", name="1000 clients over 100", value=peaks[1000] / peaks[100], goal=1.1)


def idle() -> Iterator[Figure]:
    """Bytes a minute between a resting agent and its broker, of MQTT and with the headers of its segments."""
    minutes = 3.0  # as many pings
    with place() as here, proxied(here.port) as proxy:
        agent = _agent(here, proxy.url)
        time.sleep(10.0)  # start, connect, come to rest
        before, packets = _through(proxy), sum(proxy.packets.values())
        time.sleep(60.0 * minutes)
        mqtt, packets = _through(proxy) - before, sum(proxy.packets.values()) - packets
        resident = memory_bytes(agent.pid, "VmRSS")
    # a ping is a segment, its answer another, and the answer is acknowledged by a third
    segments = packets * 3 / 2
    wire = (mqtt + segments * HEADERS_BYTES) / minutes
    yield Figure(section="idle", name="agent at rest, MQTT bytes a minute", value=mqtt / minutes)
    yield Figure(section="idle", name="with TCP and IP headers (3 segments a ping)", value=wire, goal=200)
    yield Figure(section="idle", name="agent at rest, MB resident", value=resident / 1e6)


def _through(proxy: FaultProxy) -> int:
    return proxy.sent["up"] + proxy.sent["down"]


def _agent(here: Place, url: str) -> "subprocess.Popen[str]":
    rows, labels = np.zeros((10, 4), np.float32), np.arange(10) % 2
    data = ClientData(x_train=rows, y_train=labels, x_test=rows[:2], y_test=labels[:2])
    save_client(here.folder / "data.npz", data)
    settings = AgentSettings(device="idle", federation=FEDERATION, data="data.npz", broker=BrokerSettings(url=url))
    path = here.folder / "agent.toml"
    path.write_text(to_toml(settings))
    return here.python("-m", "fedeq_edge", "agent", "run", "--config", str(path))


@contextlib.contextmanager
def proxied(port: int) -> Iterator[FaultProxy]:
    """A proxy before the broker."""
    proxy = FaultProxy(port)
    try:
        yield proxy
    finally:
        proxy.stop()


def flap() -> Iterator[Figure]:
    """A contribution of a megabyte over a link of 64 kB/s that is cut every 2 s."""
    spec = model(200)
    with place() as here, proxied(here.port) as proxy:
        here.aggregator(model=spec, codec="f32", schedule=Schedule(deadline_s=PATIENCE_S), train=Plan(rounds=2))
        sent, seconds, cuts = _contribute(here, proxy)
    megabyte = 4 * parameters(spec)
    yield Figure(
        section="flap",
        name="1 MB up at 64 kB/s, cut every 2 s: bytes sent over size",
        value=sent / megabyte,
        goal=1.2,
        detail=f"{sent} bytes for {megabyte} in {seconds:.0f} s with {cuts} cuts",
    )


def _contribute(here: Place, proxy: FaultProxy) -> tuple[int, float, int]:
    """(bytes sent, seconds, cuts) from the end of training to the verdict; the link is good until then."""

    def worsen(number: int) -> None:
        if number == 1:
            proxy.conditions.rate = 64_000.0
            proxy.flap(2.0)

    inbox: queue.SimpleQueue[Mail] = queue.SimpleQueue()
    link = Link("d0", Endpoint(url=proxy.url), here.folder, inbox, worsen)
    before, began = 0, time.monotonic()
    while link.machine.state.accepted_round < 1:
        if time.monotonic() - began > PATIENCE_S:
            raise SystemExit(f"1 MB has not arrived after {PATIENCE_S:.0f} s and {proxy.cuts} cuts")
        with contextlib.suppress(queue.Empty):
            link.on_event(inbox.get(timeout=0.5).event)
        link.tick()
        if not proxy.cuts and link.machine.state.pending is None:
            before, began = proxy.sent["up"], time.monotonic()
    result = proxy.sent["up"] - before, time.monotonic() - began, proxy.cuts
    proxy.flap(None)
    link.stop()
    return result


def accuracy() -> Iterator[Figure]:
    """Points of HAR lost with int4 both ways against float32, mean of three seeds."""
    means = {}
    for codec in ("f32", "int4"):
        found = [_har(codec, seed) for seed in (0, 1, 2)]
        means[codec] = statistics.mean(found)
        shown = ", ".join(f"{100 * value:.2f}" for value in found)
        yield Figure(
            section="accuracy", name=f"HAR, {codec} both ways, percent", value=100 * means[codec], detail=shown
        )
    yield Figure(section="accuracy", name="points lost", value=100 * (means["f32"] - means["int4"]), goal=0.3)


def _har(codec: str, seed: int) -> float:
    data = har_file()
    with tempfile.TemporaryDirectory(prefix="bench-har-") as folder:
        columns = ["--x", "X", "--client", "subject", "--test", "local_test", "--classes", "0-5"]
        more = ["--codec", codec, "--seed", str(seed), "--json", "--out", f"{folder}/run"]
        command = [sys.executable, "-m", "fedeq_edge", "demo", "--data", str(data), *columns, *more]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return float(json.loads(done.stdout)["accuracy"]["personal"])


def load() -> Iterator[Figure]:
    """What the broker needs for thousands of raw connections; the capacity page of broker/README.md rests on it."""
    for clients, size in ((1000, 50_000), (1000, 400_000), (5000, 50_000)):
        with place() as here:
            found = raw.measure(here.port, here.broker.pid, clients=clients, size=size)
        name = f"{clients} connections, {size // 1000} kB"
        yield Figure(section="load", name=f"{name}: broker CPU ms per MB, down", value=found.down_ms_per_mb)
        yield Figure(section="load", name=f"{name}: broker CPU ms per MB, up", value=found.up_ms_per_mb)
        yield Figure(section="load", name=f"{name}: broker kB a connection at rest", value=found.kb_a_connection)
        yield Figure(section="load", name=f"{name}: broker peak MB", value=found.peak_mb, detail="all uploads at once")


SECTIONS: dict[str, Callable[[], Iterable[Figure]]] = {
    "cpu": cpu,
    "payload": payload,
    "masking": masking,
    "memory": memory,
    "idle": idle,
    "flap": flap,
    "accuracy": accuracy,
    "load": load,
}


def main() -> None:
    """Measure the sections named on the command line, all of them when none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with us, our processes
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"a round did not come within {PATIENCE_S} s"))
    measure(SECTIONS, options.sections)


if __name__ == "__main__":
    main()
