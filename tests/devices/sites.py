"""A site of boards: a gateway and a bridge in a network namespace, and a cable to each board's own namespace."""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

GATEWAY: Final = "10.77.0.1"
_CLONE_NEWNET: Final = 0x40000000  # sched.h
_libc: Final = ctypes.CDLL(None, use_errno=True)
_numbers: Final = itertools.count()


class Site:
    """The gateway's namespace. What runs in it reaches the boards and nothing else; `close` leaves no trace of it."""

    def __init__(self) -> None:
        self.namespace = f"fq-{os.getpid()}-{next(_numbers)}"
        self._boards: list[str] = []
        _ip("netns", "add", self.namespace)
        self._ip("link", "add", "boards", "type", "bridge")
        self._ip("address", "add", f"{GATEWAY}/24", "dev", "boards")
        for link in ("lo", "boards"):
            self._ip("link", "set", link, "up")

    def plug(self) -> tuple[str, str]:
        """(namespace, address) for one more board, joined to the bridge by a cable."""
        number = len(self._boards) + 2
        namespace, port = f"{self.namespace}-b{number}", f"port{number}"
        _ip("netns", "add", namespace)
        self._boards.append(namespace)
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._ip("link", "set", port, "master", "boards", "up")
        address = f"10.77.0.{number}"
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", link, "up")
        return namespace, address

    def unplug(self, address: str) -> None:
        """The cable is out: the board hears nobody. Connections are not closed, their packets vanish."""
        self._ip("link", "set", _port(address), "down")

    def plug_in_again(self, address: str) -> None:
        self._ip("link", "set", _port(address), "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, its sockets and the processes that it starts are on the gateway until the end."""
        with Path("/proc/thread-self/ns/net").open("rb") as home:
            try:
                with Path(f"/run/netns/{self.namespace}").open("rb") as gateway:
                    _set_namespace(gateway.fileno())
                yield
            finally:
                _set_namespace(home.fileno())

    def listens(self, address: str, port: int) -> bool:
        """Whether the gateway is let in there."""
        with self.entered(), contextlib.suppress(OSError), socket.create_connection((address, port), 1.0):
            return True
        return False

    def run(self, command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
        """A command on the gateway, with its output as text."""
        return subprocess.run(self._there(command), capture_output=True, text=True, check=False, **more)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A process on the gateway that writes to the end of `log`; `close` kills it if nobody has."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self._there(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def close(self) -> None:
        """Processes first, then the namespaces; what is still in a board's namespace belongs to a board not removed."""
        for namespace in (*self._boards, self.namespace):
            for pid in pids(namespace):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ip("netns", "delete", namespace)

    def _there(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def _ip(self, *words: str) -> None:
        _ip("-n", self.namespace, *words)


def missing() -> str:
    """Why there can be no site here, in one line; empty if there can."""
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return f"no network namespace can be made here: {done.stderr.strip()}" if done.returncode else ""


def namespaces() -> set[str]:
    """Names of the network namespaces that sites of this process have made and not removed."""
    folder = Path("/run/netns")
    return {path.name for path in folder.glob(f"fq-{os.getpid()}-*")} if folder.exists() else set()


def _port(address: str) -> str:
    return f"port{address.rpartition('.')[2]}"


def pids(namespace: str) -> list[int]:
    """Processes in a network namespace; those of a board, if it is a board's."""
    return [int(word) for word in _ip("netns", "pids", namespace).split()]


def _set_namespace(descriptor: int) -> None:
    """setns(2) of the calling thread; the standard library has it from python 3.12."""
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout
