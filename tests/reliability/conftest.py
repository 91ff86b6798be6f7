"""Fleets of real processes behind fault proxies, on mosquitto and amqtt."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import pytest

from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.mqtt import Endpoint
from tests.conftest import RealMosquitto
from tests.reliability.fleet import Fleet, Shape

_numbers = itertools.count()


class MakeFleet(Protocol):
    """Makes fleets that are gone after the test."""

    def __call__(self, port: int, elsewhere: Mapping[str, int] | None = None, /, **shape: object) -> Fleet: ...


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """A fleet on the broker of a port; nothing of it runs yet."""
    with contextlib.ExitStack() as fleets:

        def make(port: int, elsewhere: Mapping[str, int] | None = None, /, **shape: object) -> Fleet:
            folder = tmp_path / f"fleet-{next(_numbers)}"  # brokers are shared, and keep what is retained
            folder.mkdir()
            fleet = Fleet(folder, port, Shape(**shape), elsewhere)  # type: ignore[arg-type]
            fleets.callback(fleet.close)
            return fleet

        yield make


StartSite = Callable[[int, Literal["devices", "sums"]], RealMosquitto]


@pytest.fixture
def start_site(_mosquitto_installed: None, tmp_path: Path) -> Iterator[StartSite]:
    """A site's mosquitto, joined to the fleet's on a port by the shipped bridge without TLS.

    Over it go the messages of devices, or the sums of a worker at the site and nothing else.
    """
    shipped = (Path(__file__).parents[2] / "broker" / "mosquitto-bridge.conf").read_text()
    with contextlib.ExitStack() as sites:

        def start(fleet_port: int, crosses: Literal["devices", "sums"]) -> RealMosquitto:
            site = RealMosquitto(tmp_path, more=_bridge(shipped, fleet_port, crosses))
            sites.callback(site.kill)
            return site

        yield start


def _bridge(shipped: str, fleet_port: int, crosses: Literal["devices", "sums"]) -> str:
    changed = {
        "fleet.example.org:8883": f"127.0.0.1:{fleet_port}",
        "worker/site-a/": "worker/+/",
        "restart_timeout 1 60": "restart_timeout 1",
    }
    for there, here in changed.items():
        shipped = shipped.replace(there, here)
    device_lines, sum_lines = ("topic fedeq/v1/+/dev", "topic fedeq/v1/+/global"), ("topic fedeq/v1/+/worker",)
    other = sum_lines if crosses == "devices" else device_lines
    tls = ("bridge_cafile", "bridge_certfile", "bridge_keyfile")
    return "".join(f"{line}\n" for line in shipped.splitlines() if not line.startswith((*tls, *other)))


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
