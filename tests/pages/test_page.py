"""Pages: all that a reader needs is on them, nothing is loaded, and names are text."""

import base64
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.errors import FlatnessError
from lightning_flatness.pages import parts
from tests.guarding import guards

VOID = {"meta", "img", "br", "hr", "link", "input"}
BATCHES = [(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)]


def net(seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def report():
    return replace(lf.measure_flatness(net(), BATCHES, layers="all", per_sample=True), data="val")


@pytest.fixture
def page(tmp_path):
    """Write a page and return its text."""
    return lambda *results, **options: lf.save_html(tmp_path / "page.html", *results, **options).read_text()


class Checked(HTMLParser):
    """Checks that elements are closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], set(), [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_nothing_is_loaded_and_nothing_runs(report, page):
    text = page(
        report,
        lf.hessian_spectrum(net(), BATCHES, num_steps=4, num_probes=2),
        history=[{"epoch": 0, "relative_flatness": 2.0}],
    )
    checked = Checked(text)
    assert not checked.tags & {"script", "link", "iframe", "object"}
    assert checked.sources
    assert all(source.startswith("data:image/") for source in checked.sources)
    assert not re.search(r"@import|url\(|https?://", text)
    assert "default-src 'none'" in text


def test_every_number_has_its_error_and_its_label(report, page):
    words = "\n".join(Checked(page(report)).words)
    for layer in report.layers.values():
        for measure in ("hessian_trace", "relative_flatness", "normalized_relative_flatness"):
            assert f"{layer.shown(measure)}" in words
            assert "±" in layer.shown(measure)
    assert "40 samples of validation data" in words
    assert "Exact: these are the numbers of the full Hessian" in words
    assert "cross_entropy, mean 1." in words


def test_what_is_not_exact_says_so_first(page):
    inexact = lf.measure_flatness(net(activation=nn.Tanh), BATCHES, layers="0")
    words = Checked(page(inexact)).words
    summary = next(word for word in words if word.startswith("relative flatness of layer 0"))
    assert "Not exact: the Gauss-Newton part of the Hessian, since" in summary
    mixed = lf.measure_flatness(net(activation=nn.Tanh), BATCHES, layers="all")
    assert "Not exact for 1 of 2 layers: the Gauss-Newton part of the Hessian, since" in page(mixed)


def test_a_comparison_answers_in_the_first_lines(page):
    reports = {
        name: lf.measure_flatness(net(seed), BATCHES, layers="0", per_sample=True) for seed, name in enumerate("ab")
    }
    comparison = lf.compare(reports, train_losses={"a": 1.0, "b": 3.0})
    words = [word.strip() for word in Checked(page(comparison, reports)).words if word.strip()]
    assert words.index(comparison.verdict) < words.index("What must not be concluded")
    assert (
        words.index("What must not be concluded")
        < words.index(comparison.cautions[0].sentence)
        < words.index("Comparison")
    )
    assert "cannot be compared as they are: training losses differ" in comparison.verdict
    assert sum("ompare" in word and "equal training loss" in word for word in words[:15]) == 1  # said once
    assert "Flatness of layers: a" in words
    assert comparison.models["b"].shown("normalized_relative_flatness") in words


@pytest.mark.parametrize("axes", [["random"], ["random", "random"]])
def test_landscapes(page, axes):
    landscape = lf.loss_landscape(net(), BATCHES, axes=axes, steps=3)
    text = page({"net": landscape})
    assert "Loss landscape: net" in text
    assert f"{landscape.origin_loss:.4g} at the weights" in text
    assert f"Mean loss on a {'line' if len(axes) == 1 else 'plane'}" in text
    assert ('<figure class="filled">' in text) == (len(axes) == 2)  # its colours mean something


def test_a_spectrum_has_residuals_and_the_error_of_its_trace(page):
    spectrum = lf.hessian_spectrum(net(), BATCHES, num_steps=4, num_probes=2, top_k=1)
    text = page(spectrum)
    assert f"{float(spectrum.residuals[0]):.1g}" in text
    assert "(est. ±" in text
    assert "residual" in text
    assert "normalised measure" not in text  # there is none


def test_a_spectrum_is_that_of_its_matrix(page):
    options = {"num_steps": 4, "num_probes": 2, "top_k": 1}
    words = " ".join(Checked(page(lf.hessian_spectrum(net(), BATCHES, matrix="gauss_newton", **options))).words)
    assert "Spectrum of the Gauss-Newton matrix" in words
    assert "Spectral density of the Gauss-Newton matrix." in words
    assert "Gauss-Newton matrix of 51 parameters, over 40 samples: largest eigenvalue " in words
    assert "The Gauss-Newton matrix is the part of the Hessian" in words
    assert "Hessian of 51 parameters" not in words


def test_a_spectrum_without_probes_has_no_trace(page):
    spectrum = lf.hessian_spectrum(net(), BATCHES, num_probes=0, top_k=1)
    largest = f"{float(spectrum.eigenvalues[0]):.4g}"
    assert f"Hessian of 51 parameters, over 40 samples: largest eigenvalue {largest}." in page(spectrum)


def test_other_results_are_tables(page):
    found = lf.measure_lambda_max(net(), BATCHES, layers="0")
    assert "LambdaMaxReport" in page(found)


def test_drawings_are_drawings_and_large_ones_pixels(report, page, monkeypatch):
    (source,) = Checked(page(report)).sources
    kind, _, content = source.partition(";base64,")
    assert kind == "data:image/svg+xml"
    assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
    monkeypatch.setattr(parts, "MOST_BYTES", 100)
    (source,) = Checked(page(report)).sources
    assert source.startswith("data:image/png;base64,iVBOR")


def test_pages_of_one_result_are_the_same(report, page):
    dated = re.compile(r"lightning-flatness [\d.]+\. .*<")
    assert dated.sub("", page(report)) == dated.sub("", page(report))


def test_without_matplotlib_a_sentence_says_so(report, page, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    text = page(report)
    assert "<img" not in text
    assert "No figure: Figures need matplotlib" in text


@guards("pages/page.py", "autoescape=True", "autoescape=False")
def test_names_are_text(report, page):
    name = "<script>alert('x')</script>"
    text = page({name: report}, title=name, details={name: name}, notes=[name])
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 5
    Checked(text)


def test_light_dark_and_print(report, page):
    text = page(report)
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    assert 'name="viewport"' in text


def test_a_history_is_of_its_own_layers_and_data(report, page):
    history = [{"epoch": 0, "relative_flatness": 3.0, "layers": ["body.conv9"], "data": "train", "num_samples": 1300}]
    text = page(report, history=history).partition("The run, epoch by epoch")[2]
    assert "1,300 samples of training data" in text
    assert "body.conv9" in text


def test_history_shows_errors_and_what_is_not_known(page):
    history = [
        {"epoch": 0, "relative_flatness": 3.0, "relative_flatness_error": 0.5, "exact": True, "accuracy": 0.5},
        {"epoch": 1, "relative_flatness": 2.0, "relative_flatness_error": None, "exact": False, "accuracy": None},
    ]
    words = Checked(page(history=history)).words
    assert "3.0 ± 0.5" in words
    assert "no" in words
    assert "loss" not in words  # a column of nothing


@pytest.mark.parametrize(
    ("path", "results", "phrase"),
    [
        ("page.txt", [BATCHES], "'.*page.txt' does not end"),
        ("page.html", [], "nothing to show"),
        ("page.html", [3], "a int"),
    ],
)
def test_refusals(tmp_path, path, results, phrase):
    with pytest.raises(FlatnessError, match=phrase):
        lf.save_html(tmp_path / path, *results)
