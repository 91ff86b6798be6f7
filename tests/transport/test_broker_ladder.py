"""Which broker the ladder takes, and that a child broker ends with its context."""

import importlib.util
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.errors import ConfigError, TransportError
from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.mqtt import Endpoint

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto


def _listens(endpoint: Endpoint) -> bool:
    host, port, _ = endpoint.address()
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


@pytest.mark.broker
@pytest.mark.usefixtures("_mosquitto_installed")
def test_auto_takes_mosquitto_where_it_is_and_ends_it_with_the_context(tmp_path: Path) -> None:
    with ladder.running("auto", log=tmp_path / "broker.log") as broker:
        assert (broker.kind, broker.endpoint.version) == ("mosquitto", "5")
        assert broker.version[0].isdecimal()
        assert _listens(broker.endpoint)
        assert broker.alive()
    assert not _listens(broker.endpoint)
    assert not broker.alive()
    assert "mosquitto version" in (tmp_path / "broker.log").read_text()


def test_embedded_is_amqtt_and_ends_with_the_context() -> None:
    pytest.importorskip("amqtt", reason="amqtt is not installed: pip install 'fedeq-edge[broker]'")
    with ladder.running("embedded") as broker:
        assert (broker.kind, broker.endpoint.version) == ("amqtt", "3.1.1")
        assert _listens(broker.endpoint)
    assert not _listens(broker.endpoint)


def test_auto_falls_back_to_amqtt_and_then_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    assert ladder.kind_of("auto") == "amqtt"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for choice, remedy in (("auto", r"pip install 'fedeq-edge\[broker\]'"), ("mosquitto", "apt-get install mosquitto")):
        with pytest.raises(ConfigError, match=remedy):
            ladder.kind_of(choice)


def test_an_url_is_taken_as_it_is_and_nothing_is_started() -> None:
    with ladder.running("mqtt://gateway:1884") as broker:
        assert (broker.kind, broker.endpoint.url, broker.version) == ("external", "mqtt://gateway:1884", "")


@pytest.mark.parametrize("choice", ["rabbitmq", "", "mqtt://host:x"])
def test_an_unknown_broker_is_a_config_error(choice: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown; use auto|no broker address"), ladder.running(choice):
        pass


@pytest.mark.broker
def test_a_port_in_use_is_named_with_the_remedy(shared_mosquitto: "RealMosquitto") -> None:
    message = rf"port {shared_mosquitto.port} on 127.0.0.1 is in use .*--port"
    with pytest.raises(ConfigError, match=message), ladder.running("mosquitto", port=shared_mosquitto.port):
        pass


@pytest.mark.broker
@pytest.mark.usefixtures("_mosquitto_installed")
def test_a_child_that_does_not_start_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "mosquitto_config", lambda _port: "no_such_option true\n")
    with pytest.raises(TransportError, match=r"mosquitto did not start on port \d+: .*\w"), ladder.running("mosquitto"):
        pass
