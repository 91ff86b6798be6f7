"""Explicit networks that equilibrium models are compared with, as values (no torch; explicit.py builds them).

All are features and a linear head, so that personal heads and refits work alike. They have GroupNorm where the
published ones have BatchNorm, whose running statistics are no consensus variables (algorithm.md, section 1); the
parameters are as many.
"""

import difflib
from collections.abc import Callable
from math import prod
from typing import Literal

import msgspec

from fedeq_edge.errors import ConfigError


class ExplicitSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network of explicit layers. Raises ConfigError where the parts do not fit.

    input_shape: one sample, (features,), (channels, length) or (channels, height, width).
    network: mlp: dense layers of `widths`, relu after each, on the flattened sample.
             cnn: for each of `widths` a convolution of `kernel` taps with bias, relu, a maximum over 2 per dimension.
             resnet: images alone; a 3x3 convolution, then groups of `blocks` basic blocks of `widths` channels, each
             group but the first at half the resolution; global mean.
    dense: layers between that and the head, relu after each; in a resnet a GroupNorm ends them, as published.
    shortcut: of a resnet where widths change: "padded" (identity, zeros for new channels) or "projected" (1x1).
    groups: of every GroupNorm. shift, scale: fixed input normalisation, as of `ModelSpec`.
    """

    network: Literal["mlp", "cnn", "resnet"]
    input_shape: tuple[int, ...]
    classes: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()
    kernel: int = 3
    shortcut: Literal["padded", "projected"] = "padded"
    groups: int = 8
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        self._check_sizes()
        self._check_network()
        if self.network == "resnet":
            self._check_resnet()
        for name in ("shift", "scale"):
            if len(getattr(self, name)) not in (0, 1, self.input_shape[0]):
                raise ConfigError(f"network: {name} has {len(getattr(self, name))} values; give none, one, or one each")

    @property
    def grid(self) -> tuple[int, ...]:
        """Lengths of what a cnn hands to its dense layers; () for the others, which hand on a vector."""
        return tuple(length >> len(self.widths) for length in self.input_shape[1:]) if self.network == "cnn" else ()

    @property
    def pooled(self) -> int:
        """Numbers per sample that reach the dense layers."""
        return self.widths[-1] * prod(self.grid)

    @property
    def features(self) -> int:
        """Numbers per sample that the head reads."""
        return self.dense[-1] if self.dense else self.pooled

    def _check_sizes(self) -> None:
        numbers = (*self.input_shape, *self.widths, *self.blocks, *self.dense, self.kernel, self.groups)
        if not 1 <= len(self.input_shape) <= 3 or not self.widths or min(numbers) < 1:
            raise ConfigError(
                f"network: input_shape {self.input_shape} with widths {self.widths}; give one to three lengths and at "
                "least one width, every number at least 1"
            )
        if self.classes < 2:
            raise ConfigError(f"network: classes is {self.classes}; a classifier needs at least 2")

    def _check_network(self) -> None:
        if self.network == "cnn" and (len(self.input_shape) == 1 or min(self.grid) < 1 or self.kernel % 2 == 0):
            raise ConfigError(
                f"network: a cnn of {len(self.widths)} halvings and {self.kernel} taps on samples of shape "
                f"{self.input_shape}; give sequences or images, fewer widths, an odd kernel"
            )
        if self.network != "resnet" and self.blocks:
            raise ConfigError(f'network: blocks belong to a resnet; leave them out of "{self.network}"')

    def _check_resnet(self) -> None:
        if len(self.input_shape) != 3 or len(self.blocks) != len(self.widths):
            raise ConfigError(
                f"network: a resnet on samples of shape {self.input_shape} with {len(self.widths)} widths and "
                f"{len(self.blocks)} blocks; give images, and as many blocks as widths"
            )
        odd = [width for width in (*self.widths, *self.dense[-1:]) if width % self.groups]
        if odd:
            raise ConfigError(f"network: width {odd[0]} is not divisible by groups = {self.groups}; change one of them")


def resnet_cifar(blocks: tuple[int, int, int]) -> Callable[[tuple[int, ...], int], ExplicitSpec]:
    """FeDEQ's residual networks for CIFAR-100: three groups, padded shortcuts, dense 256 and 128."""
    return lambda input_shape, classes: ExplicitSpec(
        network="resnet",
        input_shape=input_shape,
        classes=classes,
        widths=(64, 128, 256),
        blocks=blocks,
        dense=(256, 128),
    )


def resnet_femnist(blocks: tuple[int, int, int, int]) -> Callable[[tuple[int, ...], int], ExplicitSpec]:
    """FeDEQ's residual networks for FEMNIST: four narrower groups, projected shortcuts, dense 256 and 128."""
    return lambda input_shape, classes: ExplicitSpec(
        network="resnet",
        input_shape=input_shape,
        classes=classes,
        widths=(32, 64, 128, 256),
        blocks=blocks,
        dense=(256, 128),
        shortcut="projected",
    )


def cnn_fedavg(input_shape: tuple[int, ...], classes: int) -> ExplicitSpec:
    """The convolutional network of FedAvg, arXiv 1602.05629: 1,663,370 parameters on MNIST."""
    return ExplicitSpec(
        network="cnn", input_shape=input_shape, classes=classes, widths=(32, 64), dense=(512,), kernel=5
    )


NETWORKS: dict[str, Callable[[tuple[int, ...], int], ExplicitSpec]] = {
    "resnet14-cifar": resnet_cifar((1, 2, 3)),
    "resnet20-cifar": resnet_cifar((2, 3, 4)),
    "resnet34-cifar": resnet_cifar((3, 5, 8)),
    "resnet14-femnist": resnet_femnist((1, 2, 2, 1)),
    "resnet20-femnist": resnet_femnist((2, 3, 2, 2)),
    "resnet34-femnist": resnet_femnist((3, 4, 5, 3)),
    "cnn-fedavg": cnn_fedavg,
}
"""By name, of (input_shape, classes). FeDEQ (arXiv 2309.15659) runs its "ResNet-34" in the two sizes given here."""


def network(
    name: str,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    shift: tuple[float, ...] = (),
    scale: tuple[float, ...] = (),
) -> ExplicitSpec:
    """The network of that name for such samples. Raises ConfigError naming the nearest one."""
    if name in NETWORKS:
        return msgspec.structs.replace(NETWORKS[name](input_shape, classes), shift=shift, scale=scale)
    nearest = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.0)
    raise ConfigError(f"there is no network {name!r}, nearest is {nearest[0]!r}; known are {', '.join(NETWORKS)}")
