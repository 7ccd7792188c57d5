import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lightning_flatness as lf
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.results import as_text, summary_table
from lightning_flatness.results.texts import measured
from tests.results.made import flatness


def net(act):
    conv = parametrizations.weight_norm(nn.Conv2d(2, 4, 3, groups=2))
    return nn.Sequential(nn.Conv2d(1, 2, 1), act, conv, act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def batch():
    return torch.randn(5, 1, 6, 6), torch.randint(3, (5,))


def labels(text):
    rows = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[-2].strip() for row in rows if row[1].strip()}


def test_report_prints_a_row_for_every_layer_within_80_columns():
    report = lf.measure_flatness(net(nn.SiLU()), [batch()], layers="all")
    text = as_text(report.table(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "Flatness over 5 samples" in text
    assert "since the network is curved after it" in " ".join(
        text.split()
    )  # the first convolution is not exact, and says why
    assert labels(str(report)) == {"0": "no: Gauss-Newton", "2": "yes", "6": "yes", "sum": "no"}
    assert report.num_samples == 5
    assert report.hessian_trace == sum(layer.hessian_trace for layer in report.layers.values())


def test_the_table_says_what_to_compare_with_and_how_sure_it_is():
    text = " ".join(str(flatness()).split())
    assert "Flatness over 5 samples of validation data" in text
    assert "Mean loss 0.43 ± 0.03, accuracy 0.6 (cross_entropy)." in text
    assert "normalised" in text
    assert "0.125" in text
    assert "± 0.012" in text
    assert "±: standard error over samples." in text
    assert "est." not in text
    measures = ("hessian_trace", "relative_flatness")
    bare = replace(flatness(), layers=lf.measure_flatness(net(nn.ReLU()), [batch()], measures=measures).layers)
    assert "normalised" not in str(bare)


def test_the_error_of_an_estimate_is_not_that_over_samples():
    report = lf.measure_flatness(net(nn.SiLU()), [batch()], layers="0", residual="hutchinson")
    errors = {"hessian_trace": 0.0512, "relative_flatness": 0.0051}
    layer = replace(report.layers["0"], sampling_errors={"hessian_trace": 0.0321}, standard_errors=errors)
    text = " ".join(str(replace(report, layers={"0": layer})).split())
    assert layer.shown("hessian_trace") == f"{layer.hessian_trace:.2f} ± 0.03 (est. ± 0.05)"
    assert layer.shown("relative_flatness") == f"{layer.relative_flatness:.4g} (est. ± 0.005)"
    assert "est. ±: standard error of an estimate." in text
    assert labels(str(report)) == {"0": "no: estimate"}


def test_an_error_that_is_not_known_is_left_out():
    layer = flatness().layers["2"]
    unknown = {"hessian_trace": math.nan}
    assert "est." not in replace(layer, standard_errors=unknown).shown("hessian_trace")
    assert "est." not in str(replace(flatness(), layers={"2": replace(layer, standard_errors=unknown)}))


def test_an_error_that_is_rounded_up_has_two_digits():
    assert measured(1.0, 0.0996) == "1.00 ± 0.10"
    assert measured(100.0, 9.96) == "100 ± 10"


@pytest.mark.parametrize(("passes", "words"), [(1, "1 backward pass per"), (2, "2 backward passes per")])
def test_backward_passes_are_counted(passes, words):
    info = replace(flatness().layers["0"].info, backward_passes=passes)
    assert words in " ".join(as_text(summary_table({"0": info})).split())


def test_a_closed_form_that_is_not_exact_has_a_label():
    """As a file of another program may say."""
    info = replace(flatness().layers["0"].info, method="closed_form", exact=False, reason="it is odd")
    assert info.label == "no"
    assert "not exact: closed form, since it is odd" in repr(info)


def test_layers_are_named_where_reasons_differ():
    report = flatness()
    first = report.layers["0"]
    layers = {
        name: replace(first, info=replace(first.info, name=name, reason=f"it is odd {name > 'b'}"))
        for name in "abcdefg"
    }
    text = " ".join(str(replace(report, layers=layers)).split())
    assert "since it is odd False (a, b), or it is odd True (c, d, e and 2 others)." in text


def test_summary_says_how_every_layer_is_measured():
    measurement = Measurement(net(nn.ReLU()), layers="all")
    measurement.certify(*batch(), live=False)
    text = as_text(summary_table(measurement.layers, verbose=True), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "4 x 9, 2 groups" in text
    assert "2*" in text  # measured with respect to the kernel that weight_norm yields
    assert "closed form" in text
    assert "Gauss-Newton" in text
    assert " 6 " in text, "names are not folded"


def test_summary_leaves_details_to_its_verbose_form():
    measurement = Measurement(net(nn.ReLU()), layers="all")
    measurement.update(*batch())
    text = as_text(summary_table(measurement.layers), width=80)
    assert "Flatness is measured for these layers." in text
    assert max(map(len, text.splitlines())) <= 80
    assert not any(detail in text for detail in ("x 9", "mult.", "deviation"))
