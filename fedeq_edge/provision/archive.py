"""A bundle as a file: a tar.gz of which every byte but the contents of its files follows from its manifest.

Theory of operation. The manifest comes first, then its signature, then the files in the order of their names, each with
mode and nothing else of its own (no times, owners, folders, links). So whoever reads does not parse what came, he
computes what must come and compares: a member more, a member less, a link or another order cannot even be expressed.
Contents are held against size and sha256 of the manifest, the manifest against the fleet's Ed25519 key. How deflate
puts it alone is free; whoever needs the very file (the installer, TUF) compares its sha256.
"""

import gzip
import hashlib
import itertools
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Literal, NoReturn

import msgspec

from fedeq_edge.atomic import writing
from fedeq_edge.errors import Exit, ProvisionError

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
_SIGNATURE_BYTES: Final = 64  # Ed25519
_MANIFEST_LIMIT: Final = 16 * 2**20  # a torch tree of 12,000 files needs 2 MiB
COMPRESSION = 6  # as of the program gzip; with another one every bundle would be of other bytes
_FILE_LIMIT: Final = 2**31  # libtorch_cpu.so is 0.4 GiB
_TAR_END: Final = bytes(2 * tarfile.BLOCKSIZE)
_CHUNK: Final = 2**20
# Deflate, no name, no time, no word on the compressor's effort, unknown system: what GzipFile writes at level 6.
_GZIP_HEAD: Final = bytes.fromhex("1f8b08000000000000ff")
_PLAIN_MODES: Final = (0o644, 0o755)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file: sha256 in hex, size in bytes, mode (0o644 or 0o755)."""

    sha256: str
    size: int
    mode: int


class Cpu(msgspec.Struct, frozen=True, kw_only=True):
    """The core that a bundle is meant for: "CPU part" of /proc/cpuinfo and qemu's name; empty: any."""

    part: str
    qemu: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a bundle and where it runs.

    version: the package's and the first 12 hex digits of the digest of `files`. packages: version by distribution.
    """

    format: Literal[1] = 1
    version: str
    profile: str
    architecture: str
    python: str
    glibc: str
    cpu: Cpu
    packages: dict[str, str]
    files: dict[str, Entry]

    @property
    def unpacked_bytes(self) -> int:
        """What its files take on a disk, without the slack of their last blocks."""
        return sum(entry.size for entry in self.files.values())


def canonical(value: object) -> bytes:
    """The one JSON of a value: keys sorted, no spaces."""
    return msgspec.json.encode(value, order="sorted")


def entry_of(path: Path, mode: int) -> Entry:
    """The entry of a file."""
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Entry(sha256=digest, size=path.stat().st_size, mode=mode)


def pack(tree: Path, manifest: Manifest, key: Path | None, out: Path) -> None:
    """`out` is the bundle of the files in `tree` that `manifest` names, signed with the PEM key, or what it was before.

    Same tree, manifest and key: same bytes.
    """
    described = canonical(manifest)
    head = {MANIFEST: described, **({} if key is None else {SIGNATURE: sign(described, key)})}
    part = out.with_name(f".{out.name}.part")
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as raw, gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as packed:
                for piece in _stream(tree, manifest, head):
                    packed.write(piece)
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _stream(tree: Path, manifest: Manifest, head: Mapping[str, bytes]) -> Iterator[bytes]:
    """The tar of a bundle, piece by piece."""
    for name, content in head.items():
        yield _header(name, len(content), 0o644) + content + _padding(len(content))
    for name, entry in sorted(manifest.files.items()):
        yield _header(name, entry.size, entry.mode)
        yield from _pieces(tree / name)
        yield _padding(entry.size)
    yield _TAR_END


def sign(message: bytes, key: Path) -> bytes:
    """The Ed25519 signature (64 bytes) with the PEM key in a file. Raises ProvisionError where it is no such key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415  # extra `fleet`
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        found = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ProvisionError(Exit.MISUSED, f"bundle key {key} cannot be used: {error}; restore the fleet's") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise ProvisionError(Exit.MISUSED, f"bundle key {key} is no Ed25519 key; restore the fleet's keys/bundle.key")
    return found.sign(message)


def read_manifest(path: Path) -> Manifest:
    """What a bundle says of itself, not verified. Raises ProvisionError where it is no bundle."""
    with _Reader(path) as reader:
        return reader.manifest()[1]


def whole(path: Path) -> tuple[Manifest, bool]:
    """The manifest of a bundle every byte of which is what it names, and whether somebody signed it, whoever.

    Raises ProvisionError (VERIFICATION) where a byte is another one.
    """
    with _Reader(path) as reader:
        manifest = reader.manifest()[1]
        signed = reader.skips_signature()
        reader.rest(manifest)
    return manifest, signed


def verify(path: Path, public_key: Path) -> Manifest:
    """The manifest of a bundle that is whole and signed with the key (PEM). Raises ProvisionError (VERIFICATION)."""
    with _Reader(path) as reader:
        manifest = reader.signed(public_key)
        reader.rest(manifest)
    return manifest


def unpack(path: Path, public_key: Path, folder: Path) -> Manifest:
    """`verify`, and its files are in `folder`, which is ours; after an error whatever is there must not be used."""
    with _Reader(path) as reader:
        manifest = reader.signed(public_key)
        for name, entry in sorted(manifest.files.items()):
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as output:
                output.writelines(reader.file(name, entry))
            to.chmod(entry.mode)
        reader.end()
    return manifest


class _Reader:
    """Reads a bundle front to back, at no point more than what must come next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._total = 0

    def __enter__(self) -> "_Reader":
        try:
            self._raw = self._path.open("rb")
        except OSError as error:
            raise ProvisionError(Exit.MISUSED, f"bundle {self._path}: {error.strerror}; name one built here") from error
        if self._raw.read(len(_GZIP_HEAD)) != _GZIP_HEAD:
            self._raw.close()
            self._refuse("it is no bundle of ours")
        self._raw.seek(0)
        self._packed = gzip.GzipFile(fileobj=self._raw)
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def manifest(self) -> tuple[bytes, Manifest]:
        """The manifest, as bytes and decoded; nothing of it can be trusted yet, but that its paths stay inside."""
        head = self._exactly(tarfile.BLOCKSIZE)
        try:
            size = tarfile.TarInfo.frombuf(head, "utf-8", "strict").size
        except tarfile.HeaderError:
            self._refuse("it does not begin with its manifest")
        if head != _header(MANIFEST, size, 0o644) or size > _MANIFEST_LIMIT:
            self._refuse("it does not begin with its manifest")
        described = self._exactly(size)
        self._same(_padding(size), MANIFEST)
        try:
            manifest = msgspec.json.decode(described, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._refuse(f"its manifest cannot be read ({error})")
        for name, entry in manifest.files.items():
            self._check_entry(name, entry)
        return described, manifest

    def signed(self, public_key: Path) -> Manifest:
        """The manifest, which the owner of the key has signed."""
        described, manifest = self.manifest()
        self._same(_header(SIGNATURE, _SIGNATURE_BYTES, 0o644), f"{SIGNATURE}: it is not signed")
        signature = self._exactly(_SIGNATURE_BYTES)
        self._same(_padding(_SIGNATURE_BYTES), SIGNATURE)
        if not is_signed(described, signature, public_key):
            self._refuse(f"its signature is not of {public_key}")
        return manifest

    def skips_signature(self) -> bool:
        """Whether one stood here; then it is behind us."""
        at = self._total
        if self._read(tarfile.BLOCKSIZE) == _header(SIGNATURE, _SIGNATURE_BYTES, 0o644):
            self._exactly(_SIGNATURE_BYTES)
            self._same(_padding(_SIGNATURE_BYTES), SIGNATURE)
            return True
        self._total = self._packed.seek(at)
        return False

    def rest(self, manifest: Manifest) -> None:
        """All files, and the end, are what the manifest names."""
        for name, entry in sorted(manifest.files.items()):
            for _ in self.file(name, entry):
                pass
        self.end()

    def file(self, name: str, entry: Entry) -> Iterator[bytes]:
        """The content of the file that must come next, in pieces; raises at its end where it is another."""
        self._same(_header(name, entry.size, entry.mode), name)
        digest, left = hashlib.sha256(), entry.size
        while left:
            piece = self._exactly(min(left, _CHUNK))
            digest.update(piece)
            left -= len(piece)
            yield piece
        if digest.hexdigest() != entry.sha256:
            self._refuse(f"{name} is not what the manifest names")
        self._same(_padding(entry.size), name)

    def end(self) -> None:
        """Nothing comes any more; zeros behind the end are the one thing that gzip itself lets pass."""
        self._same(_TAR_END, "the end")
        if self._read(1):
            self._refuse("something follows its end")
        self._raw.seek(-4, 2)
        if int.from_bytes(self._raw.read(), "little") != self._total % 2**32:
            self._refuse("something follows its end")

    def _check_entry(self, name: str, entry: Entry) -> None:
        path = PurePosixPath(name)
        inside = str(path) == name and not path.is_absolute() and ".." not in path.parts and name.isprintable()
        if not inside or name in {MANIFEST, SIGNATURE, "."}:
            self._refuse(f"its manifest names {name!r}")
        if not 0 <= entry.size <= _FILE_LIMIT or entry.mode not in _PLAIN_MODES:
            self._refuse(f"{name} has size {entry.size} and mode {entry.mode:o}")

    def _same(self, expected: bytes, where: str) -> None:
        if self._exactly(len(expected)) != expected:
            self._refuse(f"another entry than the manifest's stands at {where}")

    def _exactly(self, size: int) -> bytes:
        found = self._read(size)
        if len(found) != size:
            self._refuse("it is cut off")
        return found

    def _read(self, size: int) -> bytes:
        try:
            found = self._packed.read(size)
        except (OSError, EOFError, zlib.error) as error:
            self._refuse(f"it cannot be unpacked ({error})")
        self._total += len(found)
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise ProvisionError(
            Exit.VERIFICATION, f"bundle {self._path} is refused: {why}; build it again with `fedeq bundle build`"
        )


def is_signed(message: bytes, signature: bytes, public_key: Path) -> bool:
    """Whether the owner of an Ed25519 key (PEM) has signed. Raises ProvisionError where the file is no such key."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  # extra `fleet`
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise ProvisionError(Exit.MISUSED, f"key {public_key} cannot be used: {error}; name bundle.pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProvisionError(Exit.MISUSED, f"key {public_key} is no Ed25519 key; name the fleet's keys/bundle.pub")
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _header(name: str, size: int, mode: int) -> bytes:
    """The tar header of a file without times and owners; GNU's form, for names beyond 100 characters."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, mode
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as content:
        yield from itertools.takewhile(len, iter(lambda: content.read(_CHUNK), None))
