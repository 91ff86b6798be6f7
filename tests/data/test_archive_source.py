import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedeq_edge.data.archives import Source, source
from fedeq_edge.errors import DataError
from tests.data.archives import Files, laid_out, tarred, zipped

Open = Callable[[Path], Source]
FILES: Files = {"set/a.txt": b"one", "set/sub/b.txt": b"two"}
FORMS: list[tuple[str, Callable[[Path, Files], Path]]] = [
    ("set.zip", zipped),
    ("set.tar", tarred),
    ("set.tar.gz", tarred),
    ("folder", laid_out),
]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens sources, and closes them after the test."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(Source(path))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_of_an_archive_gives_the_same_files(
    opened: Open, tmp_path: Path, name: str, form: Callable[[Path, Files], Path]
) -> None:
    found = opened(form(tmp_path / name, FILES))
    assert found.names == ("set/a.txt", "set/sub/b.txt")
    assert found.read(found.one(r"b\.txt")) == b"two"
    assert found.read("set/a.txt") == b"one"


def test_a_zip_in_a_zip_is_looked_into_and_what_macos_adds_is_not(opened: Open, tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"set/a.txt": b"one", "__MACOSX/set/._a.txt": b"junk"}).read_bytes()
    found = opened(zipped(tmp_path / "outer.zip", {"Data Set.zip": inner, "readme": b""}))
    assert found.names == ("Data Set.zip/set/a.txt", "readme")
    assert found.read("Data Set.zip/set/a.txt") == b"one"


def test_a_gzipped_file_is_read_unpacked_and_its_unpacked_twin_comes_first(opened: Open, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "f", {"a.gz": gzip.compress(b"one"), "b": b"two", "b.gz": gzip.compress(b"three")})
    found = opened(folder)
    assert found.read(found.one(r"a(?:\.gz)?")) == b"one"
    assert found.read(found.one(r"b(?:\.gz)?")) == b"two"


def test_digests_are_of_the_archive_or_of_the_files_of_a_folder_that_were_read(opened: Open, tmp_path: Path) -> None:
    empty_tree = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    folder = opened(laid_out(tmp_path / "folder", {"a": b"", "b": b"unread"}))
    folder.read("a")
    assert {name: digest.sha256 for name, digest in folder.digests.items()} == {"a": empty_tree}
    (tmp_path / "alone").write_bytes(b"")
    assert opened(tmp_path / "alone").digests["alone"].sha256 == empty_tree


def test_a_path_that_leads_outside_is_a_name_and_nothing_is_written(opened: Open, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name, form in FORMS[:3]:
        found = opened(form(place / name, {"../../evil.txt": b"bad", "/abs/evil.txt": b"bad"}))
        assert found.read("../../evil.txt") == b"bad"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["place", *(name for name, _ in FORMS[:3])])


def test_links_in_a_tar_are_no_files(opened: Open, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "links.tar", "w:") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"link{kind!r}")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    assert opened(tmp_path / "links.tar").names == ()


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[3]], ids=lambda form: form[0])
def test_a_file_beyond_the_limit_is_refused_before_it_is_read(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, Callable[[Path, Files], Path]]
) -> None:
    path = form[1](tmp_path / form[0], {"big": bytes(100_000)})
    monkeypatch.setattr(source, "LARGEST_FILE_BYTES", 50_000)
    with pytest.raises(DataError, match="big has 100000 bytes, the limit is 50000"):
        opened(path).read("big")


def test_what_unpacks_to_more_than_the_limit_is_stopped_there(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = laid_out(tmp_path, {"a.gz": gzip.compress(bytes(10 << 20))})
    monkeypatch.setattr(source, "LARGEST_FILE_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"a\.gz unpacks to more than 1048576 bytes"):
        opened(folder).read("a.gz")


def test_many_files_that_are_too_much_together_are_stopped(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(zipped(tmp_path / "a.zip", {str(number): bytes(1000) for number in range(10)}))
    monkeypatch.setattr(source, "LARGEST_TOTAL_BYTES", 5000)
    with pytest.raises(DataError, match="more than 5000 bytes in all"):
        [found.read(name) for name in found.names]
    with pytest.raises(DataError, match="ends beyond 5000 bytes"):
        opened(tarred(tmp_path / "a.tar", {str(number): bytes(1000) for number in range(10)}))
    monkeypatch.setattr(source, "MOST_FILES", 5)
    with pytest.raises(DataError, match="more than 5 files"):
        opened(tmp_path / "a.zip")


def test_a_tar_whose_header_asks_for_all_memory_is_refused(opened: Open, tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="a header asks for"):
        opened(tmp_path / "a.tar")


def test_compressions_that_unpack_without_a_bound_are_not_read(opened: Open, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", b"one")
    assert opened(tmp_path / "a.zip").names == ()


@pytest.mark.parametrize("cut", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz"])
def test_a_torn_archive_is_refused_in_one_line(opened: Open, tmp_path: Path, name: str, cut: float) -> None:
    form = zipped if name.endswith("zip") else tarred
    whole = form(tmp_path / name, {"set/a": os.urandom(3000), "set/b": os.urandom(3000)}).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(cut * len(whole))])

    def read_all() -> None:
        found = opened(tmp_path / name)
        found.read(found.one("set/a"))
        found.read(found.one("set/b"))

    with pytest.raises(DataError, match=r"set\.(zip|tar\.gz): .*fetch .*whole") as refusal:
        read_all()
    assert "\n" not in str(refusal.value)


def test_a_zip_whose_content_was_changed_is_refused(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"one")
    path.write_bytes(path.read_bytes().replace(b"one", b"two", 1))
    with pytest.raises(DataError, match="Bad CRC-32"):
        opened(path).read("a")


def test_what_is_absent_empty_or_no_file_is_named(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.zip: no such file"):
        opened(tmp_path / "absent.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="an empty folder"):
        opened(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no regular file"):
        opened(tmp_path / "pipe")


def test_a_file_that_is_missing_or_there_twice_is_named(opened: Open, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "f", {"x/a": b"", "y/a": b""})
    with pytest.raises(DataError, match="x/a and y/a are both a; keep one"):
        opened(folder).one("a")
    with pytest.raises(DataError, match=r"no b\.txt in it; fetch the archive again, whole"):
        opened(folder).one(r"b\.txt")
    (tmp_path / "alone").write_bytes(b"")
    with pytest.raises(DataError, match="give the folder that holds it too"):
        opened(tmp_path / "alone").one("b")


def test_names_that_would_break_a_terminal_are_left_out(opened: Open, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a\x1b[31m\n", b"")
        file.writestr("b", b"")
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    assert opened(tmp_path / "a.zip").names == ("b",)
