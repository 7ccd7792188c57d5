"""Two processes find the landscape and the spectrum of one that has all batches."""

import pytest
from torch.testing import assert_close

from tests.distributed.loss_scenarios import KINDS, SHARED, measured
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.spectra import data

pytestmark = pytest.mark.slow
NAMES = [scenario.__name__ for scenario in SHARED]
# The eigenvector of the landscape's axis is found to 1e-7.
TOLERANCE = {"landscape": {"rtol": 1e-6, "atol": 1e-9}, "spectrum": {"rtol": 1e-8, "atol": 1e-10}}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    names = [f"{name}, {kind}" for kind in KINDS for name in (*NAMES, "one_rank_fails")]
    return run_once_on_ranks(*names, name="losses", tmp_path_factory=tmp_path_factory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process(outcomes, name, kind):
    expected = measured(kind, [data(10)])
    first, second = returned(outcomes[f"{name}, {kind}"])
    for key, value in first.items():
        assert_close(value, second[key], rtol=0, atol=0)
        assert_close(value, expected[key], **TOLERANCE[kind])


def test_an_error_on_one_rank_is_one_on_all_of_a_landscape(outcomes):
    for message, computed in returned(outcomes["one_rank_fails, landscape"]):
        assert "rank 1: RuntimeError: no more" in message
        assert not computed.any(), "points count that all ranks have"


def test_an_error_on_one_rank_is_one_on_all_of_a_spectrum(outcomes):
    healthy, failing = returned(outcomes["one_rank_fails, spectrum"])
    assert "Rank 1 failed" in healthy
    assert "NaN" in healthy
    assert "NaN" in failing
