"""Bundles: everything that a board needs, as one signed file; no pip, no venv, no compiler needed there.

    manifest.json manifest.sig   what is inside, and the fleet's Ed25519 signature of that
    release.py                   the installer, standard library only
    bin/fedeq, bin/fedeq-updater start these with the board's own python and this tree
    site/                        fedeq-edge and its packages as wheels unpack them
    units/ config/ models/       systemd units; agent.toml where built for a device; models given with --model
    requirements.txt             what uv resolved, with hashes

Same inputs, same bytes: nothing in it knows when, where or by whom it was made.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge import kit
from fedeq_edge.errors import ConfigError, Exit, ProvisionError
from fedeq_edge.provision import wheels
from fedeq_edge.provision.archive import (
    Cpu,
    Entry,
    Manifest,
    canonical,
    entry_of,
    pack,
    read_manifest,
    unpack,
    verify,
    whole,
)
from fedeq_edge.provision.models import check_model
from fedeq_edge.provision.platforms import Platform

__all__ = ["BundleSpec", "Manifest", "build", "read_manifest", "unpack", "verify", "whole"]

INSTALLER: Final = Path(__file__).with_name("release.py")
LAUNCHER: Final = "bin/fedeq"
# The updater is there all the time: it is started without the command line's libraries.
_LAUNCHERS: Final = {LAUNCHER: "fedeq_edge.cli", "bin/fedeq-updater": "fedeq_edge.updater"}
_EXECUTABLE: Final = frozenset({*_LAUNCHERS, "release.py"})

# Environment, not `python -I`: the agent starts its trainer as `python -m fedeq_edge.trainer`, which must find the same
# tree. Everything of PYTHON* that could name another one is set or gone, _ISOLATION does the rest. A release itself is
# never written to: its byte code is in the bundle (wheels.precompile).
_LAUNCHER: Final = """\
#!/bin/sh
# Starts @WHAT@ with the packages of this release and the board's own python @PYTHON@.
release=$(dirname "$(dirname "$(readlink -f "$0")")")
unset PYTHONHOME PYTHONSTARTUP PYTHONPLATLIBDIR PYTHONPYCACHEPREFIX
export PYTHONPATH="$release/site" PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
# onnxruntime >= 1.29 reports to its maker unless this is set before it is loaded.
export ORT_DISABLE_TELEMETRY=1
export PYTHONDONTWRITEBYTECODE=1
start='import sys; sys.argv[0] = "@WHAT@"; from @MODULE@ import main; sys.exit(main())'
for python in /usr/bin/python@PYTHON@ /usr/local/bin/python@PYTHON@; do
    [ -x "$python" ] && exec "$python" -c "$start" "$@"
done
echo "@WHAT@: this release needs python @PYTHON@ in /usr/bin or /usr/local/bin; install it, or build the bundle" \\
    "with --python for the one that is here" >&2
exit 6
"""
# Python imports it at every start, with PYTHONPATH first: a torch that somebody installed on the board, which may crash
# there, is not found where the bundle has none.
_ISOLATION: Final = """\
import sys

sys.path[:] = [folder for folder in sys.path if not folder.endswith("-packages")]
"""


class BundleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to build.

    out: folder for the bundle. key: Ed25519 private key (PEM); None: not signed, and no board takes it. name: of device
    or board, in the file's name. torch: also torch, to train by it. wheelhouse: folder of wheels to use instead of the
    network. config: agent.toml, empty: none.
    """

    platform: Platform
    out: Path
    key: Path | None
    name: str
    torch: bool = False
    models: tuple[Path, ...] = ()
    wheelhouse: Path | None = None
    config: bytes = b""


def build(spec: BundleSpec) -> Path:
    """The bundle of `spec`, whole and signed. Raises ProvisionError, or ConfigError naming what cannot be used."""
    _check_inputs(spec)
    with tempfile.TemporaryDirectory(prefix="fedeq-bundle-") as folder:
        tree, work = Path(folder) / "tree", Path(folder) / "work"
        work.mkdir()
        lock = wheels.install(tree / "site", work, spec.platform, torch=spec.torch, wheelhouse=spec.wheelhouse)
        (tree / "requirements.txt").write_text(lock)
        _furnish(tree, spec)
        manifest = _describe(tree, spec.platform)
        out = spec.out / f"{spec.name}-py{spec.platform.python.replace('.', '')}-{manifest.version}.tar.gz"
        pack(tree, manifest, spec.key, out)
    return out


def _check_inputs(spec: BundleSpec) -> None:
    """Raises ConfigError before minutes are spent on what cannot work."""
    for model in spec.models:
        check_model(model)
    names = [model.name for model in spec.models]
    if len(set(names)) < len(names):
        raise ConfigError(f"models {', '.join(names)}: two have the same name; rename one")
    if spec.wheelhouse is not None and not spec.wheelhouse.is_dir():
        raise ConfigError(f"wheelhouse {spec.wheelhouse} is no folder; name one that holds wheels, or leave it out")


def _furnish(tree: Path, spec: BundleSpec) -> None:
    """Everything beside the packages is in the tree."""
    for folder in ("bin", "units", "config", "models"):
        (tree / folder).mkdir()
    for path, module in _LAUNCHERS.items():
        told = {"PYTHON": spec.platform.python, "MODULE": module, "WHAT": Path(path).name}
        (tree / path).write_text(_filled(_LAUNCHER, told))
    (tree / "site/sitecustomize.py").write_text(_ISOLATION)
    shutil.copyfile(INSTALLER, tree / "release.py")
    for unit in kit.folder("devices").glob("*.service"):
        shutil.copyfile(unit, tree / "units" / unit.name)
    for model in spec.models:
        shutil.copyfile(model, tree / "models" / model.name)
    if spec.config:
        (tree / "config/agent.toml").write_bytes(spec.config)


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub("@([A-Z]+)@", lambda mark: words[mark[1]], text)


def _describe(tree: Path, platform: Platform) -> Manifest:
    """The manifest of a tree; its version changes with any byte of any file."""
    files = {name: entry_of(tree / name, 0o755 if name in _EXECUTABLE else 0o644) for name in _files(tree)}
    packages = wheels.packages(tree / "site")
    return Manifest(
        version=f"{packages[wheels.DISTRIBUTION]}+{_digest(files)}",
        profile=platform.profile,
        architecture=platform.architecture,
        python=platform.python,
        glibc=platform.glibc,
        cpu=Cpu(part=platform.cpu_part, qemu=platform.qemu_cpu),
        packages=packages,
        files=files,
    )


def _files(tree: Path) -> list[str]:
    """Every file of a tree by its path inside. Raises ProvisionError where a wheel brought a link."""
    found = [path for path in tree.rglob("*") if path.is_symlink() or not path.is_dir()]
    odd = [path for path in found if path.is_symlink() or not path.is_file()]
    if odd:
        raise ProvisionError(Exit.FAILED, f"{odd[0].relative_to(tree)} is a link or a device; leave its package out")
    return sorted(path.relative_to(tree).as_posix() for path in found)


def _digest(files: dict[str, Entry]) -> str:
    return hashlib.sha256(canonical(files)).hexdigest()[:12]
