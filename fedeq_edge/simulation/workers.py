"""Who does the jobs of a run: this process, or processes of this machine, one for each core.

A worker process is a program of its own (worker.py) that is spoken to by pipes, so that a crash of the library that
trains takes nothing else along. Jobs hold all that they need, so it does not matter which worker does one, nor how
many there are: outcomes come in the order of the jobs.
"""

import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Final, Protocol

import psutil

from fedeq_edge import structs
from fedeq_edge.backends import dedicated
from fedeq_edge.errors import StateError
from fedeq_edge.simulation import jobs
from fedeq_edge.simulation.jobs import Begin, Consensus, Job, Outcome
from fedeq_edge.simulation.scenario import Scenario
from fedeq_edge.simulation.site import Site
from fedeq_edge.training.step import BackendName, Vector

# Jobs under way for each worker: one that is done, and one that follows without a wait.
AHEAD: Final = 2
_END_S: Final = 5.0


class Workers(Protocol):
    """Workers that go through runs one after the other."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def begin(self, scenario: Scenario) -> None:
        """Jobs are of this run from here on."""
        ...

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        ...

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs, in their order. Raises StateError naming a job that kills its worker twice."""
        ...

    @property
    def cpu_s(self) -> float | None:
        """What they have taken since this run began beside this process, None where nobody can tell."""
        ...

    def close(self) -> None:
        """No worker is left."""
        ...


class Here:
    """The one worker that this process is."""

    count = 1
    cpu_s = 0.0

    def begin(self, scenario: Scenario) -> None:
        """Jobs are of this run from here on."""
        self._site = Site(scenario)
        self._backend: BackendName = scenario.setup.experiment.backend

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        self._site.hold(base, z)

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs, in their order."""
        for job in wanted:
            with dedicated(self._backend):
                found = self._site.do(job)
            yield found

    def close(self) -> None:
        """Nothing is left of the last run."""
        with contextlib.suppress(AttributeError):
            del self._site


class Worker:
    """A process that does jobs. Raises BrokenPipeError or EOFError from `ask` where it has died."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedeq_edge.simulation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C on the terminal is ours to act on
        )
        self._told: list[bytes] = []

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """What it has taken so far, 0 of one that has died."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def ask(self, setting: list[bytes], job: Job) -> Outcome:
        """The outcome of this job. setting: the packed run and consensus that it is of, sent where they are news."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for news in setting:
            if not any(news is told for told in self._told):
                jobs.write(self._process.stdin, news)  # type: ignore[arg-type]  # a pipe of bytes
        self._told = setting
        jobs.write(self._process.stdin, structs.pack(job))  # type: ignore[arg-type]
        content = jobs.read(self._process.stdout)  # type: ignore[arg-type]
        if content is None:
            raise EOFError
        return jobs.outcome(content)

    def end(self) -> int:
        """It has left, at once where it was at work. Returns its exit status."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=_END_S)
        return self._process.wait(_END_S)


class Processes:
    """`count` worker processes on this machine."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: SimpleQueue[Worker | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)  # started when its first job comes
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._setting: list[bytes] = []
        self._taken_before: dict[Worker, float] = {}  # CPU seconds of each worker that lives, as the run began

    @property
    def cpu_s(self) -> float:
        """Of those that live: what one took that has died is lost with it."""
        return sum(worker.cpu_s - before for worker, before in self._taken_before.items())

    def begin(self, scenario: Scenario) -> None:
        """Jobs are of this run from here on."""
        self._taken_before = {worker: worker.cpu_s for worker in self._taken_before}
        self._setting = [structs.pack(Begin(setup=scenario.setup))]

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        self._setting = [self._setting[0], structs.pack(Consensus(base=base, z=z))]

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs, in their order. Raises StateError naming a job that kills its worker twice."""
        under_way: deque[Future[Outcome]] = deque()
        try:
            for job in wanted:
                under_way.append(self._threads.submit(self._do, self._setting, job))
                if len(under_way) >= AHEAD * self.count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def close(self) -> None:
        """No worker is left."""
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self.count):
            worker = self._free.get()
            if worker is not None:
                worker.end()

    def _do(self, setting: list[bytes], job: Job) -> Outcome:
        """By whichever worker is free; one that dies is replaced, and has one more try."""
        worker, status = self._free.get(), 0
        try:
            for _ in range(2):
                worker = worker or self._new()
                try:
                    return worker.ask(setting, job)
                except (BrokenPipeError, EOFError):
                    del self._taken_before[worker]
                    status, worker = worker.end(), None
            raise StateError(crashed(job, f"exit status {status}"))
        finally:
            self._free.put(worker)

    def _new(self) -> Worker:
        worker = Worker()
        self._taken_before[worker] = 0.0
        return worker


def crashed(job: Job, how: str) -> str:
    """What is said of a job that no worker survives."""
    return (
        f"simulation: the worker died twice in job {job.number} ({job.kind}, client {job.device}, round {job.round}; "
        f"{how}); is the machine out of memory? Fewer --workers need less; run the same command again to go on"
    )
