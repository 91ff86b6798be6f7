"""Where applications on this device ask: a unix socket, or a port of the loopback interface. Never the network."""

import contextlib
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from fedeq_edge.errors import ConfigError

_PORT = re.compile(r"(?P<host>[^/]*):(?P<port>\d+)")
_LOOPBACK = "127.0.0.1"
# sockaddr_un.sun_path holds 108 bytes, the last of them zero.
_LONGEST_PATH = 107
# Applications on one board; the kernel holds what comes while all are being answered.
_BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Address:
    """Exactly one of path and port."""

    path: Path | None
    port: int | None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"{_LOOPBACK}:{self.port}"


def parse_address(serve: str) -> Address:
    """The address that the setting `serve` means; a relative path stays one.

    Raises ConfigError for a port of another interface than the loopback, because nobody is asked who he is.
    """
    found = _PORT.fullmatch(serve)
    if found is None:
        return Address(Path(serve), None)
    if found["host"] != _LOOPBACK or not 1 <= int(found["port"]) <= 65535:
        raise ConfigError(
            f"serve = {serve!r}: answers stay on this device; give {_LOOPBACK}:PORT, or the path of a unix socket"
        )
    return Address(None, int(found["port"]))


def listen(address: Address) -> socket.socket:
    """A listening socket there. Raises ConfigError where it cannot be, or somebody else answers there already.

    A unix socket is open to everybody who may enter its folder: the folder's mode says who may ask.
    """
    try:
        return _listen_at_path(address.path) if address.path is not None else _listen_at_port(address.port or 0)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"serve: cannot listen at {address}: {reason}; choose another place") from error


def _listen_at_port(port: int) -> socket.socket:
    return socket.create_server((_LOOPBACK, port), backlog=_BACKLOG)


def _listen_at_path(path: Path) -> socket.socket:
    if len(bytes(path)) > _LONGEST_PATH:
        raise ConfigError(f"serve: {path} is longer than the {_LONGEST_PATH} bytes of a unix socket; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _remove_left_over(path: Path) -> None:
    """A socket that a killed agent has left is gone; anything else there stays, and is named."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"serve: {path} exists and is no socket; remove it or choose another path")
        if _answers(path):
            raise ConfigError(f"serve: another program answers at {path}; stop it or choose another path")
        path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Without waiting: a program that is there but busy has a full backlog, and is there.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except ConnectionRefusedError:
            return False
    return True
