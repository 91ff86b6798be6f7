"""What an installed wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MADE = {"__pycache__", "node_modules"}
COMPILED = Path("export/cpp/run")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_has_one_package_and_nothing_else_at_the_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"fedeq_edge"}


@pytest.mark.parametrize("folder", ["devices", "broker", "export"])
def test_what_users_take_with_them_travels_as_package_data(wheel: zipfile.ZipFile, folder: str) -> None:
    found = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
    committed = {str(path) for path in found if MADE.isdisjoint(path.parts) and path != COMPILED}
    assert committed
    assert {f"fedeq_edge/_kit/{name}" for name in committed} <= set(wheel.namelist())


def test_what_users_make_of_it_stays_at_home(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if MADE & set(Path(name).parts)]


def test_types_and_templates_travel_too(wheel: zipfile.ZipFile) -> None:
    assert {
        "fedeq_edge/py.typed",
        "fedeq_edge/templates/report.html.jinja",
        "fedeq_edge/algorithm.md",
        "fedeq_edge/simulation/studies.md",
    } <= set(wheel.namelist())
