import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded():
    """Every test and doctest starts from the same random state, with threads that do not fight over the cores."""
    torch.manual_seed(0)


@pytest.fixture
def batch():
    """Five images of two channels with their classes, for ``eventful_networks``."""
    return torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 3, 1])


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
