"""Measurements on two ranks, and through a metric."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.measure import measurement, samples
from lightning_flatness.measure.measurement import Measurement
from tests.guarding import guards
from tests.measure.ranks import Ranks


def small_network(activation=nn.SiLU):
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).double()


def data():
    return torch.randn(10, 2, 6, 6).double(), torch.arange(10) % 4


@guards("measure/measurement.py", ", rows=slice(0, MOST_CERTIFIED)", "")
def test_layers_are_certified_on_few_samples_of_a_large_batch():
    net, sizes = small_network(), []
    net[0].register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    Measurement(net).certify(torch.randn(500, 2, 6, 6).double(), torch.arange(500) % 4, live=False)
    assert 2 <= max(sizes) <= 16


@guards("measure/measurement.py", "self.observer.sums(inputs, targets)\n        if live", "raise\n        if live")
def test_layers_of_a_network_that_takes_whole_batches_only_are_certified():
    net = small_network()

    def refuse(module, arguments):
        if len(arguments[0]) != 40:
            raise ValueError("a batch has 40 samples")

    net.register_forward_pre_hook(refuse)
    measurement = Measurement(net)
    measurement.certify(torch.randn(40, 2, 6, 6).double(), torch.arange(40) % 4, live=False)
    assert list(measurement.layers) == ["0"]


def test_measurements_on_two_ranks_report_the_whole(monkeypatch):
    net, x, y = small_network(), *data()
    whole = lf.measure_flatness(net, [(x, y)])

    measurements = on_two_ranks(monkeypatch, net)
    measurements[0].update(x[:7], y[:7])
    measurements[1].update(x[7:], y[7:])
    for report in (rank.report() for rank in measurements):
        assert_same_layer(report.layers["0"], whole.layers["0"])


def on_two_ranks(monkeypatch, net):
    """Two measurements that tell each other what they measure, as if they were on two ranks."""
    ranks = Ranks()

    class RankMetric(lf.FlatnessMetric):
        def __init__(self, *args):
            super().__init__(*args, **ranks.sync_options())
            ranks.metrics.append(self)

        def sync_context(self, dist_sync_fn=ranks.gather, **kwargs):
            return super().sync_context(dist_sync_fn, **kwargs)

    monkeypatch.setattr(measurement, "FlatnessMetric", RankMetric)
    measures = ("hessian_trace", "relative_flatness")  # the ranks tell each other nothing before they report
    measurements = [Measurement(net, sync=True, measures=measures) for _ in range(2)]
    monkeypatch.setattr(
        measurement, "gather", lambda own, sync: [(rank.layers, rank.observer.left_out) for rank in measurements]
    )
    of_samples = lambda own, sync: [rank._values.of_rank() for rank in measurements]  # noqa: E731
    monkeypatch.setattr(samples, "gather", of_samples)

    made, own = {}, Measurement._metric

    def of_all_ranks(self, info):
        """The metric of one rank, when all have made theirs, as in a report they all do."""
        for rank in measurements:
            if (rank, info.name) not in made:
                made[rank, info.name] = own(rank, info)
        return made[self, info.name]

    monkeypatch.setattr(Measurement, "_metric", of_all_ranks)
    return measurements


def assert_same_layer(found, expected):
    assert found.num_samples == 10
    for name in ("block_traces", "filter_traces", "filter_flatness"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-14)
    for name in ("hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness", "weight_norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


@guards("measure/measurement.py", "if info.name in self._sums:", "if True:")
@guards(
    "measure/measurement.py",
    "gather((self.layers, self.observer.left_out), self._sync)",
    "[(self.layers, self.observer.left_out)]",
)
def test_a_rank_without_batches_reports_the_whole(monkeypatch):
    net, x, y = small_network(), *data()
    whole = lf.measure_flatness(net, [(x, y)])
    measurements = on_two_ranks(monkeypatch, net)
    measurements[0].update(x, y)
    assert_same_layer(measurements[1].report().layers["0"], whole.layers["0"])


@guards("measure/measurement.py", "merged([layers[name] for layers, _ in found])", "found[0][0][name]")
def test_what_one_rank_has_labelled_is_labelled_on_all(monkeypatch):
    net, x, y = small_network(), *data()
    measurements = on_two_ranks(monkeypatch, net)
    for rank in measurements:
        rank.update(x, y)
    labelled = replace(measurements[1].layers["0"], exact=False, method="gauss_newton", reason="of rank 1")
    found = [({"0": measurements[0].layers["0"]}, {}), ({"0": labelled}, {"2": "runs late"})]
    monkeypatch.setattr(measurement, "gather", lambda own, sync: found)
    report = measurements[0].report()
    assert (report.layers["0"].info.reason, report.left_out) == ("of rank 1", {"2": "runs late"})


@guards("measure/measurement.py", "if layers.keys() != found[0][0].keys():", "if False:")
def test_ranks_that_measure_other_layers_are_refused(monkeypatch):
    net, x, y = small_network(nn.ReLU), *data()
    measurements = on_two_ranks(monkeypatch, net)
    for rank in measurements:
        rank.update(x, y)
    found = [({"0": measurements[0].layers["0"]}, {"4": "for a reason"}), ({"0": None, "4": None}, {})]
    monkeypatch.setattr(measurement, "gather", lambda own, sync: found)
    with pytest.raises(lf.BatchError, match=r"'4' is measured on some ranks and not on others \(for a reason\)"):
        measurements[0].report()


class WithUnused(nn.Sequential):
    """A network that has a parameter of NaN, which it does not use."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.unused = nn.Parameter(torch.full((2,), torch.nan).double())

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


@guards("measure/measurement.py", "if not all(map(same_values, before, self._weights())):", "if False:")
def test_weights_that_change_while_samples_wait_are_refused():
    net, (x, y) = WithUnused(*small_network()), data()
    measurement = Measurement(net)
    measurement.update(x, y)
    expected = lf.measure_flatness(nn.Sequential(*net), [(x, y)]).relative_flatness
    assert measurement.report().relative_flatness == expected
    measurement = Measurement(net)
    measurement.update(x, y)
    net[0].weight.data[0] += 1
    with pytest.raises(lf.BatchError, match="The weights have changed before the first samples could be measured"):
        measurement.report()


def test_a_metric_fed_by_an_observer_is_a_measurement():
    net, x, y = small_network(), *data()
    observer, metric = lf.FlatnessObserver(net), lf.FlatnessMetric(num_filters=6)
    for part in (slice(7), slice(7, 10)):
        metric.update(*observer(x[part], y[part])["0"])
    report = lf.measure_flatness(net, [(x, y)])
    for name, value in metric.compute().items():
        assert float(value) == pytest.approx(getattr(report.layers["0"], name), rel=1e-12)
