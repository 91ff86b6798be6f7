import numpy as np
import pytest

from fedeq_edge.data.npz import ClientData
from fedeq_edge.demo.source import device_ids, statistics


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["1", "2", "10"], ["client-1", "client-2", "client-10"]),
        (["ann", "bob"], ["ann", "bob"]),
        (["Ann", "ann", "bob"], ["client-1", "client-2", "client-3"]),
        (["-1", "0", "1"], ["client-1", "client-2", "client-3"]),
        (["01", "1"], ["client-1", "client-2"]),
    ],
)
def test_every_client_has_an_id_of_its_own(names: list[str], ids: list[str]) -> None:
    assert device_ids(names) == ids


def test_dense_data_is_normalised_by_one_value_for_all_features() -> None:
    x = np.arange(2000, dtype=np.float32).reshape(4, 500)
    data = ClientData(x_train=x, y_train=np.array([0, 1, 0, 1]), x_test=x[:0], y_test=np.zeros(0, np.int64))
    shift, scale = statistics({"a": data})
    assert shift == (999.5,)
    assert len(scale) == 1
