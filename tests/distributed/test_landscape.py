"""Two processes find the landscape of one that has all batches."""

import pytest
from torch.testing import assert_close

import lightning_flatness as lf
from tests.distributed.landscape_scenarios import OPTIONS, network
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.spectra import data

pytestmark = pytest.mark.slow
SCENARIOS = ("landscape_of_uneven_ranks", "landscape_of_a_rank_without_batches", "landscape_where_one_rank_fails")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*SCENARIOS, name="landscape", tmp_path_factory=tmp_path_factory)


@pytest.mark.parametrize("name", SCENARIOS[:2])
def test_ranks_agree_with_one_process(outcomes, name):
    expected = lf.loss_landscape(network(), [data(10)], **OPTIONS)
    first, second = returned(outcomes[name])
    for key, value in first.items():
        assert_close(value, second[key], rtol=0, atol=0)
        # The eigenvector is found to 1e-7.
        assert_close(value, getattr(expected, key), rtol=1e-6, atol=1e-9)


def test_an_error_on_one_rank_is_one_on_all(outcomes):
    for message, computed in returned(outcomes["landscape_where_one_rank_fails"]):
        assert "rank 1: RuntimeError: no more" in message
        assert not computed.any(), "points count that all ranks have"
