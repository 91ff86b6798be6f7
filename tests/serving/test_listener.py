"""Where applications ask, and the process that comes when they do."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedeq_edge.errors import ConfigError
from fedeq_edge.serving.address import Address, listen, parse_address
from fedeq_edge.serving.listener import Listener
from fedeq_edge.transport.broker import free_port
from tests.conftest import until
from tests.serving.asking import Application, answering, gone, keep, personal, samples

LONG_S = 600.0
Start = Callable[[Address, float], Listener]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    keep(tmp_path / "state", personal())
    return tmp_path / "state"


@pytest.fixture
def start(state: Path) -> Iterator[Start]:
    """Make listeners that have stopped after the test."""
    with contextlib.ExitStack() as started:

        def make(address: Address, idle_s: float) -> Listener:
            listener = Listener(address, state, idle_s=idle_s)
            started.callback(listener.stop)
            return listener

        yield make


def ours() -> list[psutil.Process]:
    return answering(os.getpid())


def test_a_path_and_a_loopback_port_are_places_to_ask() -> None:
    assert parse_address("/run/fedeq-edge/infer.sock").path == Path("/run/fedeq-edge/infer.sock")
    assert parse_address("127.0.0.1:8471").port == 8471


@pytest.mark.parametrize("serve", ["0.0.0.0:8471", ":8471", "192.168.1.4:80", "127.0.0.1:0", "127.0.0.1:70000"])
def test_the_network_is_no_place_to_ask(serve: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:PORT"):
        parse_address(serve)


def test_everybody_who_may_enter_the_folder_may_ask(tmp_path: Path) -> None:
    with listen(Address(tmp_path / "infer.sock", None)):
        assert (tmp_path / "infer.sock").stat().st_mode & 0o777 == 0o666


def test_what_a_killed_agent_left_is_replaced(tmp_path: Path) -> None:
    address = Address(tmp_path / "infer.sock", None)
    listen(address).close()
    assert (tmp_path / "infer.sock").exists()
    with listen(address), socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(address.path))


def test_a_place_that_is_taken_is_refused_and_left_alone(tmp_path: Path) -> None:
    address = Address(tmp_path / "infer.sock", None)
    with listen(address), pytest.raises(ConfigError, match="another program answers"):
        listen(address)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        listen(Address(tmp_path / "notes", None))
    assert (tmp_path / "notes").read_text() == "mine"
    port = Address(None, free_port())
    with listen(port), pytest.raises(ConfigError, match="cannot listen"):
        listen(port)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than"):
        listen(Address(tmp_path / ("n" * 120), None))


def test_nothing_runs_until_somebody_asks_nor_after_a_rest(start: Start, tmp_path: Path) -> None:
    start(Address(tmp_path / "infer.sock", None), 0.1)
    application = Application(Address(tmp_path / "infer.sock", None))
    assert ours() == []
    for _ in range(2):
        assert application.infer(samples(1)).status == 200
        until(lambda: ours() == [], "the answering process leaves")


def test_an_answering_process_that_dies_is_followed_by_another(start: Start, tmp_path: Path) -> None:
    address = Address(None, free_port())
    start(address, LONG_S)
    assert Application(address).health().status == 200
    (process,) = ours()
    process.kill()
    assert Application(address).health().status == 200


def test_stopping_ends_the_answering_process_and_frees_the_place(state: Path, tmp_path: Path) -> None:
    address = Address(tmp_path / "infer.sock", None)
    listener = Listener(address, state, idle_s=LONG_S)
    assert Application(address).health().status == 200
    (process,) = ours()
    listener.stop()
    until(lambda: gone(process), "the answering process leaves")
    assert not (tmp_path / "infer.sock").exists()


def test_stopping_is_quick_where_nobody_has_asked(state: Path, tmp_path: Path) -> None:
    Listener(Address(tmp_path / "infer.sock", None), state, idle_s=LONG_S).stop()
    assert ours() == []
