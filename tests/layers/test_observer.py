"""What an observer returns is the caller's own: whole matrices, without inference mode, without shared memory."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards

DIAGONAL = {"measures": ("hessian_trace",)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 20, 3), nn.SiLU(), nn.Conv2d(20, 6, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()  # fmt: skip


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1])


def live(observer, net, x, y):
    with torch.inference_mode(), observer.listen(x) as heard:
        net(x)
    return observer.observed(heard, y)


@guards("layers/sums.py", "with torch.inference_mode(False):", "if True:")
@pytest.mark.parametrize("options", [{}, DIAGONAL, {"layers": "all"}], ids=str)
def test_under_inference_mode_it_is_the_same(options):
    net, (x, y) = network(), batch()
    observer = lf.FlatnessObserver(net, **options)
    with torch.inference_mode():
        inside = observer(x, y)
    outside = observer(x, y)
    for name, found in inside.items():
        assert not found.block_traces.is_inference()
        assert not found.weight_gram.is_inference()
        assert_close(found.block_traces, outside[name].block_traces, rtol=1e-6, atol=0)
        found.block_traces.add_(outside[name].block_traces)  # it may be written to outside that mode


@guards("functional/symmetric.py", "return self.strips.clone()", "return self.strips")
@pytest.mark.parametrize("options", [{}, DIAGONAL, {"layers": "all"}], ids=str)
def test_what_is_returned_may_be_written_to(options):
    net, (x, y) = network(), batch()
    observer = lf.FlatnessObserver(net, **options)
    expected = {name: (s.block_traces.clone(), s.weight_gram.clone()) for name, s in observer(x, y).items()}
    for _ in range(2):
        for name, found in observer(x, y).items():
            assert_close(found.block_traces, expected[name][0], rtol=1e-6, atol=0)
            assert_close(found.weight_gram, expected[name][1], rtol=0, atol=0)
            found.block_traces.fill_(torch.nan)
            found.weight_gram.fill_(torch.nan)


@pytest.mark.parametrize("options", [{}, DIAGONAL], ids=str)
def test_what_is_observed_is_taken_by_the_metric(options):
    net, (x, y) = network(), batch()
    observer = lf.FlatnessObserver(net, **options)
    with torch.inference_mode():
        assert observer.why_not_live(x, y) == ""
    metric = lf.FlatnessMetric(6, groups=2, diagonal=bool(options))
    metric.update(*live(observer, net, x, y)["2"])
    expected = lf.measure_flatness(net, [(x, y)], **options).layers["2"]
    assert_close(float(metric.compute()["hessian_trace"]), expected.hessian_trace, rtol=1e-5, atol=0)
    assert_close(float(metric.compute()["weight_norm"]), expected.weight_norm, rtol=1e-12, atol=0)


def test_block_traces_of_a_report_are_symmetric_to_the_last_bit():
    net, data = network(), [batch()]
    for layer in lf.measure_flatness(net, data, layers="all").layers.values():
        assert_close(layer.block_traces, layer.block_traces.mT, rtol=0, atol=0)


def test_an_option_that_does_not_exist():
    with pytest.raises(lf.FlatnessError, match="option='layer' is not known; choose one of .*'layers'"):
        lf.FlatnessObserver(network(), layer="0")
