"""Resident memory of this process, and how to give back what only its start needed.

getrusage's ru_maxrss survives exec and a vfork: a small child of a large parent would report the parent's peak. The
kernel's VmHWM belongs to the process image and does not.
"""

import ctypes
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4
# glibc, malloc.h. 32 MB is the largest threshold that it takes on 64-bit systems.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")


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


def keep_heap() -> None:
    """Freed memory stays with this process: for one that allocates the same large tensors over and over.

    By default glibc maps every block above 128 kB anew and trims the heap's top, so a cell with states of 1 MB spends a
    fifth of its time on page faults. Nothing happens without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


def give_back() -> None:
    """Free heap is returned to the kernel, and code that only the start has run is no longer mapped.

    How much of a library's code is mapped depends on how the kernel cached its file: 18 MB for an idle agent on one
    day, 24 MB just after an installation. Mapped pages are the last that a kernel in need reclaims, so on a board of
    512 MB a process at rest should not hold them. What is needed again is mapped again from the cache on first use.
    Only clean pages of executable file mappings are touched; where libc or kernel offer none of this, nothing happens.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):  # not glibc
        return
    libc.malloc_trim(0)
    for start, size in _clean_code():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)


def _clean_code() -> Iterator[tuple[int, int]]:
    """(address, bytes) of executable file mappings without a changed page."""
    mapping: re.Match[str] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = _MAPPING.match(line)
        if found is not None:
            mapping = found if found[3].startswith("r-x") and found[4] != "0" else None
        elif mapping is not None and line.startswith("Private_Dirty:") and int(line.split()[1]) == 0:
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            yield start, end - start
