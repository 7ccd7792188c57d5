"""Derivatives of the losses against autograd's derivatives of torch's own losses."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import CrossEntropy, CustomLoss, MeanSquaredError, find_loss, flatness_penalty
from tests.guarding import guards
from tests.networks import focal


def matrices(curvature, classes):
    """``Λ``, from the columns of its factor."""
    factor = torch.stack([curvature.column(index) for index in range(curvature.num_columns)], dim=2)
    signed = factor if curvature.signs is None else factor * curvature.signs[:, None]
    assert factor.shape[1] == classes
    return signed @ factor.mT


def assert_derivatives_are_autograds(loss, of_torch, logits, targets):
    """``of_torch`` is the mean loss."""
    curvature, residual, _, normalizer, outcomes, _ = loss(logits, targets)
    assert_close(outcomes[:, 2].sum() / normalizer, of_torch(logits, targets).double())
    samples, classes = logits.shape
    first = jacobian(lambda f: of_torch(f, targets), logits)
    second = hessian(lambda f: of_torch(f, targets), logits)  # (N, K, N, K)
    blocks = torch.stack([second[n, :, n] for n in range(samples)])
    assert_close(residual / normalizer, first, rtol=1e-12, atol=1e-15)
    assert_close(matrices(curvature, classes) / normalizer, blocks, rtol=1e-10, atol=1e-14)
    assert_close(loss.total(logits, targets) / normalizer, of_torch(logits, targets).double())


@st.composite
def logits_and_indices(draw):
    samples, classes = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    return scale * torch.randn(samples, classes, dtype=torch.float64), torch.randint(classes, (samples,))


@given(
    batch=logits_and_indices(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    ignored=st.booleans(),
    soft=st.booleans(),
)
def test_cross_entropy_with_its_options(batch, label_smoothing, weighted, ignored, soft):
    logits, targets = batch
    options = {"label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = torch.rand(logits.shape[1], dtype=torch.float64) + 0.1
    if soft:
        targets = torch.rand_like(logits).softmax(1)
    elif ignored and len(targets) > 1:
        options["ignore_index"] = 1
        targets[0], targets[-1] = 1, 0
    by_torch = nn.CrossEntropyLoss(**options)
    assert_derivatives_are_autograds(find_loss(by_torch), by_torch, logits, targets)
    class_weight = options.pop("weight", None)
    by_name = find_loss("cross_entropy", class_weight=class_weight, **options)
    assert_derivatives_are_autograds(by_name, by_torch, logits, targets)


@given(batch=logits_and_indices())
def test_binary_cross_entropy(batch):
    logits, _ = batch
    targets = torch.rand_like(logits).round(decimals=1)
    by_torch = nn.BCEWithLogitsLoss()
    assert_derivatives_are_autograds(find_loss("binary_cross_entropy"), by_torch, logits, targets)
    assert_derivatives_are_autograds(find_loss(by_torch), by_torch, logits, targets)


@given(batch=logits_and_indices())
def test_squared_error(batch):
    logits, _ = batch
    targets = torch.randn_like(logits)
    assert_derivatives_are_autograds(find_loss("mse"), nn.MSELoss(), logits, targets)
    assert_derivatives_are_autograds(find_loss(nn.MSELoss()), nn.MSELoss(), logits, targets)


@given(batch=logits_and_indices())
def test_a_loss_of_ones_own(batch):
    # The focal loss is not convex: its curvature has negative directions.
    assert_derivatives_are_autograds(find_loss(focal), lambda f, y: focal(f, y).mean(), *batch)


def test_assertion_can_fail():
    logits, targets = torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    with pytest.raises(AssertionError):
        assert_derivatives_are_autograds(CrossEntropy(), lambda f, y: focal(f, y).mean(), logits, targets)


def test_one_logit_takes_a_vector_of_targets():
    logits, targets = torch.randn(5, 1), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    for name in ("binary_cross_entropy", "mse"):
        actual, expected = (find_loss(name)(logits, t) for t in (targets, targets[:, None]))
        assert_close(actual.residual, expected.residual, rtol=0, atol=0)


def test_without_targets_there_is_no_residual():
    for name in ("cross_entropy", "binary_cross_entropy", "mse"):
        derivatives = find_loss(name)(torch.randn(3, 4))
        assert derivatives.residual is None
        assert derivatives.normalizer == derivatives.num_samples == 3


def test_ignored_samples_do_not_count():
    derivatives = CrossEntropy(class_weight=(1.0, 2.0, 4.0))(torch.randn(4, 3), torch.tensor([2, -100, 0, -100]))
    assert derivatives.num_samples == 2
    assert derivatives.normalizer == 5.0
    assert not derivatives.residual[[1, 3]].any()
    assert not derivatives.curvature.weights[[1, 3]].any()


def test_float32_logits_are_taken_in_float64():
    logits, targets = 5 * torch.randn(3, 4), torch.tensor([0, 1, 2])
    single, double = CrossEntropy()(logits, targets), CrossEntropy()(logits.double(), targets)
    assert_close(single.residual, double.residual, rtol=0, atol=0)
    assert_close(single.curvature.weights, double.curvature.weights, rtol=0, atol=0)


def test_confident_logits_keep_their_digits():
    # 1 - π is 2e-40 / (1 + 2e-40) here; as a difference it would be zero.
    logits = torch.tensor([[40 * math.log(10), 0.0, 0.0]], dtype=torch.float64)
    curvature, residual, *_ = CrossEntropy()(logits, torch.tensor([0]))
    assert_close(residual, torch.tensor([[-2e-40, 1e-40, 1e-40]], dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(curvature.center[0, 1:], torch.tensor([1e-40, 1e-40], dtype=torch.float64), rtol=1e-12, atol=0)
    weights = find_loss("binary_cross_entropy")(logits).curvature.weights
    assert_close(weights[0, 0], torch.tensor(1e-40 / 3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_confident_and_wrong():
    residual = CrossEntropy()(torch.tensor([[90.0, 0.0]]), torch.tensor([1])).residual
    assert_close(residual, torch.tensor([[1.0, -1.0]], dtype=torch.float64), rtol=1e-12, atol=0)


def test_huge_logits_do_not_overflow():
    curvature, residual, *_ = CrossEntropy()(torch.tensor([[3e38, 0.0, -3e38]]), torch.tensor([0]))
    assert_close(curvature.center, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), rtol=0, atol=0)
    assert_close(residual, torch.zeros(1, 3, dtype=torch.float64), rtol=0, atol=0)


def test_a_common_shift_of_the_logits_changes_nothing():
    logits, targets = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    shifted, plain = CrossEntropy()(logits + 7, targets), CrossEntropy()(logits, targets)
    assert_close(shifted.residual, plain.residual, rtol=1e-12, atol=1e-15)
    assert_close(shifted.curvature.weights, plain.curvature.weights, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"loss": "hinge"}, "loss='hinge' is not known.*'binary_cross_entropy', 'mse'.*function"),
        ({"loss": 3}, "loss=3 is not known"),
        ({"loss": "mse", "label_smoothing": 0.1}, "options of loss='cross_entropy'"),
        ({"loss": nn.CrossEntropyLoss(), "ignore_index": 0}, "options of loss='cross_entropy'"),
        ({"loss": "cross_entropy", "label_smoothing": 1.5}, "label_smoothing=1.5 must be a number between 0 and 1"),
        ({"loss": "cross_entropy", "label_smoothing": True}, "label_smoothing=True must be a number between"),
        ({"loss": "cross_entropy", "class_weight": [1.0, -1.0]}, "must contain one number for every class"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "reduction='sum'.*mean over samples"),
        ({"loss": nn.MSELoss(reduction="none")}, "reduction='none'.*mean over samples"),
    ],
    ids=str,
)
def test_wrong_losses_are_refused(arguments, match):
    with pytest.raises(FlatnessError, match=match):
        find_loss(**arguments)


def test_label_smoothing_may_be_a_number_of_another_library():
    for number in (torch.tensor(0.25), torch.tensor(0.25).numpy()[()]):
        assert find_loss("cross_entropy", label_smoothing=number) == CrossEntropy(label_smoothing=0.25)
    assert find_loss("cross_entropy", label_smoothing=torch.tensor(0.0)) == CrossEntropy()


UNORDERED = [{0: 5.0, 1: 1.0, 2: 0.5}, Counter([0, 1, 1, 2]), {5.0, 1.0, 0.5}, "123", b"123"]


@pytest.mark.parametrize("class_weight", UNORDERED, ids=lambda value: type(value).__name__)
def test_class_weights_without_the_order_of_the_classes_are_refused(class_weight):
    name = type(class_weight).__name__
    remedy = r"class_weight=\[weights\[k\] for k in range\(num_classes\)\]" if isinstance(class_weight, dict) else ""
    with pytest.raises(FlatnessError, match=f"class_weight is a {name}.*list or a tensor.*{remedy}"):
        find_loss("cross_entropy", class_weight=class_weight)
    with pytest.raises(FlatnessError, match=f"class_weight is a {name}"):
        flatness_penalty(torch.ones(3, 2), torch.ones(3, 3), torch.ones(3, 2), Y, class_weight=class_weight)


@given(batch=logits_and_indices(), weighted=st.booleans(), ignored=st.booleans())
def test_negative_log_likelihood_of_log_probabilities(batch, weighted, ignored):
    logits, targets = batch
    weight = torch.rand(logits.shape[1]).double() + 0.1 if weighted else None
    by_torch = nn.NLLLoss(weight, ignore_index=int(targets[0]) if ignored and targets.unique().numel() > 1 else -100)
    loss = find_loss(by_torch)
    # As functions of what goes into the log-softmax, both losses are one.
    cross_entropy = nn.CrossEntropyLoss(weight, ignore_index=by_torch.ignore_index)
    outputs = logits.log_softmax(1)
    assert_derivatives_are_autograds(loss, cross_entropy, outputs, targets)
    assert_close(loss.total(outputs, targets) / loss(outputs, targets).normalizer, by_torch(outputs, targets))


@pytest.mark.parametrize("output", [torch.randn(3, 4), torch.randn(3, 4).softmax(1)], ids=["logits", "probabilities"])
def test_negative_log_likelihood_of_something_else(output):
    with pytest.raises(BatchError, match="does not return log-probabilities.*loss='cross_entropy'.*log_softmax"):
        find_loss(nn.NLLLoss())(output, Y)


class Margin(nn.Module):
    """A head and its loss: takes embeddings, and draws the mean of these into a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, embeddings, targets):
        self.centre += embeddings.detach().mean(0)
        return F.cross_entropy(8 * (embeddings @ self.weight.T).tanh(), targets, reduction="none")


@guards("functional/loss_argument.py", "if not isinstance(self.function, nn.Module):", "if True:")
def test_a_module_with_parameters_is_a_loss_of_embeddings():
    module, embeddings = Margin(), torch.randn(3, 4).double()
    with pytest.warns(UserWarning, match=r"loss=Margin holds parameters \(weight\).*count as constants.*nn.Sequential"):
        loss = find_loss(module)
    weight = module.weight.detach().double()

    def of_torch(f, y):
        return F.cross_entropy(8 * (f @ weight.T).tanh(), y)

    assert_derivatives_are_autograds(loss, of_torch, embeddings, Y)
    assert not module.centre.any()
    assert module.weight.grad is None


Y = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("loss", "targets", "match"),
    [
        (CrossEntropy(class_weight=(1.0, 1.0)), Y, "class_weight has 2 entries, but there are 4 classes"),
        (CrossEntropy(), Y[:, None], r"shape \(3, 1\) and dtype torch.int64.*Give targets.squeeze\(1\)\."),
        (CrossEntropy(), Y[:, None].float(), r"shape \(3, 1\).*Give targets.squeeze\(1\).long\(\)"),
        (CrossEntropy(), Y.double(), r"dtype torch.float64.*give targets.long\(\)"),
        (CrossEntropy(), Y > 0, r"dtype torch.bool.*give targets.long\(\)"),
        (CrossEntropy(), F.one_hot(Y, 4), r"one-hot, give targets.float\(\).*'binary_cross_entropy'"),
        (CrossEntropy(), Y + 2, r"lie in 2..4, but the model has 4 classes \(0..3\).*ignore_index=.*targets - 1"),
        (CrossEntropy(class_weight=(1.0,) * 4), None, "With class_weight= the loss depends on the targets"),
        (CrossEntropy(ignore_index=1), None, "With ignore_index= the loss depends on the targets"),
        (find_loss("mse"), Y, r"shape \(3,\), but loss='mse' needs the shape of the model's output, \(3, 4\)"),
        (
            find_loss("binary_cross_entropy"),
            Y,
            r"shape of the model's output, \(3, 4\).*loss='cross_entropy', or .*one_hot",
        ),
        (find_loss("binary_cross_entropy"), torch.full((3, 4), 2.0), "between 0 and 1"),
        (CustomLoss(focal), None, "'focal' needs targets"),
        (CustomLoss(F.cross_entropy), Y, r"returns \(\) for 3 samples\. .*loss='cross_entropy'.*reduction='none'"),
        (CustomLoss(lambda f, y: f.detach()[:, 0]), Y, "no gradient with respect to the logits.*or it detaches them"),
        (CustomLoss(lambda f, y: (f - f.mean(0)).square().sum(1)), Y, "depends on other samples"),
        (CustomLoss(lambda f, y: f[:, 0].abs().sqrt() * 0 + torch.inf * f[:, 0] ** 2), Y, "not finite"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_wrong_targets_are_refused(loss, targets, match):
    with pytest.raises(BatchError, match=match):
        loss(torch.randn(3, 4), targets)


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CustomLoss(lambda f, y: F.cross_entropy(f, y.long(), reduction="none"))]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_of_small_integer_types(loss, dtype):
    """In uint8, 156 equals -100, and 256 equals 0."""
    logits, targets = torch.randn(4, 256).double(), torch.tensor([156, 1, 2, 255])
    _, residual, number, normalizer, outcomes, _ = loss(logits, targets.to(dtype))
    expected = loss(logits, targets)
    assert (number, normalizer) == (4, 4.0)
    assert_close(residual, expected.residual, rtol=0, atol=0)
    assert_close(outcomes, expected.outcomes, rtol=0, atol=0)


def test_a_loss_without_curvature_has_none():
    curvature = CustomLoss(lambda f, y: f[:, 0])(torch.randn(3, 4), Y).curvature
    assert not matrices(curvature, 4).any()


def test_regression_has_one_output():
    assert MeanSquaredError()(torch.randn(3, 1), torch.randn(3)).curvature.num_columns == 1
