"""Samples of a batch one by one: norms over everything but the batch, and selection of whole samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedeq_edge.deq.spec import SMALLEST_NORM


def norms(states: Tensor) -> Tensor:
    """(B,) L2 norms of states (B, ...)."""
    lengths: Tensor = torch.linalg.vector_norm(states if states.dim() == 2 else states.flatten(1), dim=1)
    return lengths


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """(B,) |f(z) - z| / max(|f(z)|, 1e-9), L2 over everything but the batch; infinite where |f(z)| is."""
    length = norms(fz)
    return torch.where(torch.isinf(length), torch.inf, norms(fz - z) / length.clamp_min(SMALLEST_NORM))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) as (B, 1, ...), to broadcast against or select whole samples of `like` (B, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def put(target: Tensor, samples: Sequence[int], source: Tensor) -> None:
    """`samples` of `target` (B, ...) are those of `source`: copies of rows, so NaN elsewhere does no harm."""
    if samples:
        rows = torch.tensor(samples, device=target.device)
        target.index_copy_(0, rows, source.index_select(0, rows))
