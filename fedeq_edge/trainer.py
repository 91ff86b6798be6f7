"""The trainer process: a backend, one device's data, requests on stdin, replies on stdout (training/exchange.py).

Run by the agent as `python -m fedeq_edge.trainer`; it ends at once when its stdin is closed, even while it trains:
nobody waits for the result, and an agent that was killed and comes back would otherwise hold two of them in memory.
"""

import hashlib
import os
import queue
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec

from fedeq_edge import storage
from fedeq_edge.backends import dedicate_process, open_onnx, open_torch
from fedeq_edge.data.npz import load_client
from fedeq_edge.deq.initial import start
from fedeq_edge.deq.spec import read_spec
from fedeq_edge.errors import ConfigError, FedEqError, StateError
from fedeq_edge.hardware.clock import DeviceClock
from fedeq_edge.hardware.memory import keep_heap, peak_rss_bytes
from fedeq_edge.hardware.profiles import DeviceLimits, load_profile
from fedeq_edge.hardware.reading import read
from fedeq_edge.hardware.throttle import derate
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.exchange import (
    Done,
    Failed,
    Fit,
    Fitted,
    Ready,
    Reply,
    Request,
    Setup,
    Work,
    read_request,
    write,
)
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import Calibration

# A board without a profile: the temperature at which most SoCs begin to throttle.
_UNKNOWN_BOARD = DeviceLimits(hot_c=80.0)


def main() -> None:
    """Answer requests until the link closes the pipe."""
    requests, replies = sys.stdin.buffer, _own_stdout()
    keep_heap()
    arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, arrived), name="requests", daemon=True).start()
    trainer: Trainer | None = None
    while True:
        request = arrived.get()
        try:
            if isinstance(request, Setup):
                trainer = Trainer(request)
            reply = _answer(trainer, request)
        except FedEqError as error:
            reply = Failed(reason=str(error))
        write(replies, reply)


def _receive(requests: BinaryIO, arrived: "queue.SimpleQueue[Request]") -> None:
    while (request := read_request(requests)) is not None:
        arrived.put(request)
    os._exit(0)  # the main thread may be deep in a solve; replies are flushed and files are written atomically


def _own_stdout() -> BinaryIO:
    """The reply pipe for us alone: whatever a library prints goes to stderr instead of into the protocol."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _answer(trainer: "Trainer | None", request: Request) -> Reply:
    if trainer is None:
        return Failed(reason="the trainer has not been set up")
    if isinstance(request, Work):
        return trainer.work(request)
    if isinstance(request, Fit):
        return trainer.fit(request)
    return Ready(samples=trainer.learner.samples, rss_peak=peak_rss_bytes())


class Trainer:
    """A learner with the limits of its board."""

    def __init__(self, setup: Setup) -> None:
        self._backend = _open(setup)
        dedicate_process(setup.backend)
        board = load_profile(setup.profile) if setup.profile else None
        self._limits = board.limits if board else _UNKNOWN_BOARD
        cache = Path(setup.cache)
        plan = setup.plan
        # What a step's cost depends on; the penalty adds products to it, unrolling trades them for evaluations.
        gradient = plan.jacobian_penalty > 0.0, plan.unrolled, plan.microbatch
        by = setup.backend, setup.graph_sha256.hex()
        made_of = (setup.model, plan.batch, plan.budgets, gradient, setup.slowdown, by)
        name = hashlib.sha256(msgspec.json.encode(made_of))
        self._cache = cache.with_name(f"{cache.name}-{name.hexdigest()[:12]}")
        known = storage.load(self._cache, Calibration)
        self.learner = Learner(
            self._backend,
            load_client(Path(setup.data)),
            setup.plan,
            setup.method,
            start=start(self._backend.description, setup.seed),
            clock=DeviceClock(slowdown=setup.slowdown, shared=setup.shared),
            calibration=known,
            speed=lambda: derate(read(), self._limits).factor,
            watts=board.active_watts if board else None,
        )
        if known is None:
            storage.save(self._cache, self.learner.calibrate())

    def work(self, request: Work) -> Reply:
        """One round, unless the device must rest."""
        derating = derate(read(), self._limits)
        if derating.factor <= 0.0:
            return Failed(reason=f"resting: {derating.reason}")
        task = request.task
        if not task.head.size:
            task = msgspec.structs.replace(task, head=self.learner.initial_head())
        return Done(result=self.learner.train(task), rss_peak=peak_rss_bytes())

    def fit(self, request: Fit) -> Reply:
        """The personal model."""
        head = request.head if request.head.size else self.learner.initial_head()
        personal = self.learner.personalise(request.z, head)
        return Fitted(personal=personal, solver=self._backend.solver, rss_peak=peak_rss_bytes())


def _open(setup: Setup) -> Backend:
    """What the announced graph describes; in torch the model of the manifest, of a kind that this version knows."""
    if setup.backend == "onnx":
        return open_onnx(_graph(setup), setup.plan)
    try:
        spec = read_spec(setup.model)
    except ConfigError as error:
        raise ConfigError(f'{error}, or set backend = "onnx" on this device, which trains by the graph') from error
    return open_torch(spec, setup.plan)


def _graph(setup: Setup) -> bytes:
    """The training graph, as the federation has announced it: nobody parses another."""
    path = Path(setup.graph)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StateError(f"training graph {path} cannot be read: {error.strerror}; check its owner and disk") from error
    if hashlib.sha256(content).digest() != setup.graph_sha256:
        raise StateError(
            f"training graph {path} has another sha256 than the federation announces; it is fetched anew with the "
            "next round"
        )
    return content


if __name__ == "__main__":
    main()
