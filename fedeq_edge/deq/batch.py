"""Samples of a batch one by one: norms over everything but the batch, and selection of whole samples."""

import torch
from torch import Tensor


def norms(states: Tensor) -> Tensor:
    """(B,) L2 norms of states (B, ...)."""
    lengths: Tensor = torch.linalg.vector_norm(states.flatten(1), dim=1)
    return lengths


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) as (B, 1, ...), to broadcast against or select whole samples of `like` (B, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
