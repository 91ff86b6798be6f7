"""What flashing asks of a target: facts, commands, files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.facts import SCRIPT, Facts, parse
from fedeq_edge.provision.layout import Layout

PYTHON: Final = "/usr/bin/python3"  # the one that the release's launcher takes
_NOT_FOUND: Final = 127  # of a shell, and of `env`
_PROBE_S: Final = 60.0  # python starts in 0.3 s on a board that is emulated
# One command, so that a connection lost in it leaves the old file; `cat` because a small board has no sftp server.
_PUT: Final = (
    'umask 077 && cat >"$1.part" && [ "$(wc -c <"$1.part")" -eq "$3" ] && chmod "$2" "$1.part" && mv -f "$1.part" "$1"'
)


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended."""

    code: int
    out: bytes
    err: bytes

    @property
    def reason(self) -> str:
        """The last line that it complained with, or its exit status."""
        lines = self.err.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.code}"


class Target(Protocol):
    """Something that can be flashed. `name` is what the user called it, `layout` where things are on it."""

    name: str
    layout: Layout

    def facts(self) -> Facts:
        """What it is. Raises ProvisionError where it cannot say."""
        ...

    def close(self) -> None:
        """Nothing of ours is open any more."""
        ...


class Machine(Target, Protocol):
    """A target that runs commands, as root: this machine, or one over ssh."""

    def run(self, argv: Sequence[str], *, input: bytes = b"", timeout_s: float = 60.0) -> Ran:  # noqa: A002
        """The command has ended. Raises ProvisionError (LOST) where the way to the machine ended before it."""
        ...

    def stream(self, argv: Sequence[str]) -> Iterator[str]:
        """The lines that the command prints, as it prints them, until it ends."""
        ...


def make_folder(machine: Machine, path: str, *, mode: int) -> None:
    """The folder is there, root's, with this mode."""
    done = machine.run(["install", "-d", "-m", f"{mode:o}", path])
    if done.code:
        raise ProvisionError(Exit.FAILED, f"{machine.name}: cannot make {path}: {done.reason}; is its disk read-only?")


def put(machine: Machine, content: bytes, remote: str, *, mode: int = 0o644, timeout_s: float = 600.0) -> None:
    """`remote` holds `content`, or what it held before; nobody else can read it before `mode` lets them."""
    size = str(len(content))
    done = machine.run(["sh", "-c", _PUT, "put", remote, f"{mode:o}", size], input=content, timeout_s=timeout_s)
    if done.code and b"No space" in done.err:
        raise ProvisionError(Exit.NO_SPACE, f"{machine.name}: no room for {remote}; free some and flash again")
    if done.code:
        raise ProvisionError(Exit.FAILED, f"{machine.name}: cannot write {remote}: {done.reason}; flash again")


def get(machine: Machine, remote: str) -> bytes | None:
    """What the file holds, None where there is none."""
    done = machine.run(["cat", remote])
    return None if done.code else done.out


def ask(machine: Machine) -> Facts:
    """The facts of a machine that runs. Raises ProvisionError where it has no python3."""
    done = machine.run([PYTHON, "-"], input=SCRIPT, timeout_s=_PROBE_S)
    if done.code == _NOT_FOUND:
        raise ProvisionError(
            Exit.WRONG_PLATFORM, f"{machine.name} has no {PYTHON}; install it there: apt-get install python3"
        )
    if done.code:
        raise ProvisionError(Exit.FAILED, f"{machine.name}: python3 cannot say what it is: {done.reason}")
    return parse(done.out)
