"""Weights that are spread over ranks are refused; data that is spread over ranks is measured together."""

import pytest
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Net, dataset
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.guarding import guards

pytestmark = pytest.mark.slow
SHARDED = ("fully_sharded_weights", "wrapped_by_fully_sharded_data_parallel")
NAMES = (*SHARDED, "measured_while_sharded", "sharded_in_a_trainer", "plain_data_parallel")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*NAMES, name="sharded", tmp_path_factory=tmp_path_factory)


def assert_refused(message):
    assert message is not None
    assert "sharded over processes" in message
    assert "strategy='ddp'" in message


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_refused(outcomes, name):
    for message in returned(outcomes[name]):
        assert_refused(message)


@guards("model.whole:_is_of_fsdp", returns=False)
def test_fully_sharded_weights_are_measured_together(outcomes):
    for found, wanted, of_one, is_as_it_was, difference in returned(outcomes["measured_while_sharded"]):
        for kind, numbers in wanted.items():
            assert_close(found[kind], numbers, rtol=1e-7 if kind in ("eigenvalue", "spectrum") else 1e-11, atol=0)
        assert_close(of_one, wanted["last"], rtol=1e-11, atol=0)
        assert is_as_it_was
        assert difference < 1e-5


def test_sharded_weights_are_refused_before_training(outcomes):
    for message, steps in returned(outcomes["sharded_in_a_trainer"]):
        assert_refused(message)
        assert steps == 0


def test_ranks_measure_together_without_a_trainer(outcomes):
    whole = DataLoader(ConcatDataset([dataset(5, seed=0), dataset(5, seed=1)]), 3)
    wanted = lf.measure_flatness(Net(), whole, dtype="float64").relative_flatness
    for layers, samples, flatness in returned(outcomes["plain_data_parallel"]):
        assert layers == ["module.conv2"]
        assert samples == 10
        assert flatness == pytest.approx(wanted, rel=1e-12)
