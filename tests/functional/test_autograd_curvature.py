"""Curvatures of losses of one's own: noticed to be diagonal, or multiplied by as functions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.errors import BatchError
from lightning_flatness.functional import AutogradCurvature, ClassCurvature, CustomLoss, DenseCurvature
from tests.guarding import guards
from tests.networks import focal


def hessians(function, logits, targets):
    """``Λ`` of every sample, by autograd's own Hessian."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda f, y=y: function(f[None], y[None]).sum(), f)
            for f, y in zip(logits, targets, strict=True)
        ]
    )


def asymmetric(f, y):
    """A loss for several labels, which is not convex."""
    return (-y * F.logsigmoid(f) * (-f).sigmoid() - (1 - y) * F.logsigmoid(-f) * f.sigmoid() ** 2).mean(1)


DIAGONAL = {
    "squared": lambda f, y: (f - y).square().mean(1),
    "weighted": lambda f, y: ((1 + y) * (f - y).square()).sum(1),
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").mean(1),
    "Huber": lambda f, y: F.huber_loss(f, y, reduction="none", delta=0.5).mean(1),
    "squared hinge": lambda f, y: (1 - (2 * y - 1) * f).relu().square().mean(1),
    "Poisson": lambda f, y: F.poisson_nll_loss(f, y, reduction="none").mean(1),
    "linear": lambda f, y: (f * y).sum(1),
    "one column": lambda f, y: f[:, 0].exp(),
}
DENSE = {
    "focal": lambda f, y: focal(f, y.argmax(1)),
    "cross-entropy": lambda f, y: F.cross_entropy(f, y.argmax(1), reduction="none"),
    "one pair": lambda f, y: (f - y).square().sum(1) + 1e-6 * f[:, 1] * f[:, 2],
    "some samples": lambda f, y: (f - y).square().sum(1) + y[:, 0] * f.sum(1).square(),
    "ones are in its kernel": lambda f, y: (f - f.mean(1, keepdim=True)).square().sum(1),
    "confident": lambda f, y: F.cross_entropy(60 * f, y.argmax(1), reduction="none"),
}


def batch(classes, samples=4):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randn(samples, classes, generator=generator).gt(0).double()


@pytest.mark.parametrize("classes", [5, 130])
@pytest.mark.parametrize("function", DIAGONAL.values(), ids=DIAGONAL)
def test_a_diagonal_second_derivative_is_noticed(function, classes):
    logits, targets = batch(classes)
    curvature = CustomLoss(function)(logits, targets).curvature
    assert isinstance(curvature, ClassCurvature)
    assert_close(torch.diag_embed(curvature.weights), hessians(function, logits, targets), rtol=1e-12, atol=1e-14)


@guards("functional/autograd_curvature.py", "<= allowed * scale).all()):", "<= allowed * scale).all()) and False:")
@pytest.mark.parametrize("classes", [5, 130])
@pytest.mark.parametrize("function", DENSE.values(), ids=DENSE)
def test_any_other_second_derivative_is_not_taken_for_a_diagonal(function, classes):
    logits, targets = batch(classes)
    curvature = CustomLoss(function)(logits, targets).curvature
    assert isinstance(curvature, DenseCurvature if classes < 128 else AutogradCurvature)
    expected = hessians(function, logits, targets)
    x = torch.randn_like(logits)
    assert_close(curvature.apply(x), (expected @ x[:, :, None])[:, :, 0], rtol=1e-10, atol=1e-12)


def test_a_negative_diagonal_has_no_roots():
    logits, targets = batch(130)
    assert isinstance(CustomLoss(asymmetric)(logits, targets).curvature, AutogradCurvature)
    assert isinstance(CustomLoss(asymmetric)(3 * logits[:, :20], targets[:, :20]).curvature, DenseCurvature)


@pytest.mark.parametrize("function", [*DENSE.values(), asymmetric], ids=[*DENSE, "asymmetric"])
def test_its_forms_are_those_of_the_matrix(function):
    logits, targets = batch(9)
    curvature = AutogradCurvature(function, logits, targets).scaled(0.5)
    matrices = hessians(function, logits, targets) / 2
    scale = float(matrices.abs().max())
    some = slice(2, None)
    columns = torch.stack([curvature.column(index) for index in range(curvature.num_columns)], dim=2)
    V, scales = torch.randn(9, 6).double(), torch.rand(4).double()
    projected = curvature[some].project(V)
    expected = V.T @ matrices @ V
    for actual, wanted in [
        ((columns * curvature.signs[:, None]) @ columns.mT, matrices),
        (projected.columns.mT @ projected.others, expected[some]),
        (curvature[some].diagonal(V), expected.diagonal(dim1=1, dim2=2)[some]),
        (curvature.summed(scales), torch.einsum("n,nij->ij", scales, matrices)),
    ]:
        assert_close(actual, wanted, rtol=0, atol=1e-12 * scale)


def test_many_classes_take_no_matrices():
    # Of 200 samples and 2,000 classes they would take six gigabytes, and factoring them minutes.
    logits, labels = torch.randn(200, 2000), torch.arange(200)
    loss = CustomLoss(lambda f, y: F.cross_entropy(f, y, reduction="none"))(logits, labels)
    diagonal, pi = loss.curvature.diagonal(torch.eye(2000, 3)), logits.double().softmax(1)[:, :3]
    assert_close(diagonal, pi * (1 - pi), rtol=1e-10, atol=1e-14)


def test_a_second_derivative_that_is_not_finite():
    for classes in (5, 130):
        logits, targets = batch(classes)
        logits[1, 3] = 0
        with pytest.raises(BatchError, match="second derivative of the loss is not finite"):
            CustomLoss(lambda f, y: f.abs().pow(1.5).sum(1))(logits, targets)


@pytest.fixture
def many_classes():
    torch.manual_seed(4)
    body = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*body, nn.Linear(4, 140)).double().eval()
    return net, torch.randn(6, 2, 7, 7).double(), torch.randint(140, (6,))


BOTH = ["hessian_trace", "relative_flatness"]


def own(f, y):
    return F.cross_entropy(f, y, reduction="none")


@pytest.mark.parametrize(
    ("layers", "measures"), [("2", BOTH[:1]), ("2", BOTH), (["0", "6"], BOTH)], ids=["trace", "both", "gauss-newton"]
)
def test_all_columns_give_the_numbers_of_the_named_loss(many_classes, layers, measures):
    net, x, y = many_classes
    options = {"layers": layers, "measures": measures, "strict": True}
    expected = lf.measure_flatness(net, [(x, y)], **options)
    actual = lf.measure_flatness(net, [(x, y)], loss=own, **options)
    for name, layer in actual.layers.items():
        wanted = expected.layers[name].block_traces
        assert_close(layer.block_traces, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
        assert layer.exact


def test_largest_eigenvalues_are_those_of_the_named_loss(many_classes):
    net, x, y = many_classes
    for layers, options in {"2": {}, "6": {"by_filter": False, "max_products": 20}}.items():
        options |= {"layers": layers, "tolerance": 1e-6}
        actual, expected = (
            lf.measure_lambda_max(net, [(x, y)], loss=loss, **options) for loss in (own, "cross_entropy")
        )
        assert_close(actual[layers].lambda_max, expected[layers].lambda_max, rtol=1e-5, atol=0)


@guards("layers/gauss_newton.py", "1.0 - 2 * (index % 2)", "1.0")
@pytest.mark.parametrize("loss", [own, lambda f, y: f.cos().sum(1)], ids=["cross-entropy", "concave"])
def test_sampled_columns_agree_within_their_errors(many_classes, loss):
    net, x, y = many_classes
    exact = lf.measure_flatness(net, [(x, y)], layers="0", loss=loss, tolerance=0).layers["0"]
    for seed in range(2):
        layer = lf.measure_flatness(net, [(x, y)], layers="0", loss=loss, tolerance=0.05, seed=seed).layers["0"]
        assert not layer.exact
        for name, error in layer.standard_errors.items():
            assert abs(getattr(layer, name) - getattr(exact, name)) <= 5 * error
            assert error <= 0.05 * abs(getattr(exact, name)) * 1.2
