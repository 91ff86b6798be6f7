"""Settings of sums that hide what they are made of: the server learns S = sum omega_i step_i and no step_i.

The masks are in fedeq_edge/masking, which needs cryptography; this module needs nothing.
"""

import math
from typing import Final

import msgspec

from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ConfigError

MEMBERS_LEAST: Final = 3  # the sum of two tells each of them the other's vector


class Masking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pairwise-masked rounds, checked when made (ConfigError).

    limit: no parameter of a masked difference is larger, > 0: with it, what a value takes on the wire is known before
    anybody has trained. threshold: share of a round's devices that must stay to its end, above a half, at most 1; the
    others may drop out at any moment. step_s: how long the slowest device may take to answer one message of the
    exchange, seconds > 0.
    """

    limit: float = 4.0
    threshold: float = 2 / 3
    step_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("limit", "step_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"masking.{name} is {getattr(self, name)}; give a finite number above 0")
        if not 0.5 < self.threshold <= 1.0:
            raise ConfigError(f"masking.threshold is {self.threshold}; give a share above 0.5, at most 1")

    def check(self, method: Method) -> None:
        """The method can run under this. Raises ConfigError naming the field that stands in the way."""
        if method.server != "mean":
            raise ConfigError(
                f"masking: method {method.name} has server = {method.server!r}, which takes the dual of a device that "
                'leaves out of its sum, and nobody knows it here; set server = "mean"'
            )
        if method.sees_each:
            raise ConfigError(
                f"masking: method {method.name} looks at every single difference, and nobody can here; set robust = "
                '"none", and neither norm_limit nor min_cosine'
            )

    def bound(self, omega: int, penalty: int) -> int:
        """No entry of omega_i step_i is larger, in units 2^-32. penalty: kappa_i 2^32."""
        return omega * math.ceil(penalty * self.limit)
