"""Runs with a FlatnessCallback that start from the same random state."""

from torch.testing import assert_close

import lightning_flatness as lf
from tests.callbacks.compare import seed_all
from tests.callbacks.lightning_modules import loaders, quiet_trainer


def flatness_callback(**options):
    return lf.FlatnessCallback(**({"summary": False} | options))


def fit(module, folder, *callbacks, data=None, **options):
    seed_all()
    trainer = quiet_trainer(folder, *callbacks, **({"max_epochs": 4} | options))
    trainer.fit(module, *(loaders() if data is None else data))
    return trainer


def measured(network, batches, layers="last"):
    return lf.measure_flatness(network, batches, layers=layers)


def assert_reports_equal(found, expected, prefix="net.", rtol=1e-5):
    assert list(found.layers) == [prefix + name for name in expected.layers]
    for name, layer in expected.layers.items():
        one = found.layers[prefix + name]
        scale = abs(layer.hessian_trace) + abs(layer.relative_flatness)
        for measure in ("hessian_trace", "relative_flatness", "weight_norm"):
            assert_close(getattr(one, measure), getattr(layer, measure), rtol=rtol, atol=rtol * scale)
        assert one.exact == layer.exact
