"""What a file is that somebody names as a model: told by its content, for names are typed and copied by people."""

from pathlib import Path
from typing import Final, Literal

from fedeq_edge.atomic import reading
from fedeq_edge.errors import ConfigError
from fedeq_edge.storage import SEAL

Form = Literal["fedeq", "onnx"]
_NAMES: Final[dict[str, Form]] = {".fedeq": "fedeq", ".onnx": "onnx"}
_ARCHIVE: Final = b"PK\x03\x04"
_ONNX: Final = b"\x08"  # the IR version, ONNX's first field


def form(path: Path) -> Form:
    """Whether `path` holds a personal model or an ONNX one, as `recognised`. Raises ConfigError for anything else."""
    found = recognised(path)
    if found is None:
        raise ConfigError(
            f"{path} {_wrong(path)}; name a device's personal.fedeq, or an ONNX file that fedeq model export wrote"
        )
    return found


def recognised(path: Path) -> Form | None:
    """What `path` holds, by its content; by its name where there is no such file or its beginning is damaged."""
    with reading(path):
        begins = _beginning(path) if path.is_file() else b""
    if begins.startswith(SEAL):
        return "fedeq"
    if begins.startswith(_ONNX):
        return "onnx"
    return None if begins.startswith(_ARCHIVE) else _NAMES.get(path.suffix.lower())


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(SEAL))


def _wrong(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    if path.is_dir():
        return "is a folder"
    return "is an .npz or another archive, no model" if _beginning(path).startswith(_ARCHIVE) else "is no model"


def spare(out: Path) -> None:
    """Raises ConfigError where writing `out` would replace anything but an earlier export: a model has no copy."""
    if out.is_file() and out.stat().st_size and recognised(out) != "onnx":
        raise ConfigError(f"--out {out}: is there already and is no ONNX file; name another")
