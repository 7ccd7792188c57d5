"""On two ranks the weights with FlatnessPenalty are those of a training step with the penalty, to the last bit."""

import pytest
import torch
from torch.testing import assert_close

from tests.distributed.ranks import returned, run_once_on_ranks

PAIRS = [
    ("penalty_by_callback", "penalty_by_hand"),
    ("accumulated_penalty_by_callback", "accumulated_penalty_by_hand"),
]
pytestmark = pytest.mark.slow
FAILS = "penalty_of_a_loss_that_does_not_fit_on_one_rank"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_once_on_ranks(*sum(PAIRS, ()), FAILS, name="penalty", tmp_path_factory=tmp_path_factory)


@pytest.mark.parametrize(("by_callback", "by_hand"), PAIRS)
def test_weights_are_those_of_a_training_step_with_the_penalty(outcomes, by_callback, by_hand):
    (one, logged), (other, logged_there) = returned(outcomes[by_callback])
    expected = returned(outcomes[by_hand])
    assert_close(one, expected[0], rtol=0.0, atol=0.0)
    assert_close(other, expected[1], rtol=0.0, atol=0.0)
    assert torch.equal(one["net.fc.weight"], other["net.fc.weight"])
    assert (
        logged["penalty/loss"]
        == logged_there["penalty/loss"]
        == pytest.approx(0.3 * logged["penalty/relative_flatness"], rel=1e-5)
    )


def test_an_error_on_one_rank_is_raised_on_both(outcomes):
    assert all("on rank 1: FlatnessPenalty finds no classifier" in outcome.error for outcome in outcomes[FAILS])
