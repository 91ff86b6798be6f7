"""Requests of a board to the fleet's service over TLS: who it trusts, what it shows, and what a refusal means."""

import contextlib
import datetime
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

from fedeq_edge.errors import Exit, ProvisionError, StateError

_ANSWER_BYTES: Final = 65_536
_TIMEOUT_S: Final = 30.0
_PORT: Final = 8443
# Codes of X509_verify_cert: not yet valid, expired; and a name or address that the certificate does not have.
_DATES: Final = (9, 10)
_NAMES: Final = (62, 64)


class Answer(NamedTuple):
    """Content, and the moment by the service's clock (HTTP's Date, "" where it says none)."""

    body: bytes
    date: str


class _Told(msgspec.Struct):
    """How the service refuses."""

    exit: Exit
    error: str


def trusting(authority: bytes) -> ssl.SSLContext:
    """Trusts this CA (PEM) and no other, and shows no certificate."""
    return ssl.create_default_context(cadata=authority.decode())


def identified(folder: Path) -> ssl.SSLContext:
    """Trusts ca.crt of the folder and shows its device.crt. Raises StateError where the board is not enrolled."""
    try:
        context = trusting((folder / "ca.crt").read_bytes())
        context.load_cert_chain(folder / "device.crt", folder / "device.key")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = error.strerror if isinstance(error, FileNotFoundError) else error
        raise StateError(f"no identity in {folder} ({why}); enrol this board: fedeq device enrol --help") from error
    return context


def ask(
    service_url: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None = None, token: str = ""
) -> Answer:
    """What the service answers. Raises ProvisionError: its refusal, or why it could not be asked."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with _asked(service_url, context, method, path, body, headers) as response:
        content = response.read(_ANSWER_BYTES)
    if response.status != http.client.OK:
        raise _refusal(service_url, response.status, content)
    return Answer(content, response.headers.get("Date", ""))


class RefusedError(ProvisionError):
    """The service gives a file to nobody, or not to us; `status` is that of HTTP."""

    def __init__(self, status: int, refusal: ProvisionError) -> None:
        super().__init__(refusal.exit, str(refusal))
        self.status = status


def stream(service_url: str, context: ssl.SSLContext, path: str) -> Iterator[bytes]:
    """The file at `path` in pieces of at most 64 KiB. Raises RefusedError, or ProvisionError where it breaks off."""
    with _asked(service_url, context, "GET", path, None, {}) as response:
        if response.status != http.client.OK:
            raise RefusedError(response.status, _refusal(service_url, response.status, response.read(_ANSWER_BYTES)))
        left = response.length
        while piece := response.read(_ANSWER_BYTES):
            yield piece
            left = None if left is None else left - len(piece)
        if left:
            raise http.client.IncompleteRead(b"", left)


@contextlib.contextmanager
def _asked(
    service_url: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> Iterator[http.client.HTTPResponse]:
    """The answer, open for reading. What the network does becomes a ProvisionError."""
    address = _address(service_url)
    link = http.client.HTTPSConnection(
        address.hostname or "", address.port or _PORT, timeout=_TIMEOUT_S, context=context
    )
    try:
        with contextlib.closing(link):
            link.request(method, f"{address.path.rstrip('/')}{path}", body, headers)
            yield link.getresponse()
    except ssl.SSLError as error:
        raise _untrusted(service_url, error) from error
    except socket.gaierror as error:
        raise ProvisionError(
            Exit.LOST,
            f"{service_url}: no address is known for {address.hostname} ({error.strerror}); check the name and this "
            "machine's DNS (.local names need avahi-daemon and libnss-mdns), or give the gateway's address instead",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ProvisionError(
            Exit.LOST, f"{service_url} cannot be reached ({error}); is fedeq fleet serve running, and the network up?"
        ) from error


def _address(service_url: str) -> SplitResult:
    address = urlsplit(service_url)
    if address.scheme != "https" or not address.hostname:
        raise ProvisionError(Exit.MISUSED, f"{service_url!r} is no address of the service; give https://HOST:{_PORT}")
    return address


def _untrusted(service_url: str, error: ssl.SSLError) -> ProvisionError:
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else None
    host = urlsplit(service_url).hostname
    if code in _DATES:
        here = datetime.datetime.now(datetime.UTC)
        return ProvisionError(
            Exit.CLOCK,
            f"{service_url}: its certificate is out of date by this board's clock ({here:%Y-%m-%d %H:%M}); "
            "set it (timedatectl set-ntp true), or on the host: fedeq fleet gateway",
        )
    if code in _NAMES:
        remedy = f"its certificate does not name {host}; on the host, run: fedeq fleet gateway --host {host}"
    elif code is not None:
        remedy = "it is not of this fleet; check --service"
    else:
        remedy = f"{error.reason}; was this board's certificate made by this fleet? Enrol it anew with a token"
    return ProvisionError(Exit.VERIFICATION, f"{service_url}: {remedy}")


def _refusal(service_url: str, status: int, content: bytes) -> ProvisionError:
    """The service's own words where it has some. Whose they are may not be known: nothing that steers a terminal."""
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        told = msgspec.json.decode(content, type=_Told)
        return ProvisionError(told.exit, "".join(letter for letter in told.error[:500] if letter.isprintable()))
    return ProvisionError(Exit.FAILED, f"{service_url} answers {status}; is it the service of this fleet?")
