"""What the tests of provisioning share: a disk that is not waited for, and a fleet of which each test has a copy."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provision.release_board import without_waiting
from tests.provision.update_fleet import Member, Plant


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with without_waiting():
        yield


@pytest.fixture(scope="session", autouse=True)
def _byte_code() -> Iterator[None]:
    """The processes that tests start keep their byte code, as boards do: else each compiles what it imports first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder for what is large, or comes by the hundred, and is soon gone: not on a disk, if this machine has such.

    On a disk these files cost more than what is done with them.
    """
    place = Path("/dev/shm")
    enough = False
    with contextlib.suppress(OSError):
        found = os.statvfs(place)
        roomy = found.f_bavail * found.f_frsize > 4 << 30
        enough = roomy and not found.f_flag & os.ST_NOEXEC and os.access(place, os.W_OK)
    with tempfile.TemporaryDirectory(prefix="fedeq-tests-", dir=place if enough else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet without devices, and boards that are enrolled in it: what `plant` is a copy of."""
    with without_waiting():
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
