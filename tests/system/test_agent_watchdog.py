"""A trainer that hangs is ended, and the round is declined: an agent on a real trainer, with a clock of ours."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from fedeq_edge import agent, settings
from fedeq_edge.consensus.methods import method
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.deq.layout import size, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.protocol.state import ClientState, vector_digest
from fedeq_edge.settings import AgentSettings
from fedeq_edge.storage import ClientFolder
from fedeq_edge.training.step import Plan
from fedeq_edge.transport.base import Arrived, Event
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import messages
from fedeq_edge.wire.topics import Topics

TOPICS = Topics("test")
SPEC = ModelSpec(input_shape=(4,), classes=2, channels=8)
Z = np.zeros(size(theta_layout(SPEC)), np.float32)


class _Clock:
    """Stands for the module `time` in the agent."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 2
    save_client(tmp_path / "data.npz", ClientData(x_train=x[:10], y_train=y[:10], x_test=x[10:], y_test=y[10:]))
    path = tmp_path / "agent.toml"
    path.write_text(settings.to_toml(AgentSettings(device="a", federation="test", data="data.npz")))
    state = tmp_path / "state"
    state.mkdir()
    ClientFolder(state).save(ClientState(run="run", z=Z, base=vector_digest(Z), nu=np.zeros(Z.size, np.int64)))
    return path


def _manifest() -> bytes:
    return messages.encode(
        messages.Manifest(
            run="run",
            status="running",
            model=msgspec.to_builtins(SPEC),
            plan=msgspec.to_builtins(Plan(rounds=1)),
            method=msgspec.to_builtins(method("admm")),
            seed=0,
        )
    )


def _task(deadline_s: float) -> bytes:
    task = messages.Task(run="run", round=1, model=vector_digest(Z), kappa=0.1, deadline_s=deadline_s, codec="f32")
    return messages.encode(task)


class _Bench:
    """An agent whose steps and clock we turn by hand, connected to a broker in memory."""

    def __init__(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = _Clock()
        monkeypatch.setattr(agent, "time", self.clock)
        monkeypatch.setattr(agent, "_TICK_S", 0.01)
        monkeypatch.setattr(agent, "_TRAINER_END_S", 0.1)
        broker = MemoryBroker()
        self.heard: list[Event] = []
        self._aggregator = broker.transport((TOPICS.up("a"),))
        self._aggregator.start(self.heard.append)
        self._broker = broker
        self.agent = agent.Agent(config, settings.load(config, AgentSettings), samples=10, slowdown=1.0)
        self.agent._transport = link = broker.transport(("#",))  # type: ignore[assignment]
        link.start(lambda _event: None)

    def tell(self, topic: str, payload: bytes) -> None:
        self.agent._inbox.put(Arrived(topic, payload))
        self.agent._step()

    @property
    def trainer(self) -> psutil.Process | None:
        return None if self.agent._trainer is None else psutil.Process(self.agent._trainer.pid)

    def declines(self) -> list[str]:
        self._broker.deliver()
        found = [messages.decode(event.payload).message for event in self.heard if isinstance(event, Arrived)]
        return [message.reason for message in found if isinstance(message, messages.Decline)]


@pytest.fixture
def bench(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Bench]:
    made = _Bench(config, monkeypatch)
    yield made
    made.agent._end_trainer("the test is over")


@pytest.mark.parametrize(("deadline_s", "patience_s"), [(1.0, 60.0), (100.0, 300.0)])
def test_a_trainer_that_hangs_is_ended_after_three_deadlines_and_at_least_a_minute(
    bench: _Bench, deadline_s: float, patience_s: float
) -> None:
    bench.tell(TOPICS.manifest, _manifest())
    bench.tell(TOPICS.down("a"), _task(deadline_s))
    trainer = bench.trainer
    assert trainer is not None
    trainer.suspend()
    bench.clock.now += patience_s - 1.0
    bench.agent._step()
    assert bench.trainer == trainer
    assert bench.declines() == []
    bench.clock.now += 1.0
    bench.agent._step()
    assert bench.trainer is None
    assert not psutil.pid_exists(trainer.pid)
    (reason,) = bench.declines()
    assert "did not answer" in reason
