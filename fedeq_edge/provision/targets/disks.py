"""Whether a disk may be written: never one that this machine runs from or has mounted."""

import os
import stat
from pathlib import Path
from typing import Final

from fedeq_edge.errors import Exit, ProvisionError

_SYSTEM: Final = ("/", "/boot", "/boot/efi", "/boot/firmware", "/usr", "/var", "/home")


def check_writable(path: Path) -> None:
    """`path` is an image file of ours, or a whole disk that nothing uses. Raises ProvisionError where it is not."""
    try:
        status = path.stat()
    except OSError as error:
        raise ProvisionError(Exit.FAILED, f"{path} cannot be read: {error.strerror}; is the card in?") from error
    if stat.S_ISBLK(status.st_mode):
        check_disk(path, f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}", Path("/proc"), Path("/sys"))
    elif not stat.S_ISREG(status.st_mode):
        raise ProvisionError(Exit.MISUSED, f"{path} is neither an image file nor a disk; give card.img or /dev/sdX")
    if not os.access(path, os.R_OK | os.W_OK):
        raise ProvisionError(Exit.FAILED, f"{path} is not ours to write; run the command with sudo, or chmod u+w it")


def check_disk(path: Path, number: str, proc: Path, sys: Path) -> None:
    """The disk `number` (major:minor) is whole and nothing uses it, as the kernel tells in `proc` and `sys`."""
    if (sys / "dev/block" / number / "partition").exists():
        raise ProvisionError(Exit.MISUSED, f"{path} is one partition; give the whole card, {_whole(number, sys)}")
    used = {point for device, point in _in_use(proc, sys) if device in _on_top(number, sys)}
    if any(point in _SYSTEM or point == "swap" for point in used):
        raise ProvisionError(
            Exit.FAILED, f"{path} holds this machine's {min(used)}; a system disk is never written: name the card"
        )
    if used:
        raise ProvisionError(
            Exit.FAILED, f"{path} is in use ({', '.join(sorted(used))}); umount {' '.join(sorted(used))}"
        )


def _whole(number: str, sys: Path) -> str:
    return f"/dev/{(sys / 'dev/block' / number).resolve().parent.name}"


def _on_top(number: str, sys: Path) -> set[str]:
    """The disk, its partitions, and what lies on any of them (encryption, logical volumes), as major:minor."""
    folder = (sys / "dev/block" / number).resolve()
    parts = [part.parent for part in folder.glob("*/partition")]
    held = [holder.resolve() for here in (folder, *parts) for holder in here.glob("holders/*")]
    numbers = {(here / "dev").read_text().strip() for here in (*parts, *held) if (here / "dev").exists()}
    nested = (_on_top((here / "dev").read_text().strip(), sys) for here in held if (here / "dev").exists())
    return {number, *numbers}.union(*nested)


def _in_use(proc: Path, sys: Path) -> list[tuple[str, str]]:
    """Device (major:minor) and where it is mounted, or "swap"."""
    mounted = [line.split() for line in (proc / "self/mountinfo").read_text().splitlines()]
    swaps = [line.split()[0] for line in (proc / "swaps").read_text().splitlines()[1:]]
    blocks = [(sys / "class/block" / Path(os.path.realpath(name)).name / "dev") for name in swaps]
    swapped = [(block.read_text().strip(), "swap") for block in blocks if block.exists()]
    return [(fields[2], fields[4]) for fields in mounted] + swapped
