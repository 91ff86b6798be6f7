"""Trees of real aarch64 wheels, resolved by uv on this machine and kept in the cache between runs."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.devices import rootfs
from tests.devices.locks import alone_with


class WheelsError(Exception):
    """Wheels cannot be had here; the text is one line."""


def cache() -> Path:
    """Where the trees are kept, beside the root file systems."""
    return rootfs.cache().with_name("wheels")


def tree(*pins: str) -> Path:
    """A folder for sys.path of an aarch64 board's python 3.11 with these wheels and their needs. Raises WheelsError."""
    folder = cache() / "_".join(pins).replace("==", "-")
    with alone_with(folder):
        if not folder.exists():
            part = folder.with_name(f".{os.getpid()}-{folder.name}")
            _install(pins, part)
            part.rename(folder)
    return folder


def _install(pins: tuple[str, ...], folder: Path) -> None:
    uv = shutil.which("uv") or _bundled_uv()
    platform = [
        "--python-platform",
        "aarch64-manylinux_2_28",
        "--python-version",
        "3.11",
        "--only-binary",
        ":all:",
        "--compile-bytecode",
    ]
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--target", str(folder), *platform, *pins],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise WheelsError(f"uv pip install {' '.join(pins)}: {done.stderr.strip().splitlines()[-1]}")


def _bundled_uv() -> str:
    try:
        from uv import find_uv_bin  # noqa: PLC0415
    except ImportError:
        raise WheelsError("uv is not installed: pip install uv") from None
    return find_uv_bin()
