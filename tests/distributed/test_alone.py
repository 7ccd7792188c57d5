"""In a process group, a function measures alone and waits for nobody, unless ``sync=True``."""

import pytest
from torch.testing import assert_close

from tests.distributed.alone_scenarios import FUNCTIONS, batches, eigenvalues, network
from tests.distributed.ranks import returned, run_once_on_ranks
from tests.guarding import guards

pytestmark = pytest.mark.slow
SPLITS = (3, 10)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    names = [f"alone, {kind}" for kind in FUNCTIONS] + [f"together, {split}" for split in SPLITS]
    return run_once_on_ranks(*names, "eigenvalue, one fails", name="alone", tmp_path_factory=tmp_path_factory)


@guards("measure/ranks.py", "return sync and distributed.is_available()", "return distributed.is_available()")
@guards("measure/measurement.py", "should_sync=self._sync", "should_sync=True", ids="flatness")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_one_rank_measures_alone_what_one_process_does(outcomes, kind):
    _, found = returned(outcomes[f"alone, {kind}"])
    assert_close(found, FUNCTIONS[kind](network(), batches()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("split", SPLITS)
def test_eigenvalues_over_all_ranks(outcomes, split):
    wanted = eigenvalues(network(), batches())
    for found in returned(outcomes[f"together, {split}"]):
        assert_close(found, wanted, rtol=1e-7, atol=0)


def test_an_error_on_one_rank_is_one_on_all(outcomes):
    healthy, failing = returned(outcomes["eigenvalue, one fails"])
    assert "Rank 1 failed" in healthy
    assert failing
    assert "Rank 1 failed" not in failing
