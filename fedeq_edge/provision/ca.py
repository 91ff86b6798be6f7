"""The fleet's certificate authority: it signs devices, the gateway and the aggregator, and takes back what it signed.

Theory of operation. Every certificate is valid from 1970 on. A board without a clock starts there, and a certificate
that is "not yet valid" would lock it out of the network that could tell it the time; the beginning of validity protects
nothing here, since nobody but this authority makes certificates for this fleet. When one was issued follows from its
end, because the lifetimes are constants.

The key is made once, by `Authority.create`, which refuses a folder that has one; nothing else writes it.
"""

import datetime
import re
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey as PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedeq_edge.atomic import write_atomically
from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.provision import records
from fedeq_edge.provision.tokens import pin_of
from fedeq_edge.wire.topics import check_identifier

Clock = Callable[[], float]

_DAY: Final = datetime.timedelta(days=1)
# Before 2050 in a fleet's first years, so that dates stay UTCTime, which every TLS stack on small boards reads.
AUTHORITY_LIFETIME: Final = 20 * 365 * _DAY
# The gateway's own: nothing renews them, and an end that nobody expects stops a whole fleet (IoT Edge issue 7321).
GATEWAY_LIFETIME: Final = 10 * 365 * _DAY
DEVICE_LIFETIME: Final = 365 * _DAY
_BEGINNING: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9_.-]*[a-z0-9])?\Z", re.IGNORECASE | re.ASCII)
AGGREGATOR: Final = "aggregator"  # the CN to which broker/acl gives every right; no device may be called so


class Revocation(msgspec.Struct, frozen=True, kw_only=True):
    """Whose certificate was taken back, and when (unix seconds)."""

    device: str
    at: int


def revoked(folder: Path) -> dict[str, Revocation]:
    """Revocations by serial number in hexadecimal. Raises StateError where the file is damaged."""
    return records.read(folder / "revoked.json", dict[str, Revocation]) or {}


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number as `revoked.json` and the names of the files in `issued/` have it."""
    return f"{certificate.serial_number:x}"


def issued_at(certificate: x509.Certificate, lifetime: datetime.timedelta = DEVICE_LIFETIME) -> datetime.datetime:
    """When it was issued: its validity begins in 1970, its end tells."""
    return certificate.not_valid_after_utc - lifetime


def common_name(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The CN, "" where there is none or more than one."""
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return names[0] if len(names) == 1 else ""


def new_key() -> PrivateKey:
    """A key on P-256: small signatures, quick on boards, known to every TLS library."""
    return generate_private_key(SECP256R1())


def key_pem(key: PrivateKey, passphrase: str | None = None) -> bytes:
    """PKCS#8, under the passphrase where there is one (AES-256; its key derivation is quick: take a long one)."""
    hidden: KeySerializationEncryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


class Authority:
    """The authority in a folder `ca/`: ca.key, ca.crt, issued/, revoked.json, crl.pem."""

    def __init__(self, folder: Path, key: PrivateKey, certificate: x509.Certificate, clock: Clock = time.time) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key
        self._clock = clock

    @classmethod
    def create(cls, folder: Path, fleet: str, passphrase: str | None = None, clock: Clock = time.time) -> "Authority":
        """A new authority. Raises StateError where the folder holds one: nothing ever makes a CA anew."""
        check_identifier(fleet, "fleet name")
        if (folder / "ca.key").exists() or (folder / "ca.crt").exists():
            raise StateError(f"{folder} holds a CA, and a new one would lock every device out; choose another folder")
        (folder / "issued").mkdir(parents=True, exist_ok=True, mode=0o700)
        key = new_key()
        name = _name(fleet, "fleet CA")
        now = datetime.datetime.fromtimestamp(clock(), datetime.UTC)
        certificate = _certificate(key, name, name, key.public_key(), now + AUTHORITY_LIFETIME, _for_authority())
        authority = cls(folder, key, certificate, clock)
        write_atomically(folder / "ca.key", key_pem(key, passphrase), mode=0o600)
        write_atomically(folder / "ca.crt", authority.pem)
        authority.crl()
        return authority

    @classmethod
    def open(cls, folder: Path, passphrase: str | None = None, clock: Clock = time.time) -> "Authority":
        """The authority that was created here. Raises ConfigError on a missing or wrong passphrase, StateError else."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            key = _open_key(folder / "ca.key", passphrase)
        except PermissionError as error:
            raise StateError(f"{error.filename}: {error.strerror}; run it as the owner of {folder}") from error
        except OSError as error:
            raise StateError(f"{error.filename}: {error.strerror}; restore ca/ from your backup") from error
        except ValueError as error:
            raise StateError(f"{folder}: the CA is damaged ({error}); restore ca/ from your backup") from error
        if key.public_key() != certificate.public_key():
            raise StateError(f"{folder}: ca.key and ca.crt do not belong together; restore ca/ from your backup")
        return cls(folder, key, certificate, clock)

    @property
    def pem(self) -> bytes:
        """The CA certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def pin(self) -> str:
        """What join tokens say of the CA certificate."""
        return pin_of(self.certificate.public_bytes(Encoding.DER))

    @property
    def fleet(self) -> str:
        """Name of the fleet."""
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)

    def device_certificate(self, csr_pem: bytes, device: str, *, renews: str | None = None) -> bytes:
        """A certificate (PEM) for the key that signed the request; of its wishes only the key is heard.

        renews: serial of the certificate that it takes the place of, which must not be revoked by now.
        Raises ProvisionError where the request is not this device's, the old one was revoked, or the clock is wrong.
        """
        key = requested_key(csr_pem, device)
        more = _for_leaf(ExtendedKeyUsageOID.CLIENT_AUTH, [self._urn("device", device)])
        with records.held(self.folder):
            if renews in revoked(self.folder):
                raise ProvisionError(Exit.VERIFICATION, f"the certificate of device {device} was revoked")
            certificate = self._issue(device, key, DEVICE_LIFETIME, more)
        return certificate.public_bytes(Encoding.PEM)

    def server_certificate(self, names: Sequence[str]) -> tuple[bytes, bytes]:
        """(certificate, private key) in PEM of a gateway with these DNS names and addresses: broker and service."""
        more = _for_leaf(ExtendedKeyUsageOID.SERVER_AUTH, [_general_name(name) for name in names])
        return self._with_key("gateway", more)

    def aggregator_certificate(self) -> tuple[bytes, bytes]:
        """(certificate, private key) in PEM of the aggregator, a client of the broker as the devices are."""
        more = _for_leaf(ExtendedKeyUsageOID.CLIENT_AUTH, [self._urn(AGGREGATOR)])
        return self._with_key(AGGREGATOR, more)

    def revoke(self, device: str) -> list[str]:
        """All certificates that the device was given are revoked, and the list of them is new; serials of these."""
        with records.held(self.folder):
            known = revoked(self.folder)
            fresh = [serial for serial in map(serial_of, self.certificates(device)) if serial not in known]
            at = Revocation(device=device, at=int(self._clock()))
            records.write(self.folder / "revoked.json", {**known, **dict.fromkeys(fresh, at)})
        self.crl()
        return fresh

    def crl(self) -> bytes:
        """The list of revoked certificates (PEM), as mosquitto's `crlfile` wants it; also in crl.pem.

        It is good as long as the CA is: a list that has run out keeps the whole fleet off the broker.
        """
        with records.held(self.folder):
            entries = revoked(self.folder)
            builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
            builder = builder.last_update(_BEGINNING).next_update(self.certificate.not_valid_after_utc)
            builder = builder.add_extension(x509.CRLNumber(len(entries) + 1), critical=False)
            builder = builder.add_extension(_issuer_key(self._key), critical=False)
            for serial, entry in sorted(entries.items()):
                builder = builder.add_revoked_certificate(_revoked_entry(serial, entry))
            pem = builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)
            write_atomically(self.folder / "crl.pem", pem)
        return pem

    def certificates(self, device: str) -> list[x509.Certificate]:
        """What this device was given, the newest last."""
        issued = (_load(path) for path in (self.folder / "issued").glob("*.crt"))
        its = (one for one in issued if common_name(one) == device and _for_clients(one))
        return sorted(its, key=lambda one: one.not_valid_after_utc)

    def _with_key(self, name: str, more: "_Extensions") -> tuple[bytes, bytes]:
        key = new_key()
        with records.held(self.folder):
            certificate = self._issue(name, key.public_key(), GATEWAY_LIFETIME, more)
        return certificate.public_bytes(Encoding.PEM), key_pem(key)

    def _issue(
        self, name: str, key: EllipticCurvePublicKey, lifetime: datetime.timedelta, more: "_Extensions"
    ) -> x509.Certificate:
        end = min(self._now() + lifetime, self.certificate.not_valid_after_utc)
        subject = _name(self.fleet, name)
        certificate = _certificate(self._key, self.certificate.subject, subject, key, end, more)
        path = self.folder / "issued" / f"{serial_of(certificate)}.crt"
        # before it leaves the house, or it could not be revoked
        write_atomically(path, certificate.public_bytes(Encoding.PEM))
        return certificate

    def _now(self) -> datetime.datetime:
        """The time, which is never before the CA was made: a certificate would end before it began."""
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        if now < issued_at(self.certificate, AUTHORITY_LIFETIME) - _DAY:
            raise ProvisionError(
                Exit.CLOCK,
                f"the clock of this machine says {now:%Y-%m-%d %H:%M}, before the fleet's CA was made; "
                "set it (timedatectl set-ntp true), then try again",
            )
        return now

    def _urn(self, *parts: str) -> x509.GeneralName:
        return x509.UniformResourceIdentifier(":".join(("urn:fedeq", self.fleet, *parts)))


def requested_key(csr_pem: bytes, device: str) -> EllipticCurvePublicKey:
    """The public key of a request that its own key signed. Raises ProvisionError where it is not this device's."""
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        sound = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise _bad_request(device, "is none, or damaged") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise _bad_request(device, "has a key that is not on P-256")
    if not sound:
        raise _bad_request(device, "was not signed by its own key")
    if common_name(request) != device:
        raise _bad_request(device, f"names {common_name(request)!r}")
    return key


def _bad_request(device: str, what: str) -> ProvisionError:
    return ProvisionError(
        Exit.VERIFICATION,
        f"device {device}: the certificate request {what}; make one with fedeq device csr --device {device}",
    )


def _open_key(path: Path, passphrase: str | None) -> PrivateKey:
    content = path.read_bytes()
    encrypted = b"ENCRYPTED PRIVATE KEY" in content
    if encrypted and not passphrase:
        raise ConfigError(f"{path} is under a passphrase; give it in FEDEQ_CA_PASSPHRASE")
    try:
        key = load_pem_private_key(content, passphrase.encode() if encrypted and passphrase else None)
    except ValueError as error:
        if encrypted:
            raise ConfigError(f"the passphrase does not open {path}; check FEDEQ_CA_PASSPHRASE") from error
        raise
    if not isinstance(key, PrivateKey):
        raise ValueError("ca.key is no key on P-256")
    return key


_Extensions = Sequence[tuple[x509.ExtensionType, bool]]  # each with whether it is critical


def _for_authority() -> _Extensions:
    return ((x509.BasicConstraints(ca=True, path_length=0), True), (_usage(signs_certificates=True), True))


def _for_leaf(purpose: x509.ObjectIdentifier, names: Iterable[x509.GeneralName]) -> _Extensions:
    return (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (x509.SubjectAlternativeName(names), False),
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(
    signer: PrivateKey,
    issuer: x509.Name,
    subject: x509.Name,
    key: EllipticCurvePublicKey,
    end: datetime.datetime,
    more: _Extensions,
) -> x509.Certificate:
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(_BEGINNING).not_valid_after(end)
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(_issuer_key(signer), critical=False).sign(signer, SHA256())


def _issuer_key(signer: PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())


def _name(fleet: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    if not _HOST.match(name):
        raise ConfigError(f"{name!r} is neither a DNS name nor an address; give --host gateway.local, for example")
    return x509.DNSName(name)


def _revoked_entry(serial: str, entry: Revocation) -> x509.RevokedCertificate:
    at = datetime.datetime.fromtimestamp(entry.at, datetime.UTC)
    return x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(at).build()


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise StateError(f"{path} is damaged ({error}); restore ca/ from your backup") from error


def _for_clients(certificate: x509.Certificate) -> bool:
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return ExtendedKeyUsageOID.CLIENT_AUTH in purposes
