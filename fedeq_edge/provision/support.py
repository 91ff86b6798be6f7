"""The support bundle of `fedeq doctor`: what a helper needs, without secrets."""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from fedeq_edge.atomic import write_atomically, writing
from fedeq_edge.provision.doctor import Here, read_config
from fedeq_edge.provision.findings import Check, said
from fedeq_edge.provision.layout import AGENT, UPDATER
from fedeq_edge.provision.redact import without

_LOG_LINES: Final = 200


def pack(here: Here, checks: Sequence[Check], file: Path) -> list[str]:
    """`file` is a zip for whoever helps: checks, settings, states, logs; the names inside. No keys, no secrets.

    Files are named one by one: what is not on the list does not get in, whatever somebody put beside it.
    """
    found = {"checks.json": msgspec.json.format(msgspec.json.encode(checks)).decode(), "machine.json": _facts()}
    for name, path in _files(here):
        with contextlib.suppress(OSError):
            found[name] = path.read_text(errors="replace")
    if here.root is not None:
        for unit in (AGENT, UPDATER):
            lines = ["--lines", str(_LOG_LINES), "--output", "short-iso", "--no-pager", "--quiet"]
            found[f"journal/{unit}.txt"] = said(["journalctl", "--unit", unit, *lines])
    part = file.with_name(f".{file.name}.part")
    with writing(file), zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(found.items()):
            archive.writestr(name, without(text))
    write_atomically(file, part.read_bytes(), mode=0o600)
    part.unlink()
    return sorted(found)


def _files(here: Here) -> Iterator[tuple[str, Path]]:
    if here.fleet is not None:
        yield "fleet/fleet.toml", here.fleet / "fleet.toml"
        yield "fleet/revoked.json", here.fleet / "ca" / "revoked.json"
        for kind in ("actions", "reports"):
            for path in sorted((here.fleet / kind).glob("*.json")):
                yield f"fleet/{kind}/{path.name}", path
    if here.config is not None:
        state = here.config.parent / read_config(here.config).state
        yield f"config/{here.config.name}", here.config
        yield "config/status.json", state / "status.json"
        yield "config/rounds.jsonl", state / "rounds.jsonl"
    if here.root is not None:
        for name in ("state.json", "updater/task.json", "updater/seen.json"):
            yield f"board/{name}", here.root / "opt/fedeq-edge" / name
        yield "board/updater.toml", here.root / "etc/fedeq-edge/updater.toml"


def _facts() -> str:
    packages = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": sys.version,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": dict(sorted(packages.items())),
    }
    return json.dumps(facts, indent=1)
