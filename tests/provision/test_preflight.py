"""What would not run on a board is said before anything is sent there, with what mends it."""

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedeq_edge.errors import ConfigError, Exit
from fedeq_edge.hardware.profiles import profiles
from fedeq_edge.provision import preflight
from fedeq_edge.provision.archive import Cpu, Entry, Manifest, entry_of, pack
from fedeq_edge.provision.facts import Facts
from fedeq_edge.provision.preflight import Finding, Smoke, check, missing_for_qemu, run_under_qemu, smoke_of

NOW = 1_800_000_000
MIB = 2**20
PI4 = Facts(
    architecture="aarch64", cpu_part="0xd08", cpu_name="Cortex-A72", libc="glibc", glibc="2.36", python="3.11",
    free_disk_bytes=8 * 2**30, memory_bytes=4 * 2**30, clock=NOW, systemd=252, machine_id="0" * 32, root=True,
    hostname="pi4", booted=True,
)  # fmt: skip
BUNDLE = Manifest(
    version="0.1.0+0123456789ab", profile="raspberry-pi-4", architecture="aarch64", python="3.11", glibc="2.28",
    cpu=Cpu(part="0xd08", qemu="cortex-a72"), packages={"numpy": "2.4.6", "onnxruntime": "1.31.1"},
    files={"site/all": Entry(sha256="0" * 64, size=140 * MIB, mode=0o644)},
)  # fmt: skip


def findings(bundle: dict[str, object] | None = None, smoke: Smoke | None = None, **facts: Any) -> list[Finding]:
    manifest = msgspec.structs.replace(BUNDLE, **(bundle or {}))
    return check(msgspec.structs.replace(PI4, **facts), manifest, qemu=smoke, now=NOW)


def refusal(bundle: dict[str, object] | None = None, smoke: Smoke | None = None, **facts: Any) -> Finding:
    (found,) = findings(bundle, smoke, **facts)
    assert found.severity == "refuse"
    assert "\n" not in found.line()
    return found


def with_packages(**versions: str) -> dict[str, object]:
    return {"packages": {**BUNDLE.packages, **versions}}


def test_a_board_that_fits_has_no_findings() -> None:
    assert findings() == []


def test_a_card_that_never_ran_is_not_refused_for_what_it_cannot_tell() -> None:
    assert findings(cpu_part="", cpu_name="", memory_bytes=None, clock=None, machine_id="", booted=False) == []


@pytest.mark.parametrize("part", ["0xd03", "0xd08"])
@pytest.mark.parametrize(
    ("package", "version", "use"), [("torch", "2.10.0", "2.9.1"), ("onnxruntime", "1.21.0", "1.31.1")]
)
def test_wheels_that_die_on_old_cores_are_refused_with_the_version_to_use(
    part: str, package: str, version: str, use: str
) -> None:
    found = refusal(with_packages(**{package: version}), cpu_part=part)

    assert found.code is Exit.WRONG_PLATFORM
    assert f"{package} {version} dies of SIGILL" in found.what
    assert f'{package} = "{use}"' in found.remedy


def test_the_same_wheels_pass_on_a_newer_core() -> None:
    assert findings(with_packages(torch="2.10.0"), cpu_part="0xd0b") == []


def test_a_card_is_judged_by_the_core_of_its_profile() -> None:
    assert "Cortex-A72" in refusal(with_packages(torch="2.10.0"), cpu_part="").what


def test_where_nobody_knows_the_core_they_are_a_warning() -> None:
    (found,) = findings({**with_packages(torch="2.10.0"), "cpu": Cpu(part="", qemu="cortex-a53")}, cpu_part="")

    assert (found.severity, found.code) == ("warn", Exit.WRONG_PLATFORM)


@pytest.mark.parametrize("board", sorted(profiles()))
def test_no_board_pins_a_wheel_that_would_crash_there(board: str) -> None:
    profile = profiles()[board]
    bundle = {**with_packages(**profile.pins), "architecture": profile.arch}

    assert findings(bundle, cpu_part=profile.cpu_part, architecture=profile.arch) == []


@pytest.mark.parametrize(("version", "refused"), [("2.11.0", True), ("2.15.0", True), ("2.15.0+cpu", False)])
def test_a_cuda_torch_is_refused_on_boards(version: str, refused: bool) -> None:
    found = findings(with_packages(torch=version), cpu_part="0xd0b")

    assert [one.code for one in found] == ([Exit.WRONG_PLATFORM] if refused else [])
    assert all("CUDA" in one.what and "2.9.1" in one.remedy for one in found)


@pytest.mark.parametrize("machine", ["armv7l", "armv6l", "armhf"])
def test_a_32_bit_board_is_told_to_take_a_64_bit_system_and_nothing_else(machine: str) -> None:
    found = refusal(architecture=machine, glibc="2.24", python="3.5", systemd=232)

    assert found.code is Exit.WRONG_PLATFORM
    assert found.remedy.startswith("64-bit OS needed")


def test_the_other_64_bit_architecture_is_told_which_bundle_to_build() -> None:
    assert refusal(architecture="x86_64").remedy == "build one with `fedeq bundle build --profile x86-64`"
    assert refusal({"architecture": "x86_64"}, architecture="arm64").remedy.endswith("--profile arm64`")


@pytest.mark.parametrize(
    ("facts", "code", "words"),
    [
        ({"python": "3.13"}, Exit.WRONG_PLATFORM, "build the bundle with --python 3.13"),
        ({"python": "3.9"}, Exit.WRONG_PLATFORM, "python3 is 3.11, 3.12 or 3.13"),
        ({"python": ""}, Exit.WRONG_PLATFORM, "python is absent"),
        ({"python": "3.10"}, Exit.WRONG_PLATFORM, "apt-get install python3.11 (Ubuntu 22.04"),
        ({"python": "3.10", "pythons": ["3.10", "3.12"]}, Exit.WRONG_PLATFORM, "build the bundle with --python 3.12"),
        ({"glibc": "2.24"}, Exit.WRONG_PLATFORM, "the wheels need 2.28"),
        ({"libc": "musl", "glibc": ""}, Exit.WRONG_PLATFORM, "musl"),
        ({"systemd": 0}, Exit.WRONG_PLATFORM, "no systemd runs there"),
        ({"systemd": 245}, Exit.WRONG_PLATFORM, "its systemd is 245"),
        ({"root": False}, Exit.FAILED, "sudo"),
        ({"free_disk_bytes": 200 * MIB}, Exit.NO_SPACE, "200 MiB of its disk are free, 274 MiB are needed"),
        ({"clock": 35}, Exit.CLOCK, "its clock says 1970-01-01"),
        ({"clock": NOW - 2 * 86_400}, Exit.CLOCK, "timedatectl set-ntp true"),
    ],
)
def test_each_thing_that_is_wrong_has_its_exit_code_and_its_remedy(
    facts: dict[str, Any], code: Exit, words: str
) -> None:
    found = refusal(**facts)

    assert found.code is code
    assert words in found.line()


def test_a_python_beside_the_boards_own_is_as_good() -> None:
    assert findings(python="3.10", pythons=["3.10", "3.11"]) == []


def test_a_newer_glibc_and_a_clock_an_hour_off_are_no_fault() -> None:
    assert findings(glibc="2.100", clock=NOW - 3600) == []


def test_little_memory_is_a_warning_and_torch_needs_more() -> None:
    zero = 416 * MIB  # what Linux sees of the 512 MB of a Zero 2 W

    (found,) = findings(with_packages(torch="2.9.1"), memory_bytes=zero)

    assert findings(memory_bytes=zero) == []
    assert (found.severity, found.remedy) == ("warn", "build without --with torch")


def test_refusals_come_before_warnings() -> None:
    found = findings(memory_bytes=100 * MIB, python="3.13", root=False)

    assert [one.severity for one in found] == ["refuse", "refuse", "warn"]


def test_a_crash_that_qemu_saw_counts_where_the_table_knows_nothing() -> None:
    smoke = Smoke(cpu="cortex-a72", ok=False, signal="SIGILL", reached="numpy 9.0", detail="")

    found = refusal(with_packages(numpy="9.0"), smoke)

    assert found.code is Exit.WRONG_PLATFORM
    assert found.what == "numpy 9.0 dies of SIGILL under cortex-a72"


def test_a_pass_under_the_boards_own_core_counts_more_than_the_table() -> None:
    smoke = Smoke(cpu="cortex-a72", ok=True, signal="", reached="end", detail="")

    assert findings(with_packages(torch="2.10.0"), smoke) == []
    assert len(findings(with_packages(torch="2.10.0"), smoke, cpu_part="0xd03")) == 1  # another core than was run


@pytest.fixture(scope="module")
def rootfs() -> Path:
    """An arm64 root with python 3.11."""
    root = os.environ.get(preflight.ROOT_VARIABLE, "")
    missing = missing_for_qemu(Path(root), "3.11") if root else f"{preflight.ROOT_VARIABLE} names no arm64 root"
    if missing:
        pytest.skip(missing)
    return Path(root)


def stub_tree(folder: Path, body: str) -> Path:
    """A tree with a numpy that does this when it is imported."""
    (folder / "numpy").mkdir(parents=True)
    (folder / "numpy/__init__.py").write_text(body)
    (folder / "numpy-1.0.dist-info").mkdir()
    (folder / "numpy-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    return folder


def test_an_instruction_that_the_core_has_not_is_told_with_the_package_that_ran(tmp_path: Path, rootfs: Path) -> None:
    """udf #0 of Arm, executed in mapped memory: what a wheel for newer cores does."""
    body = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "page.write(bytes(4))\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    )

    found = run_under_qemu(stub_tree(tmp_path / "site", body), "cortex-a53", rootfs, python="3.11")

    assert (found.ok, found.signal, found.reached) == (False, "SIGILL", "numpy 1.0")


def test_an_error_of_a_package_is_told_by_its_last_line(tmp_path: Path, rootfs: Path) -> None:
    tree = stub_tree(tmp_path / "site", "raise ImportError('libcublasLt.so.13: cannot open')")

    found = run_under_qemu(tree, "cortex-a72", rootfs, python="3.11")

    assert (found.ok, found.signal) == (False, "")
    assert found.detail == "ImportError: libcublasLt.so.13: cannot open"


@pytest.mark.parametrize(("cpu", "part"), [("cortex-a53", "0xd03"), ("cortex-a72", "0xd08")])
def test_the_run_sees_the_core_of_the_board_and_no_package_of_the_root(
    tmp_path: Path, rootfs: Path, cpu: str, part: str
) -> None:
    body = f"import platform; assert '{part}' in open('/proc/cpuinfo').read(); assert platform.machine() == 'aarch64'\n"
    tree = stub_tree(tmp_path / "site", body + "raise SystemExit('seen')")

    found = run_under_qemu(tree, cpu, rootfs, python="3.11", part=part)

    assert (found.reached, found.detail) == ("numpy 1.0", "seen")


def test_without_qemu_or_a_root_the_run_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(preflight.QEMU) is not None:
        with pytest.raises(ConfigError, match=r"is no arm64 root with python 3.11 \(mmdebstrap"):
            run_under_qemu(tmp_path, "cortex-a53", tmp_path, python="3.11")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt install qemu-user-static"):
        run_under_qemu(tmp_path, "cortex-a53", tmp_path, python="3.11")


def test_flash_runs_the_wheels_only_where_a_root_is_named_and_the_board_has_a_core_to_run_them_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent, pc = tmp_path / "absent", msgspec.structs.replace(BUNDLE, cpu=Cpu(part="", qemu=""))
    monkeypatch.delenv(preflight.ROOT_VARIABLE, raising=False)

    assert smoke_of(absent, absent, BUNDLE) is None
    monkeypatch.setenv(preflight.ROOT_VARIABLE, str(tmp_path))
    assert smoke_of(absent, absent, BUNDLE) is None  # no python in it
    assert smoke_of(absent, absent, pc) is None


def test_the_wheels_of_a_signed_bundle_are_run_under_the_core_that_it_names(tmp_path: Path, rootfs: Path) -> None:
    stub_tree(tmp_path / "tree/site", "raise SystemExit(open('/proc/cpuinfo').read().count('0xd08'))")
    files = {
        path.relative_to(tmp_path / "tree").as_posix(): entry_of(path, 0o644)
        for path in (tmp_path / "tree").rglob("*")
        if path.is_file()
    }
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    manifest = msgspec.structs.replace(BUNDLE, files=files)
    pack(tmp_path / "tree", manifest, private, tmp_path / "b.tar.gz")

    found = smoke_of(tmp_path / "b.tar.gz", public, manifest)

    assert found is not None
    assert (found.cpu, found.ok, found.reached) == ("cortex-a72", False, "numpy 1.0")  # it leaves with 4, its cores
