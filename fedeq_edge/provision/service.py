"""`fedeq fleet serve`: HTTPS at which boards enrol, renew, report, and fetch releases.

Theory of operation. TLS asks for a client's certificate and checks that this fleet's CA made it for clients; all else
is decided by the desk (desk.py), which knows neither sockets nor HTTP. A refusal is JSON {"exit", "error"}; `exit` is
the exit status of the command on the board.

The standard library's server is enough for a fleet that asks once a minute. It is hedged about: so many connections at
a time, so long for a request, so many bytes.
"""

import contextlib
import http.server
import logging
import os
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge.errors import ConfigError, Exit, FedEqError, ProvisionError
from fedeq_edge.provision.desk import Answer, Desk, Refusal, Request

_BODY_BYTES: Final = 262_144  # the largest report: 40,960 characters, six bytes each where JSON escapes them
_BLOCK_BYTES: Final = 65_536
_REQUEST_S: Final = 30.0  # handshake, headers and body; the answer may take as long as it moves
_STALL_S: Final = 20.0  # without a byte, in either direction
_CONNECTIONS: Final = 128  # threads at a time; a fleet of 1000 that asks once a minute has two or three
# X509_V_FLAG_NO_CHECK_TIME: dates are checked per request (desk.py).
_DATES_LATER: Final = 0x200000

logger = logging.getLogger(__name__)


class Service(http.server.ThreadingHTTPServer):
    """The service on an address; `serve_forever` runs it until `shutdown`.

    Raises ConfigError where the address cannot be had, StateError where the gateway's certificate cannot be read.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, desk: Desk, gateway: Path, address: tuple[str, int]) -> None:
        self.desk = desk
        self._gateway = gateway
        self._shown = _stamp(gateway)
        self._context = _context(gateway)
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        self._asking: dict[socket.socket, float] = {}  # who has not said all of its request, and since when
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address[0]}:{address[1]}: {error.strerror}; choose another with --listen"
            ) from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread of its own for each connection while there is room, and no answer else."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread of one connection; its place is free again afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """One request over TLS. The handshake is made here and not by whom accepts: a silent client stops nobody."""
        request.settimeout(_STALL_S)
        link = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        self._asking[link] = time.monotonic()
        try:
            with link:
                _shake_hands(link)
                super().finish_request(link, client_address)
        finally:
            self.has_asked(link)

    def has_asked(self, link: socket.socket) -> None:
        """Its request is complete: the answer may take as long as it needs."""
        self._asking.pop(link, None)

    def service_actions(self) -> None:
        """Twice a second: connections that dribble are cut, and a renewed certificate is shown to the next one."""
        self._renew_context()
        latest = time.monotonic() - _REQUEST_S
        for link, since in list(self._asking.items()):
            if since < latest:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(link, socket.SHUT_RDWR)  # the thread that reads from it wakes up

    def _renew_context(self) -> None:
        """server.crt is written after its key (fleet.py): when it is another one, both are new."""
        found = _stamp(self._gateway)
        if found == self._shown:
            return
        self._shown = found
        try:
            self._context = _context(self._gateway)
        except ConfigError as error:
            logger.warning("the certificate from before is still shown", extra={"reason": str(error)})
        else:
            logger.info("a new certificate is shown", extra={"path": str(self._gateway / "server.crt")})

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # the base class calls it
        """A connection broke, or somebody without a certificate of ours came: a line. Anything else is our fault."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logger.info("connection ended early", extra={"peer": client_address[0], "reason": str(error)})
        else:
            logger.error("request failed", extra={"peer": client_address[0]}, exc_info=error)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request in HTTP's form, handed to the desk."""

    server_version = "fedeq-edge"
    sys_version = ""
    timeout = _STALL_S

    def do_GET(self) -> None:
        self._answer(self._service.desk.get, b"")

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= _BODY_BYTES:
            self._refuse(Refusal(413, Exit.MISUSED, f"a request has 0 to {_BODY_BYTES} bytes, and says how many"))
            return
        self._answer(self._service.desk.post, self.rfile.read(length))

    @property
    def _service(self) -> Service:
        assert isinstance(self.server, Service)
        return self.server

    def _answer(self, decide: Callable[[Request], Answer], body: bytes) -> None:
        link = self.connection
        self._service.has_asked(link)
        assert isinstance(link, ssl.SSLSocket)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        path = self.path.partition("?")[0]
        try:
            answer = decide(Request(path=path, body=body, peer=link.getpeercert(binary_form=True), bearer=bearer))
        except FedEqError as error:
            self._refuse(error)
        else:
            self._send(200, answer)

    def _refuse(self, error: FedEqError) -> None:
        told = {"peer": self.client_address[0], "path": ascii(self.path[:200]), "reason": str(error)}
        usual = isinstance(error, Refusal) and error.is_next_root(self.path)
        logger.log(logging.DEBUG if usual else logging.WARNING, "refused", extra=told)
        # what is no refusal of the asker's is trouble of our own: a damaged file, a full disk
        status, code = (403, error.exit) if isinstance(error, ProvisionError) else (500, Exit.FAILED)
        if isinstance(error, Refusal):
            status = error.status
        content = msgspec.json.encode({"exit": int(code), "error": str(error)})
        self._send(status, Answer(kind="application/json", content=content))

    def _send(self, status: int, answer: Answer) -> None:
        if isinstance(answer.content, bytes):
            self._begin(status, answer.kind, len(answer.content))
            self.wfile.write(answer.content)
            return
        with answer.content.open("rb") as file:
            self._begin(status, answer.kind, os.fstat(file.fileno()).st_size)
            shutil.copyfileobj(file, self.wfile, _BLOCK_BYTES)

    def _begin(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # the name that the base class gives it
        logger.debug(format, *arguments)


def _shake_hands(link: ssl.SSLSocket) -> None:
    """TLS is up. A client that is refused hears the alert: closed with its data unread, TCP would take it back."""
    try:
        link.do_handshake()
    except ssl.SSLError:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(link, socket.SHUT_WR)
            while socket.socket.recv(link, _BLOCK_BYTES):
                pass
        raise


def _stamp(gateway: Path) -> tuple[int, int] | None:
    """What tells one server.crt from another, None while there is none."""
    try:
        found = (gateway / "server.crt").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _context(gateway: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(gateway / "server.crt", gateway / "server.key")
        context.load_verify_locations(gateway / "ca.crt")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"the certificate in {gateway} cannot be used ({error}); make it anew: fedeq fleet gateway --host NAME"
        ) from error
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _DATES_LATER)
    return context
