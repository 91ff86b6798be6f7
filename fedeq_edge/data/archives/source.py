"""What lies in an archive or a folder that a user names: read into memory by name, never unpacked onto the disk.

Theory of operation. The names inside are only compared, so one that leads outside leads nowhere, and links are no
files. Sizes are checked before and while reading, because headers lie: a zip of 1 MB can hold 1 TB. A zip inside a
zip, as UCI packs its sets, is looked into once. Nothing that could run code (pickle) is ever opened as such.
"""

import gzip
import hashlib
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol, cast

from fedeq_edge.errors import DataError

LARGEST_FILE_BYTES: Final = 1 << 30
"""Per file inside, unpacked: twice the largest of the sets we know (EMNIST's images by class, 0.5 GB)."""
LARGEST_TOTAL_BYTES: Final = 16 << 30
"""Of all files inside together: all of FEMNIST as json is about 5 GB."""
MOST_FILES: Final = 100_000
_MOST_INNER_ZIPS: Final = 4
_PIECE: Final = 1 << 20  # zipfile joins what it reads at quadratic cost, so it is asked for little at a time
_GZIP: Final = b"\x1f\x8b"


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Seekable(_Stream, Protocol):
    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...


class _Container(Protocol):
    @property
    def sizes(self) -> Mapping[str, int]:
        """Claimed bytes by name."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """A stream of one file."""
        ...


@dataclass(frozen=True, slots=True)
class Digest:
    """Of one file, in hex. md5: because that is what publishers of data sets state."""

    sha256: str
    md5: str


class Source:
    """The files of a folder, a zip, a tar, a tar.gz, or a single file, open until the end of a `with`.

    names: of all of them, with "/", sorted. Raises DataError, which names path and remedy, where it cannot be opened
    or claims more than the limits above.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: tuple[str, ...] = ()
        self._where: dict[str, tuple[_Container, str]] = {}
        self._open = ExitStack()
        self._read_bytes = 0
        self._digests: dict[str, Digest] = {}

    def __enter__(self) -> "Source":
        with self._readable("it"), ExitStack() as opened:
            self._where = dict(_entries(self.path, self._unpacked, opened))
            self._open = opened.pop_all()
        self.names = tuple(sorted(name for name in self._where if name.isprintable() and not _of_macos(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def digests(self) -> Mapping[str, Digest]:
        """By name: of the archive or file as a whole; of a folder, of each file that was read."""
        if self.path.is_file() and not self._digests:
            with self._readable("it"), self.path.open("rb") as content:
                self._digests[self.path.name] = _digest(iter(lambda: content.read(_PIECE), b""))
        return self._digests

    def find(self, pattern: str) -> list[str]:
        """Names whose end matches the regular expression, from the start of a path segment."""
        wanted = re.compile(rf"(?:.*/)?(?:{pattern})")
        return [name for name in self.names if wanted.fullmatch(name)]

    def one(self, pattern: str) -> str:
        """The one name that `find` finds, unpacked before gzipped; DataError where it is none or several."""
        found = self.find(pattern)
        plain = [name for name in found if not (name.endswith(".gz") and name.removesuffix(".gz") in found)]
        if len(plain) == 1:
            return plain[0]
        spoken = pattern.replace("\\", "").replace("(?:.gz)?", "").replace("[-.]", "-")
        if plain:
            raise DataError(f"{self.path}: {plain[0]} and {plain[1]} are both {spoken}; keep one of them")
        alone = self.names == (self.path.name,)
        whole = "give the folder that holds it too" if alone else "fetch the archive again, whole"
        raise DataError(f"{self.path}: no {spoken} in it; {whole}")

    def read(self, name: str) -> bytes:
        """The content of a file; of one that is gzipped, what was packed."""
        container, inner = self._where[name]
        with self._readable(name):
            content = self._unpacked(container, inner)
            if self.path.is_dir():
                self._digests[name] = _digest([content])
            if content.startswith(_GZIP):
                content = self._bounded(name, gzip.GzipFile(fileobj=io.BytesIO(content)))
        return content

    def text(self, name: str) -> str:
        """The content of a text file in ASCII; other characters are replaced."""
        return self.read(name).decode("ascii", "replace")

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of a file."""
        container, inner = self._where[name]
        with self._readable(name), container.open(inner) as stream:
            return stream.read(size)

    def _unpacked(self, container: _Container, name: str) -> bytes:
        claimed = container.sizes[name]
        if claimed > LARGEST_FILE_BYTES:
            raise DataError(f"{self.path}: {name} has {claimed} bytes, the limit is {LARGEST_FILE_BYTES}; {_REMEDY}")
        with container.open(name) as stream:
            return self._bounded(name, stream)

    def _bounded(self, name: str, stream: _Stream) -> bytes:
        pieces, size = [], 0
        while piece := stream.read(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_FILE_BYTES:
                raise DataError(f"{self.path}: {name} unpacks to more than {LARGEST_FILE_BYTES} bytes; {_REMEDY}")
        self._read_bytes += size
        if self._read_bytes > LARGEST_TOTAL_BYTES:
            raise DataError(f"{self.path} unpacks to more than {LARGEST_TOTAL_BYTES} bytes in all; {_REMEDY}")
        return b"".join(pieces)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """What the standard library raises for a file that is absent, damaged or something else, as one DataError."""
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file; give the path of the archive or its folder") from None
        except _UNREADABLE as error:
            raise DataError(f"{self.path}: {name} cannot be read ({error}); fetch it again, whole") from error


_REMEDY: Final = "is this the official archive?"
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
)


def _entries(
    path: Path, unpacked: Callable[[_Container, str], bytes], opened: ExitStack
) -> Iterator[tuple[str, tuple[_Container, str]]]:
    """(name, (container, name in it)) of every file."""
    container = _container(path, opened)
    zipped = isinstance(container, _Zip)
    inner = [name for name in container.sizes if zipped and name.endswith(".zip")]
    for name in container.sizes:
        if name not in inner:
            yield name, (container, name)
    for name in inner[:_MOST_INNER_ZIPS]:
        nested = _Zip(io.BytesIO(unpacked(container, name)))
        for member in nested.sizes:
            yield f"{name}/{member}", (nested, member)


def _container(path: Path, opened: ExitStack) -> _Container:
    if path.is_dir():
        return _Folder(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("no regular file")
    if path.suffix == ".zip" or zipfile.is_zipfile(path):
        return _Zip(opened.enter_context(path.open("rb")))
    if path.name.endswith((".tar.gz", ".tgz")):
        return _Tar(opened.enter_context(gzip.open(path)))
    if path.suffix == ".tar":
        return _Tar(opened.enter_context(path.open("rb")))
    return _Folder(path)


class _Folder:
    """The files under a folder, or one file alone."""

    def __init__(self, path: Path) -> None:
        self._root = path if path.is_dir() else path.parent
        self.sizes = {path.name: path.stat().st_size} if path.is_file() else dict(self._walked())
        if not self.sizes:
            raise DataError(f"{path}: an empty folder; give the archive, or the folder that it was unpacked to")

    def _walked(self) -> Iterator[tuple[str, int]]:
        for place, _, files in os.walk(self._root):
            for number, file in enumerate(files):
                _check_count(number)
                path = Path(place, file)
                if path.is_file():
                    yield path.relative_to(self._root).as_posix(), path.stat().st_size

    def open(self, name: str) -> IO[bytes]:
        return (self._root / name).open("rb")


class _Zip:
    def __init__(self, stream: IO[bytes]) -> None:
        self._file = zipfile.ZipFile(stream)
        found = [info for info in self._file.infolist() if not info.is_dir()]
        _check_count(len(found))
        # What else zipfile knows (bzip2, lzma) it unpacks without a bound.
        known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        self.sizes = {info.filename: info.file_size for info in found if info.compress_type in known}

    def open(self, name: str) -> IO[bytes]:
        return self._file.open(name)


class _Tar:
    def __init__(self, stream: _Seekable) -> None:
        # Closed with the stream below it.
        self._file = tarfile.open(fileobj=cast("IO[bytes]", _Reins(stream)), mode="r:")  # noqa: SIM115
        self.sizes: dict[str, int] = {}
        total = 0
        for count, member in enumerate(self._file):
            _check_count(count)
            total += member.size
            if total > LARGEST_TOTAL_BYTES:
                raise DataError(f"{member.name!r} ends beyond {LARGEST_TOTAL_BYTES} bytes; {_REMEDY}")
            if member.isreg() and not member.issparse():
                self.sizes[member.name] = member.size

    def open(self, name: str) -> IO[bytes]:
        stream = self._file.extractfile(name)
        assert stream is not None  # it is a regular file
        return stream


class _Reins:
    """A stream that gives no more at once than we would read ourselves, whatever a header asks for."""

    def __init__(self, stream: _Seekable) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_FILE_BYTES:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._stream.read(size)


def _digest(pieces: Iterable[bytes]) -> Digest:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        sha256.update(piece)
        md5.update(piece)
    return Digest(sha256.hexdigest(), md5.hexdigest())


def _check_count(count: int) -> None:
    if count > MOST_FILES:
        raise ValueError(f"more than {MOST_FILES} files")


def _of_macos(name: str) -> bool:
    """Whether it is what macOS adds to archives: half of the UCI HAR zip."""
    return name.startswith("__MACOSX/") or "/__MACOSX/" in name or name.rpartition("/")[2].startswith("._")
