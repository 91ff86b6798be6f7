"""The command line as a user has it, in this process where it is quick and as a process where it is not."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from fedeq_edge import settings
from fedeq_edge.cli import main
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.settings import AgentSettings, AggregatorSettings
from fedeq_edge.training.step import Plan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str


class Fedeq(Protocol):
    """Runs `fedeq` with these arguments."""

    def __call__(self, *arguments: str | Path) -> Outcome: ...


@pytest.fixture
def fedeq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Fedeq]:
    """The program's own `main`, in this process."""
    logger = logging.getLogger("fedeq_edge")
    before = logger.handlers[:], logger.level, logger.propagate

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedeq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        streams = capsys.readouterr()
        return Outcome(int(left.value.code or 0), streams.out, streams.err)

    yield run
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a device's and an aggregator's settings and data that fit."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype(np.float32), np.arange(40) % 2
    np.savez(tmp_path / "data.npz", x=x, y=y)
    np.savez(tmp_path / "fleet.npz", x=x, y=y, client=np.arange(40) // 20)
    agent = AgentSettings(device="a", federation="test", data="data.npz")
    (tmp_path / "agent.toml").write_text(settings.to_toml(agent))
    aggregator = AggregatorSettings(
        federation="test", model=ModelSpec(input_shape=(6,), classes=2), train=Plan(rounds=2)
    )
    (tmp_path / "aggregator.toml").write_text(settings.to_toml(aggregator))
    return tmp_path
