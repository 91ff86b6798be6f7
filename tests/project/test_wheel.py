"""What an installed wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
    committed = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert committed
    assert {f"fedeq_edge/_kit/{name}" for name in committed if "__pycache__" not in name} <= set(wheel.namelist())


def test_types_and_templates_travel_too(wheel: zipfile.ZipFile) -> None:
    assert {"fedeq_edge/py.typed", "fedeq_edge/templates/report.html.jinja", "fedeq_edge/algorithm.md"} <= set(
        wheel.namelist()
    )
