"""A thousand classes: what is left out is certified, what is sampled is labelled and has a standard error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.errors import NotClosedFormError
from lightning_flatness.functional.closed_form import closed_form_contraction
from lightning_flatness.functional.weighting import spectral_bound
from lightning_flatness.layers import closed_form, gauss_newton
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS
from tests.networks import two_convolutions

CLASSES = 300


def net(confidence=1.0, activation=nn.ReLU, channels=(2, 6, 8)):
    model = two_convolutions(channels, (3, 2), CLASSES, activation)
    with torch.no_grad():
        model[6].weight.mul_(confidence * 20)
    return model


def batches(samples=12, dtype=torch.float64):
    torch.manual_seed(1)
    return [(torch.randn(samples, 2, 8, 8, dtype=dtype), torch.randint(CLASSES, (samples,)))]


@pytest.mark.parametrize("confidence", [0.01, 1.0, 5.0])
def test_closed_form_agrees_with_all_columns_of_gauss_newton(confidence, monkeypatch):
    model, batch = net(confidence).double(), batches()
    with_closed_form = lf.measure_flatness(model, batch).layers["2"]
    assert (with_closed_form.method, with_closed_form.exact) == ("closed_form", True)
    monkeypatch.setattr("lightning_flatness.layers.certify.certify_head", not_today)
    every_class = lf.measure_flatness(model, batch, tolerance=0).layers["2"]
    assert (every_class.method, every_class.exact) == ("gauss_newton", True)
    for measure in ("hessian_trace", "relative_flatness", "neuronwise_flatness", "layerwise_flatness"):
        assert_close(getattr(with_closed_form, measure), getattr(every_class, measure), rtol=1e-6, atol=0)


def not_today(*arguments):
    raise NotClosedFormError("not today")


def counted(monkeypatch):
    """Tolerances with which the closed form is called."""
    tolerances = []

    def count(*arguments, **options):
        tolerances.append(arguments[6])
        return closed_form_contraction(*arguments, **options)

    monkeypatch.setattr(closed_form, "closed_form_contraction", count)
    return tolerances


def test_classes_are_left_out_and_the_change_is_certified(monkeypatch):
    model, batch = net(confidence=10.0).double(), batches()
    tolerances = counted(monkeypatch)
    part = lf.measure_flatness(model, batch).layers["2"]
    assert [0 < tolerance < closed_form.TRUNCATION for tolerance in tolerances] == [True]
    monkeypatch.setattr(closed_form, "TRUNCATION", 0.0)
    whole = lf.measure_flatness(model, batch).layers["2"]
    difference = abs(part.relative_flatness - whole.relative_flatness) / whole.relative_flatness
    assert 0 < difference < 1e-6
    assert_close(part.filter_traces, whole.filter_traces, rtol=1e-12, atol=0)


@guards("layers/closed_form.py", "share = torch.minimum(share, _share(weighting.normalized, normalized_norm))", "pass")
def test_the_normalised_measure_does_not_need_all_classes(monkeypatch):
    # Of one channel, the variance is so large that the other channels hardly count in the normalised measure.
    model, batch = net(channels=(2, 32, 128)).double(), batches()
    with torch.no_grad():
        model[0].weight[0] *= 30
    tolerances = counted(monkeypatch)
    part = lf.measure_flatness(model, batch).layers["2"]
    assert [tolerance > 0 for tolerance in tolerances] == [True]
    monkeypatch.setattr(closed_form, "TRUNCATION", 0.0)
    whole = lf.measure_flatness(model, batch).layers["2"]
    change = part.normalized_relative_flatness / whole.normalized_relative_flatness - 1
    assert 0 < abs(change) < 1e-6


@guards(
    "layers/closed_form.py",
    "holds = holds & (part.left_out * normalized_norm <= TRUNCATION * values[NORMALIZED].abs())",
    "pass",
)
def test_the_normalised_measure_is_certified_by_itself(monkeypatch):
    model, batch = net(confidence=10.0).double(), batches()
    tolerances = counted(monkeypatch)
    monkeypatch.setattr(closed_form, "_share", lambda gram, norm: torch.tensor(1.0).double())
    monkeypatch.setattr("lightning_flatness.layers.methods.spectral_bound", lambda gram: torch.tensor(0.0))
    lf.measure_flatness(model, batch)
    assert tolerances == [closed_form.TRUNCATION / 2, 0.0]


@pytest.mark.parametrize("rank", [0, 1, 30])
def test_the_bound_of_the_spectral_norm_is_one(rank):
    torch.manual_seed(0)
    factors = torch.randn(2, 40, rank, dtype=torch.float64)
    gram, largest = factors @ factors.mT, torch.linalg.matrix_norm(factors, 2).square().amax()
    assert largest <= spectral_bound(gram) <= 1.6 * largest


def test_where_it_cannot_be_certified_all_classes_are_taken(monkeypatch):
    model = net(confidence=3.0).double()
    with torch.no_grad():  # filters that cancel in relative flatness, so that no part of the trace is small against it
        model[2].weight[1::2] = -model[2].weight[::2]
        model[2].bias[1::2] = model[2].bias[::2] = 1.0
        model[6].weight[:, 1::2] = model[6].weight[:, ::2]
    tolerances = counted(monkeypatch)
    lf.measure_flatness(model, batches())
    assert tolerances[0] > 0
    assert tolerances[1:] == [0.0]


@pytest.mark.parametrize("tolerance", [0.1, 0.02])
@pytest.mark.parametrize("confidence", [0.02, 1.0])
def test_sampled_numbers_are_labelled_and_within_their_standard_errors(confidence, tolerance):
    model, batch = net(confidence).double(), batches(32)
    exact = lf.measure_flatness(model, batch, layers="all", tolerance=0)
    assert exact.exact
    assert set(exact.standard_errors.values()) == {0.0}
    sampled = lf.measure_flatness(model, batch, layers="all", tolerance=tolerance)
    # "2" is under the closed form, and the output of "6" is the logits.
    assert [layer.exact for layer in sampled.layers.values()] == [False, True, True]
    layer, expected = sampled.layers["0"], exact.layers["0"]
    assert layer.info.reason == "classes with little probability mass are sampled"
    for measure, error in layer.standard_errors.items():
        assert abs(getattr(layer, measure) - getattr(expected, measure)) < 5 * error
    for measure in ("hessian_trace", "relative_flatness"):
        assert 0 < layer.standard_errors[measure] <= tolerance * getattr(layer, measure)


@pytest.mark.slow
def test_standard_errors_are_those_of_repetitions():
    model, batch = net(0.02).double(), batches(8)
    exact = lf.measure_flatness(model, batch, layers="0", tolerance=0).hessian_trace
    repeated = [lf.measure_flatness(model, batch, layers="0", tolerance=0.05, seed=seed) for seed in range(40)]
    scores = torch.tensor([(r.hessian_trace - exact) / r.standard_errors["hessian_trace"] for r in repeated])
    assert abs(float(scores.mean())) < 0.6
    assert 0.6 < float(scores.square().mean().sqrt()) < 1.6


def test_sampling_takes_few_passes_and_is_repeatable(monkeypatch):
    model, batch = net(0.02).double(), batches(32)
    passes = []
    pull_back = gauss_newton.pull_back
    monkeypatch.setattr(gauss_newton, "pull_back", lambda *args: passes.append(1) or pull_back(*args))
    first = lf.measure_flatness(model, batch, layers="0", tolerance=0.05)
    assert len(passes) < CLASSES / 4
    assert first.hessian_trace == lf.measure_flatness(model, batch, layers="0", tolerance=0.05).hessian_trace
    assert first.hessian_trace != lf.measure_flatness(model, batch, layers="0", tolerance=0.05, seed=1).hessian_trace


@pytest.mark.slow
def test_errors_of_batches_add_up_in_quadrature():
    model = net(0.02).double()
    ((x, y),) = batches(32)
    ratios = []
    for seed in range(12):
        whole = lf.measure_flatness(model, [(x, y)], layers="0", tolerance=0.05, seed=seed)
        twice = lf.measure_flatness(model, [(x, y), (x, y)], layers="0", tolerance=0.05, seed=seed)
        ratios.append(twice.standard_errors["hessian_trace"] / whole.standard_errors["hessian_trace"])
    assert 0.6 < sum(ratios) / len(ratios) < 0.85


def test_error_of_a_sum_over_layers_is_at_most_the_sum(monkeypatch):
    # Layers share probes, so their errors do not add up in squares.
    monkeypatch.setattr("lightning_flatness.layers.certify.is_output", lambda *_: False)
    report = lf.measure_flatness(net(0.02).double(), batches(8), layers=["0", "6"], tolerance=0.05)
    errors = [layer.standard_errors["hessian_trace"] for layer in report.layers.values()]
    assert_close(report.standard_errors["hessian_trace"], sum(errors), rtol=1e-12, atol=0)
    assert min(errors) > 0


def test_too_strict_a_tolerance_takes_every_class():
    model, batch = net(0.02).double(), batches(4)
    layer = lf.measure_flatness(model, batch, layers="0", tolerance=1e-6).layers["0"]
    exact = lf.measure_flatness(model, batch, layers="0", tolerance=0).layers["0"]
    assert_close(layer.block_traces, exact.block_traces, rtol=1e-12, atol=1e-15)
    assert set(layer.standard_errors.values()) == {0.0}


def test_strict_takes_every_class():
    model, batch = net().double(), batches(4)
    assert lf.measure_flatness(model, batch, layers="all", strict=True).exact


def test_few_classes_are_never_sampled():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 100)).double()
    assert lf.measure_flatness(model, batches(4)[0][:1], layers="all").exact


def test_report_shows_standard_errors():
    text = str(lf.measure_flatness(net(0.02).double(), batches(32), layers="all", tolerance=0.1))
    assert "±" in text
    assert "classes with little probability mass are sampled" in " ".join(text.split())


def test_the_certificate_of_what_is_left_out_counts_the_residual(monkeypatch):
    # What remains when the residual cancels the rest of relative flatness is small, and the change large against it.
    model, batch = net(confidence=3.0, activation=nn.SiLU).double(), batches()
    rows = model[2].weight.detach().flatten(1)
    tolerances = counted(monkeypatch)
    of_samples = torch.zeros(len(batch[0][0]), 1, 8, dtype=torch.float64)
    monkeypatch.setattr(closed_form, "closed_form_residual", lambda *args, summed: of_samples)
    without = lf.measure_flatness(model, batch).layers["2"]
    assert len(tolerances) == 1
    cancelling = torch.full((1, 8), -12 * without.relative_flatness / float(rows.square().sum()), dtype=torch.float64)
    of_samples = (cancelling / len(of_samples)).expand(len(of_samples), -1, -1)
    monkeypatch.setattr(closed_form, "closed_form_residual", lambda *args, summed: of_samples)
    lf.measure_flatness(model, batch)
    assert tolerances[2:] == [0.0]


def wide(outputs=150):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs)).double()


def test_a_loss_of_ones_own_is_sampled_and_labelled_like_a_named_one():
    net, batch = wide(), (VECTORS, LABELS)
    sampled, whole = (
        lf.measure_flatness(
            net, [batch], layers="all", loss=lambda f, y: F.cross_entropy(f, y, reduction="none"), tolerance=tolerance
        )
        for tolerance in (0.01, 0)
    )
    named = lf.measure_flatness(net, [batch], layers="all")
    assert [layer.exact for layer in sampled.layers.values()] == [False, False]
    assert [layer.exact for layer in named.layers.values()] == [False, True]  # known derivatives: the last is exact
    assert all(layer.standard_errors for layer in sampled.layers.values() if not layer.exact)
    assert whole.exact


def test_what_is_sampled_is_not_called_a_part():
    text = " ".join(str(lf.measure_flatness(wide(), [(VECTORS, LABELS)], layers="all", tolerance=0.2)).split())
    assert "Estimates, with standard errors: classes with little probability mass are sampled." in text
    assert "Gauss-Newton part" not in text
