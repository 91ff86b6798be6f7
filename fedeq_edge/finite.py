"""Numbers that JSON does not know."""

import math
from collections.abc import Mapping


def finite(value: object) -> object:
    """`value` for JSON: NaN and infinity, which JSON does not know, are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
