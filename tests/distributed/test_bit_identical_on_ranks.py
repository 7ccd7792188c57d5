"""On every rank, a run with the callback ends with the same bits as one without it."""

import shutil

import pytest

from tests.callbacks.training_runs import differences
from tests.distributed.bit_identical_scenarios import CONTROLLED, INDUCTOR, WITH, WITHOUT
from tests.distributed.ranks import run_on_ranks, run_once_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def outcomes(request, tmp_path_factory):
    scenarios = (*WITHOUT, *WITH, *CONTROLLED)
    name = f"bit-identical-{request.param}"
    return run_once_on_ranks(
        *scenarios, name=name, tmp_path_factory=tmp_path_factory, num_ranks=request.param, seconds=900
    )


def not_identical(outcomes, name):
    """How a run differs from the one without a callback, a line for every rank where it does."""
    without = name.rpartition(", ")[0] + ", without"
    lines = []
    for rank, (found, wanted) in enumerate(zip(outcomes[name], outcomes[without], strict=True)):
        if wanted.error or found.error:
            lines.append(f"{without if wanted.error else name}: rank {rank}: {wanted.error or found.error}")
        elif different := differences(found.returned, wanted.returned):
            lines.append(f"{name}: rank {rank} differs in {different}")
    return lines


def test_training_is_bit_identical(outcomes):
    lines = [line for name in WITH for line in not_identical(outcomes, name)]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_callback_that_leaves_a_trace_would_be_seen(outcomes, name):
    ranks = outcomes[name]
    lines = not_identical(outcomes, name)
    assert len(lines) == len(ranks)
    assert all("net.conv2.weight" in line.replace("_orig_mod.", "") for line in lines)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_training_is_bit_identical_with_the_default_compiler(tmp_path):
    outcomes = run_on_ranks(*INDUCTOR, folder=tmp_path, num_ranks=1)
    lines = [line for name in INDUCTOR[1:] for line in not_identical(outcomes, name)]
    assert not lines, "\n".join(lines)
