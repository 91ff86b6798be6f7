"""Jobs on Ray actors, for fleets that outgrow one machine: `pip install 'fedeq-edge[ray]'`.

An actor is a worker as any other: it holds the data of all clients and a backend, and does whatever job is next. What
all jobs of a round have in common is put into Ray's store once, where the actors of a machine share it.
"""

import importlib
from collections import deque
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from fedeq_edge import structs
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.simulation import jobs
from fedeq_edge.simulation.jobs import Begin, Consensus, Job, Outcome
from fedeq_edge.simulation.scenario import Scenario
from fedeq_edge.simulation.worker import Place
from fedeq_edge.simulation.workers import AHEAD, crashed
from fedeq_edge.training.step import Vector


class Actor:
    """What runs on Ray: a place, and how much it has been told."""

    def __init__(self) -> None:
        self._place = Place()
        self._told: tuple[int, int] = (0, 0)

    def do(self, told: tuple[int, int], run: bytes, consensus: bytes, job: bytes) -> bytes | None:
        """The packed outcome of a packed job. told: numbers of its run and of its consensus."""
        if told[0] != self._told[0]:
            self._place.answer(run)
        if told != self._told:
            self._place.answer(consensus)
        self._told = told
        return self._place.answer(job)


class RayWorkers:
    """`count` actors on the cluster that Ray finds, or on this machine. Raises ConfigError where Ray is missing."""

    cpu_s = None  # of other machines, which do not tell

    def __init__(self, count: int) -> None:
        self.count = count
        self._ray = _library()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._actors = [self._actor() for _ in range(count)]
        self._setting: tuple[tuple[int, int], Any, Any] = ((0, 0), None, None)

    def begin(self, scenario: Scenario) -> None:
        """Jobs are of this run from here on."""
        run, _ = self._setting[0]
        self._setting = ((run + 1, 0), self._ray.put(structs.pack(Begin(setup=scenario.setup))), None)

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        (run, number), begin, _ = self._setting
        self._setting = ((run, number + 1), begin, self._ray.put(structs.pack(Consensus(base=base, z=z))))

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs, in their order. Raises StateError naming a job that kills its actor twice."""
        under_way: deque[tuple[Job, int, Any, Any]] = deque()
        for turn, job in enumerate(wanted):
            number, setting = turn % self.count, self._setting
            under_way.append((job, number, setting, self._ask(number, setting, job)))
            if len(under_way) >= AHEAD * self.count:
                yield self._result(*under_way.popleft())
        while under_way:
            yield self._result(*under_way.popleft())

    def close(self) -> None:
        """The actors are gone, and Ray as well where it was started for them."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def _actor(self) -> Any:
        return self._ray.remote(num_cpus=1, max_restarts=0)(Actor).remote()

    def _ask(self, number: int, setting: Any, job: Job) -> Any:
        return self._actors[number].do.remote(*setting, structs.pack(job))

    def _result(self, job: Job, number: int, setting: Any, promised: Any) -> Outcome:
        died, how = self._ray.exceptions.RayActorError, ""
        for _ in range(2):
            try:
                return jobs.outcome(self._ray.get(promised))
            except died as error:
                how = str(error).splitlines()[0]
                self._actors[number] = self._actor()
                promised = self._ask(number, setting, job)
        raise StateError(crashed(job, how))


def _library() -> ModuleType:
    try:
        return importlib.import_module("ray")  # an extra, and hundreds of megabytes
    except ImportError as error:
        raise ConfigError("ray is not installed; run pip install 'fedeq-edge[ray]', or take --engine local") from error
