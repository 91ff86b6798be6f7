"""The programs of a fleet in a hurry: `python parts.py agent SETTINGS` and `python parts.py aggregator SETTINGS`.

Link and aggregator are the real ones, on a real broker, with real state on disk. The trainer is a puppet that solves a
quadratic of its own exactly, at once, or not before the file "hold" beside the settings is gone: no torch, so that a
fleet is up within a second. What waits for seconds in the field waits for tenths here. Environment variables:
KEEPALIVE_S of the MQTT connections, RETRY_S after which is said again what was not answered, and CLOCK_OFF_S, by which
the wall clock is off.
"""

import hashlib
import os
import queue
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedeq_edge import agent, gateway, logs, settings
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import read_spec
from fedeq_edge.protocol import client, course, rounds, transfers, tree
from fedeq_edge.settings import AgentSettings, AggregatorSettings
from fedeq_edge.storage import locked
from fedeq_edge.training import exchange
from fedeq_edge.training.step import Budget, LocalResult, LocalTask, Personal
from fedeq_edge.transport import mqtt

SAMPLES = {"a": 10, "b": 20, "c": 30}  # unequal weights; other devices have 10
HOLD = "hold"
_BUDGET = Budget(forward=4, adjoint=2)
_HURRY: dict[ModuleType, dict[str, float]] = {
    mqtt: {"_BACKOFF_FIRST_S": 0.1, "_BACKOFF_LAST_S": 0.5},
    rounds: {"GATHER_S": 60.0},  # the exception: a round waits for every member, so that tests can count on them
    agent: {"_TICK_S": 0.1},
    gateway: {"_TICK_S": 0.1, "_STATUS_S": 0.02},
}


def difference(device: str, task: LocalTask) -> NDArray[np.float32]:
    """argmin F + <nu, theta - z> + kappa/2 |theta - z|^2, less z; F = 1/2 (theta - c)^T A (theta - c) of the device."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(device.encode()).digest()[:8], "little"))
    A, c = rng.uniform(0.5, 3.0, task.z.size), rng.normal(0.0, 0.1, task.z.size)
    z = task.z.astype(np.float64)
    solved: NDArray[np.float32] = ((A * c - task.nu + task.kappa * z) / (A + task.kappa) - z).astype(np.float32)
    return solved


class Puppet:
    """Stands in for agent.TrainerProcess."""

    def __init__(self, setup: exchange.Setup, log_path: Path, inbox: "queue.SimpleQueue[object]") -> None:
        self._device, self._hold = log_path.parent.parent.name, log_path.parent.parent / HOLD
        self._head = initial(read_spec(setup.model), setup.seed)[1]
        self._inbox = inbox
        self.pid = os.getpid()
        self.idle_since: float | None = None
        self.ready = True
        self.busy = False

    def ask(self, request: exchange.Request, *, deadline_s: float, now: float) -> None:
        self.idle_since, self.busy = None, True
        threading.Thread(target=self._work, args=(request,), daemon=True).start()

    def answered(self, now: float) -> None:
        self.idle_since, self.busy = now, False

    def overdue(self, now: float) -> bool:
        return False

    def end(self) -> int:
        return 0

    def _work(self, request: exchange.Request) -> None:
        while self._hold.exists():
            time.sleep(0.01)
        assert isinstance(request, exchange.Work | exchange.Fit)
        reply = self._train(request) if isinstance(request, exchange.Work) else self._fit(request)
        self._inbox.put(agent._Reply(self, reply))  # type: ignore[arg-type]

    def _train(self, request: exchange.Work) -> exchange.Done:
        result = LocalResult(
            difference=difference(self._device, request.task),
            head=self._head,
            loss=0.5,
            residual=1e-3,
            backward_residual=1e-3,
            budget=_BUDGET,
            steps=1,
            seconds=0.01,
            reduced=False,
            accuracy_consensus=0.5,
        )
        return exchange.Done(result=result, rss_peak=0)

    def _fit(self, request: exchange.Fit) -> exchange.Fitted:
        personal = Personal(
            theta=request.z,
            head=self._head,
            budget=_BUDGET,
            residual=1e-3,
            certificate=None,
            accuracy_personal=0.9,
            accuracy_consensus=0.5,
            local_only=None,
        )
        return exchange.Fitted(personal=personal, solver=b"", rss_peak=0)


def _hurry() -> None:
    retry_s = {"RETRY_S": float(os.environ["RETRY_S"])}
    chosen = {client: retry_s, transfers: retry_s, course: retry_s, tree: {"SHARE_RETRY_S": retry_s["RETRY_S"]}}
    for module, constants in (_HURRY | chosen).items():
        for name, value in constants.items():
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)
    mqtt.KEEPALIVE_S = int(os.environ["KEEPALIVE_S"])  # type: ignore[misc]


def _put_the_clock_off(seconds: float) -> None:
    right = time.time
    time.time = lambda: right() + seconds


def main(kind: str, path: Path) -> None:
    """Run a part until it ends by itself or at SIGTERM."""
    logs.configure()
    _hurry()
    _put_the_clock_off(float(os.environ["CLOCK_OFF_S"]))
    if kind == "aggregator":
        gateway.Gateway(path, settings.load(path, AggregatorSettings)).run()
        return
    agent.TrainerProcess = Puppet  # type: ignore[assignment,misc]
    chosen = settings.load(path, AgentSettings)
    with locked(settings.resolve(path, chosen.state)):
        agent.Agent(path, chosen, samples=SAMPLES.get(chosen.device, 10), slowdown=1.0).run()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
