"""What a board is, before anything is sent to it: the facts that decide whether a bundle can run there."""

from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.hardware.probe import CORES

SCRIPT: Final = Path(__file__).with_name("board_probe.py").read_bytes()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A board as found; empty text and None: it does not tell, as a card that never ran.

    architecture: of `uname -m`. cpu_part: "CPU part" of /proc/cpuinfo, on ARM alone. cpu_name: "Cortex-A72". libc:
    "glibc" or "musl"; glibc: "2.36". python: minor version of its python3, "3.11"; pythons: of all that it
    has. free_disk_bytes: where releases go.
    clock: unix seconds. systemd: version of the one that runs (on a card: that is there). root: we may change the
    system. booted: it runs now, or the card has been started before.
    """

    architecture: str
    cpu_part: str
    cpu_name: str
    libc: str
    glibc: str
    python: str
    pythons: list[str] = []
    free_disk_bytes: int | None
    memory_bytes: int | None
    clock: int | None
    systemd: int
    machine_id: str
    root: bool
    hostname: str
    booted: bool


def parse(line: bytes) -> Facts:
    """The facts that board_probe.py printed. Raises ProvisionError where they are none."""
    try:
        said = msgspec.json.decode(line, type=dict[str, object])
        core = CORES.get((str(said.pop("cpu_implementer", "")), str(said["cpu_part"])))
        return msgspec.convert({**said, "cpu_name": core or said["cpu_name"]}, Facts)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError) as error:
        raise ProvisionError(
            Exit.FAILED,
            f"the board's python3 answered {line[:80]!r} when asked what it is; a login message printed for every "
            "shell is the usual cause: print it for interactive shells alone",
        ) from error
