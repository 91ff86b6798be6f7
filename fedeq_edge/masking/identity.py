"""Proof that session keys are a device's own, by its certificate: then a server cannot slip in keys of its making."""

from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedeq_edge.errors import ConfigError
from fedeq_edge.masking.messages import Keys

_LENGTH_BYTES: Final = 2


class Identity(Protocol):
    """Signs for this device and checks what others have signed."""

    def prove(self, statement: bytes) -> bytes:
        """A proof that this device made the statement, at most messages.PROOF_BYTES_MOST long."""
        ...

    def accepts(self, device: str, statement: bytes, proof: bytes) -> bool:
        """Whether `proof` shows that `device` made the statement; bytes from anywhere must not raise."""
        ...


def statement(session: bytes, device: str, keys: Keys) -> bytes:
    """What is signed: these are the keys of this device in this session."""
    return b"fedeq-edge masking keys" + session + keys.mask + keys.seal + device.encode()


class CertificateIdentity:
    """ECDSA with the key of the device's TLS certificate (CN = device id), issued by the fleet's authority.

    A proof is the certificate and a signature, 0.5 to 1 kB. Validity dates are left to the broker, which has checked
    them when the device connected: boards without a clock could not.
    """

    def __init__(
        self, key: EllipticCurvePrivateKey, certificate: x509.Certificate, authority: x509.Certificate
    ) -> None:
        if key.public_key() != certificate.public_key():
            raise ConfigError("the private key does not belong to the certificate; give the two of one device")
        self._key = key
        self._encoded = certificate.public_bytes(Encoding.DER)
        self._authority = authority

    def prove(self, statement: bytes) -> bytes:
        """The certificate with its length before it, then the signature."""
        signature = self._key.sign(statement, ECDSA(SHA256()))
        return len(self._encoded).to_bytes(_LENGTH_BYTES, "little") + self._encoded + signature

    def accepts(self, device: str, statement: bytes, proof: bytes) -> bool:
        """Whether the authority issued the certificate to `device`, and its key signed the statement."""
        end = _LENGTH_BYTES + int.from_bytes(proof[:_LENGTH_BYTES], "little")
        try:
            certificate = x509.load_der_x509_certificate(proof[_LENGTH_BYTES:end])
            certificate.verify_directly_issued_by(self._authority)
            names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
            key = certificate.public_key()
            if names != [device] or not isinstance(key, EllipticCurvePublicKey):
                return False
            key.verify(proof[end:], statement, ECDSA(SHA256()))
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion):
            return False
        return True
