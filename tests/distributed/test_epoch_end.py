"""On two ranks: training is as it was, numbers are those of one, and errors are settled by all alike."""

import pytest
from torch.testing import assert_close

from tests.callbacks.training_runs import differences
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.guarding import guards

pytestmark = pytest.mark.slow
SCENARIOS = ("at epochs, False", "at epochs, True", "numbers_at_epochs", "one_rank_fails_at_an_epoch")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*SCENARIOS, name="at-epochs", tmp_path_factory=tmp_path_factory)


def test_training_is_bit_identical(outcomes):
    for found, wanted in zip(*(returned(outcomes[name]) for name in SCENARIOS[:2]), strict=True):
        assert not differences(found, wanted)


@guards("callbacks/figures.py", "or is_trial or not trainer.is_global_zero", "or is_trial")
@guards(
    "callbacks/epoch_end.py",
    "if trainer.is_global_zero:\n            with self._errors.kept",
    "if True:\n            with self._errors.kept",
)
def test_numbers_are_those_of_one_process(outcomes, tmp_path_factory):
    one = run_once_on_ranks(SCENARIOS[2], name="at-epochs-1", tmp_path_factory=tmp_path_factory, num_ranks=1)
    (expected,) = returned(one[SCENARIOS[2]])
    first, second = returned(outcomes[SCENARIOS[2]])
    assert [first["written"], second["written"]] == [[".npz"] * 2 + [".png"] * 3, []]
    assert first["drawn"] == ["epoch=0-step=2-block_traces-net.conv2.png", "epoch=0-step=2-history.png"]
    for found in (first, second):
        for name in ("lambda_max", "trace", "k_hn", "loss"):
            assert_close(found["history"][0][name], expected["history"][0][name], rtol=1e-9, atol=1e-12)
        assert_close(found["losses"], expected["losses"], rtol=1e-9, atol=1e-12)
        assert_close(found["logged"], expected["logged"], rtol=1e-6, atol=0)


def test_one_rank_that_fails_is_a_warning_on_all(outcomes):
    for history, steps in returned(outcomes[SCENARIOS[3]]):
        assert history == [[0, 2], [0, 2]]
        assert int(steps) == 6
