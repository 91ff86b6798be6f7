"""The Python packages of a bundle as a tree: resolved by uv for the board, wheels alone, nothing compiled.

pip judges markers on the machine that it runs on (pypa/pip#11664) and would fetch nvidia-* for a Raspberry Pi; uv does
not. From a wheelhouse everything happens off-line.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fedeq_edge import kit
from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.platforms import Platform

DISTRIBUTION: Final = "fedeq-edge"
# What a provisioned board needs: TUF and keys, secure aggregation, inference.
_EXTRAS: Final = ("board", "masking")
# What no board ever runs: headers and sources of compiled modules, type stubs, and caches of another machine's python.
_PRUNED_SUFFIXES: Final = frozenset(
    {".a", ".c", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".lib", ".pxd", ".pyc", ".pyi", ".pyx"}
)
_PRUNED_FOLDERS: Final = frozenset({"__pycache__", "test", "tests"})
# Scripts name the python of this machine; onnxruntime's tools convert models on a host and need packages it has not.
_PRUNED_TREES: Final = (
    "bin",
    *(f"onnxruntime/{name}" for name in ("datasets", "quantization", "tools", "transformers")),
)
# The manifest has the digests; the others name folders of this machine.
_PRUNED_METADATA: Final = frozenset({"INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_cache.json"})
_UV_LIMIT_S: Final = 1800.0  # a torch over a slow line


def install(site: Path, work: Path, platform: Platform, *, torch: bool, wheelhouse: Path | None) -> str:
    """`site` holds this version of fedeq-edge and what it needs on the board; the locked requirements, with hashes.

    work: an empty folder for files in between. Raises ProvisionError where something has no wheel for the platform.
    """
    own = own_wheel(work, wheelhouse)
    lock = _locked(own, work, platform, torch, wheelhouse)
    source = _source(work, platform, torch, wheelhouse)
    locked = ("--no-deps", "--require-hashes", "--requirements", str(lock))
    # Out of the user's cache files are copied: a build that wrote into one would spoil all that come after it.
    linked = ("--link-mode", "copy" if wheelhouse is None else "hardlink")
    _uv("pip", "install", "--target", str(site), *locked, *_target(platform), *source, *linked)
    with zipfile.ZipFile(own) as wheel:
        wheel.extractall(site)
    prune(site)
    precompile(site, platform.python)
    return lock.read_text()


def own_wheel(work: Path, wheelhouse: Path | None = None) -> Path:
    """The wheel of the fedeq-edge that runs: built from its checkout, or packed again from its installed files."""
    package = Path(kit.__file__).parent
    if (package / "_kit").is_dir():
        return _packed_again(work)
    # Where hatchling is installed (as for development), building needs no network.
    here = ("--no-build-isolation", "--python", sys.executable) if importlib.util.find_spec("hatchling") else ()
    offline = () if wheelhouse is None else ("--no-index", "--find-links", str(wheelhouse.resolve()))
    _uv("build", "--wheel", "--out-dir", str(work), *here, *offline, str(package.parent))
    return next(work.glob("fedeq_edge-*.whl"))


def prune(site: Path) -> None:
    """What no board needs is gone from the tree."""
    for name in _PRUNED_TREES:
        shutil.rmtree(site / name, ignore_errors=True)
    for path in sorted(site.rglob("*"), reverse=True):  # what is inside comes before its folder
        if path.is_dir() and not path.is_symlink():
            if path.name in _PRUNED_FOLDERS or not any(path.iterdir()):
                shutil.rmtree(path)
        elif _superfluous(path):
            path.unlink()


def precompile(site: Path, python: str) -> None:
    """Byte code is beside every module, if the board's python is of our own minor version: a start takes half as long.

    It is never compared with its source, which the manifest vouches for like for it, and is the same in every build.
    """
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        return
    told = ("--invalidation-mode", "unchecked-hash", "-s", str(site))
    # A template among the sources of a package may not compile, and then has no byte code.
    subprocess.run([sys.executable, "-I", "-m", "compileall", "-qq", *told, str(site)], check=False)


def packages(site: Path) -> dict[str, str]:
    """Version by normalised name of every distribution in the tree."""
    found = importlib.metadata.distributions(path=[str(site)])
    return {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version for one in found}


def _superfluous(path: Path) -> bool:
    described = path.parent.name.endswith(".dist-info") and path.name in _PRUNED_METADATA
    return described or path.suffix in _PRUNED_SUFFIXES


def _packed_again(work: Path) -> Path:
    """A wheel of the installed distribution's files, scripts and caches left out."""
    found = importlib.metadata.distribution(DISTRIBUTION)
    wheel = work / f"fedeq_edge-{found.version}-py3-none-any.whl"
    inside = [file for file in found.files or () if ".." not in file.parts and file.suffix != ".pyc"]
    if not inside:
        raise ProvisionError(
            Exit.FAILED, f"{DISTRIBUTION} has no list of its files here; install it from a wheel or use a checkout"
        )
    with zipfile.ZipFile(wheel, "w") as packed:
        for file in inside:
            packed.write(Path(str(found.locate_file(file))), str(file))
    return wheel


def _locked(own: Path, work: Path, platform: Platform, torch: bool, wheelhouse: Path | None) -> Path:
    """requirements.txt: one version and its hashes for each package that the board needs beside ours."""
    extras = ",".join((*_EXTRAS, *(("torch",) if torch else ())))
    wanted, pins, lock = work / "wanted.in", work / "pins.txt", work / "requirements.txt"
    wanted.write_text(f"{DISTRIBUTION}[{extras}] @ {own.resolve().as_uri()}\n")
    pins.write_text("".join(f"{name}=={version}\n" for name, version in sorted(platform.pins.items())))
    told = ("--generate-hashes", "--no-header", "--no-annotate", "--no-emit-package", DISTRIBUTION)
    source = _source(work, platform, torch, wheelhouse)
    _uv("pip", "compile", str(wanted), "-c", str(pins), "-o", str(lock), *told, *_target(platform), *source)
    return lock


def _target(platform: Platform) -> tuple[str, ...]:
    return "--python-platform", platform.uv, "--python-version", platform.python, "--only-binary", ":all:"


def _source(work: Path, platform: Platform, torch: bool, wheelhouse: Path | None) -> tuple[str, ...]:
    """Where wheels come from; PyPI's torch for x86-64 is a CUDA build of gigabytes, pytorch.org has one without.

    Those of a wheelhouse are unpacked in `work`: uv's own cache would keep them for good, once per folder and day.
    """
    if wheelhouse is not None:
        return "--no-index", "--find-links", str(wheelhouse.resolve()), "--cache-dir", str(work / "unpacked")
    return ("--torch-backend", "cpu") if torch and platform.architecture == "x86_64" else ()


def _uv(*arguments: str) -> None:
    """Run uv in a folder without settings of a project. Raises ProvisionError with its reason in one line."""
    import uv  # noqa: PLC0415  # extra `fleet`

    environment = {**os.environ, "NO_COLOR": "1", "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    environment.pop("VIRTUAL_ENV", None)
    if arguments[0] == "pip":
        arguments = (*arguments, "--python", sys.executable)
    try:
        subprocess.run(
            [uv.find_uv_bin(), *arguments],
            env=environment, capture_output=True, text=True, check=True, timeout=_UV_LIMIT_S, cwd="/",
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise ProvisionError(
            Exit.FAILED,
            f"no tree of wheels: uv says {_one_line(error.stderr)!r}; check the network, put what is missing into "
            "--wheelhouse, or change the pins of the board's profile.toml",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ProvisionError(Exit.FAILED, f"uv did not end within {_UV_LIMIT_S:.0f} s; check the network") from error


def _one_line(told: str) -> str:
    return " ".join(_words(told.splitlines()))


def _words(lines: Sequence[str]) -> Iterator[str]:
    """The words of uv's message without its drawing and what it prints of each package."""
    for line in lines:
        if not re.match(r"\s*(Using|Resolved|Prepared|Downloading|warning:)", line):
            yield from re.sub(r"[×╰─▶├│·]", " ", line).split()
