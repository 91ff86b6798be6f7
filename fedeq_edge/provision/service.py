"""`fedeq fleet serve`: HTTPS at which boards enrol, renew, report, and fetch releases.

    POST /.well-known/est/simpleenroll     certificate request (PEM), Authorization: Bearer TOKEN -> certificate, CA
    POST /.well-known/est/simplereenroll   certificate request, with the device's certificate -> certificate
    GET  /.well-known/est/cacerts          CA certificate; a board compares it with its token's pin
    POST /v1/report                        JSON (actions.py), with the device's certificate -> {"action": ...}
    GET  /tuf/metadata/..., /tuf/targets/...   files of the repository (repository.py), with the device's certificate

Theory of operation. TLS asks for a client's certificate and checks that this fleet's CA made it for clients; whether it
is revoked, expired or a stranger's to the fleet is decided here, per request, so that a board hears the reason instead
of a broken handshake. An expired certificate may renew itself and do nothing else: a board that lay in a drawer for two
years still holds its key, and a board that is not to come back is revoked. A refusal is JSON {"exit", "error"}; `exit`
is the exit status of the command on the board.

The standard library's server is enough for a fleet that asks once a minute. It is hedged about: so many connections at
a time, so long for a request, so many bytes.
"""

import contextlib
import hashlib
import http.server
import logging
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedeq_edge.errors import ConfigError, Exit, FedEqError, ProvisionError
from fedeq_edge.provision.actions import Reply, Report
from fedeq_edge.provision.ca import Authority, common_name, requested_key, revoked, serial_of
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.tokens import Token

ENROL: Final = "/.well-known/est/simpleenroll"
RENEW: Final = "/.well-known/est/simplereenroll"
AUTHORITY: Final = "/.well-known/est/cacerts"
REPORT: Final = "/v1/report"
_TUF: Final = ("metadata", "targets")
_NEXT_ROOT: Final = re.compile(r"/tuf/metadata/\d+\.root\.json")

_BODY_BYTES: Final = 262_144  # the largest report: 40,960 characters, six bytes each where JSON escapes them
_BLOCK_BYTES: Final = 65_536
_REQUEST_S: Final = 30.0  # handshake, headers and body; the answer may take as long as it moves
_STALL_S: Final = 20.0  # without a byte, in either direction
_CONNECTIONS: Final = 128  # threads at a time; a fleet of 1000 that asks once a minute has two or three
# X509_V_FLAG_NO_CHECK_TIME: dates are checked per request, see above.
_DATES_LATER: Final = 0x200000

logger = logging.getLogger(__name__)


class _Refusal(ProvisionError):  # noqa: N818  # as the desk says it
    """A request that is not answered; `status` is that of HTTP."""

    def __init__(self, status: int, exit: Exit, message: str) -> None:  # noqa: A002  # as ProvisionError has it
        super().__init__(exit, message)
        self.status = status


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a board asks. peer: its certificate (DER), if it showed one."""

    path: str
    body: bytes
    peer: bytes | None
    bearer: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    content: bytes | Path


class Desk:
    """Decides what each request gets; knows neither sockets nor HTTP."""

    def __init__(self, fleet: Fleet, authority: Authority, clock: Callable[[], float] = time.time) -> None:
        self._fleet = fleet
        self._authority = authority
        self._clock = clock
        self._posts = {ENROL: self._enrol, RENEW: self._renew, REPORT: self._report}

    def post(self, request: _Request) -> _Answer:
        """Raises FedEqError with the reason of a refusal."""
        if request.path not in self._posts:
            raise _nothing_here(request.path)
        return self._posts[request.path](request)

    def get(self, request: _Request) -> _Answer:
        """Raises FedEqError with the reason of a refusal."""
        if request.peer is not None:
            self._refuse_revoked(x509.load_der_x509_certificate(request.peer))
        if request.path == AUTHORITY:
            return _Answer(kind="application/x-pem-file", content=self._authority.pem)
        if not request.path.startswith("/tuf/"):
            raise _nothing_here(request.path)
        self._member(request)
        found = self._tuf_file(request.path)
        if found.name == "timestamp.json":
            self._freshen()
        return _Answer(kind="application/octet-stream", content=found)

    def _enrol(self, request: _Request) -> _Answer:
        token, device = Token.parse(request.bearer), _named(request.body)
        key = requested_key(request.body, device)
        encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        with self._fleet.admitting():
            self._fleet.tokens.redeem(token, device, hashlib.sha256(encoded).hexdigest(), now=self._clock())
            self._check_member(device)
            certificate = self._authority.device_certificate(request.body, device)
        logger.info("device enrolled", extra={"device": device})
        return _Answer(kind="application/x-pem-file", content=certificate + self._authority.pem)

    def _renew(self, request: _Request) -> _Answer:
        old = self._shown(request)
        device = common_name(old)
        certificate = self._authority.device_certificate(request.body, device, renews=serial_of(old))
        logger.info("certificate renewed", extra={"device": device})
        return _Answer(kind="application/x-pem-file", content=certificate)

    def _report(self, request: _Request) -> _Answer:
        device = self._member(request)
        try:
            report = msgspec.json.decode(request.body, type=Report)
        except (msgspec.DecodeError, RecursionError) as error:  # the latter: brackets by the thousand
            raise _Refusal(400, Exit.MISUSED, f"the report of device {device} cannot be read: {error}") from error
        reply = Reply(action=self._fleet.take_report(device, report), service=self._fleet.settings.service)
        return _Answer(kind="application/json", content=msgspec.json.encode(reply))

    def _shown(self, request: _Request) -> x509.Certificate:
        """The certificate of a device of this fleet, not revoked; TLS has seen that its key is there."""
        if request.peer is None:
            raise _Refusal(401, Exit.VERIFICATION, f"{request.path} is for devices; show the device's certificate")
        certificate = x509.load_der_x509_certificate(request.peer)
        self._refuse_revoked(certificate)
        self._check_member(common_name(certificate))
        return certificate

    def _member(self, request: _Request) -> str:
        """The device that asks, whose certificate has not expired either."""
        shown = self._shown(request)
        device = common_name(shown)
        if shown.not_valid_after_utc < datetime.fromtimestamp(self._clock(), UTC):
            raise _Refusal(403, Exit.VERIFICATION, f"the certificate of device {device} has expired; renew it first")
        return device

    def _freshen(self) -> None:
        """What boards take as the sign that nothing is kept from them was signed lately."""
        from fedeq_edge.provision.repository import freshen  # noqa: PLC0415  # tuf takes 0.3 s: only who updates waits

        freshen(self._fleet.folder / "tuf", self._clock)

    def _check_member(self, device: str) -> None:
        known = self._fleet.devices.get(device)
        if known is not None and known.revoked:
            raise _Refusal(403, Exit.VERIFICATION, f"device {device} was revoked; fedeq fleet add lets it in again")
        if known is None:
            raise _Refusal(
                403, Exit.VERIFICATION, f"{device!r} is no device of this fleet; fedeq fleet add makes it one"
            )

    def _refuse_revoked(self, certificate: x509.Certificate) -> None:
        if serial_of(certificate) in revoked(self._authority.folder):
            name = common_name(certificate)
            raise _Refusal(403, Exit.VERIFICATION, f"the certificate of device {name} was revoked")

    def _tuf_file(self, path: str) -> Path:
        parts = unquote(path).split("/")  # "", "tuf", "metadata" or "targets", ...
        inside = parts[1:2] == ["tuf"] and parts[2] in _TUF if len(parts) > 3 else False
        if not inside or any(not _is_file_name(part) for part in parts[3:]):
            raise _nothing_here(path)
        base = (self._fleet.folder / "tuf" / parts[2]).resolve()
        found = base.joinpath(*parts[3:]).resolve()
        if not found.is_relative_to(base) or not found.is_file():
            raise _nothing_here(path)
        return found


def _named(csr_pem: bytes) -> str:
    """The device that a request names, "" where it is no request; `requested_key` says then what is wrong with it."""
    with contextlib.suppress(ValueError):
        return common_name(x509.load_pem_x509_csr(csr_pem))
    return ""


def _is_file_name(part: str) -> bool:
    """Whether one part of a path may name a file that we give away; 255 bytes is the longest that a disk has."""
    return bool(part) and not part.startswith(".") and "\0" not in part and len(part.encode(errors="replace")) <= 255


def _nothing_here(path: str) -> _Refusal:
    return _Refusal(404, Exit.FAILED, f"there is no {path[:200]!r} here; is this the service of another version?")


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
            self._refuse(_Refusal(413, Exit.MISUSED, f"a request has 0 to {_BODY_BYTES} bytes, and says how many"))
            return
        self._answer(self._service.desk.post, self.rfile.read(length))

    @property
    def _service(self) -> Service:
        assert isinstance(self.server, Service)
        return self.server

    def _answer(self, decide: Callable[[_Request], _Answer], body: bytes) -> None:
        link = self.connection
        self._service.has_asked(link)
        assert isinstance(link, ssl.SSLSocket)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        path = self.path.partition("?")[0]
        try:
            answer = decide(_Request(path=path, body=body, peer=link.getpeercert(binary_form=True), bearer=bearer))
        except FedEqError as error:
            self._refuse(error)
        else:
            self._send(200, answer)

    def _refuse(self, error: FedEqError) -> None:
        told = {"peer": self.client_address[0], "path": ascii(self.path[:200]), "reason": str(error)}
        logger.log(logging.DEBUG if self._is_next_root(error) else logging.WARNING, "refused", extra=told)
        # what is no refusal of the asker's is trouble of our own: a damaged file, a full disk
        status, code = (403, error.exit) if isinstance(error, ProvisionError) else (500, Exit.FAILED)
        if isinstance(error, _Refusal):
            status = error.status
        content = msgspec.json.encode({"exit": int(code), "error": str(error)})
        self._send(status, _Answer(kind="application/json", content=content))

    def _is_next_root(self, error: FedEqError) -> bool:
        """Whether a board asked for a root that is not made yet: by that it learns that it has the newest one."""
        missing = isinstance(error, _Refusal) and error.status == HTTPStatus.NOT_FOUND
        return missing and _NEXT_ROOT.fullmatch(self.path) is not None

    def _send(self, status: int, answer: _Answer) -> None:
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
