"""The figure of a metric, as torchmetrics draws them."""

import pytest
import torch
from matplotlib import pyplot

import lightning_flatness as lf

NAMES = {"hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness", "weight_norm"}


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def metric(sign=1.0):
    metric = lf.FlatnessMetric(num_filters=2)
    metric.update(sign * torch.eye(2, dtype=torch.float64)[None], torch.eye(2, dtype=torch.float64)[None], 3)
    return metric


def test_what_was_computed():
    figure, ax = metric().plot()
    assert figure is ax.figure
    drawn = {line.get_label(): float(line.get_ydata()[0]) for line in ax.lines}
    assert set(drawn) >= NAMES
    assert drawn["hessian_trace"] == pytest.approx(2 / 3)
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    assert 0 < low < min(drawn.values()) < max(drawn.values()) < high


def test_one_result_or_one_for_every_step_in_given_axes():
    values = metric().compute()
    _, ax = pyplot.subplots()
    figure, found = metric().plot(values, ax=ax)
    assert (figure, found) == (ax.figure, ax)
    figure, ax = metric().plot([values, {name: 2 * value for name, value in values.items()}])
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn["hessian_trace"] == pytest.approx([2 / 3, 4 / 3])
    with pytest.raises(lf.FlatnessError, match="val is an empty list"):
        metric().plot([])


def test_negative_numbers_are_on_a_linear_scale():
    assert metric(sign=-1.0).plot()[1].get_yscale() == "linear"
