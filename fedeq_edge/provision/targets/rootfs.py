"""A card's root file system, mounted on this machine. Nothing of it is run: its processor may be another one."""

import os
import subprocess
import sys
from pathlib import Path

from fedeq_edge.errors import ConfigError, Exit, ProvisionError
from fedeq_edge.provision.facts import SCRIPT, Facts, parse
from fedeq_edge.provision.layout import Layout


class RootfsTarget:
    """The system whose files are in `path`. Raises ConfigError where that is no system, or is this machine's own."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path.resolve()
        self.layout = Layout(str(self.path))
        if self.path == Path("/"):
            raise ConfigError("/ is this machine's own root; to flash it give local:")
        if not (self.path / "etc").is_dir() or not (self.path / "usr").is_dir():
            raise ConfigError(f"{path} is no root file system (no etc and usr in it); give where the card is mounted")

    def facts(self) -> Facts:
        """What the system is. Raises ProvisionError where we may not change it."""
        found = facts_of_tree(self.path)
        if not os.access(self.path / "etc", os.W_OK):
            raise ProvisionError(Exit.FAILED, f"{self.name} is not ours to write; run the command with sudo")
        return found

    def close(self) -> None:
        """Nothing was open."""


def facts_of_tree(root: Path) -> Facts:
    """The facts of the system whose files are at `root`."""
    command = [sys.executable, "-I", "-", str(root)]
    done = subprocess.run(command, input=SCRIPT, capture_output=True, check=True, timeout=60)
    return parse(done.stdout)
