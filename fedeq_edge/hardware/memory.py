"""Resident memory of this process.

getrusage's ru_maxrss survives exec and a vfork: a small child of a large parent would report the parent's peak. The
kernel's VmHWM belongs to the process image and does not.
"""

import os
import resource
from pathlib import Path


def rss_bytes() -> int:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most that was ever resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # a kernel without VmHWM counts in kilobytes
