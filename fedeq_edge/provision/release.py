"""The installer on a board: standard library only, python >= 3.9, one file that is sent alone.

It is one file, and long, because a board replaces it by one rename: parts would be two files to replace, and a power
cut between them a board without an installer.

    release.py [--root R] install BUNDLE --sha256 HEX [--key FILE] [--trial-s N] [--no-start]
    release.py [--root R] start | confirm | rollback | status | sweep | boot | ready

Prints JSON on stdout and one line on stderr where something was refused; the exit status is an `Exit`. The unit calls
boot and ready, at every start, and they print only where they have changed something.

Theory of operation.
- `current` is a link into releases/, replaced by rename(2): it is the truth about what runs. state.json holds what the
  link cannot: which releases were confirmed, newest first, and the trial. Whatever a power cut leaves between the two,
  the next call mends first (`_reconcile`).
- A folder in releases/ without a leading dot is complete, checked and on the disk: it gets its name by rename(2) after
  that, and loses it by rename(2) before it is deleted.
- A trial is written into the state before `current` shows it. It ends confirmed once the unit has said READY (which it
  does after a real solve) and has stayed up; or `current` goes back to the release that was confirmed last, the failed
  one's last log lines are kept, and its folder goes.
- After a power cut nobody waits for READY, so the unit calls `boot` before it starts and `ready` when it is up:
  a trial whose files are damaged, or that is started for the third time, goes back there. Both leave it to an installer
  that holds the lock.
- No clock is trusted: durations are monotonic, order is that of the state's list.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import enum
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, NamedTuple, Sequence  # noqa: UP035  # typing's: python 3.9

AGENT = "fedeq-agent.service"
UPDATER = "fedeq-updater.service"
COMMAND = "/opt/fedeq-edge/current/bin/fedeq"  # what /usr/local/bin/fedeq goes to, whichever release that is
FORMAT = 1
KEPT = 3  # releases: the current one and two to go back to
BOOTS = 3  # the start at which an unconfirmed release goes back: two may end in somebody pulling the plug
LOG_LINES = 20  # of a failed release, kept and reported
SPARE_BYTES = 16 << 20  # left free, so that logs and the agent's state have room
LIMIT_BYTES = 4 << 30  # unpacked; torch with all it needs is 0.5 GB
LIMIT_FILES = 50_000
LIMIT_MANIFEST_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20
RESTART_S = 300.0  # above the unit's TimeoutStartSec, which ends a start that hangs
POLL_S = 0.5

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Exit(enum.IntEnum):
    """Exit statuses; those of fedeq_edge.errors.Exit that happen here."""

    OK = 0
    FAILED = 1
    MISUSED = 2
    VERIFICATION = 3
    ROLLED_BACK = 4
    NO_SPACE = 5
    WRONG_PLATFORM = 6
    BUSY = 13


class RefusedError(Exception):
    """Something was not done; the board runs what it ran before, except where `exit` is FAILED and the text says so."""

    def __init__(self, status: Exit, reason: str) -> None:
        super().__init__(reason)
        self.exit = status


# Signatures


class _Point(NamedTuple):
    """On edwards25519 in extended homogeneous coordinates: x = X/Z, y = Y/Z, xy = T/Z."""

    X: int
    Y: int
    Z: int
    T: int


_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_ROOT_OF_MINUS_1 = pow(2, (_P - 1) // 4, _P)
_SPKI = bytes.fromhex("302a300506032b6570032100")  # RFC 8410: the 32 bytes of an Ed25519 key follow


def signed(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` (64 bytes) of `message` was made with the private half of `key` (32 bytes): Ed25519.

    RFC 8032, section 5.1.7, in its own formulas. A board without openssl or any package can check what it is given with
    it; all that it handles is public, so that its time tells nothing. About 10 ms.
    """
    if len(key) != 32 or len(signature) != 64:
        return False
    A, R, s = _decoded(key), _decoded(signature[:32]), int.from_bytes(signature[32:], "little")
    if A is None or R is None or s >= _ORDER:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % _ORDER
    left, right = _times(s, _BASE), _added(R, _times(h, A))
    same_x = (left.X * right.Z - right.X * left.Z) % _P == 0
    return same_x and (left.Y * right.Z - right.Y * left.Z) % _P == 0


def _added(p: _Point, q: _Point) -> _Point:
    a, b = (p.Y - p.X) * (q.Y - q.X) % _P, (p.Y + p.X) * (q.Y + q.X) % _P
    c, d = 2 * p.T * q.T * _D % _P, 2 * p.Z * q.Z % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return _Point(e * f % _P, g * h % _P, f * g % _P, e * h % _P)


def _times(factor: int, point: _Point) -> _Point:
    product = _Point(0, 1, 1, 0)
    while factor:
        if factor & 1:
            product = _added(product, point)
        point = _added(point, point)
        factor >>= 1
    return product


def _decoded(encoded: bytes) -> _Point | None:
    """The point of these 32 bytes, None where there is none: RFC 8032, section 5.1.3."""
    y = int.from_bytes(encoded, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    if y >= _P:
        return None
    x2 = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    x = pow(x2, (_P + 3) // 8, _P)
    if (x * x - x2) % _P:
        x = x * _ROOT_OF_MINUS_1 % _P
    if (x * x - x2) % _P or (x == 0 and sign):
        return None
    x = _P - x if x & 1 != sign else x
    return _Point(x, y, 1, x * y % _P)


_BASE = _decoded((4 * pow(5, _P - 2, _P) % _P).to_bytes(32, "little")) or _Point(0, 1, 1, 0)


def public_key(pem: bytes) -> bytes:
    """The 32 bytes of an Ed25519 key in PEM (SubjectPublicKeyInfo). Raises RefusedError where it is none."""
    with contextlib.suppress(ValueError):
        body = [line for line in pem.decode("ascii").split("\n") if line and not line.startswith("-----")]
        der = base64.b64decode("".join(body), validate=True)
        if der.startswith(_SPKI) and len(der) == len(_SPKI) + 32:
            return der[len(_SPKI) :]
    raise RefusedError(Exit.VERIFICATION, "the trusted key is no Ed25519 key in PEM; send the fleet's bundle.pub")


# Manifests


class Entry(NamedTuple):
    """One file of a bundle. sha256: in hex. mode: of the file, 0o644 or 0o755."""

    sha256: str
    size: int
    mode: int


class Manifest(NamedTuple):
    """What a bundle says of itself. files: by their path within it, manifest and signature apart."""

    version: str
    architecture: str
    python: str
    glibc: str
    files: Mapping[str, Entry]

    @property
    def bytes(self) -> int:
        """Of all files on the disk, in whole blocks of 4 kB."""
        return sum(-(-entry.size // 4096) * 4096 for entry in self.files.values())


def manifest_of(raw: bytes) -> Manifest:
    """A manifest out of its JSON. Raises RefusedError where it is none of this format or names unsafe paths."""
    try:
        found = json.loads(raw)
        if found["format"] != FORMAT:
            raise _tampered(f"its format is {found['format']}, this installer knows {FORMAT}")
        files = {path: Entry(str(e["sha256"]), int(e["size"]), int(e["mode"])) for path, e in found["files"].items()}
        version, architecture, python = str(found["version"]), str(found["architecture"]), str(found["python"])
        manifest = Manifest(version, architecture, python, str(found["glibc"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _tampered(f"its manifest is not readable ({error!r})") from error
    _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    if not _VERSION.fullmatch(manifest.version):
        raise _tampered(f"version {manifest.version!r} is no name of a folder")
    if len(manifest.files) > LIMIT_FILES or manifest.bytes > LIMIT_BYTES:
        raise _tampered(f"{len(manifest.files)} files of {manifest.bytes} bytes are beyond what a release may be")
    for path, entry in manifest.files.items():
        if not _safe(path) or entry.size < 0 or not _SHA256.fullmatch(entry.sha256):
            raise _tampered(f"its manifest names {path!r}, which is no file of a release")
    folders = {str(parent) for path in manifest.files for parent in Path(path).parents}
    for path in folders & set(manifest.files):
        raise _tampered(f"{path!r} is both a file and a folder")


def _safe(path: str) -> bool:
    """Whether a path stays inside: relative, plain, none of the two that speak about the others."""
    parts = path.split("/")
    plain = path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts)
    return plain and path not in (MANIFEST, SIGNATURE)


def _tampered(what: str) -> RefusedError:
    return RefusedError(Exit.VERIFICATION, f"bundle is damaged or was tampered with: {what}; build and send it again")


# Bundles


class Bundle:
    """A bundle file. Its digest was given over a channel that is trusted, and its manifest is signed by `key`.

    Raises RefusedError where one of them is not so, before anything of it is written.
    """

    def __init__(self, path: Path, sha256: str, key: bytes) -> None:
        self._path = path
        with _readable(path), path.open("rb") as packed:
            if _digest(packed) != sha256.lower():
                raise _tampered("its sha256 is not the expected one")
        self.manifest_json, self.signature = self._head()
        if not signed(key, self.signature, self.manifest_json):
            raise RefusedError(
                Exit.VERIFICATION, "bundle is not signed by this fleet's key; build it in the board's own fleet folder"
            )
        self.manifest = manifest_of(self.manifest_json)

    def unpack(self, folder: Path, told: Callable[[str], None]) -> None:
        """Every file of the manifest is in `folder`, which holds them at their full size already, and is right.

        told: called with "file" before each. Raises RefusedError where one differs, is missing, or was not announced.
        """
        missing = set(self.manifest.files)
        for member, content in self._members():
            if member.name in (MANIFEST, SIGNATURE):
                continue
            if member.name not in missing:
                raise _tampered(f"{member.name!r} is not in its manifest, or twice in it")
            missing.remove(member.name)
            told("file")
            _write_checked(folder / member.name, content, self.manifest.files[member.name])
        if missing:
            raise _tampered(f"{min(missing)!r} is missing")

    def _head(self) -> tuple[bytes, bytes]:
        found: dict[str, bytes] = {}
        seen = 0
        for member, content in self._members():
            seen += member.size
            if seen > LIMIT_BYTES:
                raise _tampered("it unpacks to more than a release may be")
            if member.name in (MANIFEST, SIGNATURE) and member.size <= LIMIT_MANIFEST_BYTES:
                found[member.name] = content.read()
            if len(found) == 2:
                return found[MANIFEST], found[SIGNATURE]
        raise _tampered(f"it has no {MANIFEST} and {SIGNATURE}")

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
        """Its files one after the other. Raises RefusedError on links, devices, and what is no tar.gz."""
        try:
            with tarfile.open(self._path, "r|gz") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is None:
                        raise _tampered(f"{member.name!r} is no plain file")
                    yield member, content
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise _tampered(f"it is no tar.gz ({error})") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise RefusedError(Exit.MISUSED, f"{path} cannot be read: {error.strerror}; name another file") from error


def _digest(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := content.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _write_checked(path: Path, content: IO[bytes], entry: Entry) -> None:
    digest, left = hashlib.sha256(), entry.size
    with path.open("r+b") as output:
        while block := content.read(BLOCK_BYTES):
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
            output.write(block)
    if left or digest.hexdigest() != entry.sha256:
        raise _tampered(f"{path.name!r} differs from its manifest")


# The board


class Machine(NamedTuple):
    """What a bundle must fit; "" where it cannot be told. architecture: of the programs, not of the kernel.

    python: of /usr/bin/python3; pythons: of all that are where a release's launcher looks for its own.
    """

    architecture: str = ""
    python: str = ""
    glibc: str = ""
    pythons: frozenset[str] = frozenset()


_ELF = {0x3E: "x86_64", 0xB7: "aarch64", 0x28: "arm (32 bit)", 0x03: "x86 (32 bit)"}


def machine_of(root: Path) -> Machine:
    """The machine whose files are under `root`, by its /usr/bin/python3 and its C library.

    Files, because a mounted card is not the machine that we run on, and a 32-bit system may have a 64-bit kernel.
    """
    interpreter = Path(os.path.realpath(root / "usr/bin/python3"))
    if not interpreter.is_file() or root.resolve() not in interpreter.parents:
        return Machine()
    with interpreter.open("rb") as program:
        head = program.read(20)
    named = re.search(r"(\d+\.\d+)$", interpreter.name)
    return Machine(
        architecture=_ELF.get(int.from_bytes(head[18:20], "little"), "") if head.startswith(b"\x7fELF") else "",
        python=named[1] if named else "",
        glibc=_glibc(root),
        pythons=frozenset(
            path.name[len("python") :]
            for folder in ("usr/bin", "usr/local/bin")
            for path in (root / folder).glob("python3.*[0-9]")
        ),
    )


def _glibc(root: Path) -> str:
    for pattern in ("lib/*-linux-gnu*/libc.so.6", "lib64/libc.so.6", "usr/lib/*-linux-gnu*/libc.so.6"):
        for library in root.glob(pattern):
            said = re.search(rb"GNU C Library [^\n]*version (\d+\.\d+)", library.read_bytes())
            if said:
                return said[1].decode()
    return ""


def check_fits(manifest: Manifest, machine: Machine) -> None:
    """Nothing that is known speaks against running it there. Raises RefusedError with what to build instead."""
    if machine.architecture not in ("", manifest.architecture):
        remedy = "install a 64-bit OS" if "32" in machine.architecture else "build one for this board's profile"
        _misfit(f"is for {manifest.architecture} and this system is {machine.architecture}; {remedy}")
    if machine.python not in ("", manifest.python) and manifest.python not in machine.pythons:
        _misfit(f"is for python {manifest.python} and /usr/bin/python3 is {machine.python}; build it with --python")
    if machine.glibc and _numbers(machine.glibc) < _numbers(manifest.glibc):
        _misfit(f"needs glibc {manifest.glibc} and this system has {machine.glibc}; install a newer OS")


def _misfit(what: str) -> None:
    raise RefusedError(Exit.WRONG_PLATFORM, f"bundle {what}")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


class Trial(NamedTuple):
    """A release that has not proven itself. boots: how often the unit was started without an installer watching."""

    version: str
    boots: int
    since: float


class Failed(NamedTuple):
    """The release that was gone back from last, and what it said last."""

    version: str
    log: Sequence[str]


class State(NamedTuple):
    """What `current` cannot tell. history: confirmed releases, newest first; the first is what a trial goes back to."""

    history: tuple[str, ...] = ()
    trial: Trial | None = None
    failed: Failed | None = None

    @property
    def confirmed(self) -> str | None:
        """The release that was confirmed last."""
        return self.history[0] if self.history else None

    @property
    def previous(self) -> str | None:
        """Where `rollback` goes."""
        older = self.history if self.trial else self.history[1:]
        return older[0] if older else None

    def confirm(self, version: str) -> State:
        """`version` has proven itself."""
        older = tuple(name for name in self.history if name != version)
        return State(history=(version, *older)[:KEPT])


class Steps:
    """What an installation did, and how long each took. told: hears of every step before it is done."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._last, self._since = "begin", time.monotonic()
        self._seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        """This comes next."""
        now = time.monotonic()
        self._seconds[self._last] = self._seconds.get(self._last, 0.0) + now - self._since
        self._last, self._since = name, now
        self._told(name)

    def seconds(self) -> dict[str, float]:
        """By step, those of one name together; steps of less than a millisecond are left out."""
        self("end")
        return {name: round(took, 3) for name, took in self._seconds.items() if took >= 1e-3}


class Board:
    """The releases of the system under `root`, and its units. step: hears of every step before it is done."""

    def __init__(self, root: Path, step: Steps | None = None) -> None:
        self.root = root
        self.step = step or Steps(lambda _: None)

    @property
    def base(self) -> Path:
        """Where everything of ours is, settings and data apart."""
        return self.root / "opt/fedeq-edge"

    @property
    def releases(self) -> Path:
        """Complete releases by their version."""
        return self.base / "releases"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other installer works on this board. Raises RefusedError where one does."""
        self.releases.mkdir(parents=True, exist_ok=True)
        with (self.base / "lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RefusedError(
                    Exit.BUSY, "another installer is at work on this board; wait for it, then look at `status`"
                ) from error
            yield

    # What is

    def current(self) -> str | None:
        """The version that `current` shows, None where that is no complete release."""
        try:
            name = (self.base / "current").readlink().name
        except OSError:
            return None
        return name if self._complete(name) else None

    def state(self) -> State:
        """As written; empty where there is none or the disk has eaten it, the link tells the rest then."""
        try:
            found = json.loads((self.base / "state.json").read_bytes())
            trial, failed = found["trial"], found["failed"]
            return State(
                history=tuple(str(name) for name in found["history"]),
                trial=trial and Trial(str(trial["version"]), int(trial["boots"]), float(trial["since"])),
                failed=failed and Failed(str(failed["version"]), [str(line) for line in failed["log"]]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return State()

    def shown(self) -> dict[str, Any]:
        """The content of state.json: the state, and what follows from it."""
        state, current = self.state(), self.current()
        return _shown(state, current)

    def manifest(self, version: str) -> Manifest:
        """Of a release on the disk."""
        return manifest_of((self.releases / version / MANIFEST).read_bytes())

    def intact(self, version: str) -> bool:
        """Whether every file of the release is what its manifest says."""
        try:
            return all(_is(self.releases / version / path, e) for path, e in self.manifest(version).files.items())
        except (OSError, RefusedError):
            return False

    def _complete(self, name: str) -> bool:
        return bool(_VERSION.fullmatch(name)) and (self.releases / name / MANIFEST).is_file()

    # What becomes

    def reconcile(self) -> State:
        """State and link agree again, whatever a power cut has left; the state as it is then."""
        found, link = self.state(), self.current()
        state = found._replace(history=tuple(name for name in found.history if self._complete(name)))
        if state.trial and state.failed and state.trial.version == state.failed.version == link and state.history:
            return self._return(state)  # it was about to go back
        if state.trial and state.trial.version != link:
            state = state._replace(trial=None)  # it was not shown yet, or not any more
        if link is None and state.history:
            link = state.history[0]
            self._switch(link)
        if link and not state.trial:
            known = state.history.index(link) if link in state.history else None
            state = state._replace(history=(link, *state.history) if known is None else state.history[known:])
            self._place_installer(link)
        if state != found:
            self.save(state)
        return state

    def put(self, bundle: Bundle) -> bool:
        """The bundle's release is complete on the disk. False where it was. Raises RefusedError, and leaves nothing."""
        version = bundle.manifest.version
        if self.intact(version) and (self.releases / version / MANIFEST).read_bytes() == bundle.manifest_json:
            return False
        part = self.releases / f".part-{version}"
        try:
            self._reserve(part, bundle.manifest)
            self.step("unpack")
            bundle.unpack(part, self.step)
            self._seal(part, bundle)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if (self.releases / version).is_dir():
            self._mend(part, bundle.manifest)
        else:
            self.step("name")
            part.rename(self.releases / version)
            _sync(self.releases)
        return True

    def show(self, version: str) -> None:
        """`current` shows the release, as a trial unless it is the confirmed one; units are in their place."""
        state = self.reconcile()
        if version != self.current() or version != state.confirmed:
            self.step("trial")
            state = state._replace(trial=Trial(version, 0, time.time()), failed=None)
            self.save(state)
            self._switch(version)
            self.save(state)  # for those who read in the file what is current
        self._place_units(version, enable=not state.history)
        if not (self.base / "release.py").exists():  # the unit calls it before it starts
            self._place_installer(version)
        self._place_command()

    def confirm(self) -> None:
        """What `current` shows has proven itself."""
        state, version = self.state(), self.current()
        if version and state.trial:
            self.step("confirm")
            self.save(state.confirm(version))
            self._place_installer(version)

    def go_back(self, log: Sequence[str]) -> None:
        """The trial has failed with these last lines; the release before it, if there is one, is current again."""
        state = self.state()
        assert state.trial is not None
        state = state._replace(failed=Failed(state.trial.version, log))
        self.step("failed")
        self.save(state)  # before the link, so that a power cut between them cannot lose the reason
        if state.history:
            self._return(state)

    def _return(self, state: State) -> State:
        self._switch(state.history[0])
        self._place_units(state.history[0])
        self.step("returned")
        state = state._replace(trial=None)
        self.save(state)
        return state

    def roll_back(self) -> str:
        """The release before the current one is current. Raises RefusedError where there is none."""
        state = self.reconcile()
        if state.previous is None:
            raise RefusedError(Exit.FAILED, "there is no earlier release to go back to; install another one")
        if state.trial:
            self.go_back(["rolled back by hand"])
            return state.previous
        self._switch(state.previous)
        self._place_units(state.previous)
        self.step("returned")
        self.save(state._replace(history=state.history[1:]))
        return state.previous

    def sweep(self) -> list[str]:
        """Only the current release, the trial and two confirmed ones are left; the names of what went."""
        state = self.reconcile()
        kept = {*state.history[:KEPT], self.current(), state.trial and state.trial.version}
        gone = []
        for folder in sorted(self.releases.iterdir()):
            if folder.name not in kept:
                self.step("sweep")
                dead = folder if folder.name.startswith(".") else folder.rename(self.releases / f".dead-{folder.name}")
                shutil.rmtree(dead)
                gone.append(folder.name)
        return gone

    def _reserve(self, part: Path, manifest: Manifest) -> None:
        """Every file exists at its full size, so that the disk cannot fill up half-way. Raises RefusedError."""
        self.step("reserve")
        part.mkdir()
        try:
            for path, entry in manifest.files.items():
                self.step("allocate")
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                with (part / path).open("xb") as output:
                    if entry.size:
                        os.posix_fallocate(output.fileno(), 0, entry.size)
                    os.fchmod(output.fileno(), 0o755 if entry.mode & stat.S_IXUSR else 0o644)
        except OSError as error:
            if error.errno in _FULL:
                raise self._no_space(manifest) from error
            raise
        disk = os.statvfs(part)
        if disk.f_bavail * disk.f_frsize < SPARE_BYTES:
            raise self._no_space(manifest)

    def _no_space(self, manifest: Manifest) -> RefusedError:
        needed = manifest.bytes + SPARE_BYTES
        return RefusedError(
            Exit.NO_SPACE, f"the release needs {needed >> 20} MB free on the disk of {self.releases}; free some"
        )

    def _seal(self, part: Path, bundle: Bundle) -> None:
        """The folder is on the disk with its manifest. One sync for all first: a thousand fsyncs wear out a card."""
        (part / MANIFEST).write_bytes(bundle.manifest_json)
        (part / SIGNATURE).write_bytes(bundle.signature)
        self.step("sync")
        os.sync()
        for folder, _, files in os.walk(part):
            for name in files:  # tells of errors, which sync(2) does not
                _sync(Path(folder) / name)
            _sync(Path(folder))

    def _mend(self, part: Path, manifest: Manifest) -> None:
        """Files of a release that the disk has damaged are replaced one by one: it may be the current one."""
        for path in (*manifest.files, SIGNATURE, MANIFEST):
            self.step("mend")
            target = self.releases / manifest.version / path
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / path).replace(target)
        os.sync()
        shutil.rmtree(part)

    def _switch(self, version: str) -> None:
        link = self.base / ".current.new"
        self.step("link")
        link.unlink(missing_ok=True)
        link.symlink_to(f"releases/{version}")
        self.step("switch")
        link.replace(self.base / "current")  # never unlink and link: there would be a moment without
        self.step("switched")
        _sync(self.base)

    def save(self, state: State) -> None:
        """This is the state."""
        self.step("save")
        shown = _shown(state, self.current())
        self._write(self.base / "state.json", json.dumps(shown, indent=1).encode() + b"\n")

    def _write(self, path: Path, content: bytes) -> None:
        """The file holds the content, on the disk, or what it held before."""
        neighbour = path.with_name(f".{path.name}.new")
        with neighbour.open("wb") as output:
            output.write(content)
            output.flush()
            os.fsync(output.fileno())
        self.step("replace")
        neighbour.replace(path)
        _sync(path.parent)

    def _place_installer(self, version: str) -> None:
        """The release's own installer is the board's: only of one that is confirmed, or where there was none."""
        ours, theirs = self.base / "release.py", self.releases / version / "release.py"
        if theirs.is_file() and not (ours.is_file() and ours.read_bytes() == theirs.read_bytes()):
            self.step("installer")
            self._write(ours, theirs.read_bytes())

    def _place_command(self) -> None:
        """`fedeq` is on the board's PATH, unless that name is somebody else's there.

        The updater's sandbox may not write it; a flash came before, or the next one brings it.
        """
        link = self.root / "usr/local/bin/fedeq"
        if os.path.lexists(link):
            return
        self.step("command")
        with contextlib.suppress(OSError):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(COMMAND)

    # Units

    def _place_units(self, version: str, *, enable: bool = False) -> None:
        """The release's unit files are the system's. enable: also of one that is known, which somebody may disable."""
        folder = self.root / "etc/systemd/system"
        folder.mkdir(parents=True, exist_ok=True)
        units = {path.name: path.read_bytes() for path in (self.releases / version / "units").glob("*.service")}
        held = {name: (folder / name).read_bytes() for name in units if (folder / name).exists()}
        for name in sorted(name for name in units if held.get(name) != units[name]):
            self.step("unit")
            self._write(folder / name, units[name])
        self._enable(sorted(name for name in units if enable or name not in held))
        if held != units:
            self.step("reload")
            self.systemctl("daemon-reload")  # refused for a mounted card, where it is not needed

    def _enable(self, units: Sequence[str]) -> None:
        self.step("enable")
        if units and (ended := self.systemctl("enable", *units)).returncode:
            said = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RefusedError(Exit.FAILED, f"systemctl cannot enable {', '.join(units)}: {said}; mend that, try again")

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it; the real one refuses to start anything where `root` is not the running system's."""
        elsewhere = [] if self.root == Path("/") else [f"--root={self.root}"]
        return _run(["systemctl", *elsewhere, *arguments])

    def log(self) -> list[str]:
        """The last lines in the journal of the last start that left any: the agent's, and systemd's about it."""
        lines = _run(["journalctl", "--unit", AGENT, "--lines", "200", "--output", "cat", "--no-pager", "--quiet"])
        starts = re.split(r"^Starting .*fedeq.*\n", lines.stdout, flags=re.MULTILINE)  # `boot` is in one that has none
        return next((start for start in reversed(starts) if start), "").splitlines()[-LOG_LINES:]

    def runs(self) -> bool:
        """Whether the unit has said READY and is up."""
        return self._condition().get("ActiveState") == "active"

    def starts(self, trial_s: float) -> bool:
        """The unit was restarted, has said READY, and was up all the time for `trial_s` after it."""
        self.step("restart")
        self.systemctl("reset-failed", AGENT)  # no memory of the crashes of another release
        if self.systemctl("restart", AGENT).returncode:
            return False
        self.step("watch")
        first, until = self._condition(), time.monotonic() + trial_s
        while first.get("ActiveState") == "active":
            if time.monotonic() >= until:
                return True
            time.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
            if self._condition() != first:
                return False
        return False

    def _condition(self) -> dict[str, str]:
        """ActiveState, and InvocationID, which is another one after a restart that we did not see."""
        shown = self.systemctl("show", AGENT, "--property=ActiveState", "--property=InvocationID").stdout
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def _shown(state: State, current: str | None) -> dict[str, Any]:
    trial, failed = state.trial, state.failed
    return {
        "current": current,
        "confirmed": state.confirmed,
        "previous": state.previous,
        "trial": trial and {"version": trial.version, "boots": trial.boots, "since": trial.since},
        "failed": failed and {"version": failed.version, "log": list(failed.log)},
        "history": list(state.history),
    }


def _is(path: Path, entry: Entry) -> bool:
    if path.is_symlink() or path.stat().st_size != entry.size:
        return False
    with path.open("rb") as content:
        return _digest(content) == entry.sha256


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Its end; status 127 where there is no such program, 124 where it does not come back."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=RESTART_S, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} hangs")


# Commands; each returns what is printed


def install(board: Board, options: argparse.Namespace) -> dict[str, Any]:
    """The bundle's release is current and, unless --no-start, has proven itself."""
    board.sweep()
    board.step("digest")
    key = options.key or board.base / "bundle.pub"
    with _readable(key):
        trusted = public_key(key.read_bytes())
    bundle = Bundle(options.bundle, options.sha256, trusted)
    check_fits(bundle.manifest, machine_of(board.root))
    changed = board.put(bundle)
    board.show(bundle.manifest.version)
    outcome = {} if options.no_start else start(board, options)
    return {"changed": changed, **outcome}


def start(board: Board, options: argparse.Namespace) -> dict[str, Any]:
    """What `current` shows runs, and is confirmed; or the release before it runs, and RefusedError says why."""
    state = board.reconcile()
    if not state.trial and board.runs():
        return {"restarted": False}
    if board.starts(options.trial_s):
        board.confirm()
        board.sweep()
        return {"restarted": True}
    raise _unhealthy(board, state, board.log())


def _unhealthy(board: Board, state: State, log: list[str]) -> RefusedError:
    """What ran before runs again, where there is such a release; the error that says so."""
    failed, last = board.current(), _reason(log)
    if not state.trial:
        return RefusedError(Exit.FAILED, f"release {failed} is confirmed but does not start: {last}")
    board.go_back(log)
    earlier = state.confirmed
    if earlier is None:
        return RefusedError(
            Exit.ROLLED_BACK,
            f"release {failed} is unhealthy and there is no earlier one, so that systemd goes on trying it: {last}",
        )
    if not board.starts(0.0):
        return RefusedError(
            Exit.FAILED, f"neither release {failed} nor {earlier} before it starts; look at the journal: {last}"
        )
    board.sweep()
    return RefusedError(Exit.ROLLED_BACK, f"release {failed} is unhealthy, {earlier} runs again; its last line: {last}")


def _reason(log: Sequence[str]) -> str:
    """The line that tells most: the signal that killed it, its own last words, or whatever systemd says."""
    killed = [line for line in log if re.search(r"code=(killed|dumped)|timed out|[Ff]ailed to set up", line)]
    own = [line for line in log if not re.match(rf"{AGENT}: |Failed to start |Started |Stopp", line)]
    return next((lines[-1].strip() for lines in (killed, own, log) if lines), "it said nothing")


def confirm(board: Board, _: argparse.Namespace) -> dict[str, Any]:
    """What `current` shows is confirmed."""
    board.reconcile()
    board.confirm()
    return {}


def rollback(board: Board, options: argparse.Namespace) -> dict[str, Any]:
    """The release before the current one is current and runs."""
    version = board.roll_back()
    if options.no_start:
        return {}
    if not board.starts(options.trial_s):
        raise RefusedError(Exit.FAILED, f"release {version} is current again but does not start; look at the journal")
    board.sweep()
    return {"restarted": True}


def sweep(board: Board, _: argparse.Namespace) -> dict[str, Any]:
    """What interrupted installations left is gone, and link and state agree."""
    return {"swept": board.sweep()}


def boot(board: Board, _: argparse.Namespace) -> dict[str, Any]:
    """Before the unit starts: a trial that is damaged, or started for the third time, has gone back."""
    trial, history = (state := board.reconcile()).trial, state.history
    if trial:
        trial = trial._replace(boots=trial.boots + 1)
        board.save(state._replace(trial=trial))
        if history and (trial.boots >= BOOTS or not board.intact(trial.version)):
            board.go_back(board.log())
    return {}


COMMANDS: Mapping[str, Callable[[Board, argparse.Namespace], dict[str, Any]]] = {
    "install": install,
    "start": start,
    "confirm": confirm,
    "rollback": rollback,
    "sweep": sweep,
    "boot": boot,
    "ready": confirm,
}
# The unit calls these, also while an installer that holds the lock restarts it and judges for itself.
OF_THE_UNIT = ("boot", "ready")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="release.py",
        description="Releases of fedeq-edge on this board.",
        epilog="Example: release.py install /tmp/fedeq.tar.gz --sha256 9f86d0...",
    )
    whole.add_argument("--root", type=Path, default=Path("/"), help="of the system; a mounted card for example")
    commands = whole.add_subparsers(dest="command", required=True)
    told = {name: (function.__doc__ or "").split("\n")[0] for name, function in COMMANDS.items()}
    made = {name: commands.add_parser(name, help=text) for name, text in told.items()}
    commands.add_parser("status", help="What runs, what ran before, and why a release failed.")
    made["install"].add_argument("bundle", type=Path)
    made["install"].add_argument("--sha256", required=True, help="of the bundle, by a channel that is trusted")
    made["install"].add_argument("--key", type=Path, help="trusted Ed25519 key (PEM); default: bundle.pub of the board")
    for name in ("install", "rollback"):
        made[name].add_argument("--no-start", action="store_true", help="leave the unit as it is")
    for name in ("install", "start", "rollback"):
        made[name].add_argument("--trial-s", type=float, default=3.0, help="how long it must stay up after READY")
    return whole


def main(arguments: Sequence[str], told: Callable[[str], None] = lambda _: None) -> int:
    """Run the command line; the exit status. told: hears of every step before it is done."""
    options = parser().parse_args(arguments)
    os.umask(0o022)  # the agent's user, who is nobody else's, reads the releases
    board = Board(options.root.resolve(), Steps(told))
    before = board.shown()
    status, outcome = _carry_out(board, options)
    taken, after = board.step.seconds(), board.shown()
    with contextlib.suppress(BrokenPipeError):  # who asked may have gone, the work is done
        if options.command not in OF_THE_UNIT or before != after:  # at every start, into the agent's journal
            print(json.dumps({"exit": status, **outcome, **after, "seconds": taken}), flush=True)
        if reason := outcome.get("error"):
            print(f"release.py: {reason}", file=sys.stderr)
    if outcome.get("restarted"):
        board.systemctl("--no-block", "restart", UPDATER)  # last, as it may be the updater that runs us
    return int(status)


def _carry_out(board: Board, options: argparse.Namespace) -> tuple[Exit, dict[str, Any]]:
    if options.command == "status":
        return Exit.OK, {}
    try:
        with board.locked():
            return Exit.OK, COMMANDS[options.command](board, options)
    except RefusedError as error:
        if error.exit is Exit.BUSY and options.command in OF_THE_UNIT:
            return Exit.OK, {}
        status, reason = error.exit, str(error)
    except OSError as error:
        full = error.errno in _FULL
        status = Exit.NO_SPACE if full else Exit.FAILED
        remedy = "free some space" if full else "run it as root, and look at the disk"
        reason = f"{error.filename or board.base}: {error.strerror}; {remedy}"
    return status, {"error": reason}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
