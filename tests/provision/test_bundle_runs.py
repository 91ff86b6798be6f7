"""A bundle for this machine's architecture runs with the system's python and nothing else."""

import importlib.metadata
import json
import platform
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from packaging.requirements import Requirement

from fedeq_edge import __version__
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.provision import archive, wheels
from fedeq_edge.provision.bundle import BundleSpec, build
from fedeq_edge.provision.platforms import platform_of

pytest.importorskip("uv", reason="uv is not installed (extra fleet)")
HERE = ".".join(platform.python_version_tuple()[:2])
SYSTEM = Path(f"/usr/bin/python{HERE}")
BOARD = {"x86_64": "x86-64", "aarch64": "arm64"}.get(platform.machine(), "")


def closure(requirements: Iterable[str], extras: frozenset[str] = frozenset({""})) -> Iterator[str]:
    """Distributions that are needed on this machine by one with these requirements and extras; some twice."""
    for text in requirements:
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
            yield need.name
            yield from closure(importlib.metadata.requires(need.name) or (), frozenset({"", *need.extras}))


def packed_again(name: str, house: Path) -> None:
    """The wheel that an installed distribution came from."""
    found = importlib.metadata.distribution(name)
    described = found.read_text("WHEEL") or ""
    tags = [line.removeprefix("Tag: ").split("-") for line in described.splitlines() if line.startswith("Tag: ")]
    joined = "-".join(".".join(sorted(set(parts))) for parts in zip(*tags, strict=True))
    file = f"{re.sub(r'[-_.]+', '_', found.metadata['Name'])}-{found.version}-{joined}.whl"
    with zipfile.ZipFile(house / file, "w") as packed:
        for path in found.files or ():
            if ".." not in path.parts and path.suffix != ".pyc":
                packed.write(Path(str(found.locate_file(path))), str(path))


@pytest.fixture(scope="module")
def release(memory: Path) -> Path:
    """An unpacked bundle, from wheels made of what is installed here, as a board has it."""
    if not BOARD or not SYSTEM.exists():
        pytest.skip(f"no {SYSTEM} beside this python: a bundle for this machine would not start")
    folder, house = memory / "release", memory / "release/wheelhouse"
    house.mkdir(parents=True)
    try:
        # what is installed as editable may have been so before an extra was added
        own = next(iter(importlib.metadata.distributions(path=[str(wheels.own_wheel(folder))])))
        for name in sorted(set(closure(own.requires or (), frozenset({"", "board", "masking"})))):
            packed_again(name, house)
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed here (extra board)")
    # pip took the wheels for this machine's glibc, which may be newer than a board's.
    here = {"glibc": platform.libc_ver()[1], "pins": {}}
    board = msgspec.structs.replace(platform_of(load_profile(BOARD), HERE), **here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "COMPRESSION", 0)  # that of 150 MB takes as long as half of the rest
        patch.setattr(tempfile, "tempdir", str(folder))
        bundle = build(BundleSpec(platform=board, out=folder, key=None, name="here", wheelhouse=house))
    tree = folder / "opt" / "release"
    tree.mkdir(parents=True)
    subprocess.run(["tar", "-xzf", bundle, "-C", tree], check=True)
    return tree


def fedeq(release: Path, *arguments: str, **environment: str) -> str:
    """What `fedeq` of the release prints, started with this environment alone."""
    done = subprocess.run(
        [release / "bin/fedeq", *arguments], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    return done.stdout


def test_it_tells_its_version_and_the_machine_without_any_environment(release: Path) -> None:
    assert fedeq(release, "--version") == f"fedeq-edge {__version__}\n"
    assert json.loads(fedeq(release, "device", "probe", "--json"))["arch"] == platform.machine()
    assert fedeq(release, "--help").lstrip().startswith("Usage: fedeq ")


def run_inside(release: Path, code: str, **environment: str) -> str:
    """What python code prints that runs as a child of the launcher would: with what it exports."""
    exports = (release / "bin/fedeq").read_text().partition("for python in")[0]
    script = release / "bin/probe"
    script.write_text(f"{exports}\nexec {SYSTEM} -c '{code}'\n")
    done = subprocess.run(["sh", script], env=environment, cwd="/", capture_output=True, text=True, check=True)
    script.unlink()
    return done.stdout


def test_its_children_find_its_packages_and_none_of_the_machine(release: Path) -> None:
    """The agent starts its trainer as `python -m fedeq_edge.trainer`; a torch installed beside may crash there."""
    paths = run_inside(release, 'import sys; print(*sys.path, sep="\\n")').split()

    assert paths[0] == str(release / "site")
    assert not [path for path in paths[1:] if "packages" in path or not path.startswith("/usr/lib/python3")]


def test_another_python_of_the_environment_is_not_let_in(tmp_path: Path, release: Path) -> None:
    (tmp_path / "rich.py").write_text("raise SystemExit('another rich')")

    assert fedeq(release, "--version", PYTHONPATH=str(tmp_path), PYTHONHOME="/nonexistent", PYTHONSTARTUP="/x")


def test_a_real_solve_and_the_libraries_of_a_board_run(release: Path) -> None:
    code = (
        "import cryptography.x509, tuf.ngclient, fedeq_edge.onnx.runtime, fedeq_edge.agent, os; "
        'from fedeq_edge import health; assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"; '
        "print(health.solve().evaluations)"
    )

    assert int(run_inside(release, code)) > 1


def test_the_release_is_not_written_to(release: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in release.rglob("*")}
    fedeq(release, "device", "list", "--json")

    assert {path: path.stat().st_mtime_ns for path in release.rglob("*")} == before


def test_a_start_compiles_nothing(release: Path) -> None:
    told = run_inside(release, "import fedeq_edge.agent as agent; print(agent.__cached__, agent.__spec__.has_location)")
    cached = Path(told.split()[0])

    assert cached.is_file()
    assert int.from_bytes(cached.read_bytes()[4:8], "little") == 0b01  # PEP 552: by hash, not compared with the source


def test_it_finds_its_tree_through_links_as_current_is_one(tmp_path: Path, release: Path) -> None:
    (tmp_path / "current").symlink_to(release)
    (tmp_path / "fedeq").symlink_to(tmp_path / "current/bin/fedeq")

    told = subprocess.run([tmp_path / "fedeq", "--version"], env={}, capture_output=True, text=True, check=True)
    assert told.stdout == f"fedeq-edge {__version__}\n"


def test_without_its_python_it_says_which_to_install_and_exits_6(tmp_path: Path, release: Path) -> None:
    launcher = tmp_path / "fedeq"
    launcher.write_text(
        (release / "bin/fedeq").read_text().replace(f"python{HERE}", "python3.99").replace(HERE, "3.99")
    )

    told = subprocess.run(["sh", launcher], env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=False)

    assert told.returncode == 6
    assert "this release needs python 3.99" in told.stderr
