"""Boards that boot: a system for each architecture, a site with a gateway, and nothing left of either."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.devices import rootfs
from tests.devices.board import Board
from tests.devices.cards import Card, Inserted
from tests.devices.cpus import PI_4, Cpu
from tests.devices.depot import Depot, shared
from tests.devices.gateway import Gateway
from tests.devices.sites import Site, missing, namespaces

LONGEST_FIRST = ("test_arm_story", "test_federated_round", "test_flash_story", "test_power_cuts", "test_card_story")
LIMIT_S = 1200  # of a test that finds the cache empty and has a system built for it
MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the end of the run: what took how long."""
    return pytestconfig.stash.setdefault(MEASURED, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process that runs some of the tests for another hands over what it measured."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        session.config.workeroutput["measured"] = session.config.stash.get(MEASURED, [])  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """What one of those processes measured is ours."""
    node.config.stash.setdefault(MEASURED, []).extend(getattr(node, "workeroutput", {}).get("measured", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was measured, for the README."""
    for line in config.stash.get(MEASURED, []):
        terminalreporter.write_line(f"measured: {line}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process has one of them left when the others are done."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in ours:
        item.add_marker(pytest.mark.timeout(LIMIT_S))
    places = {item: LONGEST_FIRST.index(item.path.stem) for item in ours if item.path.stem in LONGEST_FIRST}
    items.sort(key=lambda item: places.get(item, len(LONGEST_FIRST)))


class MakeBoard(Protocol):
    """Make a board at the site, not yet booted and gone after the module; see Board for the arguments.

    card: what it boots from; else a system of its own, that nobody has touched, with more packages.
    """

    def __call__(
        self,
        name: str,
        *,
        cpu: Cpu | None = None,
        shown: Mapping[str, Path] | None = None,
        card: Card | None = None,
        packages: Sequence[str] = (),
    ) -> Board: ...


def _need(architecture: rootfs.Architecture) -> None:
    if why := rootfs.missing(architecture) or missing():
        pytest.skip(why)
    try:
        rootfs.unpacked(architecture)
    except rootfs.RootfsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A gateway for the boards of a module. Afterwards nothing of them runs, is mounted or has a namespace."""
    _need("amd64")
    made = Site()
    try:
        yield made
    finally:
        made.close()
    assert not namespaces()
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(tmp_path_factory.getbasetemp()) not in mounts


@pytest.fixture(scope="module")
def make_board(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeBoard]:
    """For a whole module, as tests share boards."""
    with contextlib.ExitStack() as boards:

        def make(
            name: str,
            *,
            cpu: Cpu | None = None,
            shown: Mapping[str, Path] | None = None,
            card: Card | None = None,
            packages: Sequence[str] = (),
        ) -> Board:
            architecture: rootfs.Architecture = "amd64" if cpu is None else "arm64"
            _need(architecture)
            folder = tmp_path_factory.mktemp(name)
            try:
                disk = rootfs.Layered(architecture, folder, *packages) if card is None else Inserted(card, folder)
            except rootfs.RootfsError as error:  # no overlay file system, no loop device, no way to Debian's packages
                pytest.skip(str(error))
            board = Board(folder, site, name, disk, cpu=cpu, shown=shown)
            boards.callback(board.close)
            return board

        yield make


@pytest.fixture(scope="session")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Depot:
    """A fleet and its bundles, for all sites of this run."""
    return Depot(shared(tmp_path_factory.getbasetemp()) / "depot")


@pytest.fixture(scope="module")
def gateway(
    _mosquitto_installed: None, site: Site, depot: Depot, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A fleet without devices whose broker and service run."""
    made = Gateway(tmp_path_factory.mktemp("gateway"), site, depot)
    try:
        made.start_broker()
        made.start_service()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def board(make_board: MakeBoard) -> Board:
    """An x86-64 board that has booted."""
    made = make_board("box-01")
    made.boot()
    return made


@pytest.fixture(scope="module")
def arm_board(make_board: MakeBoard) -> Board:
    """A Raspberry Pi 4 that has booted, as far as qemu-user is one."""
    made = make_board("pi-01", cpu=PI_4)
    made.boot()
    return made
