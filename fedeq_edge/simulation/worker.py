"""A worker process of a simulation: requests on stdin, outcomes on stdout, until stdin is closed."""

import os
import queue
import sys
import threading
from typing import BinaryIO

from fedeq_edge import structs
from fedeq_edge.backends import dedicate_process
from fedeq_edge.simulation import jobs
from fedeq_edge.simulation.experiment import DataTable
from fedeq_edge.simulation.jobs import Begin, Consensus
from fedeq_edge.simulation.scenario import Fleet, load_data, prepare
from fedeq_edge.simulation.site import Site


def main() -> None:
    """Do jobs in the order in which they come."""
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    outcomes, place = _own_stdout(), Place()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, arrived), name="requests", daemon=True).start()
    while True:
        reply = place.answer(arrived.get())
        if reply is not None:
            jobs.write(outcomes, reply)


def _receive(requests: BinaryIO, arrived: "queue.SimpleQueue[bytes]") -> None:
    while (content := jobs.read(requests)) is not None:
        arrived.put(content)
    os._exit(0)  # whoever asked is gone, and the main thread may be deep in a training


class Place:
    """A site for whichever run is asked for; the data of the last one is kept, as the next usually shares it."""

    def __init__(self) -> None:
        self._site: Site | None = None
        self._loaded: tuple[DataTable, Fleet] | None = None

    def answer(self, content: bytes) -> bytes | None:
        """The packed outcome of a packed job, None for a request without one."""
        request = jobs.request(content)
        if isinstance(request, Begin):
            dedicate_process(request.setup.experiment.backend)
            self._site = Site(prepare(request.setup, self._data(request.setup.experiment.data)))
            return None
        assert self._site is not None
        if isinstance(request, Consensus):
            self._site.hold(request.base, request.z)
            return None
        return structs.pack(self._site.do(request))

    def _data(self, table: DataTable) -> Fleet:
        if self._loaded is None or self._loaded[0] != table:
            self._loaded = table, load_data(table)
        return self._loaded[1]


def _own_stdout() -> BinaryIO:
    """The pipe for outcomes alone: whatever a library prints goes to stderr instead."""
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return outcomes


if __name__ == "__main__":
    main()
