"""Figures of models side by side: what is drawn, where, and what their titles say."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import lightning_flatness as lf
from lightning_flatness.errors import FlatnessError
from lightning_flatness.plots import plot_comparison, plot_gap
from lightning_flatness.results import Caution, ComparedModel, Comparison, RankCorrelation
from lightning_flatness.results.rank_correlation import BEST, MEASURES

NUMBERS = ("loss", "accuracy", *MEASURES)


def comparison(values, *, exact=None, outcome=None, cautions=(), correlations=()):
    rows = {}
    for index, value in enumerate(values):
        name = f"m{index}"
        rows[name] = ComparedModel(
            name=name,
            errors={BEST: 0.2},
            **dict.fromkeys((*NUMBERS, "weight_norm"), 1.0) | {BEST: value, "loss": 0.5},
            exact=exact[index] if exact else True,
            method="closed_form",
            reasons=(),
            precision="float32",
            loss_name="cross_entropy",
            data="val",
            num_samples=1200,
            layers=("conv4",),
            filters=(8,),
            features=(9,),
            outcome=outcome[index] if outcome else math.nan,
        )
    covariance = torch.eye(len(values), dtype=torch.float64) * 0.04
    return Comparison(rows, cautions, {BEST: covariance}, False, correlations, "loss gap" if outcome else "")


def dots(ax, marker):
    """Points that are drawn with a marker."""
    found = [line for line in ax.lines if line.get_marker() == marker and line.get_linestyle() == "None"]
    return [point for line in found for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def words(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_a_panel_for_each_measure_and_a_dot_for_each_model():
    figure, axes = plot_comparison(comparison([1.0, 2.0, 4.0]))
    assert [ax.get_xlabel().split("  ")[0] for ax in axes] == [
        "normalised relative flatness", "relative flatness", "Hessian trace", "loss",
    ]  # fmt: skip
    assert dots(axes[0], "o") == [(1, 0), (2, 1), (4, 2)]
    assert axes[0].get_xscale() == "log"
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["m0", "m1", "m2"]
    assert axes[0].get_ylim()[0] > axes[0].get_ylim()[1]  # the first is on top
    assert "3 models, layer conv4; 1,200 samples of validation data; exact (closed form)" in words(figure)
    assert "m0 is the flattest" in words(figure)


def test_bars_are_two_standard_errors_and_stay_above_zero_on_a_logarithmic_axis():
    _, (ax,) = plot_comparison(comparison([1.0, 0.3]), [BEST])
    (bars,) = [collection for collection in ax.collections if hasattr(collection, "get_segments")]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends[0] == pytest.approx([0.6, 1.4])
    assert ends[1] == pytest.approx([0.18, 0.7])


def test_what_is_not_exact_is_hollow_and_what_is_unclear_is_marked():
    found = comparison([1.0, 1.3, 4.0], exact=[True, True, False], cautions=(Caution("not_exact", "It is curved."),))
    figure, (ax,) = plot_comparison(found, [BEST])
    assert dots(ax, "o") == [(1, 0), (1.3, 1)]
    assert dots(ax, "D") == [(4, 2)]
    assert [(text.get_text(), text.xy) for text in ax.texts] == [("≈", (1.3, 1))]
    assert "not exact where hollow" in words(figure)
    assert "CAUTION: not exact" in words(figure)


def test_a_negative_or_missing_value_is_drawn_on_a_linear_axis_or_said():
    _, (ax,) = plot_comparison(comparison([1.0, -2.0]), [BEST])
    assert ax.get_xscale() == "linear"
    _, (ax,) = plot_comparison(comparison([1.0, math.nan]), [BEST])
    assert [text.get_text() for text in ax.texts] == ["not known"]


def test_infinite_values_are_not_known():
    with pytest.raises(FlatnessError, match="normalized_relative_flatness is not known for any model"):
        plot_comparison(comparison([math.inf, math.nan]), [BEST])


def test_the_title_explains_what_is_drawn():
    marks = "bars: ± 2 standard errors; ≈: no clear difference from m0; dotted: m0"
    assert words(plot_comparison(comparison([1.0, 1.1]), [BEST])[0]).endswith(marks)
    assert words(plot_comparison(comparison([1.0, 9.0]), [BEST])[0]).endswith("bars: ± 2 standard errors; dotted: m0")
    plain = words(plot_comparison(comparison([1.0, 1.1]), ["weight_norm"])[0])
    assert "bars" not in plain
    assert plain.endswith("dotted: m0")
    gap = comparison([1.0, 1.1], outcome=[0.1, 0.2])
    assert "bars" in words(plot_gap(gap)[0])
    assert "bars" not in words(plot_gap(gap, "weight_norm")[0])


def test_a_single_measure_may_be_a_string():
    _, (ax,) = plot_comparison(comparison([1.0, 2.0]), "hessian_trace")
    assert ax.get_xlabel().startswith("Hessian trace")


def test_given_axes_get_one_measure_and_a_title_of_their_own():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    figure, axes = plot_comparison(comparison([1.0, 2.0]), ax=ax)
    assert axes == [ax]
    assert figure is ax.figure
    assert "conv4" in ax.get_title(loc="left")
    with pytest.raises(FlatnessError, match="room for one measure"):
        plot_comparison(comparison([1.0, 2.0]), [BEST, "loss"], ax=ax)


def test_a_measure_must_be_known():
    with pytest.raises(FlatnessError, match="measure='sharpness'"):
        plot_comparison(comparison([1.0, 2.0]), ["sharpness"])
    with pytest.raises(FlatnessError, match="margin is not known"):
        plot_comparison(comparison([1.0, 2.0]), ["margin"])


def test_the_outcome_against_a_measure():
    tau = RankCorrelation(BEST, 0.6, 0.1, 0.9, {}, math.nan, False, 5)
    found = comparison([1.0, 2.0, 3.0, 5.0, 4.0], outcome=[0.1, 0.2, 0.3, 0.4, math.nan], correlations=(tau,))
    figure, ax = plot_gap(found)
    assert dots(ax, "o") == [(1, 0.1), (2, 0.2), (3, 0.3), (5, 0.4)]
    assert [text.get_text() for text in ax.texts] == ["m0", "m1", "m2", "m3"]
    assert ax.get_ylabel() == "loss gap"
    assert "Loss gap against normalised relative flatness Kendall's τ = 0.60 [0.10, 0.90], 5 models" in words(figure)
    few = replace(found, correlations=(replace(tau, low=math.nan, high=math.nan, num_models=4),))
    assert "too few models to conclude anything" in words(plot_gap(few)[0])


def test_names_of_near_models_lie_on_no_dot_and_no_name():
    values = [95.8, 90.2, 87.9, 103.4, 121.6, 105.9, 96.4, 91.7, 108.2, 191.9]
    outcome = [0.137, 0.1235, 0.1065, 0.0918, 0.087, 0.1412, 0.1345, 0.1297, 0.119, 0.177]
    figure, ax = plot_gap(comparison(values, outcome=outcome))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    drawn = ax.transData.transform(list(zip(values, outcome, strict=True)))
    assert not [(box, dot) for box in boxes for dot in drawn if box.padded(3).contains(*dot)]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_without_an_outcome_there_is_no_gap_to_draw():
    with pytest.raises(FlatnessError, match="an outcome and a finite hessian_trace. If outcomes are missing, give"):
        plot_gap(comparison([1.0, 2.0]), "hessian_trace")


def test_figures_of_a_measured_comparison():
    nets = [torch.nn.Sequential(torch.nn.Linear(2, 3)) for _ in range(2)]
    found = lf.compare(nets, [(torch.randn(40, 2), torch.arange(40) % 3)], layers="0", outcome=[0.1, 0.2])
    for figure in (plot_comparison(found)[0], plot_gap(found, "margin")[0]):
        figure.draw_without_rendering()
