"""Samples that mix are refused, in whichever batch they begin to."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.layers.pooled_net import Apply, PooledNet, X, Y, measure


def test_samples_that_mix_are_refused():
    with pytest.raises(lf.LayerSelectionError, match="'conv'.*one sample depend on other samples"):
        measure(PooledNet(tail=nn.BatchNorm2d(6, track_running_stats=False)))


def test_samples_that_mix_are_noticed_after_a_first_batch_of_one():
    net = PooledNet(tail=Apply(lambda x: x - 0.5 * x.mean(0, keepdim=True))).double()
    with pytest.raises(lf.LayerSelectionError, match="'conv'.*depend on other samples"):
        lf.measure_flatness(net, [(X[:1].double(), Y[:1]), (X.double(), Y)], strict=True)


def test_the_error_says_that_a_forward_may_put_samples_in_another_order():
    net = linear_net(lambda net, x: net.c(net.a(x).relu().flip(0)))
    with pytest.raises(lf.LayerSelectionError, match="'a'.*depend on other samples.*puts samples in another order"):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a")


@pytest.mark.parametrize("layers", ["conv", "head"])
def test_samples_that_mix_in_a_later_batch_are_noticed_then(layers):
    class Late(PooledNet):
        def forward(self, x):
            logits = super().forward(x)
            return logits + (logits.mean(0, keepdim=True).abs() - 2).relu()

    net = Late(tail=nn.ReLU()).double()
    small, large = (X.double() / 10, Y), (50 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers=layers).exact
    with pytest.raises(lf.LayerSelectionError, match="depend on other samples"):
        lf.measure_flatness(net, [small, large], layers=layers)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h[-1:],
        lambda h: h - h[:1],
        lambda h: torch.cat([h[:4] + h[4:], h[4:] - h[:4]]),
        lambda h: h + h.roll(1, 0),
        lambda h: h + h.roll(-1, 0),
        lambda h: h + h.flip(0),
        lambda h: h + h[[1, 0, 3, 2, 5, 4, 7, 6]],
        lambda h: torch.cat([h[:7], h[7:] + h[3:4]]),
    ],
    ids=["last", "first", "halves", "next", "before", "reversed", "pairs", "one"],
)
def test_samples_that_mix_in_any_way(mix):
    net = linear_net(lambda net, x: net.c(mix(net.a(x).relu())))
    with pytest.raises(lf.LayerSelectionError, match="'a'.*depend on other samples"):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers=["a", "c"])


@pytest.mark.parametrize("shift", [1, -1, 4, 3])
def test_losses_that_mix_samples(shift):
    def pairs(f, y):
        return F.cross_entropy(f, y, reduction="none") + (f * f.roll(shift, 0)).sum(1).square()

    def one_way(f, y):
        others = f.roll(shift, 0).detach()
        others[1::2] = f.roll(shift, 0)[1::2]
        return F.cross_entropy(f, y, reduction="none") + (f * others).sum(1).square()

    net = linear_net()
    for loss in (pairs, one_way):
        with pytest.raises(lf.BatchError, match="depends on other samples"):
            lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a", loss=loss)


def test_a_layer_that_fails_the_closed_form_late_may_not_mix_samples_either(monkeypatch):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 3, 3), nn.Linear(3, 4)

        def forward(self, x):
            g = self.conv(x).relu().mean(2)
            return self.head(g - g[:1] if bool(x.amax() > 50) else g)

    torch.manual_seed(0)
    net, x = Late().double(), torch.randn(8, 2, 9).double()
    later = x.clone()
    later[6, 0, 0] = 60.0
    monkeypatch.setattr("lightning_flatness.layers.passes.rows_at_a_time", lambda *args: 4)
    assert lf.measure_flatness(net, [(x, LABELS), (x, LABELS)], layers="conv").layers["conv"].method == "closed_form"
    with pytest.raises(lf.LayerSelectionError, match="'conv'.*depend on other samples"):
        lf.measure_flatness(net, [(x, LABELS), (later, LABELS)], layers="conv")


NOT_FINITE = {
    "root": lambda h: h.square().sum(1, keepdim=True).sqrt(),
    "power": lambda h: h.square().sum(1, keepdim=True) ** 0.5,
    "arc cosine": lambda h: (1 - h.square()).acos(),
    "logarithm": lambda h: torch.where(h == 0, h, h.abs().log()),
}


@pytest.mark.parametrize("later", [0, 1, 2])
@pytest.mark.parametrize("head", NOT_FINITE.values(), ids=NOT_FINITE)
def test_derivatives_that_are_not_finite_are_named(head, later):
    net = linear_net(lambda net, x: net.c(net.a(x) + head(net.b(x) / 100)))
    nn.init.zeros_(net.b.bias)
    zero = VECTORS.clone()
    zero[3] = 0
    batches = [(VECTORS, LABELS)] * later + [(zero, LABELS)]
    calls = {
        "layers": lambda: lf.measure_flatness(net, batches, layers="b"),
        "all": lambda: lf.measure_flatness(net, batches, layers="all"),
        "eigenvalues": lambda: lf.measure_lambda_max(net, batches, layers="b"),
        "spectrum": lambda: lf.hessian_spectrum(net, batches, top_k=1, num_steps=3, num_probes=1),
    }
    for call in calls.values():
        with pytest.raises(lf.BatchError, match="(derivative.*(not|NaN)|not finite.*derivative).*an epsilon"):
            call()


def test_derivatives_that_are_not_finite_under_the_closed_form():
    net = PooledNet(tail=Apply(lambda x: (x * x).sqrt()))
    nn.init.zeros_(net.conv.bias)
    zero = X.clone()
    zero[2] = 0
    for batches in ([(zero.double(), Y)], [(X.double(), Y), (zero.double(), Y)]):
        with pytest.raises(lf.BatchError, match="'conv'.*derivative.*not finite.*epsilon"):
            lf.measure_flatness(net.double(), batches)


@guards("layers/certify.py", "certificates.leave_out(mixing, ", "raise ValueError(")
def test_a_layer_after_which_samples_mix_is_left_out():
    def forward(net, x):
        h = net.a(x)
        return net.c((h - h.mean(0)).relu())

    net = linear_net(forward)
    batches = [(VECTORS[:4], LABELS[:4]), (VECTORS[4:], LABELS[4:])]
    report = lf.measure_flatness(net, batches, layers="all")
    assert (list(report.layers), report.exact) == (["c"], True)
    assert "depend on other samples" in report.left_out["a"]
    expected = sum(oracle_block_traces(net, batch, "c") for batch in batches) / 2
    assert_close(report.layers["c"].block_traces[0], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("used", [True, False], ids=["detached", "not used"])
def test_a_layer_that_also_runs_on_other_rows_is_refused(used):
    def forward(net, x):
        support = net.a(VECTORS[:3].to(x)).detach()
        scores = net.a(x).relu() @ support.mT
        return net.c(net.a(x).relu()) + (scores.sum(1, keepdim=True) if used else 0)

    with pytest.raises(lf.LayerSelectionError, match="'a': one of its calls runs on 3 rows for 8 samples"):
        lf.measure_flatness(linear_net(forward), [(VECTORS, LABELS)], layers="a")
    report = lf.measure_flatness(linear_net(forward), [(VECTORS, LABELS)], layers="all")
    assert list(report.layers) == ["c"]
    assert "3 rows for 8 samples" in report.left_out["a"]
