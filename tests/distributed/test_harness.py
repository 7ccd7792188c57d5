"""The harness gives what ranks returned, goes on after an error on one of them, and ends what does not end."""

import time

import pytest
import torch

from tests.distributed.ranks import returned, run_on_ranks

pytestmark = pytest.mark.slow


def test_outcomes_of_ranks_are_not_disturbed_by_an_error_before(tmp_path):
    outcomes = run_on_ranks("fails_on_rank_1", "sum_of_ranks", folder=tmp_path)
    done, failed = outcomes["fails_on_rank_1"]
    assert done.returned == "done"
    assert "ValueError: rank 1 has had enough" in failed.error
    with pytest.raises(pytest.fail.Exception, match=r"(?s)--- rank 1.*rank 1 has had enough"):
        returned([done, failed])
    assert returned(outcomes["sum_of_ranks"]) == [(0, torch.tensor(3)), (1, torch.tensor(3))]


def test_what_does_not_end_is_ended(tmp_path):
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="not done after 3 seconds"):
        run_on_ranks("never_ends", folder=tmp_path, seconds=3)
    assert time.monotonic() - start < 30
