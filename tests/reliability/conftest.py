"""Fleets of real processes behind fault proxies, on mosquitto and amqtt."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.mqtt import Endpoint
from tests.reliability.fleet import Fleet, Shape

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto


_numbers = itertools.count()


class MakeFleet(Protocol):
    """Makes fleets that are gone after the test."""

    def __call__(self, port: int, **shape: object) -> Fleet: ...


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """A fleet on the broker of a port; nothing of it runs yet."""
    with contextlib.ExitStack() as fleets:

        def make(port: int, **shape: object) -> Fleet:
            folder = tmp_path / f"fleet-{next(_numbers)}"  # brokers are shared, and keep what is retained
            folder.mkdir()
            fleet = Fleet(folder, port, Shape(**shape))  # type: ignore[arg-type]
            fleets.callback(fleet.close)
            return fleet

        yield make


@pytest.fixture(scope="session")
def _amqtt() -> Iterator[Endpoint]:
    pytest.importorskip("amqtt", reason="amqtt is not installed: pip install 'fedeq-edge[broker]'")
    with ladder.running("embedded") as broker:
        yield broker.endpoint


@pytest.fixture(
    params=[pytest.param("mosquitto", marks=pytest.mark.broker, id="mosquitto"), pytest.param("amqtt", id="amqtt")]
)
def either(request: pytest.FixtureRequest) -> Endpoint:
    """Each broker that we support, for tests that leave it alone."""
    if request.param == "amqtt":
        found: Endpoint = request.getfixturevalue("_amqtt")
        return found
    broker: RealMosquitto = request.getfixturevalue("shared_mosquitto")
    return Endpoint(url=broker.url)
