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


# What a test draws must not depend on what ran before it: PyTorch seeds a new process at random.
def pytest_collectstart():
    """What a file of tests draws as it is imported is the same in every run."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """And so is what fixtures of a whole file draw."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded():
    """Every test and doctest starts from the same random state, whatever such a fixture drew."""
    torch.manual_seed(0)


@pytest.fixture
def batch():
    """Five images of two channels with their classes, for ``eventful_networks``."""
    return torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 3, 1])


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
