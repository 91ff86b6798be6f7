"""A bundle file is refused as soon as one byte of it is another than the manifest and the key say."""

import gzip
import io
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedeq_edge.errors import Exit, ProvisionError, StateError
from fedeq_edge.provision import archive
from fedeq_edge.provision.archive import Cpu, Manifest, entry_of, pack, read_manifest, unpack, verify

LONG = f"site/{'deep/' * 30}module.py"  # beyond the 100 characters of a plain tar header
CONTENTS = {
    "bin/fedeq": b"#!/bin/sh\n",
    "release.py": b"",
    "site/data.bin": random.Random(0).randbytes(5000),
    LONG: b"x",
}


def make_key(folder: Path, name: str = "bundle") -> tuple[Path, Path]:
    """An Ed25519 key pair as PEM files."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def make_manifest(tree: Path, **changes: object) -> Manifest:
    found = (path for path in sorted(tree.rglob("*")) if path.is_file())
    files = {path.relative_to(tree).as_posix(): entry_of(path, 0o644) for path in found}
    manifest = Manifest(
        version="0.1.0+0123456789ab", profile="x86-64", architecture="x86_64", python="3.11", glibc="2.28",
        cpu=Cpu(part="", qemu=""), packages={"numpy": "2.4.6"}, files=files,
    )  # fmt: skip
    return msgspec.structs.replace(manifest, **changes)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_key(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path, tree: Path, keys: tuple[Path, Path]) -> Path:
    out = tmp_path / "bundle.tar.gz"
    pack(tree, make_manifest(tree), keys[0], out)
    return out


Members = list[tuple[tarfile.TarInfo, bytes]]


def retold(bundle: Path, change: Callable[[Members], Members]) -> Path:
    """The bundle with its members changed by somebody who knows tar, but not the key."""
    with tarfile.open(bundle) as packed:
        opened = [(member, packed.extractfile(member)) for member in packed.getmembers()]
        members = [(member, content.read()) for member, content in opened if content is not None]
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as packed:
        for member, content in change(members):
            member.size = len(content) if member.isreg() else 0
            packed.addfile(member, io.BytesIO(content))
    content = raw.getvalue().rstrip(b"\0")  # tarfile pads to records of 20 blocks, we do not
    return gzipped(content + bytes(-len(content) % 512 + 1024), bundle.with_name("changed.tar.gz"))


def refused(bundle: Path, public: Path) -> str:
    with pytest.raises(ProvisionError) as raised:
        verify(bundle, public)
    assert raised.value.exit is Exit.VERIFICATION
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_bundle_that_is_as_it_was_packed_is_verified_and_unpacks_to_its_tree(
    tmp_path: Path, bundle: Path, keys: tuple[Path, Path]
) -> None:
    manifest = unpack(bundle, keys[1], tmp_path / "out")

    assert verify(bundle, keys[1]) == read_manifest(bundle) == manifest
    assert {name: (tmp_path / "out" / name).read_bytes() for name in manifest.files} == CONTENTS


def test_tar_and_openssl_of_any_board_can_read_it(tmp_path: Path, bundle: Path, keys: tuple[Path, Path]) -> None:
    subprocess.run(["tar", "-xzf", bundle, "-C", tmp_path], check=True)
    told = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", keys[1], "-sigfile", tmp_path / "manifest.sig",
         "-in", tmp_path / "manifest.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "Verified Successfully" in told.stdout
    assert (tmp_path / LONG).read_bytes() == b"x"


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path, tree: Path, bundle: Path, keys: tuple[Path, Path]) -> None:
    other = tmp_path / "elsewhere" / "again.tar.gz"
    (tree / "release.py").touch()  # another time, which is no input
    pack(tree, make_manifest(tree), keys[0], other)

    assert other.read_bytes() == bundle.read_bytes()


def gzipped(content: bytes, out: Path) -> Path:
    """`content` as we compress it."""
    with out.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as zipped:
        zipped.write(content)
    return out


def test_a_changed_byte_is_refused_wherever_it_is(tmp_path: Path, bundle: Path, keys: tuple[Path, Path]) -> None:
    content, rng = gzip.decompress(bundle.read_bytes()), random.Random(0)
    for at in rng.sample(range(len(content)), 400):
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        refused(gzipped(bytes(changed), tmp_path / "changed.tar.gz"), keys[1])


def test_a_changed_byte_of_the_file_is_refused_or_changes_nothing(bundle: Path, keys: tuple[Path, Path]) -> None:
    """Deflate can say the same in two ways (which of two equal runs is copied); all that is said is held to account."""
    raw, rng = bundle.read_bytes(), random.Random(0)
    content = gzip.decompress(raw)
    ends = (*range(10), *range(len(raw) - 8, len(raw)))  # the head and the checksums of gzip
    for at in (*ends, *rng.sample(range(len(raw)), 400)):
        changed = bytearray(raw)
        changed[at] ^= 1 << rng.randrange(8)
        bundle.write_bytes(changed)
        try:
            verify(bundle, keys[1])
        except ProvisionError:
            continue
        assert at not in ends
        assert gzip.decompress(changed) == content


@pytest.mark.parametrize("more", [b"\0", b"\0" * 512, b"PK", gzip.compress(b"more", mtime=0)])
def test_something_behind_the_end_is_refused(bundle: Path, keys: tuple[Path, Path], more: bytes) -> None:
    bundle.write_bytes(bundle.read_bytes() + more)

    assert "bundle.tar.gz is refused" in refused(bundle, keys[1])


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_bundle_that_is_cut_off_is_refused(bundle: Path, keys: tuple[Path, Path], left: int) -> None:
    bundle.write_bytes(bundle.read_bytes()[:left])

    refused(bundle, keys[1])


def test_a_bundle_written_again_member_by_member_is_still_the_same(bundle: Path, keys: tuple[Path, Path]) -> None:
    """The changes below are what is refused, not the way in which they are made."""
    assert verify(retold(bundle, lambda members: members), keys[1])


def test_an_additional_file_is_refused(bundle: Path, keys: tuple[Path, Path]) -> None:
    more = (tarfile.TarInfo("site/sitecustomize.py"), b"import os")

    assert "the end" in refused(retold(bundle, lambda members: [*members, more]), keys[1])


def test_a_missing_file_is_refused_and_named(bundle: Path, keys: tuple[Path, Path]) -> None:
    assert "stands at bin/fedeq" in refused(retold(bundle, lambda members: [*members[:2], *members[3:]]), keys[1])


def test_a_file_that_comes_twice_is_refused(bundle: Path, keys: tuple[Path, Path]) -> None:
    refused(retold(bundle, lambda members: [*members[:3], *members[2:]]), keys[1])


def test_files_in_another_order_are_refused(bundle: Path, keys: tuple[Path, Path]) -> None:
    refused(retold(bundle, lambda members: [*members[:2], *reversed(members[2:])]), keys[1])


def test_other_content_of_the_same_length_is_refused_and_named(bundle: Path, keys: tuple[Path, Path]) -> None:
    def change(members: Members) -> Members:
        return [(member, content.replace(b"#!/bin/sh", b"#!/bin/ls")) for member, content in members]

    assert "bin/fedeq is not what the manifest names" in refused(retold(bundle, change), keys[1])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_devices_and_folders_are_refused(bundle: Path, keys: tuple[Path, Path], kind: bytes) -> None:
    def change(members: Members) -> Members:
        odd = tarfile.TarInfo(members[2][0].name)
        odd.type, odd.linkname = kind, "/etc/passwd"
        return [*members[:2], (odd, b""), *members[3:]]

    refused(retold(bundle, change), keys[1])


@pytest.mark.parametrize("change", [{"mode": 0o4755}, {"mtime": 1}, {"uid": 1}, {"uname": "root"}])
def test_owners_times_and_modes_that_the_manifest_does_not_give_are_refused(
    bundle: Path, keys: tuple[Path, Path], change: dict[str, int | str]
) -> None:
    def changed(members: Members) -> Members:
        for name, value in change.items():
            setattr(members[3][0], name, value)
        return members

    refused(retold(bundle, changed), keys[1])


def test_the_signature_of_another_key_is_refused(tmp_path: Path, bundle: Path) -> None:
    assert "its signature is not of" in refused(bundle, make_key(tmp_path, "other")[1])


def test_an_unsigned_bundle_can_be_read_and_is_refused(tmp_path: Path, tree: Path, keys: tuple[Path, Path]) -> None:
    out = tmp_path / "unsigned.tar.gz"
    pack(tree, make_manifest(tree), None, out)

    assert read_manifest(out).profile == "x86-64"
    assert "it is not signed" in refused(out, keys[1])


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a//b", "./a", "manifest.sig", "a\nb", ""])
def test_even_a_signed_manifest_names_no_path_outside(
    tmp_path: Path, tree: Path, keys: tuple[Path, Path], name: str
) -> None:
    entry = entry_of(tree / "release.py", 0o644)
    head = archive.canonical(make_manifest(tree, files={name: entry}))
    content = archive._header("manifest.json", len(head), 0o644) + head + archive._padding(len(head))

    assert "its manifest names" in refused(gzipped(content, tmp_path / "evil.tar.gz"), keys[1])


def test_a_manifest_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    bomb = gzipped(archive._header("manifest.json", 2**30, 0o644), tmp_path / "bomb.tar.gz")

    assert "does not begin with its manifest" in refused(bomb, keys[1])


def test_something_else_than_a_bundle_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    out = tmp_path / "photo.jpg"
    out.write_bytes(b"\xff\xd8\xff" * 100)

    assert "it is no bundle of ours" in refused(out, keys[1])


def test_a_key_of_another_kind_is_named_for_signing_and_for_checking(tmp_path: Path, tree: Path, bundle: Path) -> None:
    key = generate_private_key(SECP256R1())
    private, public = tmp_path / "ec.key", tmp_path / "ec.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    with pytest.raises(ProvisionError, match=r"ec.key is no Ed25519 key"):
        pack(tree, make_manifest(tree), private, tmp_path / "never.tar.gz")
    with pytest.raises(ProvisionError, match=r"ec.pub is no Ed25519 key"):
        verify(bundle, public)


def test_packing_that_fails_leaves_the_bundle_that_was_there_and_nothing_else(
    tmp_path: Path, tree: Path, bundle: Path, keys: tuple[Path, Path]
) -> None:
    before, manifest = bundle.read_bytes(), make_manifest(tree)
    (tree / "site/data.bin").unlink()

    with pytest.raises(StateError, match=r"cannot write"):
        pack(tree, manifest, keys[0], bundle)

    assert bundle.read_bytes() == before
    assert not list(bundle.parent.glob(".*.part"))
