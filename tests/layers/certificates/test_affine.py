"""Gauss-Newton is exact only where the logits are affine in a layer's weight, on all samples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.layers.certificates.affine import _combination
from lightning_flatness.testing import assert_matches_oracle, oracle_block_traces
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.layers.pooled_net import Apply, PooledNet, X, Y


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.c(torch.tanh(net.a(x) - net.b(x))),
        lambda net, x: net.c((net.a(x) - net.b(x)).square()),
        lambda net, x: net.c(F.gelu(net.a(x) + net.b(x))),
        lambda net, x: net.c(torch.tanh(net.a(x) - net.b(x).flip(1))),
    ],
    ids=["difference", "distance", "sum", "flipped"],
)
def test_layers_whose_curvatures_cancel_each_other(forward):
    net = linear_net(forward)
    report = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="all")
    assert [layer.exact for layer in report.layers.values()] == [False, False, True]
    with pytest.raises(lf.NotExactError):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers="all", strict=True)


class Relu(torch.autograd.Function):
    """Named like a function that cannot curve."""

    @staticmethod
    def forward(x):
        return (x - 2).relu().square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * (ctx.saved_tensors[0] - 2).relu()


@guards("model/graph.py", "(kind in LINEAR_IN_ONE and num_inputs == 1)", "kind in LINEAR_IN_ONE", ids="product")
@guards("model/graph.py", "isinstance(node, BackwardCFunction) or getattr", "getattr", ids="custom")
@guards("model/graph.py", ' or getattr(node, "_saved_training", False)', "", ids="instance norm")
@guards("model.graph:cannot_curve", returns=True)
@pytest.mark.parametrize(
    "curve",
    [
        lambda h: h.tanh() if bool(h.detach().amax() > 2) else h,
        lambda h: h + h * (h - 2).relu(),
        lambda h: h + ((h - 2).relu()[:, None] @ h[:, :, None])[:, 0],
        lambda h: h + Relu.apply(h),
        lambda h: F.instance_norm(h[:, None])[:, 0] if bool(h.detach().amax() > 2) else h,
    ],
    ids=["other function", "product", "matrix product", "custom", "instance norm"],
)
def test_curvature_that_only_later_samples_show(curve):
    net = linear_net(lambda net, x: net.c(curve(net.a(x))))
    small, large = (VECTORS[:1] / 10, LABELS[:1]), (30 * VECTORS[:1], LABELS[:1])  # one sample, so that nothing mixes
    assert lf.measure_flatness(net, [small], layers="a").exact
    assert not lf.measure_flatness(net, [large], layers="a").exact
    assert not lf.measure_flatness(net, [small, large], layers="a").exact


@guards("layers/certificates/__init__.py", " and not due", "")
def test_hooks_that_curve_later_are_noticed_in_the_end():
    def forward(net, x):
        h = net.a(x).relu()
        out = net.c(h)
        late = (x.detach().abs().amax() > 5).to(x)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * (1 + late * out))
        return out + 0

    small, large = (VECTORS / 10, LABELS), (30 * VECTORS, LABELS)
    assert lf.measure_flatness(linear_net(forward), [small], layers="a").exact
    assert not lf.measure_flatness(linear_net(forward), [small, *[large] * 16], layers="a").exact


def test_curvature_that_first_shows_in_a_later_batch_is_labelled():
    net = PooledNet(tail=nn.ReLU(), after=Apply(lambda f: f + F.relu(f - 2) ** 2)).double()
    small, large = (X.double() / 10, Y), (30 * X.double(), Y)
    assert lf.measure_flatness(net, [small], layers="head").exact
    assert not lf.measure_flatness(net, [large], layers="head").exact
    assert not lf.measure_flatness(net, [small, large], layers="head").exact
    with pytest.raises(lf.NotExactError, match="'head'"):
        lf.measure_flatness(net, [small, large], layers="head", strict=True)


HEADS = {
    "module": nn.LogSoftmax(dim=1),
    "function": lambda f: F.log_softmax(f, -1),
    "logsumexp": lambda f: f - f.logsumexp(1, keepdim=True),
    "by hand": lambda f: f - f.amax(1, keepdim=True) - (f - f.amax(1, keepdim=True)).exp().sum(1, keepdim=True).log(),
    "any curved shift": lambda f: f + f.square().sum(1, keepdim=True).sin(),
}


@guards("layers/certificates/affine.py", "u = (u / unit).round() * unit", "pass")
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "class_weight": (1.0, 2.0, 0.5, 3.0)}], ids=str)
def test_numbers_that_cross_entropy_does_not_see_may_be_added_to_the_logits(head, dtype, options):
    net = linear_net(lambda net, x: head(net.c(F.leaky_relu(net.a(x)) + net.b(x).relu()))).to(dtype)
    batch = VECTORS.to(dtype), LABELS
    loss = nn.CrossEntropyLoss(torch.tensor(options["class_weight"]).double(), label_smoothing=0.2) if options else None
    report = lf.measure_flatness(net, [batch, batch], layers="all", strict=True, **options)
    assert report.exact
    for name in "abc":
        mean = (lambda f, y: loss(f, y)) if loss else F.cross_entropy
        expected = oracle_block_traces(net.double(), (VECTORS.to(dtype).double(), LABELS), name, None, mean)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        actual = report.layers[name].block_traces[0]
        assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def own(f, y):
    return F.cross_entropy(f, y, reduction="none")


@guards("layers.certificates.affine:sums_to_zero", returns=True)
def test_numbers_may_be_added_where_the_gradient_of_ones_own_loss_sums_to_zero():
    net = linear_net(lambda net, x: F.log_softmax(net.c(F.leaky_relu(net.a(x))), 1))
    report = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a", loss=own, strict=True)
    expected = oracle_block_traces(net, (VECTORS, LABELS), "a")
    assert_close(report.layers["a"].block_traces[0], expected, rtol=1e-9, atol=1e-12)
    without_3, with_3 = (VECTORS, LABELS % 3), (VECTORS, torch.full_like(LABELS, 3))
    for loss in (lambda f, y: own(f, y) + (y == 3) * f.sum(1), lambda f, y: torch.where(y == 3, -f[:, 3], own(f, y))):
        assert lf.measure_flatness(net, [without_3], layers="a", loss=loss).exact
        assert not lf.measure_flatness(net, [without_3, with_3], layers="a", loss=loss).exact


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_layer_that_runs_twice_before_a_log_softmax(kernel):
    torch.manual_seed(kernel)
    shared = nn.Conv1d(2, 2, kernel, padding=kernel // 2)

    class Twice(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.shared, self.fc, self.activation = shared, nn.Linear(2, 3), activation

        def forward(self, x):
            return F.log_softmax(self.fc(self.shared(x).mean(2) + self.activation(self.shared(x.flip(2))).mean(2)), 1)

    net, x, y = Twice(nn.ReLU()).double().eval(), torch.randn(4, 2, 6).double(), torch.tensor([0, 1, 2, 0])
    assert lf.measure_flatness(net, [(x, y)], layers="shared", strict=True).exact
    assert_matches_oracle(net, (x, y), layer="shared")
    assert not lf.measure_flatness(Twice(nn.Tanh()).double(), [(x, y)], layers="shared").exact


@guards("layers/certificates/affine.py", "if up_to_shift:\n        # Mult", "if True:\n        # Mult", ids="mse")
@pytest.mark.parametrize(("loss", "activation"), [("mse", F.relu), ("cross_entropy", F.silu)], ids=["mse", "silu"])
def test_other_curvature_is_seen_through_a_log_softmax(loss, activation):
    net = linear_net(lambda net, x: F.log_softmax(net.c(activation(net.a(x))), 1))
    targets = F.one_hot(LABELS, 4).double() if loss == "mse" else LABELS
    report = lf.measure_flatness(net, [(VECTORS, targets)], layers="a", loss=loss)
    assert (report.exact, report.layers["a"].info.reason) == (False, "the network is curved after it")


@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 21_843])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_a_combination_sum_to_zero_in_any_order(classes, dtype):
    u = _combination(torch.empty(4, classes, dtype=dtype), up_to_shift=True).detach()
    for order in (torch.arange(classes), torch.randperm(classes), u[0].argsort(), u[0].abs().argsort()):
        assert not u[:, order].cumsum(1)[:, -1].any()
    assert u.any(1).all()
    assert len(u.unique()) > min(classes, 20)


def test_a_second_derivative_that_is_not_finite_is_the_reason():
    zero = VECTORS.clone()
    zero[3] = 0
    net = linear_net(lambda net, x: net.c(net.a(x).relu() + net.b(x).norm(dim=1, keepdim=True)))
    nn.init.zeros_(net.b.bias)
    report = lf.measure_flatness(net, [(zero, LABELS)], layers="all")
    assert "second derivative after it is not finite" in report.layers["b"].info.reason
    with pytest.raises(lf.NotExactError, match="'b'.*second derivative after it is not finite"):
        lf.measure_flatness(net, [(zero, LABELS)], layers="b", strict=True)
