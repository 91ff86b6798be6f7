"""A bundle is resolved for its board by the real uv, off-line from wheels of one line each, and always the same."""

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedeq_edge import __version__
from fedeq_edge.errors import ConfigError, Exit, ProvisionError
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.provision import wheels
from fedeq_edge.provision.bundle import BundleSpec, build, read_manifest, unpack
from fedeq_edge.provision.platforms import platform_of
from tests.provision.small_models import personal

pytest.importorskip("uv", reason="uv is not installed (extra fleet)")

PURE = {
    "cbor2": "6.2.1", "msgspec": "0.22.0", "paho-mqtt": "2.2.0", "psutil": "7.2.2", "rich": "15.0.0",
    "tomli-w": "1.2.0", "tuf": "7.0.1", "typer": "0.29.2",
}  # fmt: skip


def add_wheel(house: Path, name: str, version: str, *, tag: str = "py3-none-any", needs: tuple[str, ...] = (),
              files: dict[str, str] | None = None) -> None:  # fmt: skip
    """A wheel of one module, and of what else is asked for."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    required = "".join(f"Requires-Dist: {need}\n" for need in needs)
    contents = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n",
        **(files or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    rows = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"])
    with zipfile.ZipFile(house / f"{module}-{version}-{tag}.whl", "w") as packed:
        for path, text in contents.items():
            packed.writestr(path, text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels for 64-bit ARM: a numpy that wants CUDA where uname says x86-64 as here, with what no board needs."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    for name, version in PURE.items():
        add_wheel(folder, name, version)
    clutter = {
        "numpy/tests/test_core.py": "", "numpy/core.h": "", "numpy/core.pyi": "", "numpy/lib/libnpy.a": "",
        "numpy/testing/__init__.py": "", "numpy/__pycache__/core.cpython-311.pyc": "",
    }  # fmt: skip
    tag = "cp311-cp311-manylinux_2_28_{}"
    cuda = "nvidia-cublas; platform_machine == 'x86_64'"
    add_wheel(folder, "numpy", "2.4.6", tag=tag.format("aarch64"), needs=(cuda,), files=clutter)
    add_wheel(folder, "numpy", "2.4.5", tag=tag.format("x86_64"))
    compiled = ("onnxruntime 1.21.0", "onnxruntime 1.31.1", "torch 2.9.1", "torch 2.10.0", "cryptography 50.0.2")
    for name, version in map(str.split, compiled):
        add_wheel(folder, name, version, tag=tag.format("aarch64"))
    add_wheel(folder, "onnxruntime", "1.31.2", tag=tag.format("x86_64"))
    return folder


BUILD_OWN_WHEEL = wheels.own_wheel


@pytest.fixture(scope="module", autouse=True)
def _own_wheel_built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    built = BUILD_OWN_WHEEL(tmp_path_factory.mktemp("own"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "own_wheel", lambda work, _wheelhouse=None: Path(shutil.copy(built, work)))
        yield


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An Ed25519 key pair as PEM files."""
    folder, key = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.generate()
    (folder / "a.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "a.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return folder / "a.key", folder / "a.pub"


def spec_of(out: Path, house: Path, key: Path) -> BundleSpec:
    """A bundle of a Raspberry Pi 4 out of those wheels."""
    platform = platform_of(load_profile("raspberry-pi-4"))
    return BundleSpec(platform=platform, out=out, key=key, name="pi4", wheelhouse=house)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, house: Path, keys: tuple[Path, Path]) -> Path:
    """That bundle, for those who look at it alone."""
    return build(spec_of(tmp_path_factory.mktemp("plain"), house, keys[0]))


CONFIG = b"device = 'a'\n"


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, house: Path, keys: tuple[Path, Path]) -> Path:
    """The same with settings."""
    spec = spec_of(tmp_path_factory.mktemp("configured"), house, keys[0])
    return build(msgspec.structs.replace(spec, config=CONFIG))


@pytest.fixture(scope="module")
def laden(tmp_path_factory: pytest.TempPathFactory, house: Path, keys: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same with all that a bundle may bring, torch, a model and settings; and that model."""
    folder = tmp_path_factory.mktemp("laden")
    model = personal(folder / "personal.fedeq")
    spec = spec_of(folder / "out", house, keys[0])
    changed = msgspec.structs.replace(spec, torch=True, models=(model,), config=b"device = 'pi-01'\n")
    return build(changed), model


Build = Callable[..., Path]


@pytest.fixture
def pi4(tmp_path: Path, house: Path, keys: tuple[Path, Path]) -> Build:
    """Builds that bundle with changes."""
    spec = spec_of(tmp_path / "out", house, keys[0])
    return lambda **changes: build(msgspec.structs.replace(spec, **changes))


def test_markers_and_wheels_are_those_of_the_board_and_pins_hold(plain: Path) -> None:
    manifest = read_manifest(plain)

    assert manifest.packages == {
        **PURE, "fedeq-edge": __version__, "numpy": "2.4.6", "onnxruntime": "1.31.1", "cryptography": "50.0.2"
    }  # fmt: skip
    assert (manifest.architecture, manifest.python, manifest.glibc) == ("aarch64", "3.11", "2.28")
    assert (manifest.profile, manifest.cpu.part, manifest.cpu.qemu) == ("raspberry-pi-4", "0xd08", "cortex-a72")


def test_torch_comes_when_it_is_asked_for_in_the_version_of_the_board(laden: tuple[Path, Path], plain: Path) -> None:
    assert read_manifest(laden[0]).packages["torch"] == "2.9.1"  # 2.10.0 lies beside it
    assert "torch" not in read_manifest(plain).packages


def test_the_same_inputs_give_the_same_bytes(
    tmp_path: Path, configured: Path, pi4: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "own_wheel", BUILD_OWN_WHEEL)
    before = os.umask(0o077)  # neither this, nor where, nor the order of the day matter
    monkeypatch.setenv("TZ", "Pacific/Apia")
    try:
        again = pi4(config=CONFIG, out=tmp_path / "elsewhere")
    finally:
        os.umask(before)

    assert configured.name == again.name
    assert configured.read_bytes() == again.read_bytes()


def test_the_version_changes_with_any_byte(configured: Path, pi4: Build) -> None:
    other = pi4(config=CONFIG.replace(b"'a'", b"'b'"))
    first, second = (read_manifest(bundle).version for bundle in (configured, other))

    assert first != second
    assert first.startswith(f"{__version__}+")


def test_what_no_board_needs_is_left_out_and_what_names_this_machine_too(
    tmp_path: Path, plain: Path, house: Path
) -> None:
    manifest = unpack_here(plain, tmp_path)

    assert [name for name in manifest if name.startswith("site/numpy") and "__pycache__" not in name] == [
        "site/numpy-2.4.6.dist-info/METADATA",
        "site/numpy-2.4.6.dist-info/WHEEL",
        "site/numpy/__init__.py",
        "site/numpy/testing/__init__.py",
    ]
    assert "site/numpy/__pycache__/core.cpython-311.pyc" not in manifest
    for name in manifest:
        content = (tmp_path / "unpacked" / name).read_bytes()
        assert str(house).encode() not in content, name
        assert sys.prefix.encode() not in content, name


def unpack_here(bundle: Path, folder: Path) -> list[str]:
    to = folder / "unpacked"
    to.mkdir()
    subprocess.run(["tar", "-xzf", bundle, "-C", to], check=True)
    return sorted(read_manifest(bundle).files)


def test_installer_units_launcher_models_and_settings_are_in_their_places(
    tmp_path: Path, laden: tuple[Path, Path], keys: tuple[Path, Path]
) -> None:
    bundle, model = laden

    manifest = unpack(bundle, keys[1], tmp_path / "tree")

    assert {"release.py", "bin/fedeq", "units/fedeq-agent.service", "requirements.txt"} <= set(manifest.files)
    assert (tmp_path / "tree/models/personal.fedeq").read_bytes() == model.read_bytes()
    assert (tmp_path / "tree/config/agent.toml").read_bytes() == b"device = 'pi-01'\n"
    executable = [name for name in manifest.files if (tmp_path / "tree" / name).stat().st_mode & stat.S_IXUSR]
    assert executable == ["bin/fedeq", "bin/fedeq-updater", "release.py"]
    assert "site/fedeq_edge/_kit/devices/raspberry-pi-4/profile.toml" in manifest.files


def test_the_lock_in_it_names_a_hash_for_each_package_and_no_folder(tmp_path: Path, plain: Path) -> None:
    unpack_here(plain, tmp_path)
    lock = (tmp_path / "unpacked/requirements.txt").read_text()

    assert lock.count("==") == len(PURE) + 3
    assert lock.count("--hash=sha256:") >= len(PURE) + 3
    assert "/" not in lock


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_a_package_without_a_wheel_for_the_board_is_named_and_nothing_is_left(
    tmp_path: Path, pi4: Build, python: str
) -> None:
    with pytest.raises(ProvisionError) as raised:
        pi4(platform=platform_of(load_profile("raspberry-pi-4"), python))

    assert raised.value.exit is Exit.FAILED
    assert "numpy" in str(raised.value) or "cryptography" in str(raised.value) or "onnxruntime" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_wheelhouse_is_not_made_up_for_by_the_network(tmp_path: Path, pi4: Build) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    with pytest.raises(ProvisionError, match="no tree of wheels"):
        pi4(wheelhouse=empty)


def test_a_link_in_a_tree_is_refused(tmp_path: Path) -> None:
    from fedeq_edge.provision.bundle import _files  # noqa: PLC0415  # a wheel cannot bring one past uv, a tree could

    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(ProvisionError, match="link is a link"):
        _files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": (Path("absent.onnx"),)}, "absent.onnx does not exist"),
        ({"models": (Path(__file__),)}, "test_bundle.py is no .fedeq or .onnx"),
        ({"wheelhouse": Path("absent")}, "wheelhouse absent is no folder"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_fetched(
    pi4: Build, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pi4(**changes)


def test_a_model_that_cannot_be_loaded_is_refused_before_anything_is_fetched(tmp_path: Path, pi4: Build) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"graph")

    with pytest.raises(ConfigError, match=r"junk\.onnx cannot be loaded"):
        pi4(models=(junk,))


def test_models_of_the_same_name_are_refused(tmp_path: Path, pi4: Build) -> None:
    models = tuple(personal(tmp_path / folder / "m.fedeq") for folder in "ab")

    with pytest.raises(ConfigError, match="two have the same name"):
        pi4(models=models)


def test_a_python_that_we_do_not_know_is_refused_with_those_that_we_do() -> None:
    with pytest.raises(ConfigError, match=r"python '3.9': bundles are built for 3.11, 3.12, 3.13"):
        platform_of(load_profile("raspberry-pi-4"), "3.9")


def test_a_32_bit_profile_is_refused() -> None:
    board = msgspec.structs.replace(load_profile("raspberry-pi-4"), arch="armv7l", wheel_tag="linux_armv7l")

    with pytest.raises(ConfigError, match="64-bit operating system"):
        platform_of(board)


def test_an_installed_wheel_packs_itself_again_as_it_was_built(tmp_path: Path) -> None:
    """A bundle is built from an installed fedeq-edge as from a checkout."""
    built = wheels.own_wheel(tmp_path)
    installed, again = tmp_path / "installed", tmp_path / "again"
    with zipfile.ZipFile(built) as packed:
        packed.extractall(installed)
    again.mkdir()
    code = (
        "import pathlib, sys; from fedeq_edge.provision import wheels; "
        f"print(wheels.__file__); wheels.own_wheel(pathlib.Path({str(again)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.startswith(str(installed))
    (wheel,) = again.glob("fedeq_edge-*.whl")
    with zipfile.ZipFile(built) as first, zipfile.ZipFile(wheel) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        assert all(first.read(name) == second.read(name) for name in first.namelist())


def test_manifest_json_is_canonical(tmp_path: Path, plain: Path) -> None:
    unpack_here(plain, tmp_path)
    raw = (tmp_path / "unpacked/manifest.json").read_bytes()

    assert json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == raw
