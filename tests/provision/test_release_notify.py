"""The agent and systemd: READY from the process that the unit started, after a real solve and without a network."""

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fedeq_edge
from fedeq_edge import settings
from fedeq_edge.data.npz import ClientData, save_client
from fedeq_edge.settings import AgentSettings, BrokerSettings
from fedeq_edge.transport import broker

PATIENCE_S = 60.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of an agent whose broker is not there."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 2
    save_client(tmp_path / "data.npz", ClientData(x_train=x[:10], y_train=y[:10], x_test=x[10:], y_test=y[10:]))
    path = tmp_path / "agent.toml"
    absent = BrokerSettings(url=f"mqtt://127.0.0.1:{broker.free_port()}")
    path.write_text(settings.to_toml(AgentSettings(device="a", federation="test", data="data.npz", broker=absent)))
    return path


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that stands for systemd's; it is told who writes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listening.settimeout(PATIENCE_S)
        listening.bind(str(tmp_path / "notify"))
        yield listening


def started(config: Path, systemd: socket.socket, **environment: str) -> subprocess.Popen[bytes]:
    known = {"NOTIFY_SOCKET": systemd.getsockname(), "PYTHONPATH": str(Path(fedeq_edge.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "fedeq_edge", "agent", "run", "--config", str(config)],
        env={**os.environ, **known, **environment},
        stderr=subprocess.DEVNULL,
    )


def heard(systemd: socket.socket, wanted: str) -> int:
    """The process that says it, after whatever else is said."""
    while True:
        text, about, _, _ = systemd.recvmsg(200, socket.CMSG_SPACE(12))
        if text.decode() == wanted:
            pid: int = struct.unpack("3i", about[0][2])[0]
            return pid


def test_the_agent_says_ready_itself_without_a_network_and_then_that_it_stops(
    config: Path, systemd: socket.socket
) -> None:
    with started(config, systemd) as process:
        assert heard(systemd, "READY=1") == process.pid  # it has been re-executed, and is still the one
        assert heard(systemd, "STATUS=broker: connecting") == process.pid
        process.send_signal(signal.SIGTERM)
        heard(systemd, "STOPPING=1")
        assert process.wait(PATIENCE_S) == 0


def test_the_agent_feeds_a_watchdog_that_asks_for_it(config: Path, systemd: socket.socket) -> None:
    with started(config, systemd, WATCHDOG_USEC="10000") as process:
        assert [heard(systemd, "WATCHDOG=1") for _ in range(2)] == [process.pid] * 2
        process.terminate()


def test_an_agent_that_cannot_solve_is_never_ready(config: Path, systemd: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import fedeq_edge.health\nfedeq_edge.health._BUDGET = 1\n"  # no residual is small after one evaluation
    )
    path = f"{tmp_path}:{Path(fedeq_edge.__file__).parents[1]}"
    with started(config, systemd, PYTHONPATH=path) as process:
        assert process.wait(PATIENCE_S) == 1
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(200)
