"""Keys of a session: X25519 agreements, HKDF-SHA256 over them, and the sealing of shares with ChaCha20-Poly1305.

Every derived key is bound to the session, to its purpose and to the public keys of its two ends, and is used once.
"""

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.masking.shamir import to_bytes

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
_NONCE: Final = bytes(12)  # a sealing key belongs to one sender, one receiver and one session: it seals one message


class Pair:
    """An X25519 key pair; `public` are its 32 bytes. Every use of a peer's key may raise RemoteWireError."""

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def drawn(cls) -> "Pair":
        """A new pair."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def of_seed(cls, seed: int, session: bytes) -> "Pair":
        """The pair that a shared secret stands for: whoever reconstructs the secret has the pair."""
        return cls(X25519PrivateKey.from_private_bytes(_derived(to_bytes(seed), session, b"pairwise key")))

    def mask_key(self, peer: bytes, session: bytes) -> bytes:
        """The key of the mask that this pair and that of `peer` share: both ends get the same."""
        ends = b"".join(sorted((self.public, peer)))
        return _derived(self._agreed(peer), session, b"pairwise mask" + ends)

    def seal(self, content: bytes, receiver: bytes, session: bytes, context: bytes) -> bytes:
        """`content` for the holder of the public key `receiver` alone, 16 bytes longer."""
        return self._box(self.public, receiver, receiver, session).encrypt(_NONCE, content, context)

    def open(self, sealed: bytes, sender: bytes, session: bytes, context: bytes) -> bytes | None:
        """What `sender` sealed for this pair in the same session and context; None if it did not."""
        try:
            return self._box(sender, self.public, sender, session).decrypt(_NONCE, sealed, context)
        except InvalidTag:
            return None

    def _box(self, sender: bytes, receiver: bytes, peer: bytes, session: bytes) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(_derived(self._agreed(peer), session, b"sealed share" + sender + receiver))

    def _agreed(self, peer: bytes) -> bytes:
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:  # a point of low order: everybody would know the secret (RFC 7748, section 6.1)
            raise RemoteWireError(f"public key {peer.hex()[:16]} of a masked sum is no point to agree with") from error


def self_mask_key(seed: int, session: bytes) -> bytes:
    """The key of the mask that a device shares with nobody."""
    return _derived(to_bytes(seed), session, b"self mask")


def check(public: bytes) -> None:
    """`public` can be agreed with. Raises RemoteWireError."""
    Pair.drawn()._agreed(public)


def _derived(secret: bytes, session: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=session, info=b"fedeq-edge " + purpose).derive(secret)
