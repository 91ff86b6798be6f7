"""scikit-learn's handwritten digits as a fleet of devices that differ: the data of `fedeq demo`.

1797 images of 8 x 8 pixels with 17 grey levels (E. Alpaydin, C. Kaynak, UCI 1998, test part; CC BY 4.0).
"""

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.npz import ClientData
from fedeq_edge.data.partition import by_labels, label_sets
from fedeq_edge.errors import DataError

DIGITS = 10


def digits_fleet(
    *, devices: int = 6, labels: int = 5, train_per_device: int = 60, seed: int = 0
) -> dict[str, ClientData]:
    """Devices "device-0", ... with `labels` of the ten digits each and about as little data as a real one has.

    x: (N, 1, 8, 8) float32 in [0, 1]. y: the digit, the same label on every device. Every digit is on the same
    number of devices, or on one more. No image is on two devices or in both parts: after `train_per_device`
    training images each, all others of a digit are test images, in equal parts among the devices that have it.
    Raises DataError when scikit-learn is missing or the digits do not suffice.
    """
    x, y = _load()
    sets = label_sets(devices, labels, DIGITS, seed=seed)
    train = by_labels(y, sets, per_client=train_per_device, seed=seed)
    rest = np.setdiff1d(np.arange(y.size), np.concatenate(train))
    test = [rest[part] for part in by_labels(y[rest], sets, per_client=None, seed=seed + 1)]
    return {
        f"device-{i}": ClientData(x_train=x[mine], y_train=y[mine], x_test=x[theirs], y_test=y[theirs])
        for i, (mine, theirs) in enumerate(zip(train, test, strict=True))
    }


def _load() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - optional, and slow to import
    except ImportError:
        raise DataError("the digits come with scikit-learn; run: pip install 'fedeq-edge[demo]'") from None
    images, y = load_digits(return_X_y=True)
    return (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), y.astype(np.int64)
