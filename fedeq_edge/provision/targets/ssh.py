"""A board over ssh: ~/.ssh/config, the agent and known_hosts are honoured, and an unknown host key is refused.

Theory of operation. asyncssh is driven from outside of any event loop: each call runs the target's own loop until that
call is done, so that flashing reads as the sequence it is, and a fleet is flashed by threads that have a target each.
A command gets its arguments quoted, its input over stdin, and sudo in front of it where the user is not root. Files go
the same way (base.put), which works where there is no sftp server and for files that are root's.
"""

import asyncio
import shlex
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.facts import Facts
from fedeq_edge.provision.layout import Layout
from fedeq_edge.provision.targets.base import Ran, ask
from fedeq_edge.provision.targets.hostkeys import HostKeys
from fedeq_edge.provision.targets.local import SUDO

if TYPE_CHECKING:
    import asyncssh

_CONNECT_S: Final = 20.0  # a board that just booted answers after 4 to 9 s under emulation
_ALIVE_S: Final = 10.0  # three of these unanswered and the board is lost: no command waits for a pulled cable


@dataclass(frozen=True, slots=True)
class Address:
    """Where a board answers; what is left out is taken from ~/.ssh/config."""

    host: str
    user: str = ""
    port: int | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}" + (f":{self.port}" if self.port else "")


class SshTarget:
    """A board, connected. known_hosts: host keys that were accepted before, beside the user's own file.

    root: other than "", a tree there that stands for the machine. Raises ProvisionError: HOST_KEY with the fingerprint,
    LOST where nobody answers, FAILED where we are not let in or are not root and may not become it.
    """

    def __init__(self, address: Address, *, known_hosts: Path, accept: str = "", root: str = "") -> None:
        self.name = str(address)
        self.layout = Layout(root)
        self._address = address
        self._keys = HostKeys(known_hosts, accept=accept)
        self._loop = asyncio.Runner()
        self._sudo: tuple[str, ...] = ()
        try:
            self._connection = self._loop.run(self._connect())
        except BaseException:
            self._end()
            raise
        try:
            if not root:  # a tree of one's own needs no rights over the system
                self._sudo = self._become_root()
        except BaseException:
            self.close()
            raise

    def facts(self) -> Facts:
        """What the board is."""
        return ask(self)

    def run(self, argv: Sequence[str], *, input: bytes = b"", timeout_s: float = 60.0) -> Ran:  # noqa: A002
        """The command has ended, as root. Raises ProvisionError (LOST) where the connection ended before it."""
        import asyncssh  # noqa: PLC0415  # an extra, and 0.2 s that no other target needs

        try:
            done = self._loop.run(self._run(shlex.join([*self._sudo, *argv]), input, timeout_s))
        except TimeoutError as error:
            raise self._lost(argv[0], f"no end after {timeout_s:g} s") from error
        except (asyncssh.Error, OSError) as error:
            raise self._lost(argv[0], error) from error
        if done.exit_status is None or done.exit_status < 0:  # no status was sent: the channel went, or a signal came
            raise self._lost(argv[0], "the connection ended")
        return Ran(done.exit_status, _bytes(done.stdout), _bytes(done.stderr))

    def stream(self, argv: Sequence[str]) -> Iterator[str]:
        """The lines that the command prints, as it prints them, until it ends or the connection does."""
        process = self._loop.run(self._start(shlex.join([*self._sudo, *argv])))
        try:
            while line := self._loop.run(process.stdout.readline()):
                yield str(line).rstrip("\n")
        finally:
            process.close()

    def close(self) -> None:
        """The connection is closed."""
        self._connection.close()
        self._loop.run(self._connection.wait_closed())
        self._end()

    def _end(self) -> None:
        self._loop.run(asyncio.sleep(0))  # sockets that were closed are given back in the next turn of the loop
        self._loop.close()

    async def _start(self, command: str) -> "asyncssh.SSHClientProcess[str]":
        return await self._connection.create_process(command)

    async def _run(self, command: str, content: bytes, timeout_s: float) -> "asyncssh.SSHCompletedProcess":
        return await asyncio.wait_for(self._connection.run(command, input=content, encoding=None), timeout_s)

    async def _connect(self) -> "asyncssh.SSHClientConnection":
        import asyncssh  # noqa: PLC0415

        given = {"username": self._address.user or None, "port": self._address.port}
        chosen = {key: value for key, value in given.items() if value is not None}
        file = Path.home() / ".ssh/config"  # named, as only `connect` looks for it
        config = [str(file)] if file.is_file() else None
        configured = asyncssh.SSHClientConnectionOptions(config=config, host=self._address.host, **chosen)
        try:
            connection = await asyncssh.connect(
                self._address.host,
                client_factory=self._keys.client,
                known_hosts=self._keys.lookup(configured.known_hosts),
                keepalive_interval=_ALIVE_S,
                connect_timeout=_CONNECT_S,
                **chosen,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise self._keys.refusal(self.name) from error
        except asyncssh.PermissionDenied as error:
            raise ProvisionError(
                Exit.FAILED, f"{self.name} does not let us in; try: ssh-copy-id {self._ssh()}"
            ) from error
        except socket.gaierror as error:
            raise ProvisionError(
                Exit.LOST,
                f"{self.name}: no address is known for {self._address.host} ({error.strerror}); check the name, or "
                "give the board's address (.local names need avahi-daemon and libnss-mdns on this machine)",
            ) from error
        except (asyncssh.Error, OSError) as error:
            why = getattr(error, "reason", "") or str(error) or type(error).__name__
            raise ProvisionError(
                Exit.LOST, f"{self.name} cannot be reached: {why}; is it on, and does ssh {self._ssh()} work?"
            ) from error
        self._keys.remember()
        return connection

    def _ssh(self) -> str:
        """What the user types for the same board."""
        port = f"-p {self._address.port} " if self._address.port else ""
        return port + (f"{self._address.user}@" if self._address.user else "") + self._address.host

    def _become_root(self) -> tuple[str, ...]:
        if self.run(["id", "-u"]).out.strip() == b"0":
            return ()
        if self.run([*SUDO, "true"]).code:
            user = self._address.user or "your user"
            raise ProvisionError(
                Exit.FAILED,
                f"{self.name} is not root and sudo asks for a password; let it for this user: "
                f"echo '{user} ALL=(ALL) NOPASSWD:ALL' | sudo tee /etc/sudoers.d/fedeq-edge, or flash as root",
            )
        return SUDO

    def _lost(self, command: str, why: object) -> ProvisionError:
        return ProvisionError(
            Exit.LOST,
            f"{self.name} was lost during {command}: {why or type(why).__name__}; it keeps running what it ran, "
            "flash again when it answers",
        )


def _bytes(said: "bytes | str | None") -> bytes:
    assert not isinstance(said, str)  # encoding=None
    return said or b""
