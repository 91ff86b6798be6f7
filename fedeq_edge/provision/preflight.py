"""What would go wrong on a board, found before anything is sent to it.

Two sources say whether wheels crash on a core: a table of what is known, and, where qemu-user and an arm64 root are,
the wheels themselves run under that core. The run sees the code paths it takes and no others, and QEMU's A53 and A72
have the crypto instructions that those of Raspberry Pis lack: a pass is evidence, a crash is proof.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedeq_edge.errors import ConfigError, Exit
from fedeq_edge.provision.archive import Manifest, unpack
from fedeq_edge.provision.facts import Facts
from fedeq_edge.provision.platforms import PYTHONS, architecture_of, version_of

Severity = Literal["refuse", "warn"]
QEMU: Final = "qemu-aarch64-static"
# Names the arm64 root in which `smoke_of` runs wheels: debootstrap's, an unpacked image, a card.
ROOT_VARIABLE: Final = "FEDEQ_ARM64_ROOT"
# LoadCredential= of the agent's unit.
_SYSTEMD: Final = 247
# Beside the unpacked release: the archive (about a third of it), the file table, a log; and a card must not run full.
_DISK_SPARE_BYTES: Final = 64 * 2**20
# An idle agent rests at 45 MB and its unit is limited to what a training process adds: 150 MB, 350 MB more with torch.
_MEMORY_BYTES: Final = 256 * 2**20
_MEMORY_TORCH_BYTES: Final = 640 * 2**20
# What a board that keeps time at all may be behind.
_CLOCK_SLACK_S: Final = 86_400.0
_RUN_LIMIT_S: Final = 300.0  # torch needs 14 s to load under emulation on a free core

# ARMv8.0 cores: no dot product, no fp16 arithmetic, no LSE atomics.
_ARMV8_0: Final = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, and what mends it.

    code: how a flash ends that meets it; "warn" lets it go on.
    """

    code: Exit
    severity: Severity
    what: str
    remedy: str

    def line(self) -> str:
        """Both in one line."""
        return f"{self.what}; {self.remedy}"


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """A wheel that is known to die of SIGILL on ARMv8.0 cores. use: the version to pin instead; seen: where."""

    package: str
    version: str
    use: str
    seen: str


# Measured under qemu-aarch64 7.2 with these cores, and reported from boards.
CRASHES: Final = (
    Crash(package="torch", version="2.10.0", use="2.9.1", seen="pytorch#176993"),
    Crash(package="onnxruntime", version="1.21.0", use="1.31.1", seen="onnxruntime#23957, #24112"),
)


class Smoke(msgspec.Struct, frozen=True, kw_only=True):
    """How the wheels of a bundle did under a core. signal: what killed them, "SIGILL"; empty: nothing did.

    reached: what was running last, "torch 2.10.0". detail: the last line of what they said.
    """

    cpu: str
    ok: bool
    signal: str
    reached: str
    detail: str


def check(facts: Facts, manifest: Manifest, *, qemu: Smoke | None = None, now: float | None = None) -> list[Finding]:
    """What speaks against this bundle on this board, refusals first; empty: nothing.

    qemu: how `run_under_qemu` ended; it counts more than the table. now: unix seconds, this machine's by default.
    Facts that a board does not tell are not held against it, but those without which nothing runs there.
    """
    architecture = _architecture(facts, manifest)
    if architecture:
        return architecture  # all else would be consequences
    part = facts.cpu_part or manifest.cpu.part  # a card that never ran does not say what it will run on
    found = [
        *_system(facts, manifest),
        *(_table(part, manifest) if qemu is None or part != manifest.cpu.part else ()),
        *_cuda(manifest),
        *(_smoke(qemu) if qemu is not None else ()),
        *_room(facts, manifest),
        *_clock(facts, time.time() if now is None else now),
    ]
    return sorted(found, key=lambda finding: finding.severity != "refuse")


def _refuse(code: Exit, what: str, remedy: str) -> Finding:
    return Finding(code=code, severity="refuse", what=what, remedy=remedy)


def _architecture(facts: Facts, manifest: Manifest) -> list[Finding]:
    here = architecture_of(facts.architecture)
    if here == manifest.architecture:
        return []
    what = f"the board is {facts.architecture}, the bundle is for {manifest.architecture}"
    if here in {"aarch64", "x86_64"}:
        board = "arm64" if here == "aarch64" else "x86-64"
        return [_refuse(Exit.WRONG_PLATFORM, what, f"build one with `fedeq bundle build --profile {board}`")]
    remedy = (
        "64-bit OS needed: there are no 32-bit ARM wheels of numpy, onnxruntime or torch; a Raspberry Pi Zero 2, 3, 4 "
        "or 5 can run a 64-bit Raspberry Pi OS"
        if here.startswith("arm")
        else "fedeq-edge runs on aarch64 and x86_64"
    )
    return [_refuse(Exit.WRONG_PLATFORM, what, remedy)]


def _system(facts: Facts, manifest: Manifest) -> list[Finding]:
    """libc, python, systemd, and the right to change the system."""
    found = []
    if facts.libc == "musl":
        found.append(("its libc is musl", "use Debian, Ubuntu or Raspberry Pi OS: the wheels need glibc"))
    elif facts.glibc and version_of(facts.glibc) < version_of(manifest.glibc):
        found.append((f"its glibc is {facts.glibc}, the wheels need {manifest.glibc}", "use Debian 11 or later"))
    if manifest.python not in (facts.python, *facts.pythons):
        found.append((f"its python is {facts.python or 'absent'}, the bundle is for {manifest.python}", _python(facts)))
    if facts.systemd < _SYSTEMD:
        has = f"its systemd is {facts.systemd}" if facts.systemd else "no systemd runs there"
        found.append((f"{has}, the units need {_SYSTEMD}", "use Debian 11 or later with systemd as init"))
    refused = [_refuse(Exit.WRONG_PLATFORM, what, remedy) for what, remedy in found]
    if not facts.root:
        told = "log in as root, or allow the user sudo without a password"
        refused.append(_refuse(Exit.FAILED, "the user there may not change the system", told))
    return refused


def _python(facts: Facts) -> str:
    usable = [python for python in (facts.python, *reversed(facts.pythons)) if python in PYTHONS]
    if usable:
        return f"build the bundle with --python {usable[0]}"
    known = f"{', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}"
    return (
        f"use a system whose python3 is {known} (Debian 12 and 13, Ubuntu 24.04), or put one beside it: "
        f"apt-get install python3.11 (Ubuntu 22.04, as of JetPack 6), and build with --python 3.11"
    )


def _table(part: str, manifest: Manifest) -> list[Finding]:
    """What is known to crash on a core; a warning where nobody knows what the bundle will run on."""
    core = _ARMV8_0.get(part)
    if manifest.architecture != "aarch64" or (part and core is None):
        return []
    return [
        Finding(
            code=Exit.WRONG_PLATFORM,
            severity="refuse" if core else "warn",
            what=f"{one.package} {one.version} dies of SIGILL on {core or 'older ARM cores'} ({one.seen})",
            remedy=f'set {one.package} = "{one.use}" under [pins] in the board\'s profile.toml and build it again',
        )
        for one in CRASHES
        if manifest.packages.get(one.package) == one.version
    ]


def _cuda(manifest: Manifest) -> list[Finding]:
    """PyPI's torch for aarch64 is a CUDA build from 2.11 on, and does not load without its libraries."""
    torch = manifest.packages.get("torch", "")
    plain = manifest.architecture == "aarch64" and "+" not in torch
    if not plain or version_of(torch) < (2, 11) or any(name.startswith("nvidia-") for name in manifest.packages):
        return []
    what = f"torch {torch} for aarch64 is a CUDA build and does not load without CUDA's libraries"
    return [_refuse(Exit.WRONG_PLATFORM, what, 'set torch = "2.9.1" under [pins] in the board\'s profile.toml')]


def _smoke(qemu: Smoke) -> list[Finding]:
    if qemu.ok:
        return []
    how = f"{qemu.reached} dies of {qemu.signal}" if qemu.signal else f"{qemu.reached} fails ({qemu.detail})"
    remedy = "pin a version that runs there under [pins] in the board's profile.toml and build the bundle again"
    return [_refuse(Exit.WRONG_PLATFORM, f"{how} under {qemu.cpu}", remedy)]


def _room(facts: Facts, manifest: Manifest) -> list[Finding]:
    found = []
    needed = manifest.unpacked_bytes * 3 // 2 + _DISK_SPARE_BYTES
    if facts.free_disk_bytes is not None and facts.free_disk_bytes < needed:
        what = f"{_mib(facts.free_disk_bytes)} of its disk are free, {_mib(needed)} are needed"
        found.append(_refuse(Exit.NO_SPACE, what, "delete something there, or take a larger card"))
    torch = "torch" in manifest.packages
    memory = _MEMORY_TORCH_BYTES if torch else _MEMORY_BYTES
    if facts.memory_bytes is not None and facts.memory_bytes < memory:
        what = f"it has {_mib(facts.memory_bytes)} of memory, {_mib(memory)} are wanted{' with torch' if torch else ''}"
        remedy = "build without --with torch" if torch else "expect its trainer to be killed when memory runs out"
        found.append(Finding(code=Exit.FAILED, severity="warn", what=what, remedy=remedy))
    return found


def _clock(facts: Facts, now: float) -> list[Finding]:
    if facts.clock is None or facts.clock > now - _CLOCK_SLACK_S:
        return []
    today = time.strftime("%Y-%m-%d", time.gmtime(now))
    what = f"its clock says {time.strftime('%Y-%m-%d', time.gmtime(facts.clock))}, and here it is {today}"
    return [_refuse(Exit.CLOCK, what, "set it: `timedatectl set-ntp true`, or `date -s` where there is no network")]


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


# A model of one product and one tanh as ONNX (opset 13): enough to run onnxruntime's kernels.
_GRAPH: Final = (
    "CAgSADptChEKAXgKAXcSAWEiBk1hdE11bAoMCgFhEgF5IgRUYW5oEgFnKhsIAggCEAEiEAAAAD8AAIC+AAAAPgAAgD9CAXdaFAoBeBIPCg0IARIJ"
    "CgMSAW4KAggCYhQKAXkSDwoNCAESCQoDEgFuCgIIAkIECgAQDQ=="
)
_RUN: Final = f"""\
import importlib.metadata, importlib.util
def begin(name):
    found = importlib.util.find_spec(name) is not None
    if found:
        print("begin", name, importlib.metadata.version(name.replace("_", "-")), flush=True)
    return found
if begin("numpy"):
    import numpy
    a = numpy.random.default_rng(0).normal(size=(64, 64)).astype("float32")
    numpy.linalg.solve(a, a @ a)
if begin("cryptography"):
    from cryptography.hazmat.primitives.asymmetric import ec
    ec.generate_private_key(ec.SECP256R1())
if begin("onnxruntime"):
    import base64, onnxruntime
    session = onnxruntime.InferenceSession(base64.b64decode({_GRAPH!r}), providers=["CPUExecutionProvider"])
    session.run(None, {{"x": numpy.ones((8, 2), "float32")}})
if begin("torch"):
    import torch
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 4), torch.nn.Tanh())
    net(torch.randn(8, 1, 8, 8)).square().mean().backward()
if begin("fedeq_edge"):
    from fedeq_edge import health
    health.solve()
    if importlib.util.find_spec("torch"):
        from fedeq_edge.backends import open_backend
        from fedeq_edge.deq.spec import ModelSpec
        from fedeq_edge.training.cost import calibrate_model
        from fedeq_edge.training.step import Plan
        calibrate_model(open_backend("torch", ModelSpec(input_shape=(16,), classes=4, channels=32), Plan()), Plan())
print("end", flush=True)
"""


def missing_for_qemu(rootfs: Path, python: str) -> str:
    """Why wheels cannot be run under another core here, in one line; empty: they can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed (Debian: apt install qemu-user-static)"
    if not (rootfs / f"usr/bin/python{python}").exists():
        return f"{rootfs} is no arm64 root with python {python} (mmdebstrap --arch=arm64 --include=python3 makes one)"
    return ""


def run_under_qemu(site: Path, cpu: str, rootfs: Path, *, python: str, part: str = "") -> Smoke:
    """Every compiled package of the tree loaded and used once under a core of qemu-aarch64; no root, no binfmt.

    rootfs: an arm64 file system with python. part: "CPU part" that /proc/cpuinfo shall tell, for libraries that choose
    their kernels by it. Raises ConfigError where something for it is missing.
    """
    missing = missing_for_qemu(rootfs, python)
    if missing:
        raise ConfigError(f"cannot run wheels under {cpu}: {missing}")
    with tempfile.TemporaryDirectory(prefix="fedeq-qemu-") as folder:
        _sysroot(Path(folder), rootfs, part or "0xd03")
        command = [QEMU, "-cpu", cpu, "-L", folder, str(rootfs / f"usr/bin/python{python}"), "-B", "-s", "-c", _RUN]
        try:
            done = subprocess.run(
                command, env=_environment(site), capture_output=True, text=True, timeout=_RUN_LIMIT_S, check=False,
                cwd=folder,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"wheels under {cpu} did not end within {_RUN_LIMIT_S:.0f} s; try again") from error
    return _outcome(cpu, done)


def smoke_of(bundle: Path, public_key: Path, manifest: Manifest) -> Smoke | None:
    """`run_bundle` where all that it needs is here and FEDEQ_ARM64_ROOT names a root; else None, the table must do."""
    named = os.environ.get(ROOT_VARIABLE, "")
    if not named or not manifest.cpu.qemu or missing_for_qemu(Path(named), manifest.python):
        return None
    return run_bundle(bundle, public_key, Path(named))


def run_bundle(bundle: Path, public_key: Path, rootfs: Path) -> Smoke:
    """`run_under_qemu` with the packages of a bundle, unpacked once its signature has been checked."""
    with tempfile.TemporaryDirectory(prefix="fedeq-run-") as folder:
        manifest = unpack(bundle, public_key, Path(folder))
        if not manifest.cpu.qemu:
            raise ConfigError(f"bundle {bundle} is for {manifest.profile}, which names no qemu_cpu to run it under")
        return run_under_qemu(
            Path(folder) / "site", manifest.cpu.qemu, rootfs, python=manifest.python, part=manifest.cpu.part
        )


def _environment(site: Path) -> dict[str, str]:
    path = os.environ.get("PATH", os.defpath)
    return {"PATH": path, "PYTHONPATH": str(site), "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


def _sysroot(folder: Path, rootfs: Path, part: str) -> None:
    """What qemu looks up first: the root's own folders, and what a board says of its core.

    qemu-user before 8.1 passes this machine's /proc/cpuinfo on, which makes onnxruntime fall over; oneDNN (in torch)
    reads midr_el1: implementer 0x41 (Arm), part, variant and revision 0.
    """
    for name in ("bin", "etc", "lib", "sbin", "usr"):
        (folder / name).symlink_to((rootfs / name).resolve())
    (folder / "proc").mkdir()
    lines = ("Features\t: fp asimd evtstrm crc32 cpuid", "CPU implementer\t: 0x41", "CPU architecture: 8")
    core = "\n".join((*lines, "CPU variant\t: 0x0", f"CPU part\t: {part}", "CPU revision\t: 3"))
    (folder / "proc/cpuinfo").write_text("".join(f"processor\t: {number}\n{core}\n\n" for number in range(4)))
    registers = folder / "sys/devices/system/cpu/cpu0/regs/identification"
    registers.mkdir(parents=True)
    (registers / "midr_el1").write_text(f"0x{0x41 << 24 | 0xF << 16 | int(part, 16) << 4:016x}\n")


def _outcome(cpu: str, done: subprocess.CompletedProcess[str]) -> Smoke:
    steps = [line for line in done.stdout.splitlines() if line.startswith(("begin ", "end"))]
    reached = steps[-1].removeprefix("begin ") if steps else "python"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return Smoke(
        cpu=cpu,
        ok=done.returncode == 0 and reached == "end",
        signal=signal.Signals(-done.returncode).name if done.returncode < 0 else "",
        reached=reached,
        detail=said[-1].strip() if said else "",
    )
