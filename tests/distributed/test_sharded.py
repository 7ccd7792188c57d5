"""Weights that are spread over ranks are refused; data that is spread over ranks is measured together."""

import pytest
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Net, dataset
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.distributed.sharded_scenarios import SHARDED_RUNS
from tests.guarding import guards

pytestmark = pytest.mark.slow
SHARDED = ("fully_sharded_weights", "wrapped_by_fully_sharded_data_parallel")
RUNS = tuple(f"sharded, {name}" for name in SHARDED_RUNS)
REFUSED_IN_RUNS = ("sharded spectrum", "sharded landscape")
OTHERS = ("measured_while_sharded", "sharded_and_failing", "sharded_and_swapped", "plain_data_parallel")
NAMES = (*SHARDED, *RUNS, *REFUSED_IN_RUNS, *OTHERS)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*NAMES, name="sharded", tmp_path_factory=tmp_path_factory, seconds=500)


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


@guards(
    "callbacks/flatness.py",
    "return Measurement(self._whole_copy(network.module),",
    "return Measurement(network.module,",
)
@guards("model/whole.py", "for name in SHARED if", "for name in () if", ids="sharded, as a whole")
@pytest.mark.parametrize("name", RUNS)
def test_a_callback_measures_the_network_that_a_strategy_shards(outcomes, name):
    for found, wanted, is_as_without, logged in returned(outcomes[name]):
        assert_close(found, wanted, rtol=1e-5 if "float32" in name else 1e-10, atol=0)
        assert logged == pytest.approx(wanted[-1][0], rel=1e-5)
        assert is_as_without


@pytest.mark.parametrize("name", REFUSED_IN_RUNS)
def test_other_callbacks_refuse_sharded_weights_before_training(outcomes, name):
    for message, steps in returned(outcomes[name]):
        assert_refused(message)
        assert steps == 0


def test_a_rank_that_fails_leaves_nobody_waiting(outcomes):
    assert returned(outcomes["sharded_and_failing"]) == [0, 0]


@guards("model/whole.py", "if not all(same_values(_sample(parameter), sample)", "if not all(True")
def test_weights_that_change_after_they_were_gathered_are_refused(outcomes):
    for message in returned(outcomes["sharded_and_swapped"]):
        assert "changed the weights, which FSDP2 shards" in message


def test_ranks_measure_together_without_a_trainer(outcomes):
    whole = DataLoader(ConcatDataset([dataset(5, seed=0), dataset(5, seed=1)]), 3)
    wanted = lf.measure_flatness(Net(), whole, dtype="float64").relative_flatness
    for layers, samples, flatness in returned(outcomes["plain_data_parallel"]):
        assert layers == ["module.conv2"]
        assert samples == 10
        assert flatness == pytest.approx(wanted, rel=1e-12)
