"""One fleet for all sites of a run, and the bundles that it signed: made once, good at every site.

A bundle takes 10 s of a CPU, and what differs between the sites is none of it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.devices.locks import alone_with
from tests.devices.sites import GATEWAY

NAME: Final = "plant"
_BUILD_S: Final = 600.0  # with torch, which has to come from somewhere first


class Depot:
    """The fleet in `folder`, which the test processes of a run share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fleet = folder / "fleet"
        with alone_with(self._fleet):
            if not (self._fleet / "fleet.toml").exists():
                _fedeq("fleet", "init", NAME, "--host", GATEWAY, "--fleet", str(self._fleet))

    def copy_to(self, fleet: Path) -> None:
        """`fleet` is the folder of this fleet, its keys and all, and has no devices and no bundles yet."""
        shutil.copytree(self._fleet, fleet, ignore=shutil.ignore_patterns("bundles"))

    def bundle(self, profile: str, *more: str) -> Path:
        """A signed bundle for this kind of board."""
        told = self._folder / "-".join((profile, *(word.strip("-") for word in more)))
        with alone_with(told):
            if not told.exists():
                words = ["--profile", profile, "--python", "3.11", "--fleet", str(self._fleet), "--json", *more]
                told.write_text(_fedeq("bundle", "build", *words))
        return Path(json.loads(told.read_text())["path"])


def _fedeq(*words: str) -> str:
    """What it prints. It runs outside every site, since a site has no way to the wheels."""
    command = [sys.executable, "-m", "fedeq_edge", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_S)
    assert done.returncode == 0, f"fedeq {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def shared(base: Path) -> Path:
    """The folder for what test processes share. base: of temporary files of this process, which pytest has made."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
