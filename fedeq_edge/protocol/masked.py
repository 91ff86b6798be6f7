"""Whether this machine can take part in masked rounds (extra "masking"), for those who must not need it to know."""

import importlib.util
from typing import Final

from fedeq_edge.errors import ConfigError

FEATURE: Final = "masked"
"""A device that can says so among the codecs of its birth."""


def features() -> tuple[str, ...]:
    """What a device of this machine adds to the codecs of its birth."""
    return (FEATURE,) if importlib.util.find_spec("cryptography") else ()


def check_installed() -> None:
    """Raises ConfigError where this machine cannot mask."""
    if not features():
        raise ConfigError("masked sums need cryptography: pip install 'fedeq-edge[masking]'")
