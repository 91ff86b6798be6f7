"""Two workers and a root against one aggregator with the same devices: the same z after every round, bit for bit."""

from typing import TYPE_CHECKING

import msgspec
import pytest

from fedeq_edge import settings
from fedeq_edge.settings import AggregatorSettings
from tests.reliability.fleet import AGGREGATOR, Fleet

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet, StartSite

pytestmark = pytest.mark.broker
ROUNDS = 4
SHAPE = {"rounds": ROUNDS, "codec": "f32", "channels": 16}


def _change(fleet: Fleet, **changes: object) -> None:
    chosen: AggregatorSettings = msgspec.structs.replace(fleet.aggregator_settings, audit=False, **changes)
    (fleet.folder / f"{AGGREGATOR}.toml").write_text(settings.to_toml(chosen))


class Tree:
    """Workers with two devices each, and their root."""

    def __init__(self, make_fleet: "MakeFleet", port: int, left_port: int | None = None) -> None:
        self.left = make_fleet(left_port or port, devices=("a", "b"), **SHAPE)
        self.right = make_fleet(port, devices=("c", "d"), **SHAPE)
        self.root = make_fleet(port, devices=(), **SHAPE, schedule={"min_devices": 1})
        _change(self.root, workers=(self.left.name, self.right.name))
        for worker in self.workers:
            _change(worker, root=self.root.name)

    @property
    def workers(self) -> tuple[Fleet, Fleet]:
        return self.left, self.right

    def start(self) -> None:
        for fleet in (self.root, self.left, self.right):
            fleet.start()

    def until_handed_over(self, worker: Fleet, rounds: int) -> None:
        """The worker has closed so many rounds of its own: the last share is on its disk."""
        worker.until(lambda: len(worker.rounds()) >= rounds, "the worker hands over")

    def finish(self) -> list[str]:
        """Digest of z after every round; everybody has come to the end."""
        for fleet in (self.left, self.right, self.root):
            process = fleet.processes[AGGREGATOR]
            fleet.until(lambda process=process: process.poll() is not None, f"{fleet.name} ends")  # type: ignore[misc]
            assert process.returncode == 0, fleet.logs()
        assert [line["round"] for line in self.root.rounds()] == list(range(1, ROUNDS + 1))
        return [line["z"] for line in self.root.rounds()]


@pytest.fixture(scope="module")
def _oracle() -> dict[str, list[str]]:
    return {}


@pytest.fixture
def alone(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", _oracle: dict[str, list[str]]) -> list[str]:
    """Digest of z after every round of one aggregator with all four devices; it runs once."""
    if not _oracle:
        fleet = make_fleet(shared_mosquitto.port, devices=("a", "b", "c", "d"), **SHAPE)
        fleet.start()
        fleet.finish()
        _oracle["z"] = [line["z"] for line in fleet.rounds()]
    return _oracle["z"]


@pytest.fixture
def tree(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> Tree:
    return Tree(make_fleet, shared_mosquitto.port)


def test_workers_and_their_root_make_the_consensus_of_one_aggregator(tree: Tree, alone: list[str]) -> None:
    tree.start()
    assert tree.finish() == alone


def test_a_worker_that_is_killed_amid_its_contributions_holds_them_and_comes_back(tree: Tree, alone: list[str]) -> None:
    tree.left.hold("b")
    tree.start()
    tree.left.until_only("b")
    tree.left.kill(AGGREGATOR)
    tree.left.start(AGGREGATOR)
    tree.left.release("b")
    assert tree.finish() == alone


def test_a_worker_that_is_killed_with_its_share_handed_over_is_counted_once(tree: Tree, alone: list[str]) -> None:
    tree.left.hold("b")
    tree.start()
    tree.until_handed_over(tree.right, 1)
    tree.right.kill(AGGREGATOR)
    tree.right.start(AGGREGATOR)
    tree.left.release("b")
    assert tree.finish() == alone


def test_a_root_that_is_killed_asks_nobody_to_work_again(tree: Tree, alone: list[str]) -> None:
    tree.start()
    for number in range(1, ROUNDS):
        tree.root.until_round(number)
        tree.root.kill(AGGREGATOR)
        tree.root.start(AGGREGATOR)
    assert tree.finish() == alone


def test_a_worker_at_a_site_sends_its_sums_over_the_bridge_and_nothing_else_is_needed(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", start_site: "StartSite", alone: list[str]
) -> None:
    site = start_site(shared_mosquitto.port, "sums")
    tree = Tree(make_fleet, shared_mosquitto.port, left_port=site.port)
    tree.start()
    assert tree.finish() == alone
