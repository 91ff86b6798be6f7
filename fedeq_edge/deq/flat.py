"""Modules over two flat parameter vectors: what is shared (theta) and what may stay on the device (head).

Parameters are views of the two, their gradients views of two flat gradient tensors. What travels is flat, so loading,
projecting and stepping copy nothing twice.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedeq_edge.deq.layout import Layout, checked, size


class FlatModule(nn.Module):
    """theta (p,), head_vector (h,): flat parameters; theta_grad, head_grad: flat gradients.

    Gradients are zeroed by `zero_grad` and filled by `backward`. In-place changes of the flat tensors change the
    module. It lives on the CPU in the dtype that it was built with: `.to` would cut the views, so build another and
    load it. A subclass makes its layers, then calls `flatten`.
    """

    def flatten(self, theta: Layout, head: Layout, dtype: torch.dtype = torch.float32) -> None:
        """The parameters that the layouts name are zero, and views of the flat vectors."""
        self._layouts = theta, head
        self.theta, self.theta_grad = _bind(self, theta, dtype)
        self.head_vector, self.head_grad = _bind(self, head, dtype)
        self._leaves = list(self.parameters())

    def load(self, theta: NDArray[np.floating], head: NDArray[np.floating]) -> None:
        """The module computes with these parameters, copies of theta (p,) and head (h,).

        Raises ConfigError, before anything has changed, for another size and for NaN or infinity.
        """
        loaded = (
            (self.theta, _checked("theta", theta, self.theta, self._layouts[0])),
            (self.head_vector, _checked("head", head, self.head_vector, self._layouts[1])),
        )
        for flat, vector in loaded:
            flat.copy_(vector)
        self._follow_theta()

    def backward(self, loss: Tensor) -> None:
        """The gradient of `loss` is added to theta_grad and head_grad; the input gets none."""
        torch.autograd.backward(loss, inputs=self._leaves)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Flat gradients are zero. They stay where they are: set_to_none, torch's default, would cut the views."""
        del set_to_none
        self.theta_grad.zero_()
        self.head_grad.zero_()

    def _follow_theta(self) -> None:
        """What depends on theta is as it says now."""


def _checked(name: str, vector: NDArray[np.floating], flat: Tensor, layout: Layout) -> Tensor:
    """`vector` in the dtype of `flat`. Raises ConfigError where it does not fit or is not finite."""
    with np.errstate(over="ignore"):  # what overflows is named
        fresh = np.ascontiguousarray(vector).astype(flat.numpy().dtype, copy=False)
    return torch.from_numpy(checked(name, fresh, layout))


def _bind(model: nn.Module, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(flat parameters, flat gradients), zero, with the named parameters of the model made views of them."""
    flat, gradient = torch.zeros(size(layout), dtype=dtype), torch.zeros(size(layout), dtype=dtype)
    for slot in layout:
        owner, _, name = slot.name.rpartition(".")
        parameter = nn.Parameter(flat[slot.offset : slot.end].view(slot.shape))
        parameter.grad = gradient[slot.offset : slot.end].view(slot.shape)
        setattr(model.get_submodule(owner), name, parameter)
    return flat, gradient
