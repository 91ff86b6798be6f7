"""This machine."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.facts import Facts
from fedeq_edge.provision.layout import Layout
from fedeq_edge.provision.targets.base import Ran, ask

SUDO: Final = ("sudo", "-n", "--")


class LocalTarget:
    """This machine, as root: with sudo where we are not. root: other than "", a tree that stands for the machine."""

    def __init__(self, *, root: str = "") -> None:
        self.name = "local:"
        self.layout = Layout(root)
        # A tree of one's own needs no rights over the system.
        self._sudo = () if os.geteuid() == 0 or root else SUDO

    def facts(self) -> Facts:
        """What this machine is."""
        return ask(self)

    def run(self, argv: Sequence[str], *, input: bytes = b"", timeout_s: float = 60.0) -> Ran:  # noqa: A002
        """The command has ended; one that is not there ends with 127, as in a shell."""
        command = [*self._sudo, *argv]
        try:
            done = subprocess.run(command, input=input, capture_output=True, timeout=timeout_s, check=False)
        except FileNotFoundError:
            return Ran(127, b"", f"{command[0]}: not found".encode())
        except subprocess.TimeoutExpired as error:
            raise ProvisionError(
                Exit.FAILED, f"{self.name} {argv[0]} has not ended after {timeout_s:g} s; look at what it waits for"
            ) from error
        return Ran(done.returncode, done.stdout, done.stderr)

    def stream(self, argv: Sequence[str]) -> Iterator[str]:
        """The lines that the command prints, as it prints them."""
        with subprocess.Popen([*self._sudo, *argv], stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            try:
                yield from (line.rstrip("\n") for line in running.stdout)
            finally:
                running.terminate()

    def close(self) -> None:
        """Nothing was open."""
