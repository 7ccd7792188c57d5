"""The classifier's flatness as a penalty: its value, its gradient and its second derivatives, by other ways."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import (
    ConvolutionGeometry,
    CrossEntropy,
    classifier_block_traces,
    closed_form_block_traces,
    flatness_penalty,
    layerwise_flatness,
    relative_flatness,
    weight_gram,
)
from lightning_flatness.testing import oracle_block_traces
from tests.guarding import guards

KINDS = [
    pytest.param({"measure": measure, "normalize": normalize}, id=f"{measure}{', normalized' * normalize}")
    for measure in ("relative_flatness", "layerwise_flatness")
    for normalize in (False, True)
]
LOSSES = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"class_weight": True},
    "weights and smoothing": {"class_weight": True, "label_smoothing": 0.2},
    "ignored": {"ignore_index": 1},
    "all": {"class_weight": True, "label_smoothing": 0.2, "ignore_index": 1},
}


def head(seed, samples=5, features=4, classes=3, dtype=torch.float64):
    """Features, weight, bias and targets of a random classifier, of whatever scale; its features have offsets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = 10 ** float(torch.rand((), generator=generator) * 2 - 1)
    g, w, b = scale * (normal(samples, features) + normal(features)), normal(classes, features), normal(classes)
    targets = torch.randint(classes, (samples,), generator=generator)
    targets[0], targets[1] = 0, 1  # some are ignored and some are not
    return g.to(dtype), w.to(dtype), b.to(dtype), targets


def options_of(loss, classes):
    options = dict(LOSSES[loss])
    if "class_weight" in options:
        options["class_weight"] = torch.linspace(0.5, 2.0, classes, dtype=torch.float64)
    return options


def by_double_backward(g, f, w, targets, measure="relative_flatness", normalize=False, class_weight=None, **options):
    """The same from products of torch's own cross-entropy's Hessian at the logits, which can be differentiated again.

    The Hessian of sample n with respect to the weight is the Kronecker product of that at its logits and g gᵀ.
    """
    if normalize:
        sigma = g.detach().std(0, correction=0)
        g, w = g / sigma, w * sigma
    (gradient,) = torch.autograd.grad(cross_entropy(f, targets, class_weight, **options), f, create_graph=True)
    flatness = 0.0
    vectors = w.T if measure == "relative_flatness" else torch.eye(f.shape[1], dtype=f.dtype)
    for vector in vectors:
        (product,) = torch.autograd.grad((gradient @ vector).sum(), f, create_graph=True)
        flatness = flatness + g.square().sum(1) @ (product @ vector)
    return flatness if measure == "relative_flatness" else w.square().sum() * flatness


def gradients(function, g, f, w, *arguments, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (g, f, w)]
    value = function(*leaves, *arguments, **options)
    return value.detach(), torch.autograd.grad(value, leaves)


def assert_same(actual, expected, rtol):
    """Compare tensors relative to their largest entry."""
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=0.0, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_hundred_heads_equal_those_by_double_backward(kind):
    for seed in range(100):
        g, w, b, targets = head(seed, samples=3 + seed % 4, features=2 + seed % 5, classes=2 + seed % 7)
        arguments = g, g @ w.T + b, w, targets
        options = options_of(list(LOSSES)[seed % len(LOSSES)], len(w))
        value, found = gradients(flatness_penalty, *arguments, **kind, **options)
        expected, wanted = gradients(by_double_backward, *arguments, **kind, **options)
        assert_close(value, expected, rtol=1e-10, atol=0.0)
        assert_same(found, wanted, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 1000])
def test_gradients_of_many_classes_equal_those_by_double_backward(kind, classes):
    g, w, b, targets = head(0, samples=4, features=6, classes=classes)
    w = w / 10
    if kind["measure"] == "layerwise_flatness":  # its reference takes one product for every class
        g, w, b, targets = g[:2], w[:100], b[:100], targets[:2]
    arguments = g, g @ w.T + b, w, targets
    options = options_of("weights and smoothing", len(w))
    value, found = gradients(flatness_penalty, *arguments, **kind, **options)
    expected, wanted = gradients(by_double_backward, *arguments, **kind, **options)
    assert_close(value, expected, rtol=1e-10, atol=0.0)
    assert_same(found, wanted, rtol=1e-10)


@pytest.mark.parametrize("measure", ["relative_flatness", "layerwise_flatness"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_gradients_of_a_hundred_heads_equal_finite_differences(measure, classes):
    for seed in range(100):
        g, w, b, _ = head(seed, classes=classes)
        leaves = g, g @ w.T + b, w
        _, found = gradients(flatness_penalty, *leaves, measure=measure)
        for index in range(3):
            direction = torch.randn_like(leaves[index])
            direction *= leaves[index].abs().mean() / direction.norm()

            def moved(step, index=index, leaves=leaves, direction=direction):
                changed = [*leaves[:index], leaves[index] + step * direction, *leaves[index + 1 :]]
                return flatness_penalty(*changed, measure=measure)

            h = 1e-4  # a central difference of fourth order
            difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
            along = (found[index] * direction).sum()
            assert_close(along, difference, rtol=0.0, atol=1e-6 * float(found[index].norm() * direction.norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_is_right(kind):
    g, w, b, _ = head(0)
    leaves = [tensor.requires_grad_() for tensor in (g, (g @ w.T + b).detach(), w)]
    if kind["normalize"]:  # finite differences would move σ, which counts as a constant
        leaves = leaves[1:]
        assert torch.autograd.gradgradcheck(lambda f, w: flatness_penalty(g.detach(), f, w, **kind), leaves)
    else:
        assert torch.autograd.gradgradcheck(lambda *tensors: flatness_penalty(*tensors, **kind), leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_value_is_that_of_the_measured_block_traces(loss):
    g, w, b, targets = head(1, samples=20, classes=5)
    f, options = g @ w.T + b, options_of(loss, 5)
    weights = options.get("class_weight")
    derivatives = CrossEntropy(**options | ({} if weights is None else {"class_weight": tuple(weights.tolist())}))
    derivatives = derivatives(f, targets)
    traces, gram = classifier_block_traces(g, derivatives.curvature) / derivatives.normalizer, weight_gram(w)
    for measure in (relative_flatness, layerwise_flatness):
        value = flatness_penalty(g, f, w, targets, measure=measure.__name__, **options)
        assert_close(value, measure(traces, gram), rtol=1e-12, atol=0.0)
        of_samples = flatness_penalty(g, f, w, targets, measure=measure.__name__, reduction="none", **options)
        assert of_samples.shape == (20,)
        assert_close(of_samples.sum() / derivatives.normalizer, value, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_targets_that_are_probabilities(weighted):
    g, w, b, _ = head(2, samples=6, classes=4)
    targets = torch.softmax(torch.randn(6, 4, dtype=torch.float64), 1)
    options = options_of("weights and smoothing", 4) if weighted else {}
    value = flatness_penalty(g, g @ w.T + b, w, targets, **options)
    leaf = (g @ w.T + b).requires_grad_()
    assert_close(value, by_double_backward(g, leaf, w, targets, **options).detach(), rtol=1e-12, atol=0.0)


def test_features_and_weight_of_a_convolution_of_size_one():
    g, w, b, _ = head(3)
    expected = flatness_penalty(g, g @ w.T + b, w)
    assert_close(flatness_penalty(g[..., None, None], g @ w.T + b, w[..., None, None]), expected, rtol=0.0, atol=0.0)


@guards("functional/penalty.py", "sigma = torch.where(sigma > eps * largest, sigma, 0.0)", "pass")
def test_normalized_is_invariant_to_scales_of_features_also_of_constant_ones():
    g, w, b, _ = head(4, samples=6, features=5)
    g[:, 2] = 0.1
    g[0, 2] = torch.nextafter(g[0, 2], g[0, 2] + 1)  # constant, but for rounding
    f = g @ w.T + b
    value = flatness_penalty(g, f, w, normalize=True)
    scales = torch.tensor([0.01, 3.0, 7.0, 50.0, 1.0], dtype=torch.float64)
    assert_close(flatness_penalty(g * scales, f, w / scales, normalize=True), value, rtol=1e-12, atol=0.0)
    kept = [0, 1, 3, 4]
    assert_close(flatness_penalty(g[:, kept], f, w[:, kept], normalize=True), value, rtol=1e-12, atol=0.0)
    assert float(flatness_penalty(g * scales, f, w / scales)) > 1.5 * float(flatness_penalty(g, f, w))


@guards("functional/penalty.py", "torch.autocast(g.device.type, enabled=False)", "torch.enable_grad()")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    g, w, b, _ = head(5, samples=8, features=32, classes=10, dtype=torch.float32)
    g = 100 * g.to(dtype)  # squares of these overflow in float16
    f = (g.float() @ w.T / 1000 + b).to(dtype)
    g.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = flatness_penalty(g, f, w)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, g)
    assert gradient.dtype == dtype
    in_double, (expected, *_) = gradients(flatness_penalty, g.double(), f.double(), w.double())
    assert_close(value.double(), in_double, rtol=1e-5, atol=0.0)
    assert_same([gradient.double()], [expected], rtol=4 * torch.finfo(dtype).eps)


@guards("functional/penalty.py", "torch.where(is_likeliest, -others.sum(1, keepdim=True), others)", "others")
@guards("functional/penalty.py", "centred = weight - weight.mean(0)", "centred = weight")
@pytest.mark.parametrize("measure", ["relative_flatness", "layerwise_flatness"])
def test_confident_samples_keep_their_digits_in_float32(measure):
    g, w, *_ = head(6, samples=8, features=32, classes=10)
    w = w + 1000.0 if measure == "relative_flatness" else w
    f = 30.0 * torch.eye(10, dtype=torch.float64)[:8] + torch.linspace(0, 1, 10, dtype=torch.float64)
    exact, wanted = gradients(flatness_penalty, g, f, w, measure=measure)
    value, found = gradients(flatness_penalty, g.float(), f.float(), w.float(), measure=measure)
    assert 0 < float(exact) < 1e-6 * float(w.square().sum() * g.square().sum())
    assert_close(value.double(), exact, rtol=1e-3, atol=0.0)
    assert_same([found[1].double()], [wanted[1]], rtol=1e-3)


def test_it_can_be_compiled():
    g, w, b, targets = head(7)
    compiled = torch.compile(flatness_penalty, backend="eager", fullgraph=True)
    arguments = g, g @ w.T + b, w, targets
    assert_close(compiled(*arguments, normalize=True), flatness_penalty(*arguments, normalize=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 3)}, r"features \(4, 3\), logits \(5, 3\) and weight \(3, 4\) do not fit"),
        ({"features": torch.zeros(5, 3)}, "do not fit"),
        ({"features": torch.zeros(5, 2, 4)}, "a linear classifier that takes one feature vector"),
        ({"weight": torch.zeros(2, 4)}, "do not fit"),
        ({"weight": nn.Linear(4, 3)}, r"weight is a Linear; give a tensor \(of a layer, its parameter `weight`\)"),
        ({"targets": [0, 1, 2, 0, 1]}, "targets is a list; give a tensor"),
        ({"logits": torch.zeros(5, 1), "weight": torch.zeros(1, 4)}, "at least two, one for every class"),
        ({"targets": None, "class_weight": [1.0, 2.0, 3.0]}, "depends on the targets. Give targets="),
        ({"class_weight": [1.0, 2.0]}, r"class_weight has shape \(2,\), but there are 3 classes"),
        ({"targets": torch.zeros(5)}, r"integers of shape \(5,\)\) or probabilities"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets have shape \(4,\)"),
        ({"measure": "hessian_trace"}, "measure='hessian_trace' is not known; choose one of 'relative_flatness'"),
        ({"reduction": "sum"}, "reduction='sum' is not known"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    g, w, b, targets = head(8)
    arguments = {"features": g, "logits": g @ w.T + b, "weight": w, "targets": targets} | change
    with pytest.raises(FlatnessError, match=message):
        flatness_penalty(**arguments)


def test_targets_of_a_small_integer_type():
    """In uint8, 156 equals -100, which is ignored."""
    g, w, b, _ = head(8, classes=200)
    targets = torch.tensor([156, 1, 2, 3, 4])
    expected = flatness_penalty(g, g @ w.T + b, w, targets)
    assert_close(flatness_penalty(g, g @ w.T + b, w, targets.to(torch.uint8)), expected, rtol=0, atol=0)


def test_one_sample_cannot_be_normalized():
    g, w, b, _ = head(9, samples=2)
    with pytest.raises(BatchError, match=r"normalize=True .* has one sample. Use larger batches.* drop_last=True in"):
        flatness_penalty(g[:1], g[:1] @ w.T + b, w, normalize=True)


# ---------------------------------------------------------------------------------- the last convolution as a penalty


def last_convolution(x, kernel1, kernel2, head):
    """Relative flatness of ``kernel2``, differentiable: the recipe of docs/theory.md."""
    inputs = torch.relu(torch.conv2d(x, kernel1))
    z = torch.conv2d(inputs, kernel2)
    slopes = (z.detach() > 0).to(z) / z[0, 0].numel()
    logits = torch.relu(z).mean((2, 3)) @ head.T
    curvature = CrossEntropy()(logits).curvature
    geometry = ConvolutionGeometry(kernel2.shape[2:], (1, 1), (0, 0), (1, 1))
    traces = closed_form_block_traces(inputs, geometry, slopes, head, curvature) / len(x)
    rows = kernel2.flatten(1)
    return relative_flatness(traces, rows @ rows.T), z


def test_the_flatness_of_the_last_convolution_has_the_gradient_of_the_theory():
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
    leaves = [torch.randn(*shape, dtype=torch.float64) / 2 for shape in ((3, 2, 3, 3), (4, 3, 2, 2), (5, 4))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value, z = last_convolution(x, *leaves)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, bias=False),
        torch.nn.ReLU(),
        torch.nn.Conv2d(3, 4, 2, bias=False),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5, bias=False),
    ).double()
    for name, leaf in zip(("0", "2", "6"), leaves, strict=True):
        net.get_submodule(name).weight.data = leaf.detach().clone()
    oracle = oracle_block_traces(net, (x, torch.zeros(6, dtype=torch.long)), "2")
    assert_close(value.detach(), (oracle * weight_gram(leaves[1])[0]).sum(), rtol=1e-10, atol=0.0)
    found = torch.autograd.grad(value, leaves)
    with torch.no_grad():
        for index, leaf in enumerate(leaves):
            direction = torch.randn_like(leaf)
            values = []
            for step in (-1e-6, 1e-6):
                changed = [*leaves[:index], leaf + step * direction, *leaves[index + 1 :]]
                moved, moved_z = last_convolution(x, *changed)
                assert torch.equal(moved_z > 0, z > 0)  # no slope has changed
                values.append(moved)
            along = float((found[index] * direction).sum())
            assert along == pytest.approx(float(values[1] - values[0]) / 2e-6, rel=1e-6)


def test_the_flatness_of_the_last_convolution_jumps_where_a_slope_does():
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None, None]
    first = torch.eye(2, dtype=torch.float64)[..., None, None]
    head = torch.tensor([[1.0, 3.0], [-1.0, -3.0]], dtype=torch.float64)

    def flatness(step):
        second = torch.tensor([[1.0, 0.0], [step, 1.0]], dtype=torch.float64)[..., None, None]
        return float(last_convolution(x, first, second, head)[0])

    assert flatness(-1e-9) == pytest.approx(flatness(-1e-6), rel=1e-5)
    assert flatness(1e-9) > 5 * flatness(-1e-9)
