"""The same federation on our own machines and on Flower's engine: accuracy, CPU, wall, bytes and memory.

    python -m tests.bench.flower [NODES ...]        in an environment with fedeq-edge[torch,demo,flower]

Each run is a process of its own. What it and its descendants cost is read from /proc, where they carry a mark in their
environment: Ray's daemons are nobody's children. CPU of training is the devices' own account of it.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid, ServerApp
from msgspec.structs import replace

from fedeq_edge.data.digits import digits_fleet
from fedeq_edge.data.npz import ClientData
from fedeq_edge.flower import ConsensusStrategy, client_app
from fedeq_edge.hardware.clock import DeviceClock
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import Calibration
from tests.bench.processes import cpu_seconds
from tests.flower.in_process import InProcessGrid, partitions
from tests.flower.machines import Machines

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

ROUNDS, SEEDS, NODES = 10, (0, 1, 2), (10, 50)
MARK = "FEDEQ_BENCH_MARK"
# Every budget is affordable, so that all engines train with the same ones: what a step really costs varies by the hour.
CHEAP = Calibration(batch=16, fixed_s=1e-6, evaluation_s=1e-6, adjoint_s=1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """z: digest of the last consensus. accuracy: mean over the personal models. *_bytes: of payloads, all rounds.

    training_s: CPU that devices spent on training. wall_s: of the rounds, without start and personal models.
    """

    z: str
    accuracy: float
    training_s: float
    wall_s: float
    up_bytes: int = 0
    down_bytes: int = 0


def settings(nodes: int, seed: int) -> AggregatorSettings:
    model, plan, method = recommend((1, 8, 8), 10)
    return AggregatorSettings(
        federation="digits",
        model=model,
        train=replace(plan, rounds=ROUNDS, epochs=2, compute_s=1e4),
        method={"preset": method.name, "heads": method.heads},
        schedule=Schedule(min_devices=nodes, deadline_s=2e4, seed=seed),
        seed=seed,
    )


@cache
def fleet(nodes: int, seed: int) -> Mapping[str, ClientData]:
    """1797 images do not suffice for 60 on each of 50 devices."""
    found = digits_fleet(devices=nodes, train_per_device=min(60, 1000 // nodes), seed=seed)
    return {name.replace("device", "client"): data for name, data in found.items()}


@dataclass(frozen=True)
class Load:
    """Data of a node, read in whatever process it lives in."""

    seed: int

    def __call__(self, node: Mapping[str, Any]) -> ClientData:
        return fleet(node["num-partitions"], self.seed)[f"client-{node['partition-id']}"]


# ---- engines ---------------------------------------------------------------------------------------------------


def machines(nodes: int, seed: int) -> Outcome:
    """Our own protocol over an in-memory broker, one process."""
    chosen = settings(nodes, seed)
    began = time.monotonic()
    ours = Machines(chosen, fleet(nodes, seed), CHEAP, clock=DeviceClock(shared=True))
    ours.run()
    counters = ours.aggregator.counters
    rounds = [line for line in ours.lines if line["kind"] == "round"]
    return Outcome(
        z=rounds[-1]["z"],
        accuracy=statistics.fmean(report.accuracy_personal for report in ours.reports.values()),
        training_s=_training_s(rounds),
        wall_s=time.monotonic() - began,
        up_bytes=counters.bytes_in,
        down_bytes=counters.bytes_out,
    )


def in_process(nodes: int, seed: int) -> Outcome:
    """Our Flower apps without Flower's engine: what the adapter itself costs."""
    app = client_app(settings(nodes, seed), Load(seed), calibration=CHEAP, clock=DeviceClock(shared=True))
    grid = InProcessGrid(app, partitions(nodes))
    outcome = _strategy(nodes, seed, grid)
    return Outcome(**{**asdict(outcome), "up_bytes": _size(grid.answers), "down_bytes": _size(grid.sent)})


def ray(nodes: int, seed: int) -> Outcome:
    """Flower's simulation engine."""
    from flwr.simulation import run_simulation  # noqa: PLC0415  # imports Ray

    found: list[Outcome] = []
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator, unused-ignore]  # as Flower's own idiom
    def main(grid: Grid, _: Context) -> None:
        found.append(_strategy(nodes, seed, grid))

    app = client_app(settings(nodes, seed), Load(seed), calibration=CHEAP, clock=DeviceClock(shared=True))
    resources: dict[str, dict[str, Any]] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, nodes, backend_config=resources)
    return found[0]


ENGINES: dict[str, Callable[[int, int], Outcome]] = {
    "our machines": machines,
    "Flower apps alone": in_process,
    "Flower simulation": ray,
}


def _strategy(nodes: int, seed: int, grid: Grid) -> Outcome:
    strategy = ConsensusStrategy(settings(nodes, seed))
    began = time.monotonic()
    strategy.start(grid)
    return Outcome(
        z=str(strategy.history[-1]["z"]),
        accuracy=statistics.fmean(report.accuracy_personal for report in strategy.reports.values()),
        training_s=_training_s(strategy.history),
        wall_s=time.monotonic() - began,
    )


def _training_s(rounds: list[Mapping[str, Any]]) -> float:
    return float(sum(device["seconds"] for line in rounds for device in line["devices"].values()))


def _size(messages: list[Message]) -> int:
    """As Flower's protobuf; on a network its objects, polls and acknowledgements come on top."""
    return sum(recorddict_to_proto(message.content).ByteSize() for message in messages)


# ---- what it costs ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Meter:
    """CPU and memory of every process with this mark, looked at four times a second."""

    mark: str
    cpu: dict[int, float] = field(default_factory=dict)
    peak_bytes: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self._ended.wait(0.25):
            self.look()

    def look(self) -> None:
        total = 0
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() not in (place / "environ").read_bytes():
                    continue
                self.cpu[int(place.name)] = cpu_seconds(int(place.name))
                total += _pss_bytes(place)
            except OSError:
                continue
        self.peak_bytes = max(self.peak_bytes, total)

    def end(self) -> None:
        self._ended.set()


def _pss_bytes(place: Path) -> int:
    lines = (place / "smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measured(engine: str, nodes: int, seed: int) -> dict[str, Any]:
    """One run in a process of its own, and its cost."""
    meter = Meter(mark=f"{MARK}={uuid.uuid4().hex}")
    name, _, value = meter.mark.partition("=")
    quiet = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, name: value, **quiet, "PYTHONPATH": str(Path.cwd())}
    # Not -m: what Ray sends to its processes must not be of "__main__".
    program = "import sys; from tests.bench import flower; flower.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--run", engine, str(nodes), str(seed)]
    watching = threading.Thread(target=meter.watch)
    watching.start()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        meter.end()
        watching.join()
    outcome = json.loads(done.stdout.splitlines()[-1])
    cost = {"cpu_s": sum(meter.cpu.values()), "peak_bytes": meter.peak_bytes}
    row = {"engine": engine, "nodes": nodes, "seed": seed, **outcome, **cost}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds."""
    first = rows[0]
    mean = {
        name: statistics.fmean(row[name] for row in rows)
        for name, kind in first.items()
        if kind.__class__ in (int, float)
    }
    accuracies = [row["accuracy"] for row in rows]
    spread = statistics.stdev(accuracies) if len(rows) > 1 else 0.0
    per_round = {name: value / ROUNDS for name, value in mean.items()}
    told = f"{per_round['down_bytes'] / 1e3:.1f} kB down, {per_round['up_bytes'] / 1e3:.1f} kB up a round"
    print(
        f"{first['engine']:18} {first['nodes']:3} nodes  accuracy {mean['accuracy']:.4f} +- {spread:.4f}  "
        f"CPU {mean['cpu_s']:.1f} s in all, {per_round['training_s']:.2f} s a round for training; "
        f"wall {per_round['wall_s']:.2f} s a round; PSS {mean['peak_bytes'] / 2**20:.0f} MB; "
        f"{told if mean['up_bytes'] else 'bytes as the apps alone'}"
    )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--run"]:
        engine, nodes, seed = arguments[1], int(arguments[2]), int(arguments[3])
        print(json.dumps(asdict(ENGINES[engine](nodes, seed))), flush=True)
        return
    for nodes in map(int, arguments) if arguments else NODES:
        rows = {engine: [measured(engine, nodes, seed) for seed in SEEDS] for engine in ENGINES}
        for found in rows.values():
            show(found)
        same = all(len({row["z"] for row in runs}) == 1 for runs in zip(*rows.values(), strict=True))
        print(f"the consensus of all engines is {'the same, bit for bit' if same else 'NOT the same'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
