"""What simulating costs beside training: make bench-simulate.

Clients whose training is a copy of a constant vector, so that all that is left is protocol, coding, consensus, files
and the engine itself. A round of all clients at 100,200 shared parameters, int8 both ways, each size in a process of
its own: the first round, in which everybody fetches the whole consensus, and the mean of those after it. Beside it the
parts that no engine can do without, on the same vectors. A table on stderr, one JSON line a figure on stdout.
"""

import argparse
import cProfile
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedeq_edge.consensus.fixed import dual_step, fraction_bits
from fedeq_edge.data.npz import ClientData
from fedeq_edge.hardware.memory import peak_rss_bytes
from fedeq_edge.protocol.state import NOTHING
from fedeq_edge.simulation.engine import Simulation
from fedeq_edge.simulation.experiment import parse
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.journal import Journal
from fedeq_edge.simulation.scenario import Setup, prepare
from fedeq_edge.training.step import Budget, LocalResult, Personal, Vector
from fedeq_edge.wire import coding
from tests.simulation.reached import EVALUATION

ROUNDS: Final = 4
SIZES: Final = (100, 1000, 5000)
REPEATS: Final = 50
MODEL: Final = {"preset": "plain", "cell": "residual", "channels": 120, "stem_kernel": 12, "stem_stride": 4}


class Trivial:
    """A runner whose training takes no time: every client moves by the same vector."""

    def __init__(self, size: int, head: int) -> None:
        rng = np.random.default_rng(0)
        self._difference = (0.01 * rng.standard_normal(size)).astype(np.float32)
        self._head = np.zeros(head, np.float32)

    def hold(self, base: bytes, z: Vector) -> None:
        """Nobody looks at z."""

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs."""
        for job in wanted:
            yield self._outcome(job)

    def _outcome(self, job: Job) -> Outcome:
        budget, evaluation = Budget(forward=4, adjoint=2), None
        result, personal = None, None
        if job.kind == "train":
            result = LocalResult(
                difference=self._difference,
                head=self._head,
                loss=0.5,
                residual=1e-3,
                backward_residual=1e-3,
                budget=budget,
                steps=1,
                seconds=1.0,
                reduced=False,
                accuracy_consensus=0.5,
            )
        else:
            evaluation = EVALUATION
        if job.kind == "personalise":
            personal = Personal(
                theta=NOTHING,
                head=NOTHING,
                budget=budget,
                residual=1e-3,
                certificate=None,
                accuracy_personal=0.5,
                accuracy_consensus=0.5,
                local_only=None,
            )
        return Outcome(
            number=job.number, name=job.name, result=result, personal=personal, evaluation=evaluation, seconds=1.0
        )


def simulation(clients: int, codec: str, folder: Path, say: Callable[[dict[str, Any]], None]) -> Simulation:
    """A run of so many clients with two small samples each."""
    tables = {
        "name": "bench",
        "model": MODEL,
        "train": {"rounds": ROUNDS},
        "method": {"preset": "admm"},
        "wire": {"codec": codec},
        "evaluation": {"every": 0, "local": False},
    }
    x, y = np.random.default_rng(0).standard_normal((2, 9, 16)).astype(np.float32), np.arange(2)
    data = ClientData(x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    fleet = {f"c{number:05d}": data for number in range(clients)}
    scenario = prepare(Setup(experiment=parse(tables, "bench")[0].experiment, seed=0), fleet)
    runner = Trivial(scenario.consensus.size, scenario.start[1].size)
    journal = Journal(runner, folder / "bench.journal", b"bench")
    return Simulation(scenario, journal, say, folder)


def measure(clients: int, codec: str) -> dict[str, float]:
    """CPU seconds of the first round and of one after it, and MB of memory, in this process."""
    marks: list[float] = []

    def say(line: dict[str, Any]) -> None:
        if line["kind"] == "round":
            marks.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        run = simulation(clients, codec, Path(folder), say)
        began = time.process_time()
        run.run()
    return {
        "clients": clients,
        "first_s": marks[0] - began,
        "later_s": (marks[-1] - marks[0]) / max(1, ROUNDS - 1),
        "rss_mb": peak_rss_bytes() / 1e6,
    }


def parts(codec: str, size: int = 100_200) -> dict[str, float]:
    """CPU milliseconds a client and round of what cannot be left out, on one vector."""
    vector = (0.01 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    body = coding.encode(codec, vector, random.Random(0))
    step, total = dual_step(vector, 0.1, fraction_bits(np.float32)), np.zeros(size, np.int64)
    return {
        f"encode {codec}": _milliseconds(lambda: coding.encode(codec, vector, random.Random(0))),
        f"decode {codec}": _milliseconds(lambda: coding.decode(codec, body, size)),
        "sha256 of it, twice": 2 * _milliseconds(lambda: hashlib.sha256(body)),
        "step of the dual": _milliseconds(lambda: dual_step(vector, 0.1, fraction_bits(np.float32))),
        "nu and H move": 2 * _milliseconds(lambda: np.add(total, step, out=total)),
    }


def _milliseconds(act: Callable[[], object]) -> float:
    act()
    began = time.process_time()
    for _ in range(REPEATS):
        act()
    return 1e3 * (time.process_time() - began) / REPEATS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--codec", default="int8", help="of differences, both ways")
    parser.add_argument("--here", action="store_true", help="measure one size in this process")
    parser.add_argument("--profile", action="store_true", help="profile one size in this process")
    chosen = parser.parse_args()
    if chosen.profile:
        with cProfile.Profile() as profile:
            measure(chosen.sizes[0], chosen.codec)
        profile.print_stats("tottime")
    elif chosen.here:
        print(json.dumps(measure(chosen.sizes[0], chosen.codec)))
    else:
        _table(chosen.sizes, chosen.codec)


def _table(sizes: Iterable[int], codec: str) -> None:
    print(f"{'clients':>8} {'first round':>14} {'later rounds':>14} {'a client':>10} {'memory':>10}", file=sys.stderr)
    for size in sizes:
        command = [sys.executable, __file__, "--here", "--codec", codec, str(size)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{size:8d} {found['first_s']:12.2f} s {found['later_s']:12.2f} s "
            f"{1e3 * found['later_s'] / size:7.2f} ms {found['rss_mb']:7.0f} MB",
            file=sys.stderr,
        )
        print(json.dumps(found))
    known = parts(codec)
    for name, cost in known.items():
        print(f"{name:>24} {cost:7.3f} ms", file=sys.stderr)
    print(f"{'together':>24} {sum(known.values()):7.3f} ms", file=sys.stderr)
    print(json.dumps(known))


if __name__ == "__main__":
    main()
