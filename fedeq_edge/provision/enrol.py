"""On the board: it makes its own key, which never leaves it, and has it certified by the fleet.

    device.key   P-256, 0600, made once and kept over renewals: a new pair would be two files to replace, and a power
                 cut between them a board that nobody lets in
    device.crt   made by the fleet's CA; that it is there means that the board is enrolled
    ca.crt       the fleet's CA, whose digest the token had
    root.json    what the updater trusts (repository.py);  updater.toml: where it asks

A board whose clock stands in 1970 can do all of it: certificates are valid from then on (ca.py), and where its clock is
behind the moment in which its own certificate was made, it takes the time from the service.
"""

import datetime
import email.utils
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from fedeq_edge.atomic import write_atomically, writing
from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.provision import link
from fedeq_edge.provision.ca import DEVICE_LIFETIME, common_name, issued_at, key_pem, new_key
from fedeq_edge.provision.reporting import updater_toml
from fedeq_edge.provision.tokens import Token, pin_of
from fedeq_edge.wire.topics import check_identifier

_ENROL: Final = "/.well-known/est/simpleenroll"
_RENEW: Final = "/.well-known/est/simplereenroll"
_AUTHORITY: Final = "/.well-known/est/cacerts"
# Version 1: whoever trusts it follows the chain of signatures to the newest.
_ROOT: Final = "/tuf/metadata/1.root.json"
_DAY: Final = datetime.timedelta(days=1)


class Join(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """join.toml, as a card carries it to its first boot: where the service is, and the token."""

    service: str
    token: str


def csr(folder: Path, device: str) -> bytes:
    """A certificate request (PEM) for this device, signed by the key in `folder`, which is made if it is not there."""
    check_identifier(device, "device")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(_key(folder), SHA256())
    return request.public_bytes(Encoding.PEM)


def enrol(service_url: str, token: str, folder: Path, device: str) -> None:
    """`folder` holds the identity, and what the updater needs, by the token. May be repeated until it has succeeded.

    Raises ProvisionError with the exit of its own: token expired, used, another device's; CA that is not the token's;
    a clock after the end of the service's certificate; nobody there.
    """
    joined = Token.parse(token)
    if joined.device != device:
        raise ProvisionError(
            Exit.VERIFICATION,
            f"this token is for device {joined.device}, not {device}; on the host, run: fedeq fleet token {device}",
        )
    authority = _pinned_authority(service_url, joined.pin)
    request = csr(folder, device)
    answer = link.ask(service_url, link.trusting(_pem(authority)), "POST", _ENROL, request, token=str(joined))
    certificate = _own(answer.body, folder, device, authority)
    write_atomically(folder / "ca.crt", _pem(authority))
    write_atomically(folder / "updater.toml", updater_toml(service_url))
    write_atomically(folder / "device.crt", _pem(certificate))
    keep_root(service_url, folder)


def keep_root(service_url: str, folder: Path) -> None:
    """`folder` holds root.json. Whoever runs the service is believed this once, by the certificate of the pinned CA."""
    if not (folder / "root.json").exists():
        root = link.ask(service_url, link.identified(folder), "GET", _ROOT).body
        write_atomically(folder / "root.json", root)


def join(path: Path, folder: Path) -> str:
    """Enrolled by the file `path` (join.toml), which is gone afterwards, for it holds a secret; the device's id."""
    try:
        asked = msgspec.toml.decode(path.read_bytes(), type=Join)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name the join.toml of this board") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}; it has two lines, service = and token =") from error
    token = Token.parse(asked.token)
    try:
        enrol(asked.service, asked.token, folder, token.device)
    except ProvisionError as error:
        # the power went after the certificate came and before the file was gone, and stayed away for long
        if error.exit != Exit.TOKEN_EXPIRED or not _is_enrolled(folder, token):
            raise
    with writing(path):
        path.unlink()
    return token.device


def renew_if_due(service_url: str, folder: Path, clock: Callable[[], float] = time.time) -> bool:
    """Whether device.crt was made anew: past the middle of its life it is, even if it has ended.

    Raises ProvisionError where the service refuses or cannot be reached: ask again later, the certificate stays.
    """
    certificate, authority = _read_certificate(folder / "device.crt"), _read_certificate(folder / "ca.crt")
    context = link.trusting(_pem(authority))
    now = datetime.datetime.fromtimestamp(clock(), datetime.UTC)
    if now < issued_at(certificate) - _DAY:
        now = _date(service_url, link.ask(service_url, context, "GET", _AUTHORITY))
    if now < issued_at(certificate) + DEVICE_LIFETIME / 2:
        return False
    device = common_name(certificate)
    context.load_cert_chain(folder / "device.crt", folder / "device.key")
    answer = link.ask(service_url, context, "POST", _RENEW, csr(folder, device))
    write_atomically(folder / "device.crt", _pem(_own(answer.body, folder, device, authority)))
    return True


def _is_enrolled(folder: Path, token: Token) -> bool:
    """Whether the folder holds a certificate of the fleet and for the device that the token names."""
    try:
        authority = _read_certificate(folder / "ca.crt")
        _own((folder / "device.crt").read_bytes(), folder, token.device, authority)
    except (OSError, StateError, ProvisionError):
        return False
    return pin_of(authority.public_bytes(Encoding.DER)) == token.pin


def _date(service_url: str, answer: link.Answer) -> datetime.datetime:
    """When the service answered, by its own clock."""
    try:
        return email.utils.parsedate_to_datetime(answer.date)
    except ValueError as error:
        raise ProvisionError(
            Exit.CLOCK,
            f"this board's clock is behind its certificate, and {service_url} says no time; set it (timedatectl "
            "set-ntp true)",
        ) from error


def _pinned_authority(service_url: str, pin: str) -> x509.Certificate:
    """The CA that the token means. Asked for without knowing whom: nothing is sent, and the answer must fit the pin."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    body = link.ask(service_url, blind, "GET", _AUTHORITY).body
    try:
        authority = x509.load_pem_x509_certificate(body)
    except ValueError as error:
        raise ProvisionError(
            Exit.VERIFICATION, f"{service_url} answers with no certificate; check --service"
        ) from error
    if pin_of(authority.public_bytes(Encoding.DER)) != pin:
        raise ProvisionError(
            Exit.VERIFICATION,
            f"{service_url} shows a CA that is not the one of this token: it is another fleet's, or somebody sits in "
            "between; nothing was sent to it. Check --service, and make a token of this fleet: fedeq fleet token",
        )
    return authority


def _own(answer: bytes, folder: Path, device: str, authority: x509.Certificate) -> x509.Certificate:
    """The first certificate of an answer, if it is for our key and name and of our CA."""
    try:
        certificate = x509.load_pem_x509_certificate(answer)
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise _not_ours(device) from error
    if common_name(certificate) != device or certificate.public_key() != _key(folder).public_key():
        raise _not_ours(device)
    return certificate


def _not_ours(device: str) -> ProvisionError:
    return ProvisionError(Exit.VERIFICATION, f"the service answered with no certificate for device {device}; try again")


def _key(folder: Path) -> EllipticCurvePrivateKey:
    """The device's key, made if it is not there."""
    path = folder / "device.key"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        write_atomically(path, key_pem(new_key()), mode=0o600)
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; run this as root") from error
    except (ValueError, TypeError) as error:
        raise StateError(f"{path} is damaged; delete it and enrol this board anew with a token") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise StateError(f"{path} is no key on P-256; delete it and enrol this board anew with a token")
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; enrol this board: fedeq device enrol --help") from error
    except ValueError as error:
        raise StateError(f"{path} is damaged; enrol this board anew with a token") from error


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
