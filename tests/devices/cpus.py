"""The processors of boards as this machine can play them: qemu-user's model, and what /proc/cpuinfo says there.

The file matters by itself: without it numerical libraries read the host's and take paths that the model lacks.
"""

from typing import Final, NamedTuple


class Cpu(NamedTuple):
    """qemu: name of the model in QEMU_CPU; part, features: as the kernel prints them in /proc/cpuinfo."""

    qemu: str
    part: str
    features: str
    board: str

    @property
    def cpuinfo(self) -> str:
        """The text of /proc/cpuinfo on this board."""
        cores = "\n".join(_CORE.format(number=number, cpu=self) for number in range(4))
        return f"{cores}\nModel\t\t: {self.board}\n"


_CORE: Final = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: {cpu.features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {cpu.part}
CPU revision\t: 3
"""
_V8_0: Final = "fp asimd evtstrm crc32 cpuid"  # a Pi 3 or 4 has no crypto extension
_V8_2: Final = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"

PI_3: Final = Cpu("cortex-a53", "0xd03", _V8_0, "Raspberry Pi 3 Model B Plus Rev 1.3")
PI_4: Final = Cpu("cortex-a72", "0xd08", _V8_0, "Raspberry Pi 4 Model B Rev 1.5")
PI_5: Final = Cpu("cortex-a76", "0xd0b", _V8_2, "Raspberry Pi 5 Model B Rev 1.0")
