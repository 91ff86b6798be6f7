"""Texts that may be shown to a stranger: without keys, tokens and passwords."""

import re
from typing import Final

from fedeq_edge.transport.mqtt import without_secrets

# Passwords and tokens have many shapes: better a harmless word too much is taken out.
_SECRETS: Final = (
    re.compile(r"-----BEGIN [^-]*PRIVATE KEY-----.*?(-----END [^-]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"fedeq1\.[\w.-]+"),
    re.compile(r"(?<=//)[^\s\"'<>]*(?=@)"),
    re.compile(r"(?i)\b(?:bearer|basic)\s+[\w.~+/=-]{8,}"),
    re.compile(
        r"(?i)(?<![a-z])[\w.-]*(?:password|passwd|passphrase|secret|token|api[_-]?key|private[_-]?key)[\w.-]*[\"']?"
        r"\s*[=:]\s*(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}\]]+)"
    ),
)


def without(text: str) -> str:
    """The text without keys, tokens and passwords, as far as they can be told from other words."""
    for pattern in _SECRETS:
        text = pattern.sub("[removed]", text)
    return without_secrets(text)


def printable(text: str) -> str:
    """The text without what would steer a terminal, line ends included."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
