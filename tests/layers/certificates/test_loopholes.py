"""Networks made to slip past the certificates; none may be called exact with another number than the Hessian's."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces

torch.manual_seed(0)
SEED = torch.Generator().manual_seed(0)
X = torch.randn(8, 6, generator=SEED).double()
Y = torch.randint(4, (8,), generator=SEED)


class Two(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def network(forward):
    torch.manual_seed(1)
    return Two(forward).double()


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
    net = network(forward)
    report = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert [layer.exact for layer in report.layers.values()] == [False, False, True]
    with pytest.raises(lf.NotExactError):
        lf.measure_flatness(net, [(X, Y)], layers="all", strict=True)


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
    net = network(lambda net, x: net.c(curve(net.a(x))))
    small, large = (X[:1] / 10, Y[:1]), (30 * X[:1], Y[:1])  # one sample, so that nothing mixes
    assert lf.measure_flatness(net, [small], layers="a").exact
    assert not lf.measure_flatness(net, [large], layers="a").exact
    assert not lf.measure_flatness(net, [small, large], layers="a").exact


def test_hooks_that_curve_later_are_noticed_in_the_end():
    def forward(net, x):
        h = net.a(x).relu()
        out = net.c(h)
        late = (x.detach().abs().amax() > 5).to(x)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * (1 + late * out))
        return out + 0

    small, large = (X / 10, Y), (30 * X, Y)
    assert lf.measure_flatness(network(forward), [small], layers="a").exact
    assert not lf.measure_flatness(network(forward), [small, *[large] * 16], layers="a").exact


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
    net = network(lambda net, x: net.c(mix(net.a(x).relu())))
    with pytest.raises(lf.LayerSelectionError, match="'a'.*depend on other samples"):
        lf.measure_flatness(net, [(X, Y)], layers=["a", "c"])


@pytest.mark.parametrize("shift", [1, -1, 4, 3])
def test_losses_that_mix_samples(shift):
    def pairs(f, y):
        return F.cross_entropy(f, y, reduction="none") + (f * f.roll(shift, 0)).sum(1).square()

    def one_way(f, y):
        others = f.roll(shift, 0).detach()
        others[1::2] = f.roll(shift, 0)[1::2]
        return F.cross_entropy(f, y, reduction="none") + (f * others).sum(1).square()

    net = network(lambda net, x: net.c(net.a(x).relu()))
    for loss in (pairs, one_way):
        with pytest.raises(lf.BatchError, match="depends on other samples"):
            lf.measure_flatness(net, [(X, Y)], layers="a", loss=loss)


@pytest.mark.parametrize("hidden", [nullcontext, torch._C.DisableTorchFunctionSubclass], ids=["seen", "hidden"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_kernel_that_some_batches_use_twice(order, hidden):
    def forward(net, x):
        h = net.a(x).relu()
        if x.mean() > 0.5:
            with hidden():  # as inputs of a class of their own do
                h = F.linear(F.pad(h, (0, 1)), net.a.weight).relu()
        return net.c(h)

    batches = [(X - 1, Y), (X + 1, Y)][::order]
    with pytest.raises(lf.LayerSelectionError, match="'a'.*depend on its kernel in another way"):
        lf.measure_flatness(network(forward), batches, layers="a")


def test_uses_that_do_not_matter_are_fine():
    def forward(net, x):
        if x.mean() > 0.5:
            net.a.weight.norm()
        return net.c(net.a(x).relu())

    net = network(forward)
    report = lf.measure_flatness(net, [(X - 1, Y), (X + 1, Y)], layers="a")
    expected = oracle_block_traces(net, (torch.cat([X - 1, X + 1]), torch.cat([Y, Y])), "a")
    assert_close(report.layers["a"].block_traces[0], expected, rtol=1e-10, atol=1e-14)


class OfInput(nn.Linear):
    """A kernel that depends on the input."""

    def forward(self, x):
        return F.linear(x, self.weight * (3.0 if x.mean() > 0.5 else 1.0))


def test_a_kernel_that_depends_on_the_input():
    net = network(lambda net, x: net.c(net.a(x).relu()))
    net.a = OfInput(6, 5).double()
    with pytest.raises(lf.LayerSelectionError, match="'a' applies another kernel from one call to the next"):
        lf.measure_flatness(net, [(X - 1, Y), (X + 1, Y)], layers="a")


def test_rows_that_are_routed_in_a_later_batch_only():
    def forward(net, x):
        h = torch.zeros_like(x[:, :5])
        chosen = x[:, 0] > 0
        h[chosen] = net.a(x[chosen]).relu()
        h[~chosen] = net.b(x[~chosen]).relu()
        return net.c(h)

    first, later = X.clone(), X.clone()
    first[:, 0] = 1.0
    with pytest.raises(lf.LayerSelectionError, match="'a' runs on some samples of this batch only"):
        lf.measure_flatness(network(forward), [(first, Y), (later, Y)], layers="a")


def test_inputs_that_are_changed_in_place_afterwards():
    def forward(net, x):
        x = x[:, :5].clone()
        h = F.pad(x, (0, 1))
        z = net.a(h)
        h += 1
        return net.c((z + h[:, :5]).relu())

    net = network(forward)
    try:
        layer = lf.measure_flatness(net, [(X, Y)], layers="a").layers["a"]
    except lf.LayerSelectionError:
        return
    assert_close(layer.block_traces[0], oracle_block_traces(net, (X, Y), "a"), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("confidence", [1.0, 30.0, 60.0])
def test_diagonals_alone_keep_their_digits(classes, confidence):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    net, x = net.double(), torch.randn(6, 2, 6, 6).double()
    with torch.no_grad():
        net[4].bias[0] += confidence
    whole = lf.measure_flatness(net, [x], tolerance=0).layers["0"]
    part = lf.measure_flatness(net, [x], measures=["hessian_trace"]).layers["0"]
    assert_close(part.filter_traces, whole.filter_traces, rtol=1e-12, atol=0)
    default = lf.measure_flatness(net, [x]).layers["0"]
    assert_close(default.filter_traces, whole.filter_traces, rtol=1e-12, atol=0)


def test_a_loss_that_holds_single_precision():
    net, weight = network(lambda net, x: net.c(net.a(x).relu())).float(), torch.rand(4)
    found = lf.measure_flatness(
        net, [(X.float(), Y)], layers="a", loss=lambda f, y: F.cross_entropy(f, y, weight=weight, reduction="none")
    )
    double = lf.measure_flatness(
        net, [(X.float(), Y)], layers="a", loss=lambda f, y: F.cross_entropy(f, y, weight.double(), reduction="none")
    )
    assert_close(found.hessian_trace, double.hessian_trace, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [lambda f: f, lambda f, y: F.mse_loss(f, y, reduction="none"), lambda f, y: f @ f])
def test_errors_in_a_loss_name_it(loss):
    net = network(lambda net, x: net.c(net.a(x).relu()))
    with pytest.raises(lf.BatchError, match="The loss '<lambda>' fails on logits of shape"):
        lf.measure_flatness(net, [(X, Y)], layers="a", loss=loss)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": None},
        {"ignore_index": "x"},
        {"class_weight": "balanced"},
        {"class_weight": torch.ones(4, 4)},
        {"label_smoothing": "a"},
        {"tolerance": "a"},
        {"seed": 1.5},
        {"seed": None},
    ],
    ids=str,
)
def test_options_of_a_wrong_type(options):
    net = network(lambda net, x: net.c(net.a(x).relu()))
    with pytest.raises(lf.FlatnessError):
        lf.measure_flatness(net, [(X, Y)], layers="a", **options)


def test_probabilities_that_are_none():
    net = network(lambda net, x: net.c(net.a(x).relu()))
    with pytest.raises(lf.BatchError, match="probabilities must be finite and not negative"):
        lf.measure_flatness(net, [(X, torch.full((8, 4), -1.0))], layers="a")


@pytest.mark.parametrize("options", [{"max_products": 0}, {"max_products": 1.5}, {"tolerance": -1.0}], ids=str)
def test_eigenvalues_with_wrong_options(options):
    net = network(lambda net, x: net.c(net.a(x).relu()))
    with pytest.raises(lf.FlatnessError, match="measure_lambda_max"):
        lf.measure_lambda_max(net, [(X, Y)], layers="a", **options)


def wide(outputs=150):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs)).double()


def test_a_dense_curvature_is_never_sampled():
    report = lf.measure_flatness(
        wide(), [(X, Y)], layers="all", loss=lambda f, y: F.cross_entropy(f, y, reduction="none")
    )
    assert report.exact
    by_name = lf.measure_flatness(wide(), [(X, Y)], layers="all", tolerance=0)
    assert_close(report.hessian_trace, by_name.hessian_trace, rtol=1e-9, atol=0)


def test_what_is_sampled_is_not_called_a_part():
    text = " ".join(str(lf.measure_flatness(wide(), [(X, Y)], layers="all", tolerance=0.2)).split())
    assert "Estimates, with standard errors: classes without much mass are sampled." in text
    assert "Gauss-Newton part" not in text


def test_a_loss_of_ones_own_may_be_derived_from_one_of_torch():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, f, y):
            losses = F.cross_entropy(f, y, reduction="none")
            return (1 - (-losses).exp()) ** 2 * losses

    net = network(lambda net, x: net.c(net.a(x).relu()))
    focal = lf.measure_flatness(net, [(X, Y)], layers="a", loss=Focal())
    by_function = lf.measure_flatness(net, [(X, Y)], layers="a", loss=Focal().forward)
    assert focal.hessian_trace == by_function.hessian_trace
    assert focal.hessian_trace != lf.measure_flatness(net, [(X, Y)], layers="a").hessian_trace


def test_tables_among_the_inputs(monkeypatch):
    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x, table):
            return self.c(self.a(x + table.mean(0)).relu())

    torch.manual_seed(3)
    net, table = WithTable().double(), torch.randn(20, 6).double()
    whole = lf.measure_flatness(net, [({"x": X, "table": table}, Y)], layers="a")
    monkeypatch.setattr("lightning_flatness.layers.passes.rows_at_a_time", lambda *args: 3)
    parts = lf.measure_flatness(net, [({"x": X, "table": table}, Y)], layers="a")
    assert whole.num_samples == parts.num_samples == 8
    assert_close(parts.relative_flatness, whole.relative_flatness, rtol=1e-12, atol=0)
    with pytest.raises(lf.BatchError, match="rows of logits for .* samples.*Give targets"):
        lf.measure_flatness(net, [((X, table), None)], layers="a")


def test_memory_that_runs_out_while_certifying(monkeypatch):
    from lightning_flatness.layers import plan

    net = network(lambda net, x: net.c(net.a(x).relu()))
    expected = lf.measure_flatness(net, [(X, Y)], layers="all")
    certified, calls = plan.why_not_affine, []

    def tight(layers, logits):
        calls.append(len(logits))
        if len(logits) > 4:
            raise torch.OutOfMemoryError("no memory")
        return certified(layers, logits)

    monkeypatch.setattr(plan, "why_not_affine", tight)
    found = lf.measure_flatness(net, [(X, Y)], layers="all")
    assert calls == [8, 4]  # of the second half the graph is enough
    assert found.exact
    for name, layer in expected.layers.items():
        assert_close(found.layers[name].block_traces, layer.block_traces, rtol=1e-12, atol=1e-15)


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
    assert lf.measure_flatness(net, [(x, Y), (x, Y)], layers="conv").layers["conv"].method == "closed_form"
    with pytest.raises(lf.LayerSelectionError, match="'conv'.*depend on other samples"):
        lf.measure_flatness(net, [(x, Y), (later, Y)], layers="conv")
