"""Whether this machine can take part in masked rounds (extra "masking"), for those who must not need it to know."""

import importlib.util
from typing import Final

from fedeq_edge.errors import ConfigError

FEATURE: Final = "masked"
"""A device that can says so among the codecs of its birth."""


def installed() -> bool:
    """Whether this machine can mask: the extra "masking" is there."""
    return importlib.util.find_spec("cryptography") is not None


def check_installed() -> None:
    """Raises ConfigError where this machine cannot."""
    if not installed():
        raise ConfigError("masked sums need cryptography: pip install 'fedeq-edge[masking]'")
