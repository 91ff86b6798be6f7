"""What is proven of a well-posed cell's answer (wellposed.py proves it), as values that travel; no numpy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """For every input, |z_K - z*| <= `bound` after K = `evaluations` plain ones in float32 from the cell's own start.

    norm: max: largest absolute entry of a sample's state; rms: L2 over the root of its size. gamma: rate in that norm.
    unit: state: the bound as it stands (entries of z* are below 1). injection: the bound times the rms of u.
    """

    norm: Literal["max", "rms"]
    gamma: float
    evaluations: int
    bound: float
    unit: Literal["state", "injection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What parameters promise at every budget: all that a certificate needs of them, in a form that travels.

    norm, gamma, unit: as in `Certificate`. scale: the bound on |z_0 - z*| / gamma; rounding: what float32 adds to it.
    """

    norm: Literal["max", "rms"]
    gamma: float
    scale: float
    rounding: float
    unit: Literal["state", "injection"]

    def certificate(self, evaluations: int) -> Certificate:
        """The promise after so many evaluations >= 1."""
        bound = self.scale * (self.gamma ** (evaluations + 1) + self.rounding)
        return Certificate(norm=self.norm, gamma=self.gamma, evaluations=evaluations, bound=bound, unit=self.unit)
