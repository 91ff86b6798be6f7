"""Join tokens: a board that holds one may have one certificate made for it, once and soon.

    fedeq1.<device>.<32 hex of secret>.<first 32 hex of the sha256 of the CA certificate, DER>

The last part is the pin: the board knows by it whom it talks to before it trusts anybody. The host keeps the sha256 of
the secret alone; 128 random bits need no slow hash. A token remembers the key that it was used with: an answer that was
lost on the way may be asked for again with the same key, and nobody else gains by that.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision import records
from fedeq_edge.wire.topics import check_identifier

LIFETIME_S: Final = 24 * 3600.0
_SECRET_BYTES: Final = 16
PIN_DIGITS: Final = 32
_FORM: Final = re.compile(r"fedeq1\.([a-z0-9_-]{1,63})\.([0-9a-f]{32})\.([0-9a-f]{32})\Z")


def pin_of(authority_der: bytes) -> str:
    """What a token says of the fleet's CA certificate."""
    return hashlib.sha256(authority_der).hexdigest()[:PIN_DIGITS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A join token, taken apart. `str` of it is what travels."""

    device: str
    secret: str
    pin: str

    def __str__(self) -> str:
        return f"fedeq1.{self.device}.{self.secret}.{self.pin}"

    def __repr__(self) -> str:  # never a secret in a log
        return f"Token(device={self.device!r})"

    @property
    def digest(self) -> str:
        """All that the host keeps of the secret."""
        return hashlib.sha256(bytes.fromhex(self.secret)).hexdigest()

    @classmethod
    def parse(cls, text: str) -> "Token":
        """Raises ProvisionError where it is no token; the text itself is not repeated, it may be a secret."""
        found = _FORM.match(text.strip())
        if found is None:
            raise ProvisionError(
                Exit.MISUSED,
                "this is no join token (fedeq1.DEVICE.SECRET.PIN); copy the whole line that fedeq fleet token printed",
            )
        return cls(device=check_identifier(found[1], "device"), secret=found[2], pin=found[3])


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a token. expires, used: unix seconds. key: sha256 of the public key it was used with."""

    device: str
    sha256: str
    expires: int
    used: int | None = None
    key: str = ""


class Tokens:
    """The tokens of a fleet, in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def issue(self, device: str, pin: str, *, now: float, lifetime_s: float = LIFETIME_S) -> Token:
        """A token for this device; what it had and did not use is void. Raises ConfigError on a bad id."""
        secret = secrets.token_hex(_SECRET_BYTES)
        token = Token(device=check_identifier(device, "device"), secret=secret, pin=pin)
        record = Record(device=device, sha256=token.digest, expires=int(now + lifetime_s))
        with records.held(self._path.parent):
            self._write([*(old for old in self._read() if old.device != device or old.used is not None), record])
        return token

    def redeem(self, token: Token, device: str, key: str, *, now: float) -> None:
        """The token is used, by this device with this public key (sha256 of it).

        Raises ProvisionError with the exit of its own for each of: unknown or void, another device's, used, expired.
        """
        with records.held(self._path.parent):
            kept = self._read()
            record = next((one for one in kept if hmac.compare_digest(one.sha256, token.digest)), None)
            if record is None:
                raise ProvisionError(Exit.VERIFICATION, f"this token is unknown or void; {_another(device)}")
            _check(record, device, key, now)
            used = msgspec.structs.replace(record, used=record.used or int(now), key=key)
            self._write([used if one is record else one for one in kept])

    def void(self, device: str) -> int:
        """No token of this device is good any more; how many were."""
        with records.held(self._path.parent):
            kept = self._read()
            left = [one for one in kept if one.device != device]
            self._write(left)
        return sum(one.device == device and one.used is None for one in kept)

    def waiting(self, device: str, *, now: float) -> Record | None:
        """The token that this device may still use."""
        usable = (one for one in self._read() if one.device == device and one.used is None and one.expires > now)
        return next(usable, None)

    def _read(self) -> list[Record]:
        return records.read(self._path, list[Record]) or []

    def _write(self, kept: list[Record]) -> None:
        records.write(self._path, kept)


def _check(record: Record, device: str, key: str, now: float) -> None:
    if record.device != device:
        raise ProvisionError(
            Exit.VERIFICATION, f"this token is for device {record.device}, not {device}; {_another(device)}"
        )
    if record.used is not None and not hmac.compare_digest(record.key, key):
        raise ProvisionError(Exit.TOKEN_USED, f"this token was used already, with another key; {_another(device)}")
    if record.expires <= now:
        raise ProvisionError(Exit.TOKEN_EXPIRED, f"this token has expired; {_another(device)}")


def _another(device: str) -> str:
    return f"on the host, run: fedeq fleet token {device}"
