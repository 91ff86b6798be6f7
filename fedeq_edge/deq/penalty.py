"""The Jacobian penalty: what keeps a cell contractive where no constraint can (normalisation in the loop)."""

import torch
from torch import Tensor

from fedeq_edge.deq.solvers import StepFunction


def jacobian_penalty(f: StepFunction, z: Tensor, generator: torch.Generator) -> Tensor:
    """Mean over samples and coordinates of (J^T eps)^2, J = df/dz at z (B, ...): an estimate of |J|_F^2 per coordinate.

    A scalar whose gradient reaches the parameters of f, and what else f closes over, by double backward; z counts as a
    constant. eps: one probe of +-1 per coordinate from `generator`, whose estimate has less variance than a normal one
    with the same mean (Hutchinson). With its backward it costs as much as 10 to 14 evaluations without graph.
    Source: Bai, Koltun, Kolter, ICML 2021, arXiv 2106.14342.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        fz = f(z)
        probe = torch.empty_like(fz).bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
        (product,) = torch.autograd.grad(fz, z, probe, create_graph=True)
    return product.square().mean()
