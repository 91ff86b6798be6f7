"""A model and a plan to start from, by the kind of data: what this project's measurements support (no torch).

Chosen on validation parts cut from training data, never on test parts. Accuracy there, federation and training alone,
mean over devices:

    features   HAR, 207 statistics, 30 people      0.948   0.914   1 seed; heads shared (personal 0.937)
    sequences  HAR, raw windows, 30 people         0.924   0.852   1 seed; heads personal (shared 0.918)
    images     digits, 6 devices, 60 images each   0.984   0.963   10 runs; heads shared
    images     MNIST, 20 writers                   0.979   0.842   1 seed; heads shared

Alone means the same steps, but 3 epochs in place of 5 for the digits, which was no worse for it.
Starting points for data of about these sizes, not optima.
"""

from msgspec.structs import replace

from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.step import Plan

Shape = tuple[int, ...]

PERSONAL = METHODS["admm"]
SHARED = replace(PERSONAL, heads="consensus_refit")

# A strided stem shortens sequences to about so many positions: each one is paid for in every evaluation.
SEQUENCE_POSITIONS = 32
# Images up to this side keep their resolution: a stride cost 2 to 3 points on 8x8 digits.
SMALL_IMAGE = 12


def recommend(
    input_shape: Shape, classes: int, *, shift: tuple[float, ...] = (), scale: tuple[float, ...] = ()
) -> tuple[ModelSpec, Plan, Method]:
    """(model, plan, method) for samples of `input_shape`: (features,), (channels, length) or (channels, height, width).

    shift, scale: mean and standard deviation of the fleet's training data per channel; without them the samples are
    taken to be of order one. Raises ConfigError for another shape.
    """
    kinds = {1: _features, 2: _sequence, 3: _image}
    if len(input_shape) not in kinds:
        raise ConfigError(
            f"model: samples of shape {input_shape} are no features, sequence or image; "
            "reshape them to (features,), (channels, length) or (channels, height, width)"
        )
    spec, plan, method = kinds[len(input_shape)](input_shape, classes)
    return replace(spec, shift=shift, scale=scale), plan, method


def _features(input_shape: Shape, classes: int) -> tuple[ModelSpec, Plan, Method]:
    spec = ModelSpec(input_shape=input_shape, classes=classes, channels=64)
    return spec, Plan(rounds=30, batch=32, learning_rate=0.03), SHARED


def _sequence(input_shape: Shape, classes: int) -> tuple[ModelSpec, Plan, Method]:
    stride = max(1, round(input_shape[1] / SEQUENCE_POSITIONS))
    spec = ModelSpec(
        input_shape=input_shape,
        classes=classes,
        cell="residual",
        channels=32,
        stem_kernel=3 * stride,
        stem_stride=stride,
    )
    return spec, Plan(rounds=30, batch=32, learning_rate=0.3, budgets=(2, 3, 4, 6, 8)), PERSONAL


def _image(input_shape: Shape, classes: int) -> tuple[ModelSpec, Plan, Method]:
    if max(input_shape[1:]) <= SMALL_IMAGE:
        spec = ModelSpec(input_shape=input_shape, classes=classes, cell="residual", channels=16, stem_width=8, pool=4)
        return spec, Plan(epochs=5, learning_rate=0.1), SHARED
    spec = ModelSpec(
        input_shape=input_shape,
        classes=classes,
        cell="residual",
        channels=32,
        stem_width=16,
        stem_kernel=5,
        stem_stride=2,
        pool=2,
    )
    return spec, Plan(epochs=2, learning_rate=0.1), SHARED
