"""common/model/server_optimizers.py"""

import numpy as np
import pytest

from privet.common.model.server_optimizers import OPTIMIZERS, optimizer_named
from privet.common.settings.sections import RoundSettings


def test_fedavg_adds_the_mean_times_the_learning_rate():
    settings = RoundSettings(optimizer="fedavg", learning_rate=0.5)
    optimizer = optimizer_named(settings.optimizer)
    adapter, state = optimizer.apply(
        settings, optimizer.begin(3), np.ones(3, np.float32), np.full(3, 2.0)
    )
    assert adapter.tolist() == [2.0, 2.0, 2.0]
    assert state == {}


def test_fedavgm_with_a_constant_mean_approaches_the_geometric_sum():
    settings = RoundSettings(optimizer="fedavgm", learning_rate=1.0, momentum=0.5)
    optimizer = optimizer_named(settings.optimizer)
    adapter, state = np.zeros(1, np.float32), optimizer.begin(1)
    for _ in range(2):
        adapter, state = optimizer.apply(settings, state, adapter, np.ones(1))
    assert adapter.tolist() == [2.5]


def test_fedadam_moves_each_coordinate_by_about_the_learning_rate_whatever_its_scale():
    settings = RoundSettings(optimizer="fedadam", learning_rate=0.1, adaptivity=1e-9)
    optimizer = optimizer_named(settings.optimizer)
    adapter, _ = optimizer.apply(
        settings, optimizer.begin(2), np.zeros(2, np.float32), np.array([1e-3, -5.0])
    )
    assert adapter == pytest.approx([0.1, -0.1], rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_mean_moves_nothing_and_the_arguments_are_left_alone(name):
    settings = RoundSettings(optimizer=name)
    optimizer = optimizer_named(settings.optimizer)
    start, state = np.ones(4, np.float32), optimizer.begin(4)
    adapter, _ = optimizer.apply(settings, state, start, np.zeros(4))
    assert adapter.tolist() == [1.0] * 4
    assert all(not value.any() for value in state.values())
