"""Boards that boot: a system for each architecture, a site with a gateway, and nothing left of either."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.devices import rootfs
from tests.devices.board import Board
from tests.devices.cpus import PI_4, Cpu
from tests.devices.gateway import Gateway
from tests.devices.sites import Site, missing, namespaces

MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the end of the run: what took how long."""
    return pytestconfig.stash.setdefault(MEASURED, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was measured, for the README."""
    for line in config.stash.get(MEASURED, []):
        terminalreporter.write_line(f"measured: {line}")


class MakeBoard(Protocol):
    """Make a board at the site, not yet booted and gone after the module; see Board for the arguments."""

    def __call__(self, name: str, *, cpu: Cpu | None = None, shown: Mapping[str, Path] | None = None) -> Board: ...


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

        def make(name: str, *, cpu: Cpu | None = None, shown: Mapping[str, Path] | None = None) -> Board:
            _need("amd64" if cpu is None else "arm64")
            try:
                board = Board(tmp_path_factory.mktemp(name), site, name, cpu=cpu, shown=shown)
            except rootfs.RootfsError as error:  # no overlay file system
                pytest.skip(str(error))
            boards.callback(board.close)
            return board

        yield make


@pytest.fixture(scope="module")
def gateway(_mosquitto_installed: None, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A new fleet whose broker and service run."""
    made = Gateway(tmp_path_factory.mktemp("gateway"), site)
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
