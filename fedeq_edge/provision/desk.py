"""What the fleet's service answers a board, for each request: who may ask what, and why not.

    POST /.well-known/est/simpleenroll     certificate request (PEM), Authorization: Bearer TOKEN -> certificate, CA
    POST /.well-known/est/simplereenroll   certificate request, with the device's certificate -> certificate
    GET  /.well-known/est/cacerts          CA certificate; a board compares it with its token's pin
    POST /v1/report                        JSON (actions.py), with the device's certificate -> {"action": ...}
    GET  /tuf/metadata/..., /tuf/targets/...   files of the repository (repository.py), with the device's certificate

Theory of operation. TLS has seen that whoever shows a certificate holds its key, and that this fleet's CA made it for
clients (service.py). Whether it is revoked, expired or a stranger's to the fleet is decided here, per request, so that
a board hears the reason instead of a broken handshake. An expired certificate may renew itself and do nothing else: a
board that lay in a drawer for two years still holds its key, and a board that is not to come back is revoked.
"""

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedeq_edge.errors import Exit, ProvisionError
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

logger = logging.getLogger(__name__)


class Refusal(ProvisionError):  # noqa: N818  # what a desk says; an error it is in Python alone
    """A request that is not answered; `status` is that of HTTP."""

    def __init__(self, status: int, exit: Exit, message: str) -> None:  # noqa: A002  # as ProvisionError has it
        super().__init__(exit, message)
        self.status = status

    def is_next_root(self, path: str) -> bool:
        """Whether a board asked for a root that is not made yet: by that it learns that it has the newest one."""
        return self.status == HTTPStatus.NOT_FOUND and _NEXT_ROOT.fullmatch(path) is not None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a board asks. peer: its certificate (DER), if it showed one."""

    path: str
    body: bytes
    peer: bytes | None
    bearer: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a board gets. kind: the content's type in HTTP. content: its bytes, or the file that holds them."""

    kind: str
    content: bytes | Path


class Desk:
    """Decides what each request gets; knows neither sockets nor HTTP."""

    def __init__(self, fleet: Fleet, authority: Authority, clock: Callable[[], float] = time.time) -> None:
        self._fleet = fleet
        self._authority = authority
        self._clock = clock
        self._posts = {ENROL: self._enrol, RENEW: self._renew, REPORT: self._report}

    def post(self, request: Request) -> Answer:
        """Raises FedEqError with the reason of a refusal."""
        if request.path not in self._posts:
            raise _nothing_here(request.path)
        return self._posts[request.path](request)

    def get(self, request: Request) -> Answer:
        """Raises FedEqError with the reason of a refusal."""
        if request.peer is not None:
            self._refuse_revoked(x509.load_der_x509_certificate(request.peer))
        if request.path == AUTHORITY:
            return Answer(kind="application/x-pem-file", content=self._authority.pem)
        if not request.path.startswith("/tuf/"):
            raise _nothing_here(request.path)
        self._member(request)
        found = self._tuf_file(request.path)
        if found.name == "timestamp.json":
            self._freshen()
        return Answer(kind="application/octet-stream", content=found)

    def _enrol(self, request: Request) -> Answer:
        token, device = Token.parse(request.bearer), _named(request.body)
        key = requested_key(request.body, device)
        encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        with self._fleet.admitting():
            self._fleet.tokens.redeem(token, device, hashlib.sha256(encoded).hexdigest(), now=self._clock())
            self._check_member(device)
            certificate = self._authority.device_certificate(request.body, device)
        logger.info("device enrolled", extra={"device": device})
        return Answer(kind="application/x-pem-file", content=certificate + self._authority.pem)

    def _renew(self, request: Request) -> Answer:
        old = self._shown(request)
        device = common_name(old)
        certificate = self._authority.device_certificate(request.body, device, renews=serial_of(old))
        logger.info("certificate renewed", extra={"device": device})
        return Answer(kind="application/x-pem-file", content=certificate)

    def _report(self, request: Request) -> Answer:
        device = self._member(request)
        try:
            report = msgspec.json.decode(request.body, type=Report)
        except (msgspec.DecodeError, RecursionError) as error:  # the latter: brackets by the thousand
            raise Refusal(400, Exit.MISUSED, f"the report of device {device} cannot be read: {error}") from error
        reply = Reply(action=self._fleet.take_report(device, report), service=self._fleet.settings.service)
        return Answer(kind="application/json", content=msgspec.json.encode(reply))

    def _shown(self, request: Request) -> x509.Certificate:
        """The certificate of a device of this fleet, not revoked; TLS has seen that its key is there."""
        if request.peer is None:
            raise Refusal(401, Exit.VERIFICATION, f"{request.path} is for devices; show the device's certificate")
        certificate = x509.load_der_x509_certificate(request.peer)
        self._refuse_revoked(certificate)
        self._check_member(common_name(certificate))
        return certificate

    def _member(self, request: Request) -> str:
        """The device that asks, whose certificate has not expired either."""
        shown = self._shown(request)
        device = common_name(shown)
        if shown.not_valid_after_utc < datetime.fromtimestamp(self._clock(), UTC):
            raise Refusal(403, Exit.VERIFICATION, f"the certificate of device {device} has expired; renew it first")
        return device

    def _freshen(self) -> None:
        """What boards take as the sign that nothing is kept from them was signed lately."""
        from fedeq_edge.provision.repository import freshen  # noqa: PLC0415  # tuf takes 0.3 s: only who updates waits

        freshen(self._fleet.folder / "tuf", self._clock)

    def _check_member(self, device: str) -> None:
        known = self._fleet.devices.get(device)
        if known is not None and known.revoked:
            raise Refusal(403, Exit.VERIFICATION, f"device {device} was revoked; fedeq fleet add lets it in again")
        if known is None:
            raise Refusal(
                403, Exit.VERIFICATION, f"{device!r} is no device of this fleet; fedeq fleet add makes it one"
            )

    def _refuse_revoked(self, certificate: x509.Certificate) -> None:
        if serial_of(certificate) in revoked(self._authority.folder):
            name = common_name(certificate)
            raise Refusal(403, Exit.VERIFICATION, f"the certificate of device {name} was revoked")

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


def _nothing_here(path: str) -> Refusal:
    return Refusal(404, Exit.FAILED, f"there is no {path[:200]!r} here; is this the service of another version?")
