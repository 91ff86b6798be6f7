"""A board for the tests of release.py: a temporary root, bundles, and a systemd that is two scripts on PATH."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedeq_edge.provision import release

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC_PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
UNIT = b"[Service]\nType=notify\nExecStart=/opt/fedeq-edge/current/bin/fedeq agent run\n"
INSTALLER = Path(release.__file__)

# The unit's health is a word in the release: "ok", "broken" and "silent" never say READY, "falls" ends after it has.
# In words that sh has itself, because the tests start it a thousand times and each other program costs a process.
_SYSTEMCTL = """#!/bin/sh
fake=${0%/*}
root=
case $1 in --root=*) root=${1#--root=}; shift;; esac
echo "$*" >> "$fake/calls"
case "$1 $2" in
"restart fedeq-agent.service")
    [ -e "$fake/active" ] && rm "$fake/active"
    [ -e "$fake/hooks" ] && { echo boot; "$PYTHON" "$INSTALLER" --root "$root" boot; } >> "$fake/hooks"
    read -r health < "$root/opt/fedeq-edge/current/config/health"
    [ "$health" = broken ] && echo "Illegal instruction" >> "$fake/log"
    case $health in broken|silent) exit 1;; esac
    echo 0 > "$fake/active"
    [ -e "$fake/hooks" ] && { echo ready; "$PYTHON" "$INSTALLER" --root "$root" ready; } >> "$fake/hooks"
    [ "$health" = falls ] && echo falls > "$fake/active";;
"show fedeq-agent.service")
    [ -e "$fake/active" ] || { echo ActiveState=failed; exit 0; }
    read -r active < "$fake/active"
    echo ActiveState=active; echo "InvocationID=$active"
    [ "$active" = falls ] && { rm "$fake/active"; echo "out of memory" >> "$fake/log"; };;
"enable fedeq-agent.service")
    [ -e "$fake/cannot-enable" ] && { echo "Read-only file system" >&2; exit 1; };;
esac
exit 0
"""
_JOURNALCTL = """#!/bin/sh
[ -e "${0%/*}/log" ] && exec cat "${0%/*}/log"
exit 0
"""


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Of what is synced it is only looked whether it is open, as fsync does.

    A process that is killed loses no page, so that waiting for the disk, half of the time of these tests, would prove
    nothing; processes of their own do wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        patch.setattr(os, "sync", lambda: None)
        yield


def hasty(installer: bytes) -> bytes:
    """This release.py, which waits neither for the disk nor for what may happen to a release after READY."""
    watched = installer.replace(b"default=3.0", b"default=0.0")
    return watched.replace(b"os.sync()", b"None").replace(b"os.fsync(", b"os.fstat(")


def files_of(version: str, health: str = "ok", ballast: Iterable[bytes] = ()) -> dict[str, bytes]:
    """The files of a small release: launcher, unit, installer, and what else a kill may fall between."""
    return {
        "bin/fedeq": b"#!/bin/sh\necho " + version.encode() + b"\n",
        "config/health": health.encode(),
        "release.py": INSTALLER.read_bytes() + f"# {version}\n".encode(),
        "site/empty.py": b"",
        "units/fedeq-agent.service": UNIT + f"# {version}\n".encode(),
        **{f"models/{number}.onnx": content for number, content in enumerate(ballast)},
    }


def manifest_json(version: str, files: Mapping[str, bytes], **changes: Any) -> bytes:
    """The canonical manifest of these files."""
    table = {
        path: {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "mode": 0o755 if path.startswith("bin/") else 0o644,
        }
        for path, content in files.items()
    }
    found = {
        "format": 1,
        "version": version,
        "profile": "x86-64",
        "architecture": "x86_64",
        "python": "3.11",
        "glibc": "2.28",
        "cpu": {},
        "files": table,
    }
    return json.dumps({**found, **changes}, sort_keys=True, separators=(",", ":")).encode()


def packed(
    path: Path, manifest: bytes, files: Mapping[str, bytes], *, signature: bytes | None = None, more: Sequence[Any] = ()
) -> Path:
    """A bundle of just these bytes. more: further (TarInfo, content) at its end."""
    signature = KEY.sign(manifest) if signature is None else signature
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in sorted({**files, "manifest.json": manifest, "manifest.sig": signature}.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member, content in more:
            archive.addfile(member, io.BytesIO(content))
    return path


def bundle(
    folder: Path, version: str, health: str = "ok", *, ballast: Iterable[bytes] = (), files: Any = None, **changes: Any
) -> Path:
    """A signed bundle of a release. changes: of the manifest."""
    held = files_of(version, health, ballast) if files is None else files
    return packed(folder / f"{version}.tar.gz", manifest_json(version, held, **changes), held)


def digest(path: Path) -> str:
    """Its sha256 in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakeBoard:
    """A root with the fleet's key in it, and scripts that stand for systemctl and journalctl."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.base = self.root / "opt/fedeq-edge"
        self.base.mkdir(parents=True)
        (self.base / "bundle.pub").write_bytes(PUBLIC_PEM)
        self.scripts = folder / "scripts"
        self.scripts.mkdir()
        for name, text in (("systemctl", _SYSTEMCTL), ("journalctl", _JOURNALCTL)):
            (self.scripts / name).write_text(text)
            (self.scripts / name).chmod(0o755)
        self.environment = {
            "PATH": f"{self.scripts}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "INSTALLER": str(INSTALLER),
        }

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line of its installer."""
        return [sys.executable, "-I", str(INSTALLER), "--root", str(self.root), *map(str, arguments)]

    def call(self, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        """(exit status, JSON if any, the line on stderr) of release.py, in this process: a hundred tests call it."""
        before, mask = dict(os.environ), os.umask(0o022)
        os.environ.update(self.environment)
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()) as told,
                contextlib.redirect_stderr(io.StringIO()) as line,
            ):
                status = release.main(["--root", str(self.root), *map(str, arguments)])
        finally:
            os.environ.clear()
            os.environ.update(before)
            os.umask(mask)
        return status, json.loads(told.getvalue() or "{}"), line.getvalue()

    def process(self, *arguments: str | Path, file_bytes: int | None = None) -> tuple[int, dict[str, Any], str]:
        """The same of a process of its own, that may write files of so many bytes."""
        command = [str(word) for word in self.command(*arguments)]
        if file_bytes is not None:
            command = ["sh", "-c", f'ulimit -f {file_bytes // 512}; exec "$@"', "sh", *command]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=self.environment)
        return ended.returncode, json.loads(ended.stdout), ended.stderr

    def install(self, path: Path, *more: str | Path) -> tuple[int, dict[str, Any], str]:
        """Install without waiting longer than READY, unless `more` says so."""
        return self.call("install", path, "--sha256", digest(path), "--trial-s", "0", *more)

    def runs(self) -> str:
        """What the current release's launcher says."""
        return subprocess.run(
            [str(self.base / "current/bin/fedeq")], capture_output=True, text=True, check=True
        ).stdout.strip()

    def releases(self) -> set[str]:
        """Names of everything in releases/."""
        return {path.name for path in (self.base / "releases").iterdir()}

    def calls(self) -> list[str]:
        """What systemctl was asked since the last time."""
        asked: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            asked = (self.scripts / "calls").read_text().splitlines()
            (self.scripts / "calls").unlink()
        return asked

    def wound(self, version: str, path: str) -> None:
        """One byte of a file of a release is another one, as a worn card has it."""
        victim = self.base / "releases" / version / path
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
