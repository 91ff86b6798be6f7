"""Equilibria of earlier solves as starts of later ones, as long as the weights have hardly moved since.

On a slow cell (contraction rate 0.94) a solve to 1e-4 takes 177 plain evaluations from zero, 2 after the parameters
moved by a relative 1e-4, 9 after 1e-3, 60 after 1e-2 and 154 after 1e-1. So a start from the cache pays between the
steps of a local epoch, and not after a server round that moved the weights by ten per cent.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fedeq_edge.deq.batch import norms
from fedeq_edge.errors import ConfigError


class WarmStart:
    """States of `samples` training samples, kept by sample index, each with the place of theta when it was solved.

    The place is the length of theta's path so far, sum |theta_t - theta_{t-1}| / |theta_t|, which no detour shortens: a
    state stamped at s belongs to weights at most path - s away. Beyond `limit` it is not used.

    theta (p,): the parameters now. state_shape: of one sample. capacity_bytes: bound of the states' memory, allocated
    at once; where it holds fewer than all samples, those that come first are kept, since an epoch meets every sample
    once and replacing would evict each before its next turn. Raises ConfigError where not even one state fits, or for
    a limit that is not above 0.
    """

    def __init__(
        self,
        theta: Tensor,
        *,
        samples: int,
        state_shape: Sequence[int],
        capacity_bytes: int,
        limit: float = 1e-2,
    ) -> None:
        slots = min(samples, capacity_bytes // (prod(state_shape) * theta.element_size()))
        if slots < 1 or not limit > 0.0:
            raise ConfigError(
                f"warm start: {capacity_bytes} bytes hold {slots} states of shape {tuple(state_shape)} and limit is "
                f"{limit}; give room for one state at least and a limit above 0"
            )
        self._theta = theta.detach().clone()
        self._path = 0.0
        self._limit = limit
        self._states = theta.new_empty(slots, *state_shape)
        self._stamps = torch.zeros(slots, dtype=torch.float64)
        self._taken = 0
        # Slot of each sample, -1 while it has none.
        self._slots = torch.full((samples,), -1, dtype=torch.int64)

    def moved(self, theta: Tensor) -> None:
        """The parameters are theta (p,) now; call it after every step that changed them."""
        length = theta.norm().clamp_min(torch.finfo(theta.dtype).tiny)
        self._path += float((theta - self._theta).norm() / length)
        self._theta.copy_(theta)

    def start(self, rows: Tensor, fallback: Tensor) -> Tensor:
        """z_0 (B, ...) for samples `rows` (B,) int64: the kept state where it is fresh, else that of `fallback`."""
        slots = self._slots[rows]
        # Written so that a path that is NaN or infinite makes every state stale.
        fresh = (slots >= 0) & (self._path - self._stamps[slots] <= self._limit)
        start = fallback.clone()
        start[fresh] = self._states[slots[fresh]]
        return start

    def keep(self, rows: Tensor, states: Tensor) -> None:
        """The states (B, ...) of samples `rows`, each named once, solved with the parameters as they are now, are kept
        unless they are not finite.
        """
        finite = torch.isfinite(norms(states))
        rows, states = rows[finite], states[finite]
        self._assign(rows)
        slots = self._slots[rows]
        kept = slots >= 0
        self._states[slots[kept]] = states[kept].detach()
        self._stamps[slots[kept]] = self._path

    def _assign(self, rows: Tensor) -> None:
        """Samples without a slot get one, while there are any left."""
        new = rows[self._slots[rows] < 0][: len(self._states) - self._taken]
        self._slots[new] = torch.arange(self._taken, self._taken + len(new))
        self._taken += len(new)
