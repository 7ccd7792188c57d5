"""The classifier's block traces and measures from its inputs alone, against Gauss-Newton and in extreme cases."""

import pytest
import torch
from torch.testing import assert_close

from lightning_flatness.functional import ClassCurvature, ConvolutionGeometry, CrossEntropy, weight_gram
from lightning_flatness.functional.classifier import classifier_contraction
from lightning_flatness.functional.gauss_newton import gauss_newton_contraction
from lightning_flatness.functional.weighting import CHANNELWISE, Weighting
from tests.guarding import guards

SAMPLES, CLASSES, FEATURES = 5, 7, 4


def weighting_of(kernel, deviations):
    return Weighting.of(kernel[..., None], 1, weight_gram(kernel), deviations, by_channel=True)


@guards("functional/classifier.py", "weighting.deviations.square()", "weighting.deviations")
@guards("functional/classifier.py", "(g.square() * spread)", "(g * spread)")
@guards("functional/classifier.py", "norms * spread.sum(1)", "spread.sum(1)")
@guards("functional/classifier.py", "norms * curvature.traces()", "curvature.traces()")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("diagonal", [True, False])
def test_is_what_gauss_newton_computes_from_columns(centred, diagonal):
    torch.manual_seed(0)
    g, kernel = torch.randn(SAMPLES, FEATURES).double(), torch.randn(CLASSES, FEATURES).double()
    pi = torch.randn(SAMPLES, CLASSES).double().softmax(1)
    curvature = ClassCurvature(0.7 * pi, pi if centred else None)
    deviations = torch.tensor([0.5, 2.0, 0.0, 1.0]).double()  # one channel is left out
    weighting = weighting_of(kernel, deviations)
    columns = [curvature.column(index)[..., None] for index in range(curvature.num_columns)]
    geometry = ConvolutionGeometry((1,), (1,), (0,), (1,))
    expected = gauss_newton_contraction([(g[..., None], geometry)], [columns], None, weighting, diagonal)
    actual = classifier_contraction(g, kernel, curvature, weighting, diagonal)
    assert_close(actual.total, expected.total, rtol=1e-12, atol=1e-15)
    measured = ~expected.samples.isnan()
    assert_close(actual.samples[measured], expected.samples[measured], rtol=1e-12, atol=1e-15)
    assert measured[:, CHANNELWISE].all()


def test_measures_that_are_not_wanted_are_nan():
    g, kernel = torch.randn(SAMPLES, FEATURES), torch.randn(CLASSES, FEATURES)
    values = classifier_contraction(g, kernel, CrossEntropy()(g @ kernel.T, None).curvature, Weighting()).samples
    assert values.isnan().sum(0).tolist() == [0, SAMPLES, SAMPLES, SAMPLES]


def test_confident_samples_lose_no_digits():
    """A sample whose other classes have 1e-12 of the probability: its sums would cancel if they were expanded."""
    g, kernel = torch.ones(1, FEATURES).double(), torch.randn(3, FEATURES).double()
    small = 1e-12
    pi = torch.tensor([[1 - 2 * small, small, small]], dtype=torch.float64)
    values = classifier_contraction(
        g, kernel, ClassCurvature(pi, pi), weighting_of(kernel, torch.ones(FEATURES).double())
    )
    apart = (kernel[1:] - kernel[0]).square().sum()  # to first order in the small probabilities
    assert_close(values.samples[0, 1], FEATURES * small * apart, rtol=1e-9, atol=0)
