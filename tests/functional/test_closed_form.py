"""The closed form against its definition, and against itself computed in other ways."""

import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian
from torch.testing import assert_close

from lightning_flatness.functional import (
    BinaryCrossEntropy,
    ClassCurvature,
    ConvolutionGeometry,
    CrossEntropy,
    CustomLoss,
    MeanSquaredError,
    classifier_block_traces,
    closed_form_block_traces,
    closed_form_residual,
    contraction_costs,
    patches,
    products,
    symmetric,
)
from tests.guarding import guards

MODULE = sys.modules["lightning_flatness.functional.closed_form"]


@dataclass
class Arguments:
    inputs: Tensor
    geometry: ConvolutionGeometry
    slopes: Tensor
    head: Tensor
    probabilities: Tensor
    curvatures: Tensor | None
    residual: Tensor | None

    def traces(self, **kwargs):
        curvature = ClassCurvature(self.probabilities, self.probabilities)
        arguments = (self.inputs, self.geometry, self.slopes, self.head, curvature)
        total = closed_form_block_traces(*arguments, **kwargs)
        if self.curvatures is None:
            return total
        added = closed_form_residual(self.inputs, self.geometry, self.curvatures, self.head, self.residual)
        return total + (added if kwargs.get("diagonal") else torch.diag_embed(added))

    def sample(self, n):
        names = ("inputs", "slopes", "probabilities", "curvatures", "residual")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: value[n : n + 1] for name, value in present.items()})

    def single(self):
        """In float32, but for the derivatives of the loss, which come in float64."""
        names = ("inputs", "slopes", "head", "curvatures")
        return replace(self, **{name: getattr(self, name).float() for name in names})

    def without_curvatures(self):
        return replace(self, curvatures=None)


def random_arguments(dims=2, groups=1, per_group=3, channels=2, samples=5, classes=4, size=6, stride=1, confidence=1.0):
    geometry = ConvolutionGeometry((3,) * dims, (stride,) * dims, (1,) * dims, (1,) * dims, groups)
    output = geometry.output_size((size,) * dims)
    filters = groups * per_group
    targets = torch.arange(samples) % classes
    logits = confidence * torch.nn.functional.one_hot(targets, classes) + torch.randn(samples, classes)
    curvature, residual, *_ = CrossEntropy()(logits, targets)
    return Arguments(
        torch.randn(samples, groups * channels, *[size] * dims).double(),
        geometry,
        torch.randn(samples, filters, *output).double(),
        torch.randn(classes, filters).double(),
        curvature.weights,
        torch.randn(samples, filters, *output).double(),
        residual,
    )


@st.composite
def arguments(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.integers(1, 3))
    return random_arguments(
        dims=dims,
        groups=draw(st.sampled_from([1, 1, 2, 3])),
        per_group=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 3)),
        samples=draw(st.integers(1, 6)),
        classes=draw(st.integers(2, 6)),
        size=draw(st.integers(1, 4 if dims == 3 else 6)),
        stride=draw(st.integers(1, 2)),
    )


def definition(given):
    """``T[s, s']`` entry by entry, as in the docstring."""
    phi = patches(given.inputs, given.geometry)
    groups = given.geometry.groups
    per_group = given.slopes.shape[1] // groups
    a, curved = given.slopes.flatten(2), given.curvatures.flatten(2)
    total = torch.zeros(groups, per_group, per_group, dtype=torch.float64)
    for n, pi in enumerate(given.probabilities):
        loss_hessian = torch.diag(pi) - torch.outer(pi, pi)
        for g in range(groups):
            gram = phi[n, g].T @ phi[n, g]
            for i in range(per_group):
                for j in range(per_group):
                    s, t = g * per_group + i, g * per_group + j
                    total[g, i, j] += given.head[:, s] @ loss_hessian @ given.head[:, t] * (a[n, s] @ gram @ a[n, t])
                s = g * per_group + i
                total[g, i, i] += given.residual[n] @ given.head[:, s] * (curved[n, s] @ gram.diagonal())
    return total


def assert_traces_close(actual, expected, rtol=1e-12):
    assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


@given(given=arguments())
def test_it_is_what_it_is_defined_to_be(given):
    assert_traces_close(given.traces(), definition(given))


@given(given=arguments(), chunk_size=st.integers(1, 7))
def test_chunks_do_not_change_the_result(given, chunk_size):
    assert_traces_close(given.traces(chunk_size=chunk_size), given.traces())


@given(
    given=arguments(),
    strip=st.integers(1, 3),
    strips=st.integers(1, 4),
    elements=st.integers(1, 40),
    few=st.sampled_from([0, 24]),
)
def test_how_much_is_made_at_a_time_does_not_change_the_result(given, strip, strips, elements, few):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(symmetric, "STRIP", strip)
        patched.setattr(products, "FEW", few)
        patched.setitem(products.MOST_STRIPS, "cpu", strips)
        patched.setitem(products.PRODUCT_ELEMENTS, "cpu", elements)
        actual = given.traces()
        with torch.no_grad():  # products in memory that is used again
            again = given.traces()
    assert_traces_close(actual, definition(given))
    assert_traces_close(again, definition(given))


@guards("functional/products.py", "None if torch.is_grad_enabled() else", "")
@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("by_gram", [True, False])
def test_it_can_be_differentiated(monkeypatch, by_gram, few):
    monkeypatch.setattr(products, "FEW", few)
    monkeypatch.setattr(MODULE, "contraction_costs", route(by_gram))
    given = random_arguments(dims=1, size=3, samples=2).without_curvatures()
    inputs = tuple(value.requires_grad_() for value in (given.inputs, given.slopes, given.head))

    def traces(x, a, v):
        return replace(given, inputs=x, slopes=a, head=v).traces()

    torch.autograd.gradcheck(traces, inputs, check_forward_ad=True)
    for one in range(3):
        alone = [value.requires_grad_(index == one) for index, value in enumerate(inputs)]
        torch.autograd.gradcheck(traces, tuple(alone))


@given(given=arguments())
def test_a_batch_is_the_sum_of_its_samples(given):
    one_by_one = sum(given.sample(n).traces() for n in range(len(given.inputs)))
    assert_traces_close(one_by_one, given.traces())


def route(by_gram):
    return lambda *args, **kwargs: (0, 1) if by_gram else (1, 0)


@given(given=arguments())
def test_gram_route_and_summed_route_agree(given):
    by_route = {}
    for by_gram in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(MODULE, "contraction_costs", route(by_gram))
            # The route not taken must not run.
            patched.delattr(MODULE, "patches" if by_gram else "patch_gram")
            by_route[by_gram] = given.traces()
    assert_traces_close(by_route[True], by_route[False])


@given(given=arguments())
def test_it_is_symmetric(given):
    traces = given.traces()
    assert_traces_close(traces, traces.mT)


def test_both_routes_are_cheaper_somewhere():
    by_gram, by_sum = contraction_costs(positions=16, patch_length=4608, filters=512)
    assert by_gram < by_sum
    by_gram, by_sum = contraction_costs(positions=3136, patch_length=27, filters=32)
    assert by_sum < by_gram


@given(given=arguments())
def test_the_diagonal_alone_is_the_diagonal(given):
    traces = given.traces()
    assert_close(
        given.traces(diagonal=True), traces.diagonal(dim1=1, dim2=2), rtol=0, atol=1e-12 * float(traces.abs().max())
    )


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_classes_that_hardly_matter_are_left_out(chunk_size):
    given = random_arguments(classes=300, per_group=5, groups=2, confidence=0.0).without_curvatures()
    given.probabilities = torch.softmax(6 * torch.randn(5, 300, dtype=torch.float64), dim=1)
    whole = given.traces()
    trace = float(whole.diagonal(dim1=1, dim2=2).sum())
    for tolerance in (1e-3, 1e-6):
        part = given.traces(tolerance=tolerance, chunk_size=chunk_size)
        assert_close(part.diagonal(dim1=1, dim2=2), whole.diagonal(dim1=1, dim2=2), rtol=1e-10, atol=0)
        error = float(torch.linalg.svdvals(part - whole).sum())
        assert 0 < error <= 2 * tolerance * trace


@guards("functional/closed_form.py", "total += matrices.head_gram * totals.of_floor", "pass")
@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_of_many_classes_may_differ_in_what_classes_share(chunk_size, tolerance):
    # One sample is sure of hardly anything, the others are sure: all classes share something of the first only.
    given = random_arguments(samples=60, classes=200, per_group=5).without_curvatures()
    given.probabilities = torch.softmax(40 * torch.randn(60, 200, dtype=torch.float64), dim=1)
    given.probabilities[0] = torch.softmax(torch.randn(200, dtype=torch.float64), dim=0)
    expected = sum(given.sample(n).traces() for n in range(60))
    actual = given.traces(chunk_size=chunk_size, tolerance=tolerance)
    assert_traces_close(actual, expected, rtol=max(1e-12, 2 * tolerance))


@pytest.mark.parametrize(("groups", "per_group"), [(1, 6), (2, 3), (6, 1)])
def test_shape_is_grouped(groups, per_group):
    traces = random_arguments(groups=groups, per_group=per_group).traces()
    assert traces.shape == (groups, per_group, per_group)
    assert traces.dtype == torch.float64


def test_groups_are_convolutions_side_by_side():
    given = random_arguments(groups=2, per_group=3, channels=2)
    halves = [
        replace(
            given,
            geometry=replace(given.geometry, groups=1),
            inputs=given.inputs[:, 2 * g : 2 * g + 2],
            slopes=given.slopes[:, 3 * g : 3 * g + 3],
            curvatures=given.curvatures[:, 3 * g : 3 * g + 3],
            head=given.head[:, 3 * g : 3 * g + 3],
        ).traces()
        for g in range(2)
    ]
    assert_traces_close(given.traces(), torch.cat(halves))


def test_without_curvatures_it_is_positive_semidefinite():
    traces = random_arguments(per_group=6).without_curvatures().traces()
    assert torch.linalg.eigvalsh(traces).min() > -1e-12 * traces.abs().max()


@pytest.mark.parametrize("by_gram", [True, False])
@pytest.mark.parametrize("confidence", [0.0, 15.0, 20.0])  # 1 - π of 1e-6 at 15, 1e-8 at 20
def test_float32_keeps_its_digits_for_confident_samples(monkeypatch, by_gram, confidence):
    monkeypatch.setattr(MODULE, "contraction_costs", route(by_gram))
    given = random_arguments(classes=10, per_group=8, confidence=confidence)
    given.head += 3.0  # common to all classes, so the loss does not see it; differences of products would
    # The same numbers in both precisions, so that only the arithmetic differs.
    single = given.single()
    double = replace(
        single, **{name: getattr(single, name).double() for name in ("inputs", "slopes", "head", "curvatures")}
    )
    assert_traces_close(single.traces(), double.traces(), rtol=1e-4)
    assert_traces_close(single.without_curvatures().traces(), double.without_curvatures().traces(), rtol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        CrossEntropy(label_smoothing=0.1, class_weight=(1.0, 2.0, 0.5, 3.0), ignore_index=1),
        BinaryCrossEntropy(),
        MeanSquaredError(),
        CustomLoss(lambda f, y: (f.logsumexp(1) - f.gather(1, y[:, None])[:, 0]).square()),
    ],
    ids=["cross_entropy", "weighted", "binary", "mse", "custom"],
)
def test_block_traces_of_the_classifier_are_those_of_its_full_hessian(loss):
    features, weight, bias = (torch.randn(*size).double() for size in ((6, 5), (4, 5), (4,)))
    indices = torch.arange(6) % 4
    several = isinstance(loss, (BinaryCrossEntropy, MeanSquaredError))
    targets = torch.rand(6, 4).double() if several else indices
    full = hessian(lambda w: loss.total(features @ w.T + bias, targets))(weight)
    actual = classifier_block_traces(features, loss(features @ weight.T + bias, targets).curvature)
    assert_close(actual, torch.einsum("sdtd->st", full)[None], rtol=1e-10, atol=1e-12)


@guards("functional/curvature.py", "- total.sum(1).diag()", "+ (scaled - scaled * self.center).sum(0).diag()")
def test_block_traces_of_the_classifier_keep_their_digits_for_sure_samples():
    features, logits = torch.ones(1, 3).double(), torch.tensor([[60.0, 0.0]]).double()
    actual = classifier_block_traces(features, CrossEntropy()(logits, torch.tensor([0])).curvature)
    curved = 3 * math.exp(-60)  # of a sigmoid; 1 - π is beyond float64
    assert_close(actual, curved * torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_are_squared_in_double_precision(dtype):
    features = (300 * torch.rand(4, 20)).to(dtype)
    curvature = CrossEntropy()(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).curvature
    expected = classifier_block_traces(features.double(), curvature)
    assert_close(classifier_block_traces(features, curvature), expected, rtol=1e-12, atol=0)
