"""Fixtures of a board, its fleet and a real ssh server, none of which needs root."""

import asyncio
import contextlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

import fedeq_edge
from fedeq_edge.provision.archive import Cpu, Manifest, entry_of, pack
from fedeq_edge.provision.ca import Authority
from fedeq_edge.provision.fleet import Fleet, FleetSettings
from fedeq_edge.provision.targets.ssh import SshTarget
from tests.provision.flash.board import (
    BOOT_AT,
    CMDLINE,
    DEVICE,
    INSTALLER,
    JOURNALCTL,
    PYTHON,
    ROOT_AT,
    SYSTEMCTL,
    SYSTEMD_RUN,
    USER_DATA,
    Board,
    BundleMaker,
    Card,
    CardMaker,
    Reach,
    Server,
    system,
)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    made = Board(tmp_path / "board")
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


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    settings = FleetSettings(
        name="plant", broker="mqtts://gateway:8883", service="https://gateway:8443", federation="plant"
    )
    made = Fleet.init(tmp_path / "fleet", settings, ["gateway", "127.0.0.1"])
    made.add(DEVICE, "x86-64")
    return made


@pytest.fixture
def sign(fleet: Fleet) -> Callable[[], Authority]:
    return lambda: Authority.open(fleet.folder / "ca")


@pytest.fixture
def make_bundle(tmp_path: Path, fleet: Fleet) -> BundleMaker:
    """A signed bundle. whole: its `fedeq` is the command line under test; else what a board needs of it, quicker."""

    def make(
        version: str,
        *,
        whole: bool = False,
        broken: bool = False,
        profile: str = "x86-64",
        architecture: str = "",
        python: str = "",
    ) -> Path:
        tree = tmp_path / f"tree-{version}"
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

    return make


@pytest.fixture
def arm(make_bundle: BundleMaker, fleet: Fleet) -> Path:
    fleet.add("pi-01", "raspberry-pi-4")
    return make_bundle("1.0", profile="raspberry-pi-4", architecture="aarch64", python="3.11")


@pytest.fixture
def make_card(tmp_path: Path) -> CardMaker:
    missing = [tool for tool in ("sfdisk", "mcopy", "mformat", "debugfs", "mke2fs") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: fdisk mtools e2fsprogs)")

    def make(*, cloud: bool = True, raspberry: bool = True, mark: str = "", machine: int = 183) -> Card:
        card, root = Card(tmp_path / "card.img"), tmp_path / "card-root"
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

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with a key; no agent."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(folder / ".ssh/id_ed25519")
    (folder / ".ssh/id_ed25519").chmod(stat.S_IRUSR | stat.S_IWUSR)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return folder


async def pump(source: Any, sink: Any) -> None:
    """What comes out of `source` goes into `sink`, until either ends."""
    with contextlib.suppress(OSError, asyncssh.Error):
        while content := await source.read(65_536):
            sink.write(content)
            await sink.drain()
        if isinstance(sink, asyncio.StreamWriter):
            sink.close()


@pytest.fixture
def server(board: Board, home: Path) -> Iterator[Server]:
    """The board's sshd: lets the home's key in, runs what is asked for with the board's programs first on PATH."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="sshd")
    thread.start()

    def call(work: Coroutine[Any, Any, object]) -> object:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    key = asyncssh.generate_private_key("ssh-ed25519")
    ours = asyncssh.read_private_key(home / ".ssh/id_ed25519").export_public_key("openssh").decode()
    running: list[asyncio.subprocess.Process] = []

    async def run(process: "asyncssh.SSHServerProcess[bytes]") -> None:
        command = process.command or ""
        board.commands.append(command)
        done = await asyncio.create_subprocess_shell(
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=board.environment,
            start_new_session=True,
        )
        running.append(done)
        if board.drop and board.drop in command:
            process.channel.get_connection().abort()
            await done.communicate(b"")
            board.dropped.set()
            return
        feeding = asyncio.ensure_future(pump(process.stdin, done.stdin))
        await asyncio.gather(pump(done.stdout, process.stdout), pump(done.stderr, process.stderr))
        process.exit(await done.wait())
        feeding.cancel()

    async def start() -> "asyncssh.SSHAcceptor":
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[key],
            authorized_client_keys=asyncssh.import_authorized_keys(ours),
            process_factory=run,
            encoding=None,
        )

    async def stop() -> None:
        listening.close()
        for process in running:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody has told us yet
                    os.killpg(process.pid, signal.SIGKILL)  # what the shell started, too
                await process.wait()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=5)

    listening: asyncssh.SSHAcceptor = call(start())  # type: ignore[assignment]
    try:
        yield Server(listening.get_port(), key)
    finally:
        call(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture
def reach(server: Server, board: Board, fleet: Fleet, home: Path) -> Iterator[Reach]:
    """Connects to the board, whose host key is known."""
    (home / ".ssh/known_hosts").write_text(server.known_line())
    opened: list[SshTarget] = []

    def connect() -> SshTarget:
        target = SshTarget(server.address, known_hosts=fleet.folder / "known_hosts", root=str(board.root))
        opened.append(target)
        return target

    yield connect
    for target in opened:
        target.close()
