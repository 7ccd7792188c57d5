"""``hessian_spectrum`` against the dense Hessian of small networks."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_density, plot_eigenvalues
from tests.guarding import guards
from tests.spectra import (
    NETS,
    Quadratic,
    convolutional,
    dense_gauss_newton,
    dense_hessian,
    dense_ritz,
    own_value,
    quick,
    split,
    wasserstein,
)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("net", NETS)
def test_top_ten_eigenvalues_are_those_of_the_dense_matrix(net, matrix):
    model, x, y = NETS[net]()
    dense = (dense_hessian if matrix == "hessian" else dense_gauss_newton)(model, x, y)
    assert 300 <= len(dense) <= 2000
    result = lf.hessian_spectrum(
        model, split(x, y, 10, len(x) - 10), top_k=10, matrix=matrix, num_steps=50, num_probes=2
    )
    values, vectors = torch.linalg.eigh(dense)
    assert_close(result.eigenvalues, values.flip(0)[:10], rtol=1e-8, atol=0)
    overlaps = (result.eigenvectors * vectors.T.flip(0)[:10]).sum(1).abs()
    assert_close(overlaps, torch.ones(10).double(), rtol=0, atol=1e-6)
    residuals = (result.eigenvectors @ dense - result.eigenvalues[:, None] * result.eigenvectors).norm(dim=1)
    assert_close(result.residuals, residuals, rtol=0.05, atol=1e-11)
    assert result.converged
    assert result.num_parameters == len(dense)
    assert_close(result.loss, float(cross_entropy(copy.deepcopy(model).eval()(x), y).detach()))


@pytest.mark.slow
def test_a_split_into_seven_and_three_is_the_whole():
    model, x, y = convolutional()
    x, y = x[:10], y[:10]
    parts, whole = (quick(model, split(x, y, *sizes), top_k=4, num_steps=8) for sizes in ([7, 3], [10]))
    assert_close(parts.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=0)
    assert_close(parts.ritz_values, whole.ritz_values, rtol=1e-9, atol=1e-11)
    assert_close(parts.trace, whole.trace, rtol=1e-9, atol=0)
    singles = quick(model, split(x, y, *[1] * 10), top_k=4, num_steps=8)
    assert_close(singles.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=0)
    assert singles.num_samples == whole.num_samples == 10


@pytest.mark.slow
def test_criteria_are_those_of_the_dense_ritz_decomposition():
    model, x, y = convolutional()
    dense = dense_hessian(model, x, y)
    result = quick(model, [(x, y)], num_probes=4, num_steps=30, seed=5, top_k=0)
    generator = torch.Generator().manual_seed(5)
    r_e, k_hn, c_t = [], [], []
    for values, weights in zip(result.ritz_values, result.ritz_weights, strict=True):
        probe = torch.randint(2, (len(dense),), generator=generator).double() * 2 - 1
        expected, of_values = dense_ritz(dense, probe, 30)
        assert_close(values, expected, rtol=1e-7, atol=1e-10)
        assert_close(weights, of_values, rtol=1e-5, atol=1e-10)
        below, above = expected < 0, expected > 0
        products = (expected.abs() * of_values).sqrt()
        k_hn.append(products[below].sum() / products[above].sum())
        c_t.append(expected.min() / expected.max())
        r_e.append(c_t[-1].abs())
    for name, numbers in {"r_e": r_e, "k_hn": k_hn, "c_t": c_t}.items():
        numbers = torch.stack(numbers)
        assert_close(getattr(result, name), float(numbers.mean()), rtol=1e-6, atol=0)
        assert_close(result.spread[name], float(numbers.std()), rtol=1e-4, atol=1e-12)
    assert (result.num_steps, result.num_probes, result.exponent) == (30, 4, 0.5)


QUADRATICS = {
    "mainly positive": [5.0, 5.0, 3.0, 1.0, 0.5, 0.0, 0.0, -1.0],
    "mainly negative": [2.0, 1.0, 0.5, 0.1, -3.0, -3.0, -6.0, 0.0],
    "quasi-singular": [1e-4, -1e-4, 0.0, 0.0, 2e-5, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("kind", QUADRATICS)
def test_a_quadratic_is_exact(kind):
    spectrum = torch.tensor(QUADRATICS[kind]).double()
    model = Quadratic(spectrum)
    with torch.no_grad():
        model.weight.fill_(1.0)
    batches = [(torch.zeros(5, 1), torch.zeros(5, 1))]
    result = lf.hessian_spectrum(model, batches, loss=own_value, top_k=8, num_steps=50, num_probes=10)
    descending = spectrum.sort(descending=True).values
    assert_close(result.eigenvalues, descending, rtol=0, atol=1e-12)
    assert_close(result.trace, float(spectrum.sum()), rtol=0, atol=1e-12)
    assert_close(result.trace_stderr, 0.0, rtol=0, atol=1e-12)
    assert result.kind == kind
    assert result.spread["kind"] == 0
    assert_close(result.c_t, float(spectrum.min() / spectrum.max()))
    assert_close(result.r_e, abs(float(spectrum.min() / spectrum.max())))
    for values, weights in zip(result.ritz_values, result.ritz_weights, strict=True):
        assert_close(values, spectrum.sort().values, rtol=0, atol=1e-12)
        assert_close(wasserstein(values, weights, spectrum), 0.0, rtol=0, atol=1e-10)  # signs have equal weights


def test_a_model_without_curvature_is_quasi_singular():
    net = nn.Linear(4, 1)
    batches = [(torch.randn(5, 4), torch.zeros(5, 1))]
    result = quick(net, batches, loss=own_value, top_k=3)
    assert_close(result.eigenvalues, torch.zeros(3).double())
    assert (result.kind, result.trace, result.trace_stderr) == ("quasi-singular", 0.0, 0.0)
    assert math.isnan(result.c_t)
    assert "quasi-singular" in str(result)
    result.density()


@pytest.mark.slow
def test_trace_lies_within_three_standard_errors():
    model, x, y = convolutional()
    dense = dense_hessian(model, x, y)
    dense_model = Dense(dense)
    inside = without = 0
    for seed in range(100):
        options = {"num_probes": 50, "num_steps": 1, "seed": seed, "loss": own_value}
        for top_k in (0, 3):
            result = lf.hessian_spectrum(dense_model, [(torch.zeros(2, 1), torch.zeros(2, 1))], top_k=top_k, **options)
            hit = abs(result.trace - float(dense.trace())) <= 3 * result.trace_stderr
            inside, without = inside + (hit and top_k > 0), without + (hit and top_k == 0)
    assert inside >= 95
    assert without >= 95


def test_known_eigenvectors_make_the_trace_more_certain():
    rotation, _ = torch.linalg.qr(torch.randn(60, 60).double())
    spectrum = torch.cat([torch.linspace(10, 20, 3), torch.linspace(-0.1, 0.3, 57)]).double()
    model, batches = Dense(rotation @ torch.diag(spectrum) @ rotation.T), [(torch.zeros(2, 1), torch.zeros(2, 1))]
    options = {"loss": own_value, "num_steps": 1, "num_probes": 20}
    without, known = (quick(model, batches, top_k=top_k, **options) for top_k in (0, 3))
    assert known.trace_stderr < 0.1 * without.trace_stderr
    assert abs(known.trace - float(spectrum.sum())) < 4 * known.trace_stderr


class Dense(nn.Module):
    """A model whose value is half a quadratic form: products are quick."""

    def __init__(self, matrix):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(matrix), dtype=torch.float64))
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        return (0.5 * self.weight @ self.matrix @ self.weight).expand(len(x), 1)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["convolutions and norm", "perceptron"])
@pytest.mark.parametrize("options", [{}, {"num_steps": 50, "num_probes": 10}], ids=["defaults", "more"])
def test_density_lies_near_the_exact_spectrum(net, options):
    model, x, y = NETS[net]()
    exact = torch.linalg.eigvalsh(dense_hessian(model, x, y))
    result = lf.hessian_spectrum(model, [(x, y)], top_k=0, **options)
    distance = wasserstein(result.ritz_values.flatten(), result.ritz_weights.flatten(), exact)
    assert distance <= 0.01 * float(exact.max() - exact.min())  # what docs/spectrum.md states
    grid, density = result.density()
    assert_close(float(torch.trapezoid(density, grid)), 1.0, rtol=0, atol=1e-3)
    sigma = 0.05
    grid, density = result.density(torch.linspace(-1, 1, 7), sigma)
    bells = torch.distributions.Normal(result.ritz_values.flatten(), sigma).log_prob(grid[:, None]).exp()
    assert_close(density, bells @ result.ritz_weights.flatten() / result.num_probes)


@pytest.mark.slow
def test_precision():
    model, x, y = convolutional()
    double = quick(model, [(x, y)], num_steps=10)
    single = copy.deepcopy(model).float()
    for result in (
        quick(single, [(x.float(), y)], num_steps=10),
        quick(model, [(x, y)], num_steps=10, dtype="float32"),
    ):
        assert_close(result.eigenvalues, double.eigenvalues, rtol=1e-4, atol=0)
        assert_close(result.trace, double.trace, rtol=1e-3, atol=0)
        assert result.eigenvectors.dtype == torch.float32
        assert result.converged
    assert quick(single.bfloat16(), [(x.bfloat16(), y)]).eigenvectors.dtype == torch.float32


@pytest.mark.slow
def test_seeds():
    model, x, y = convolutional()
    one, same, other = (quick(model, [(x, y)], seed=seed) for seed in (1, 1, 2))
    assert_close(one.ritz_values, same.ritz_values, rtol=0, atol=0)
    assert not torch.equal(one.ritz_values, other.ritz_values)


def test_a_saved_result_is_read_without_pickle(tmp_path):
    model, x, y = convolutional()
    result = quick(model, [(x, y)], num_probes=1, params="head")  # NaN for spreads
    path = tmp_path / "spectrum.of.epoch 3.npz"
    result.save(path)
    again = lf.SpectrumResult.load(path)
    for name, value in vars(result).items():
        if isinstance(value, torch.Tensor):
            assert_close(getattr(again, name), value, rtol=0, atol=0)
    assert str(again) == str(result)
    assert again.parameters == result.parameters
    (tmp_path / "other").write_text("something else")
    with pytest.raises(lf.FlatnessError, match="was not written by SpectrumResult.save"):
        lf.SpectrumResult.load(tmp_path / "other")


def test_table():
    model, x, y = convolutional()
    text = str(quick(model, [(x, y)], max_products=2, top_k=2))
    for part in ("λ2", "trace", "K_Hn, n = 0.5", "C_t", "kind", "24 samples", "have not converged", "5 Lanczos steps"):
        assert part in text


@guards("measure.spectrum:_certify_symmetric", returns=None)
def test_weight_norm_is_named():
    """The double backward of its norm is not symmetric in torch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(lf.LayerSelectionError, match="not symmetric.*weight_norm"):
        lf.hessian_spectrum(model, [(torch.randn(5, 3).double(), torch.randint(2, (5,)))])


def alone(**options):
    model, x, y = convolutional()
    return quick(model, [(x, y)], num_probes=0, **({"top_k": 2} | options))


def test_eigenvalues_alone_are_those_with_a_density():
    model, x, y = convolutional()
    result, whole = alone(), quick(model, [(x, y)], top_k=2)
    assert_close(result.eigenvalues, whole.eigenvalues, rtol=1e-12, atol=0)
    assert_close(result.eigenvectors, whole.eigenvectors, rtol=0, atol=1e-9)
    assert result.num_products == whole.num_products - 10
    assert result.converged
    assert (result.num_probes, result.num_steps, result.kind) == (0, 0, "unknown")
    unknown = [result.trace, result.trace_stderr, result.r_e, result.k_hn, result.c_t, *result.spread.values()]
    assert all(map(math.isnan, unknown))


def test_eigenvalues_alone_are_shown_and_saved(tmp_path):
    result = alone()
    text = str(result)
    assert "eigenvalues alone" in text
    assert not any(part in text for part in ("trace", "K_Hn", "kind", "nan"))
    assert "nan" not in repr(result)
    assert result.to_dict()["trace"] is None
    assert len(result.to_pandas()) == 2
    again = lf.SpectrumResult.load(result.save(tmp_path / "alone.npz"))
    assert str(again) == text
    assert again.ritz_values.shape == (0, 0)
    with pytest.raises(lf.FlatnessError, match="no density.*num_probes=0"):
        again.density()
    with pytest.raises(lf.FlatnessError, match="no density.*num_probes=0"):
        plot_density(again)
    _, ax = plot_eigenvalues([(0, again), (1, alone(top_k=1))])
    assert not any("Ritz" in text.get_text() for text in ax.get_legend().get_texts())


def test_nothing_to_compute_is_refused():
    with pytest.raises(lf.FlatnessError, match="top_k=0 and num_probes=0"):
        alone(top_k=0)


@guards("measure.spectrum:_certify_symmetric", returns=None)
def test_weight_norm_is_named_without_probes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(lf.LayerSelectionError, match="not symmetric.*weight_norm"):
        lf.hessian_spectrum(model, [(torch.randn(5, 3).double(), torch.randint(2, (5,)))], num_probes=0)


def test_files_of_earlier_versions_have_no_seconds(tmp_path):
    """A file without the field, as they were written before it was added."""
    result = alone()
    path = result.save(tmp_path / "old.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    text = json.loads(str(arrays["record"]))
    del text["fields"]["seconds"]
    np.savez_compressed(path, **arrays | {"record": np.array(json.dumps(text))})
    assert math.isnan(lf.SpectrumResult.load(path).seconds)
