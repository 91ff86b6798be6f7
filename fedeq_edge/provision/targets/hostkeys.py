"""Which host keys are trusted: the user's own known_hosts, and those accepted by their fingerprint before."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedeq_edge.atomic import write_atomically
from fedeq_edge.errors import Exit, ProvisionError

if TYPE_CHECKING:
    import asyncssh

Known = tuple[list["asyncssh.SSHKey"], list["asyncssh.SSHKey"], list["asyncssh.SSHKey"]]


class HostKeys:
    """The host key of one connection. file: OpenSSH known_hosts of the fleet. accept: "SHA256:..." that may be new."""

    def __init__(self, file: Path, *, accept: str) -> None:
        self._file = file
        self._accept = accept
        self._line = ""  # of the key that was accepted
        self._shown = ""  # fingerprint of the key that was not known
        self._kind = ""  # of that key, as sshd names its file: rsa, ecdsa, ed25519
        self._expected: list[str] = []  # fingerprints of the keys that were

    def lookup(self, users: Any) -> Any:  # asyncssh's KnownHostsArg, which it does not export
        """What asyncssh shall ask for the keys of a host; `users`: known_hosts as ssh's configuration has it.

        A configuration that turns host keys off is not followed: what is sent is installed and run as root.
        """
        if users is not None and not users:  # nothing is configured: the default of ssh
            users = [str(Path.home() / ".ssh/known_hosts")]
        files = [*(users if isinstance(users, list) else [users] if isinstance(users, str) else []), str(self._file)]
        paths = [Path(name).expanduser() for name in files]
        present = [str(path) for path in paths if path.is_file()]

        def known(host: str, address: str, port: int | None) -> Known:
            import asyncssh  # noqa: PLC0415

            trusted, cas, revoked, *_ = asyncssh.match_known_hosts(
                asyncssh.read_known_hosts(present), host, address, port
            )
            self._expected = [key.get_fingerprint() for key in trusted]
            return list(trusted), list(cas), list(revoked)

        return known

    def client(self) -> "asyncssh.SSHClient":
        """The callbacks of a connection: a key that is not known is held against the accepted fingerprint."""
        import asyncssh  # noqa: PLC0415

        keys = self

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002  # asyncssh's signature
                return keys._judge(host, port, key)

        return Client()

    def _judge(self, host: str, port: int, key: "asyncssh.SSHKey") -> bool:
        self._shown = key.get_fingerprint()
        self._kind = key.get_algorithm().removeprefix("ssh-").partition("-")[0]  # ssh-rsa, ecdsa-sha2-nistp256
        if self._shown != self._accept:
            return False
        name = host if port == 22 else f"[{host}]:{port}"
        self._line = f"{name} {key.export_public_key('openssh').decode().strip()}"
        return True

    def remember(self) -> None:
        """A key that was accepted is known from now on, in place of an older one of that host."""
        if not self._line:
            return
        name = self._line.split()[0]
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        kept = [line for line in lines if line.split()[:1] != [name]]
        write_atomically(self._file, "\n".join([*kept, self._line, ""]).encode(), mode=0o600)

    def refusal(self, name: str) -> ProvisionError:
        """Why the board was not talked to, and what accepts its key."""
        known = f"known is {', '.join(self._expected)}" if self._expected else "none is known"
        what = "has CHANGED its host key" if self._expected else "shows a host key that is not known"
        return ProvisionError(
            Exit.HOST_KEY,
            f"{name} {what}: {self._shown} ({known}); compare it on the board with "
            f"ssh-keygen -lf /etc/ssh/ssh_host_{self._kind}_key.pub, then add --accept-host-key {self._shown}",
        )
