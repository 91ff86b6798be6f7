"""Releases on a board, and bundles that differ from a good one in a file, signed by the same fleet."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge.provision import archive
from tests.devices.board import Board
from tests.devices.locks import alone_with

RELEASE: Final = "/usr/bin/python3 -I /opt/fedeq-edge/release.py"
HEALTH: Final = "site/fedeq_edge/health.py"
LATER, LATEST = "# a later release", "# and one more"  # variants that are as good; the same ones are made once


def state(board: Board) -> dict[str, Any]:
    """What the installer on the board says."""
    found: dict[str, Any] = json.loads(board.says(f"{RELEASE} status"))
    return found


def runs(board: Board, bundle: Path) -> bool:
    """Whether the board can be reached and its agent runs this bundle, confirmed and connected."""
    told = board.ssh(f"{RELEASE} status", check=False)
    if told.returncode:
        return False
    said = json.loads(told.stdout)
    version = archive.read_manifest(bundle).version
    return bool(version == said["current"] == said["confirmed"]) and connected(board)


def connected(board: Board) -> bool:
    """Whether the agent that runs there now says that its broker took it."""
    if board.ssh("systemctl is-active --quiet fedeq-agent", check=False).returncode:
        return False
    pid = board.says("systemctl show --property=MainPID --value fedeq-agent")
    said = json.loads(board.ssh("cat /var/lib/fedeq-edge/state/status.json", check=False).stdout or "{}")
    return said.get("broker") == "connected" and str(said.get("pid")) == pid


def variant(good: Path, fleet: Path, appended: str, file: str = HEALTH) -> Path:
    """A bundle beside the good one in which a python file has more lines at its end."""
    mark = hashlib.sha256(f"{file}\n{appended}".encode()).hexdigest()[:8]
    out = good.with_name(f"{mark}-{good.name}")
    with alone_with(out):
        if not out.exists():
            _vary(good, fleet, appended, file, out)
    return out


def _vary(good: Path, fleet: Path, appended: str, file: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        manifest = archive.unpack(good, fleet / "keys" / "bundle.pub", tree)
        with (tree / file).open("a") as source:
            source.write(f"\n{appended}\n")
        compiled = f"{Path(file).parent}/__pycache__/{Path(file).stem}."  # what was compiled of it is believed unseen
        files = {
            path: archive.entry_of(tree / path, entry.mode)
            for path, entry in manifest.files.items()
            if not path.startswith(compiled)
        }
        digest = hashlib.sha256(archive.canonical(files)).hexdigest()[:12]
        version = f"{manifest.version.partition('+')[0]}+{digest}"
        described = msgspec.structs.replace(manifest, version=version, files=files)
        archive.pack(tree, described, fleet / "keys" / "bundle.key", out)


def broken(good: Path, fleet: Path) -> Path:
    """A release whose solver finds nothing: it imports, starts, and never says READY."""
    never = 'def solve() -> Health:\n    raise SolverError("health: this release was broken on purpose")'
    return variant(good, fleet, never)
