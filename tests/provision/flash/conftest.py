"""Fixtures of a board, its fleet and a real ssh server, none of which needs root."""

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from fedeq_edge.provision import flash_board
from fedeq_edge.provision.ca import Authority
from fedeq_edge.provision.flash import flash, prepare
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.targets.local import LocalTarget
from fedeq_edge.provision.targets.ssh import SshTarget
from tests.provision.flash.board import (
    DEVICE,
    Board,
    BundleMaker,
    Card,
    CardMaker,
    Reach,
    Server,
    built,
    founded,
    laid,
    prepared,
)
from tests.provision.release_board import without_waiting


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return laid(tmp_path / "board")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fleet whose device was not flashed: what `fleet` is a copy of."""
    with without_waiting():
        return founded(tmp_path_factory.mktemp("bare") / "fleet").folder.parent


@pytest.fixture(scope="session")
def ready(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same fleet after 1.0 was flashed, and the board: what `running` is a copy of."""
    folder = tmp_path_factory.mktemp("ready")
    shutil.copytree(bare, folder, dirs_exist_ok=True)
    fleet, board = Fleet.open(folder / "fleet"), laid(folder / "board")
    with without_waiting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_board, "TRIAL_S", 0.0)
        patch.setenv("PATH", board.environment["PATH"])
        target = LocalTarget(root=str(board.root))
        plan = prepare(target, fleet, DEVICE, built(fleet, "1.0"))
        flash(target, fleet, plan, sign=lambda: Authority.open(fleet.folder / "ca"))
    return folder


@pytest.fixture
def fleet(bare: Path, tmp_path: Path) -> Fleet:
    """A fleet for one test, to be maltreated."""
    shutil.copytree(bare / "fleet", tmp_path / "fleet")
    return Fleet.open(tmp_path / "fleet")


@pytest.fixture
def running(ready: Path, fleet: Fleet, board: Board) -> Path:
    """The bundle 1.0, which the board runs; it is enrolled in the fleet."""
    shutil.copytree(ready / "fleet", fleet.folder, dirs_exist_ok=True)
    for part in [path for path in (ready / "board").iterdir() if path.is_file()]:
        shutil.copyfile(part, board.home / part.name)
    shutil.copytree(ready / "board/root", board.root, symlinks=True, dirs_exist_ok=True)
    return fleet.folder / "bundles/1.0.tar.gz"


@pytest.fixture
def sign(fleet: Fleet) -> Callable[[], Authority]:
    return lambda: Authority.open(fleet.folder / "ca")


@pytest.fixture
def make_bundle(fleet: Fleet) -> BundleMaker:
    return functools.partial(built, fleet)


@pytest.fixture
def arm(make_bundle: BundleMaker, fleet: Fleet) -> Path:
    fleet.add("pi-01", "raspberry-pi-4")
    return make_bundle("1.0", profile="raspberry-pi-4", architecture="aarch64", python="3.11")


@pytest.fixture(scope="session")
def cards(memory: Path) -> CardMaker:
    """Cards that nobody writes to; the same for the same words."""

    @functools.cache
    def make(cloud: bool, raspberry: bool, mark: str, machine: int) -> Card:
        folder = Path(tempfile.mkdtemp(dir=memory))
        return prepared(folder, cloud=cloud, raspberry=raspberry, mark=mark, machine=machine)

    return make


@pytest.fixture
def card_tools() -> None:
    """What makes cards and writes them is installed, or the test is skipped."""
    missing = [tool for tool in ("sfdisk", "mcopy", "mformat", "debugfs", "mke2fs") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: fdisk mtools e2fsprogs)")


@pytest.fixture
def make_card(memory: Path, cards: CardMaker, card_tools: None) -> Iterator[CardMaker]:
    with tempfile.TemporaryDirectory(dir=memory) as folder:

        def make(*, cloud: bool = True, raspberry: bool = True, mark: str = "", machine: int = 183) -> Card:
            card = Card(Path(folder) / "card.img")
            blank = cards(cloud, raspberry, mark, machine)
            subprocess.run(["cp", "--sparse=always", blank.path, card.path], check=True)
            return card

        yield make


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
