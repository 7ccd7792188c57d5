"""Several validation loaders in Lightning's table of ``validate`` and ``test``."""

import math

import pytest

from lightning_flatness.callbacks import logged
from tests.callbacks.flatness_runs import MONITOR, flatness_callback
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.guarding import guards


@guards("callbacks/logged.py", 'key=lambda item: "/dataloader_idx_" not in item[0]', "key=str")
@guards("callbacks.logged:tell_of_loaders", returns=None)
def test_the_table_of_several_loaders(tmp_path, monkeypatch):
    """Lightning's table drops the ends of keys, so the first loader's values must come last."""
    told = []
    monkeypatch.setattr(logged, "rank_zero_info", told.append)
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    results = quiet_trainer(tmp_path, callback).validate(module, [val, train], verbose=False)
    for result in results:
        in_table = {key.split("/dataloader_idx_")[0]: value for key, value in result.items()}
        assert in_table[MONITOR] == callback.reports[0].relative_flatness
        second = callback.reports[1].relative_flatness
        assert result[f"{MONITOR}/dataloader_idx_1"] == second
        assert result["flatness/log10_relative_flatness/dataloader_idx_1"] == pytest.approx(math.log10(second))
    each = [f"{callback.reports[index].relative_flatness:.4g} for loader {index}" for index in range(2)]
    assert f"'flatness/relative_flatness' is {', '.join(each)}. Lightning's table" in told[0]
    quiet_trainer(tmp_path, flatness_callback()).validate(module, val, verbose=False)
    assert len(told) == 1
