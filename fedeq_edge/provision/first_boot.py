"""First boot of a flashed card: install the release, enrol with the join token, start the agent, say how it went.

Runs on the board as root, out of fedeq-first-boot.service, until it has succeeded once: standard library only, python
>= 3.9, every step may be repeated after a power cut. FOLDER holds what `fedeq flash` put on the card; status.json there
tells any computer that the card is put into how far it came.

    first_boot.py [--root R] FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UPDATER = "fedeq-updater.service"


class FailedError(Exception):
    """A step did not succeed; the text says why, `step` which."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(why)
        self.step = step


class FirstBoot:
    """The steps, in their order. folder: what the card brought; root: "" on the board."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder = folder
        self.root = root
        self.home = Path(root + "/opt/fedeq-edge")
        self.identity = Path(root + "/etc/fedeq-edge")
        self.data = Path(root + "/var/lib/fedeq-edge/data.npz")
        self.card = read_json(self.folder / "card.json")

    def go(self) -> None:
        """The agent runs with a certificate of its own, and nothing secret is left on the card's open part."""
        self.take()
        self.install()
        self.enrol()
        self.start()
        self.clean()

    def take(self) -> None:
        """What anybody could read who holds the card is where root alone can: settings, token, data."""
        self.identity.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.identity.chmod(0o700)
        self.move("agent.toml", self.identity / "agent.toml", 0o600)
        self.move("join.toml", self.identity / "join.toml", 0o600)
        if (self.folder / "data.npz").exists():
            self.data.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.move("data.npz", self.data, 0o644)  # in the agent's own folder, whoever its user will be

    def install(self) -> None:
        """The release is unpacked, verified and current; nothing is started."""
        bundle = self.folder / "bundle.tar.gz"
        if not bundle.exists():
            return  # it was installed before the power went, or by the computer that flashed the card
        self.home.mkdir(parents=True, exist_ok=True)
        for name, mode in (("release.py", 0o755), ("bundle.pub", 0o644)):
            copy(self.folder / name, self.home / name, mode)
        self.release("install", str(bundle), "--sha256", self.card["sha256"], "--no-start")
        bundle.unlink()

    def enrol(self) -> None:
        """The device has a certificate for a key that it made itself, and the token is gone."""
        join = self.identity / "join.toml"
        if join.exists():
            fedeq = str(self.home / "current/bin/fedeq")
            self.command("enrol", [fedeq, "device", "enrol", "--join", str(join), "--folder", str(self.identity)])

    def start(self) -> None:
        """The agent has solved a fixed point and is ready; the updater runs beside it."""
        self.release("start")
        if Path(self.root + "/etc/systemd/system", UPDATER).exists():
            self.command("start", ["systemctl", "start", "--no-block", UPDATER])

    def clean(self) -> None:
        """Nothing is left to do: the unit's condition is card.json."""
        for name in ("card.json", "release.py", "bundle.pub"):
            if (self.folder / name).exists():
                (self.folder / name).unlink()
        os.sync()

    def move(self, name: str, destination: Path, mode: int) -> None:
        """What the card brought under this name, if it did, is at the destination alone."""
        source = self.folder / name
        if source.exists():
            copy(source, destination, mode)
            source.unlink()

    def release(self, command: str, *arguments: str) -> None:
        """release.py did this."""
        root = ["--root", self.root] if self.root else []
        self.command(command, [sys.executable, "-I", str(self.home / "release.py"), *root, command, *arguments])

    def command(self, step: str, argv: list[str]) -> None:
        """The command ended well."""
        done = run(argv)
        if done.returncode:
            raise FailedError(step, last_line(done))

    def report(self, **status: str) -> None:
        """status.json tells this; not written again where nothing changed, as cards wear out."""
        path = self.folder / "status.json"
        status["device"] = self.card.get("device", "")
        old = read_json(path)
        if {key: old.get(key) for key in status} == status:
            return
        neighbour = self.folder / "status.new"  # FAT knows no hidden names
        neighbour.write_text(json.dumps({**status, "at": int(time.time())}) + "\n")
        with neighbour.open() as written:
            os.fsync(written.fileno())
        neighbour.replace(path)

    def version(self) -> str:
        """Of the release that runs."""
        return (self.home / "current").resolve().name


def read_json(path: Path) -> dict[str, Any]:
    """What the file holds, nothing where it holds no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def copy(source: Path, destination: Path, mode: int) -> None:
    """`destination` is a copy, whole and on the disk, or what it was."""
    neighbour = destination.with_name(destination.name + ".new")
    handle = os.open(neighbour, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as output, source.open("rb") as content:
        shutil.copyfileobj(content, output)
        output.flush()
        os.fsync(output.fileno())
    neighbour.chmod(mode)
    neighbour.replace(destination)


def run(argv: list[str]) -> subprocess.CompletedProcess[bytes]:
    """The command ended."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a command complained of."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def main() -> int:
    """Exit status 0 when the agent runs, 1 where a step failed: the unit tries again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default="")
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    boot = FirstBoot(chosen.folder, chosen.root)
    try:
        boot.go()
    except (FailedError, OSError) as error:
        boot.report(state="failed", step=getattr(error, "step", "write"), detail=str(error))
        print(f"fedeq-first-boot: {error}", file=sys.stderr)
        return 1
    boot.report(state="running", version=boot.version(), detail="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
