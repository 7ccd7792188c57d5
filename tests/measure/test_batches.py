"""Batches are read alike in every pass, and leave generators as they were."""

import copy

import numpy as np
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from tests.guarding import guards
from tests.spectra import convolutional, quick


def test_a_loader_that_shuffles_is_read_alike_in_every_pass():
    model, x, y = convolutional()
    loader = DataLoader(TensorDataset(x, y), 7, shuffle=True, drop_last=True)
    state = torch.get_rng_state()
    result = quick(model, loader)
    assert result.num_samples == 21
    assert_close(torch.get_rng_state(), state)


class Noisy(torch.utils.data.Dataset):
    """Augments with a generator of its own."""

    def __init__(self, x, y):
        self.x, self.y, self.rng = x, y, np.random.default_rng(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + self.rng.normal(), self.y[index]


@guards(
    "measure/batches.py",
    "with random_states_kept(model), generators_kept(drawing(batches)):",
    "with random_states_kept(model):",
)
def test_generators_of_a_loader_and_its_data_are_left_as_they_were():
    model, x, y = convolutional()
    loader = DataLoader(Noisy(x, y), 7, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3))
    states = loader.generator.get_state(), copy.deepcopy(loader.dataset.rng.bit_generator.state)
    assert quick(model, loader).num_samples == 21
    lf.measure_flatness(model, loader)
    lf.measure_lambda_max(model, loader)
    assert_close(loader.generator.get_state(), states[0], rtol=0, atol=0)
    assert loader.dataset.rng.bit_generator.state == states[1]
