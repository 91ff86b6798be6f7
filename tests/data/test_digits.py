import sys

import numpy as np
import pytest

from fedeq_edge.data.digits import digits_fleet
from fedeq_edge.data.npz import describe
from fedeq_edge.errors import DataError

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra `demo`)")


def test_the_demo_fleet_has_five_digits_and_sixty_training_images_per_device() -> None:
    fleet = digits_fleet()
    summary = describe(fleet)
    assert (len(fleet), summary.shape, summary.classes) == (6, (1, 8, 8), 10)
    for name, data in fleet.items():
        assert sorted(summary.clients[name].histogram) == [0] * 5 + [12] * 5
        assert set(data.y_test) == set(data.y_train)
        assert data.x_train.dtype == np.float32
        assert data.x_train.min() == 0.0
        assert data.x_train.max() == 1.0
    holders = np.sum([np.array(client.histogram) > 0 for client in summary.clients.values()], axis=0)
    assert set(holders) == {3}


def test_every_image_is_on_one_device_in_one_part() -> None:
    fleet = digits_fleet()
    images = np.concatenate([part for data in fleet.values() for part in (data.x_train, data.x_test)])
    assert images.shape == (1797, 1, 8, 8)
    assert np.unique(images.reshape(1797, -1), axis=0).shape[0] == 1797  # the set has no two equal images


def test_another_seed_deals_other_images_and_the_same_seed_the_same() -> None:
    assert (digits_fleet(seed=3)["device-0"].x_train == digits_fleet(seed=3)["device-0"].x_train).all()
    assert (digits_fleet(seed=3)["device-0"].x_train != digits_fleet(seed=4)["device-0"].x_train).any()


def test_more_images_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="ask for fewer samples"):
        digits_fleet(devices=6, train_per_device=600)


def test_a_missing_scikit_learn_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fedeq-edge\[demo\]'"):
        digits_fleet()
