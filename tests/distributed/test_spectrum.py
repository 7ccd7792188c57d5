"""Two processes find the spectrum of one that has all batches."""

import pytest
from torch.testing import assert_close

import lightning_flatness as lf
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.distributed.spectrum_scenarios import OPTIONS, network
from tests.spectra import data

pytestmark = pytest.mark.slow
SCENARIOS = ("spectrum_of_uneven_ranks", "spectrum_of_a_rank_without_batches", "spectrum_where_one_rank_fails")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*SCENARIOS, name="spectrum", tmp_path_factory=tmp_path_factory)


@pytest.mark.parametrize("name", SCENARIOS[:2])
def test_ranks_agree_with_one_process(outcomes, name):
    expected = lf.hessian_spectrum(network(), [data(10)], **OPTIONS)
    first, second = returned(outcomes[name])
    for key, value in first.items():
        assert_close(value, second[key], rtol=0, atol=0)
        assert_close(value, getattr(expected, key), rtol=1e-8, atol=1e-10)


def test_an_error_on_one_rank_is_one_on_all(outcomes):
    healthy, failing = returned(outcomes["spectrum_where_one_rank_fails"])
    assert "Rank 1 failed" in healthy
    assert "NaN" in healthy
    assert "NaN" in failing
