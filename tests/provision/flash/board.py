"""A board that needs no root: its tree in a temporary folder, a systemd of four shell scripts, its sshd, and cards."""

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

import fedeq_edge
from fedeq_edge.provision.archive import Cpu, Manifest, entry_of, pack
from fedeq_edge.provision.fleet import Fleet, FleetSettings
from fedeq_edge.provision.targets.ssh import Address, SshTarget

BundleMaker = Callable[..., Path]
Reach = Callable[[], SshTarget]
CardMaker = Callable[..., "Card"]
BOOT_AT, ROOT_AT = 4 << 20, 36 << 20
CMDLINE = b"console=tty1 root=PARTUUID=1-02 rootwait\n"
USER_DATA = b"#cloud-config\nhostname: pi\n"
DEVICE = "box-01"
FIRST_BOOT = Path(fedeq_edge.__file__).parent / "provision/first_boot.py"
INSTALLER = Path(fedeq_edge.__file__).parent / "provision/release.py"
PYTHON = subprocess.run(
    ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
    capture_output=True,
    text=True,
    check=True,
).stdout.strip()

SYSTEMCTL = """\
#!/bin/sh
# What of systemctl flashing and release.py use; a release with the file site/broken does not start.
board=@BOARD@
echo "$*" >>"$board/calls"
while case "$1" in --root=*|--no-block) true ;; *) false ;; esac; do shift; done
read -r pid <"$board/pid"
read -r active <"$board/active"
case "$*" in
    *Version*) echo "252 (252.39-1~deb12u1)" ;;
    *MainPID*) echo "$pid" ;;
    *ActiveState*) echo "ActiveState=$active"; echo "InvocationID=$pid" ;;
    is-active*) echo "$active" ;;
    "restart fedeq-agent.service")
        if [ -e "$board/root/opt/fedeq-edge/current/site/broken" ]; then
            echo failed >"$board/active"
            echo "SolverError: residual 0.3" >>"$board/journal"
            exit 1
        fi
        pid=$((pid + 1))
        echo $pid >"$board/pid"
        echo active >"$board/active"
        state=$board/root/var/lib/fedeq-edge/state
        [ -d "$state" ] || mkdir -p "$state"
        read -r broker <"$board/broker"
        printf '{"pid": %s, "broker": "%s"}' "$pid" "$broker" >"$state/status.json" ;;
esac
"""
SYSTEMD_RUN = """\
#!/bin/sh
# Runs the command as a unit would: its output goes to files, and nobody's hangup reaches it.
while [ "$1" != -- ]; do
    case "$1" in StandardOutput=file:*) out=${1#*:} ;; StandardError=file:*) err=${1#*:} ;; esac
    shift
done
shift
trap '' HUP
"$@" >"$out" 2>"$err" </dev/null
"""
JOURNALCTL = """\
#!/bin/sh
cat @BOARD@/journal
"""


@dataclass
class Board:
    """A board: `home` holds its tree and what its systemd knows. drop: a command with this word ends the connection."""

    home: Path
    drop: str = ""
    commands: list[str] = field(default_factory=list)
    dropped: threading.Event = field(default_factory=threading.Event)

    @property
    def root(self) -> Path:
        return self.home / "root"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.home}/bin:{os.environ['PATH']}"}

    def program(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(text.replace("@BOARD@", str(self.home)))
        path.chmod(0o755)

    def current(self) -> str:
        link = self.root / "opt/fedeq-edge/current"
        return link.readlink().name if link.is_symlink() else ""

    def restarts(self) -> int:
        return (self.home / "calls").read_text().count("restart fedeq-agent.service")


@dataclass
class Server:
    """A real ssh server in this process."""

    port: int
    key: asyncssh.SSHKey

    @property
    def fingerprint(self) -> str:
        return str(self.key.get_fingerprint())

    @property
    def address(self) -> Address:
        return Address(host="127.0.0.1", user="pi", port=self.port)

    def known_line(self) -> str:
        return f"[127.0.0.1]:{self.port} {self.key.export_public_key('openssh').decode()}"


def laid(home: Path) -> Board:
    """A bare board in a new folder."""
    made = Board(home)
    for folder in ("root/opt", "root/etc", "root/usr", "root/var/lib/fedeq-edge", "bin"):
        (made.home / folder).mkdir(parents=True)
    for name, content in (
        ("pid", "100"),
        ("active", "inactive"),
        ("broker", "connected"),
        ("journal", ""),
        ("calls", ""),
    ):
        (made.home / name).write_text(content)
    (made.root / "var/lib/fedeq-edge/data.npz").write_bytes(b"samples")
    made.program("systemctl", SYSTEMCTL)
    made.program("systemd-run", SYSTEMD_RUN)
    made.program("journalctl", JOURNALCTL)
    return made


def founded(folder: Path) -> Fleet:
    """A fleet with one device in a new folder."""
    settings = FleetSettings(
        name="plant", broker="mqtts://gateway:8883", service="https://gateway:8443", federation="plant"
    )
    made = Fleet.init(folder, settings, ["gateway", "127.0.0.1"])
    made.add(DEVICE, "x86-64")
    return made


def built(
    fleet: Fleet,
    version: str,
    *,
    whole: bool = False,
    broken: bool = False,
    profile: str = "x86-64",
    architecture: str = "",
    python: str = "",
    config: bytes = b"",
) -> Path:
    """A signed bundle. whole: its `fedeq` is the command line under test; else what a board needs of it, quicker."""
    tree = fleet.folder.parent / f"tree-{version}"
    for name in ("bin", "units", "site"):
        (tree / name).mkdir(parents=True)
    package = Path(fedeq_edge.__file__).parent.parent
    program = "-m fedeq_edge" if whole else f"{package}/tests/provision/flash/small_fedeq.py"
    launcher = f'#!/bin/sh\nPYTHONPATH={package} exec {sys.executable} {program} "$@"\n'
    (tree / "bin/fedeq").write_text(launcher)
    (tree / "release.py").write_bytes(INSTALLER.read_bytes())
    (tree / "units/fedeq-agent.service").write_text("[Service]\nExecStart=/bin/true\n")
    (tree / "site/version").write_text(version)
    if broken:
        (tree / "site/broken").touch()
    if config:
        (tree / "config").mkdir()
        (tree / "config/agent.toml").write_bytes(config)
    paths = [path for path in tree.rglob("*") if path.is_file()]
    modes = {path: 0o755 if path.parent.name == "bin" else 0o644 for path in paths}
    manifest = Manifest(
        version=version,
        profile=profile,
        architecture=architecture or platform.machine(),
        python=python or PYTHON,
        glibc="2.17",
        cpu=Cpu(part="", qemu=""),
        packages={},
        files={path.relative_to(tree).as_posix(): entry_of(path, mode) for path, mode in modes.items()},
    )
    out = fleet.folder / "bundles" / f"{version}.tar.gz"
    pack(tree, manifest, fleet.folder / "keys/bundle.key", out)
    return out


def system(root: Path, *, machine: int = 183) -> None:
    """The few files by which a Debian 12 for this e_machine is known, and what its user put there to train on."""
    lib = root / "usr/lib/aarch64-linux-gnu"
    (lib / "systemd").mkdir(parents=True)
    (root / "usr/bin").mkdir(parents=True)
    (root / "etc").mkdir()
    elf = b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little")
    banner = b"GNU C Library (Debian GLIBC 2.36-9+deb12u9) stable release version 2.36.\n"
    (lib / "libc.so.6").write_bytes(elf + banner)
    (lib / "systemd/libsystemd-shared-252.so").touch()
    (root / "usr/bin/python3.11").touch()
    (root / "usr/bin/python3").symlink_to("python3.11")
    (root / "etc/hostname").write_text("raspberrypi\n")
    (root / "var/lib/fedeq-edge").mkdir(parents=True)
    (root / "var/lib/fedeq-edge/data.npz").write_bytes(b"samples")


@dataclass
class Card:
    """An image with a FAT and an ext4 partition."""

    path: Path

    def fat(self, name: str) -> bytes:
        command = ["mtype", "-i", f"{self.path}@@{BOOT_AT}", f"::/{name}"]
        return subprocess.run(command, capture_output=True, check=True).stdout

    def put(self, name: str, content: bytes) -> None:
        command = ["mcopy", "-o", "-i", f"{self.path}@@{BOOT_AT}", "-", f"::/{name}"]
        subprocess.run(command, input=content, check=True)

    def extract(self, folder: Path) -> Path:
        command = ["mcopy", "-s", "-i", f"{self.path}@@{BOOT_AT}", "::/fedeq", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        return folder / "fedeq"


def prepared(folder: Path, *, cloud: bool, raspberry: bool, mark: str, machine: int) -> Card:
    """The image of a card, made in a new folder."""
    card, root = Card(folder / "card.img"), folder / "card-root"
    system(root, machine=machine)
    (root / "opt").mkdir()
    if cloud:
        (root / "usr/bin/cloud-init").touch()
    if mark:
        (root / mark).parent.mkdir(parents=True)
        (root / mark).touch()
    with card.path.open("wb") as image:
        image.truncate(80 << 20)
    table = "label: dos\n8192,65536,c,*\n73728,,83\n"
    subprocess.run(["sfdisk", "-q", str(card.path)], input=table.encode(), check=True)
    fat = ["mformat", "-i", f"{card.path}@@{BOOT_AT}", "-T", "65536", "-h", "4", "-s", "16", "::"]
    subprocess.run(fat, check=True)
    ext = ["mke2fs", "-q", "-t", "ext4", "-d", str(root), "-E", f"offset={ROOT_AT}", str(card.path), "40M"]
    subprocess.run(ext, check=True, capture_output=True)
    if raspberry:
        card.put("cmdline.txt", CMDLINE)
    if raspberry and cloud:
        card.put("user-data", USER_DATA)
        card.put("meta-data", b"instance-id: rpi\n")
    return card
