"""What the tests of provisioning share: a disk that is not waited for, and a fleet of which each test has a copy."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provision.update_fleet import Member, Plant


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is synced it is only looked whether it is open, as fsync does.

    A process that is killed loses no page, so that waiting for the disk, half of the time of these tests, would prove
    nothing; processes of their own do wait.
    """
    monkeypatch.setattr(os, "fsync", os.fstat)
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet without devices, and boards that are enrolled in it: what `plant` is a copy of."""
    return Plant.stocked(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def plant(stock: Path, tmp_path: Path) -> Iterator[Plant]:
    """A fleet for one test, to be maltreated."""
    with Plant(tmp_path, stock).serving() as made:
        yield made


@pytest.fixture
def member(plant: Plant) -> Member:
    """The board pi-01 of the plant."""
    return plant.board("pi-01")
