"""What fails on one rank ends or is warned of on all of them, and nobody waits for ever."""

import time

import pytest

from tests.callbacks.training_runs import differences
from tests.distributed.rank_error_scenarios import CALLBACKS, KINDS_OF_DATA, NAN_AT, SYNCED
from tests.distributed.ranks import returned, run_on_ranks, run_once_on_ranks
from tests.guarding import guards

pytestmark = pytest.mark.slow
FLATNESS_KEYS = ("flatness/hessian_trace", "flatness/relative_flatness", "flatness/weight_norm")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    scenarios = [f"NaN in the {where}, {how}" for where in NAN_AT for how in ("without", "raise", "warn")]
    scenarios += [f"user's error, {with_}" for with_ in CALLBACKS]
    scenarios += [f"{data}, {logs}, {how}" for data in KINDS_OF_DATA for logs in SYNCED for how in ("raise", "warn")]
    return run_once_on_ranks(*scenarios, name="faults", tmp_path_factory=tmp_path_factory)


@pytest.mark.parametrize("where", NAN_AT)
def test_every_rank_raises_and_names_the_rank(outcomes, where):
    for found in returned(outcomes[f"NaN in the {where}, raise"]):
        assert found["error"] is not None
        assert "rank 1" in found["error"]


@pytest.mark.parametrize("where", NAN_AT)
def test_every_rank_goes_on_after_a_warning(outcomes, where):
    without = returned(outcomes[f"NaN in the {where}, without"])
    for found, wanted in zip(returned(outcomes[f"NaN in the {where}, warn"]), without, strict=True):
        assert found["error"] is None
        assert found["logged"] == wanted["logged"] == ["val_acc"]
        assert found["history"] == []
        assert differences(found["end"], wanted["end"]) == []


@pytest.mark.parametrize("where", NAN_AT)
def test_the_warning_names_the_rank(outcomes, where):
    first, _ = returned(outcomes[f"NaN in the {where}, warn"])
    assert any("Flatness" in warning and "rank 1" in warning for warning in first["warnings"])


@guards(
    "callbacks/validation.py",
    "if failed and (source.is_last(batch_idx) or source.is_due(batch, batch_idx))",
    "if False",
    ids="val-synced in every epoch",
)
@pytest.mark.parametrize("logs", SYNCED)
@pytest.mark.parametrize("data", KINDS_OF_DATA)
def test_no_rank_waits_for_one_that_failed(outcomes, data, logs):
    for found in returned(outcomes[f"{data}, {logs}, raise"]):
        assert "on rank 1" in found["error"]
    for found in returned(outcomes[f"{data}, {logs}, warn"]):
        assert found["error"] is None
        assert found["history"] == []


@pytest.mark.parametrize("with_", CALLBACKS)
def test_an_error_of_the_user_ends_all_ranks(outcomes, with_):
    first, second = outcomes[f"user's error, {with_}"]
    assert "ArithmeticError: the user's own error" in second.error
    assert "FlatnessError" not in second.error
    assert first.error is not None


@pytest.mark.parametrize("with_", ["without", "val"])
def test_a_rank_that_dies_ends_the_other(with_, tmp_path):
    name = f"death, {with_}"
    start = time.monotonic()
    first, second = run_on_ranks(name, folder=tmp_path, seconds=240)[name]
    assert time.monotonic() - start < 180  # and not the half hour of torch's own limit
    assert "the process ended with 1" in second.error
    assert first.error is not None
    assert "RuntimeError" in first.error or "DistBackendError" in first.error
