"""Where the files that users take with them are: board profiles, broker templates, export recipes.

An installed wheel carries them as package data in `_kit/`; a checkout has no such folder and uses the
top-level ones beside the package, so that an edit takes effect at once.
"""

from pathlib import Path
from typing import Literal

KitName = Literal["devices", "broker", "export"]

_PACKAGE = Path(__file__).resolve().parent


def folder(name: KitName) -> Path:
    """The folder `devices`, `broker` or `export` of this installation."""
    packaged = _PACKAGE / "_kit"
    return (packaged if packaged.is_dir() else _PACKAGE.parent) / name
