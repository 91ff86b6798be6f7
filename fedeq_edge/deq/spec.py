"""What a model is, as a value that travels: everything that fixes the shape and the formula, no weights, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import msgspec

from fedeq_edge.errors import ConfigError

CellKind = Literal["contractive", "monotone", "residual"]
CellNorm = Literal["max", "spectral"]
Activation = Literal["softplus", "relu"]

# Taps per spatial dimension in every convolutional cell, as published (3x3); zero padding 1 keeps the state's shape.
CELL_KERNEL = 3

# Below this norm a state counts as zero in the relative residual |f(z) - z| / max(|f(z)|, 1e-9) of every backend.
SMALLEST_NORM = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """One strided convolution of the stem, alike in every spatial dimension."""

    inputs: int
    outputs: int
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        """Zeros on each side, so that a length divisible by the stride shrinks by just that factor.

        (k - s + 1) // 2: 5 taps, stride 2 -> 2; 3, 1 -> 1; 12, 4 -> 4 (128 samples -> 32).
        """
        return max(0, (self.kernel - self.stride + 1) // 2)

    def length(self, length: int) -> int:
        """Output length for an input of that length; 0 or less where the kernel does not fit."""
        return (length + 2 * self.padding - self.kernel) // self.stride + 1


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An equilibrium model: stem, cell, pooled linear head. Raises ConfigError where the parts do not fit.

    input_shape: one sample, (features,), (channels, length) or (channels, height, width): a dense, 1-D or 2-D model.
    cell:  contractive: z = tanh(W * z + u), W in the ball of `radius` < 1 of `norm`, hence well posed (wellposed.py);
           radius None leaves W free. z0 = tanh(u).
           monotone: z = relu(W z + u), dense, eigenvalues of (W + W') / 2 at most `radius` < 1, hence well posed with
           |W| of any size. z0 = relu(a u), each evaluation goes the share a (wellposed.py) of the way.
           residual: the published block z = GN(act(z + GN(u + conv(GN(act(conv z)))))), no convolution bias; z0 = u.
    damping: of a residual cell: each evaluation goes this share of the way to the block's answer, which moves no fixed
           point (algorithm.md section 1 (c)); 1 is the published block.
    norm:  of a contractive cell. max: l1 norms of the rows of W, over taps and input channels, that is |W|_inf.
           spectral: largest singular values, added up over the taps. Rows are cheaper to project; the spectral ball
           holds matrices whose rows are up to sqrt(channels) times longer.
    activation: of the residual block; softplus is the published one.
    channels: of the state (its width in a dense model). inner_channels: between the residual block's two convolutions
           (None: as `channels`). groups: of a GroupNorm over `channels`; other widths keep its channels per group.
    stem_kernel, stem_stride: taps and stride of the stem. stem_width: None makes the stem one convolution with bias;
           a number makes it conv -> GN -> relu -> conv (3 taps, same stride) -> GN with so many channels in between.
    pool: cells of the grid, per spatial dimension, into which the state is averaged before the head (1: global mean).
    shift, scale: fixed input normalisation (x - shift) / scale, per channel or one value for all; empty: none.

    Source: algorithm.md section 1 after FeDEQ, arXiv 2309.15659; the compact forms are ours.
    """

    input_shape: tuple[int, ...]
    classes: int
    cell: CellKind = "contractive"
    activation: Activation = "relu"
    channels: int = 32
    inner_channels: int | None = None
    groups: int = 8
    radius: float | None = 0.9
    norm: CellNorm = "max"
    damping: float = 1.0
    stem_kernel: int = 3
    stem_stride: int = 1
    stem_width: int | None = None
    pool: int = 1
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        _check_sizes(self)
        _check_dense(self)
        _check_kind(self)
        _check_groups(self)
        _check_radius(self)
        _check_normalisation(self)
        _check_state(self)

    @property
    def spatial(self) -> int:
        """Spatial dimensions of the state: 0 dense, 1 sequence, 2 image."""
        return len(self.input_shape) - 1

    @property
    def inner(self) -> int:
        """Channels between the residual block's convolutions."""
        return self.channels if self.inner_channels is None else self.inner_channels

    @property
    def stem_stages(self) -> tuple[Convolution, ...]:
        """Convolutions of the stem in order: none in a dense model, two when `stem_width` is given."""
        if not self.spatial:
            return ()
        inputs, kernel, stride = self.input_shape[0], self.stem_kernel, self.stem_stride
        if self.stem_width is None:
            return (Convolution(inputs=inputs, outputs=self.channels, kernel=kernel, stride=stride),)
        first = Convolution(inputs=inputs, outputs=self.stem_width, kernel=kernel, stride=stride)
        return first, Convolution(inputs=self.stem_width, outputs=self.channels, kernel=3, stride=stride)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one sample's state z."""
        return self._stem_shapes[-1] if self.stem_stages else (self.channels,)

    @property
    def _stem_shapes(self) -> list[tuple[int, ...]]:
        """Shape of one sample after each stage of the stem."""
        shapes, lengths = list[tuple[int, ...]](), self.input_shape[1:]
        for stage in self.stem_stages:
            lengths = tuple(stage.length(length) for length in lengths)
            shapes.append((stage.outputs, *lengths))
        return shapes

    @property
    def widest_bytes(self) -> int:
        """Bytes of the widest float32 tensor that a convolution or cell computes of one sample."""
        inner = (self.inner, *self.state_shape[1:])
        return 4 * max(map(prod, (*self._stem_shapes, self.state_shape, inner)))

    @property
    def pool_windows(self) -> tuple[tuple[int, int], ...]:
        """(kernel, stride) of the average pooling per spatial dimension: exactly `pool` windows that cover every state.

        stride = L // pool, kernel = the rest: 7 -> (4, 3), 8 -> (4, 4) for a grid of 2. Windows are alike, unlike those
        of adaptive pooling, so one ONNX AveragePool computes the same.
        """
        strides = (length // self.pool for length in self.state_shape[1:])
        return tuple(
            (length - (self.pool - 1) * stride, stride)
            for length, stride in zip(self.state_shape[1:], strides, strict=True)
        )

    @property
    def features(self) -> int:
        """Numbers per sample that the head reads."""
        return self.channels * prod([self.pool] * self.spatial)

    def norm_groups(self, width: int) -> int:
        """GroupNorm groups over `width` channels: as many channels per group as over `channels`."""
        return width * self.groups // self.channels


def read_spec(model: Mapping[str, object]) -> ModelSpec:
    """The model of a manifest or a file. Raises ConfigError where this version does not know such a model."""
    try:
        return msgspec.convert(model, ModelSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"model: this version does not know it: {error}; update fedeq-edge here") from error


def published(input_shape: tuple[int, ...], classes: int, size: Literal["S", "M"]) -> ModelSpec:
    """The published vision block (S: 64/128 channels, M: 128/256) with a global mean in place of its flattened head.

    Source: FeDEQ, arXiv 2309.15659; sizes in algorithm.md section 1. The mean shrinks the payload (ibid.).
    """
    channels = 64 if size == "S" else 128
    return ModelSpec(
        input_shape=input_shape,
        classes=classes,
        cell="residual",
        activation="softplus",
        channels=channels,
        inner_channels=2 * channels,
    )


def _check_sizes(spec: ModelSpec) -> None:
    if not 1 <= len(spec.input_shape) <= 3 or min(spec.input_shape) < 1:
        raise ConfigError(
            f"model: input_shape {spec.input_shape} is none of (features,), (channels, length), "
            "(channels, height, width); give the shape of one sample"
        )
    if spec.classes < 2:
        raise ConfigError(f"model: classes is {spec.classes}; a classifier needs at least 2")
    for name in ("channels", "groups", "stem_kernel", "stem_stride", "pool", "inner_channels", "stem_width"):
        number = getattr(spec, name)
        if number is not None and number < 1:
            raise ConfigError(f"model: {name} is {number}; set it to at least 1")


def _check_dense(spec: ModelSpec) -> None:
    if spec.spatial:
        return
    if spec.cell == "residual":
        raise ConfigError(
            f'model: cell "residual" convolves, but input_shape {spec.input_shape} is dense; use cell = "contractive", '
            f"or give samples of shape (1, {spec.input_shape[0]})"
        )
    if spec.stem_width is not None or spec.pool != 1:
        raise ConfigError(
            f"model: stem_width and pool need a sequence or an image, but input_shape {spec.input_shape} is dense; "
            "remove them"
        )


def _check_kind(spec: ModelSpec) -> None:
    if spec.cell == "monotone" and spec.spatial:
        raise ConfigError(
            f'model: cell "monotone" is dense, but input_shape {spec.input_shape} is not; use cell = "contractive" '
            f'with norm = "spectral", or flatten the samples to ({prod(spec.input_shape)},), as by data.flat'
        )
    if spec.cell == "monotone" and spec.radius is None:
        raise ConfigError('model: a monotone cell needs a radius below 1; for a free one use cell = "contractive"')
    if not 0.0 < spec.damping <= 1.0:
        raise ConfigError(
            f"model: damping is {spec.damping}; choose 0 < damping <= 1, the share of the way per evaluation"
        )
    if spec.cell != "residual" and spec.damping != 1.0:
        raise ConfigError(f'model: damping = {spec.damping} belongs to cell = "residual"; remove it or change the cell')
    if spec.cell != "contractive" and spec.norm != "max":
        raise ConfigError(f'model: norm = "{spec.norm}" belongs to cell = "contractive"; remove it or change the cell')


def _check_groups(spec: ModelSpec) -> None:
    normalised = {"stem_width": spec.stem_width}
    if spec.cell == "residual":
        normalised |= {"channels": spec.channels, "inner_channels": spec.inner_channels}
    widths = {name: width for name, width in normalised.items() if width is not None}
    if not widths:
        return
    per_group, rest = divmod(spec.channels, spec.groups)
    if rest:
        raise ConfigError(
            f"model: channels = {spec.channels} is not divisible by groups = {spec.groups}; change one of them"
        )
    for name, width in widths.items():
        if width % per_group:
            raise ConfigError(
                f"model: {name} = {width} is not a multiple of the {per_group} channels per group (channels / groups); "
                f"use {per_group * max(1, width // per_group)} or change groups"
            )


def _check_radius(spec: ModelSpec) -> None:
    if spec.radius is not None and not 0.0 < spec.radius < 1.0:
        raise ConfigError(
            f"model: radius is {spec.radius}; well-posedness needs 0 < radius < 1 (None leaves a contractive cell free)"
        )


def _check_normalisation(spec: ModelSpec) -> None:
    for name in ("shift", "scale"):
        values = getattr(spec, name)
        if len(values) not in (0, 1, spec.input_shape[0]):
            raise ConfigError(
                f"model: {name} has {len(values)} values; give none, one, or one for each of the {spec.input_shape[0]} "
                "input channels"
            )
    if any(not value > 0.0 for value in spec.scale):
        raise ConfigError(f"model: scale {spec.scale} divides the input; every value must be above 0")


def _check_state(spec: ModelSpec) -> None:
    lengths = spec.state_shape[1:]
    if prod(lengths) < 1 or any(length < spec.pool for length in lengths):
        raise ConfigError(
            f"model: input_shape {spec.input_shape} leaves a state of {lengths} after the stem, smaller than the "
            f"pooling grid of {spec.pool}; lower stem_stride, stem_kernel or pool"
        )
