"""A comparison as text, as rows, and in its verdict."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import lightning_flatness as lf
from lightning_flatness.results import BASELINES, Caution, ComparedModel, Comparison, RankCorrelation
from lightning_flatness.results.rank_correlation import BEST, MEASURES
from tests.guarding import guards

NUMBERS = ("loss", "accuracy", *MEASURES)


def model(name, value, error=0.1, **others):
    numbers = dict.fromkeys((*NUMBERS, "weight_norm"), 1.0) | {BEST: value} | others
    known = {"exact": True, "method": "closed_form", "reasons": (), "precision": "float32", "data": "train"}
    known |= {"loss_name": "cross_entropy", "num_samples": 100, "layers": ("conv",), "filters": (8,), "features": (9,)}
    return ComparedModel(name=name, errors={BEST: error}, **numbers, **known)


def comparison(*values, errors=None, is_paired=False):
    errors = errors or [0.1] * len(values)
    rows = {name: model(name, value, error) for name, value, error in zip("abcdef", values, errors, strict=False)}
    covariance = torch.tensor(errors, dtype=torch.float64).square().diag()
    return Comparison(rows, (), dict.fromkeys(NUMBERS, covariance), is_paired)


def test_the_verdict_of_a_clear_difference():
    found = comparison(3.0, 1.0, 2.0)
    assert found.verdict == (
        "b is the flattest by the normalised measure. The value of c is larger by 1.00 ± 0.14 (2.0 ± 0.2 times): a "
        "clear difference, of 7.1 standard errors."
    )


def test_a_verdict_says_why_models_cannot_be_compared():
    cautions = Caution("train_loss", "..."), Caution("width", "..."), Caution("few_models", "...")
    found = replace(comparison(3.0, 1.0), cautions=cautions)
    assert found.verdict.startswith("b is flatter by the normalised measure. The value of a is larger by 2.00 ± 0.14")
    assert found.verdict.endswith(
        " But the models cannot be compared as they are: training losses differ, layers of different widths."
    )
    assert "But" not in replace(found, cautions=cautions[2:]).verdict  # which is not about the models


def test_the_verdict_of_a_tie():
    assert comparison(1.0, 1.2).verdict == (
        "A tie: a has the lowest normalised flatness, and the value of b is at most two standard errors higher."
    )
    assert comparison(1.0, 1.2, 1.1).verdict.endswith("the values of c, b are at most two standard errors higher.")


def test_a_tie_is_only_with_models_of_known_errors():
    assert comparison(1.0, 1.2, 2.0, errors=[0.1, 0.1, math.nan]).verdict == (
        "A tie: a has the lowest normalised flatness, and the value of b is at most two standard errors higher. It is "
        "not known whether the difference from c is clear, because standard errors are missing."
    )


def test_a_tie_to_the_bit():
    assert comparison(1.0, 1.0).verdict == "No difference: the normalised flatness of a, b is the same."
    assert comparison(1.0, 1.0, errors=[math.nan] * 2).verdict.startswith("No difference")
    assert comparison(1.0, 1.0, 5.0).verdict.startswith(
        "A tie: a has the lowest normalised flatness, and the value of b "
    )


@guards("results.comparison:Comparison._has_errors", returns=True)
def test_too_few_samples_for_errors_make_no_clear_difference():
    found = replace(comparison(3.0, 1.0), cautions=(Caution("few_samples", "..."),))
    assert found.verdict == (
        "b has the lowest normalised flatness. It is not known whether the difference from a is clear, because there "
        "are too few samples for reliable standard errors."
    )
    assert not found.difference(BEST, "b").is_known
    assert list(found.table().columns[1].cells)[1] == "1.00 ± 0.10 ?"


def test_a_caution_may_have_words_of_its_own():
    found = replace(comparison(3.0, 1.0), cautions=(Caution("batch_norm", "...", ("a",), "never updated in a"),))
    assert found.verdict.endswith(" But the models cannot be compared as they are: never updated in a.")


def test_the_next_may_be_unsure_although_the_second_is_clear():
    found = comparison(1.0, 2.0, 3.0, errors=[0.1, 0.1, 5.0])
    assert found.verdict.startswith("A tie: a has the lowest normalised flatness, and the value of c is at most")


def test_verdicts_without_errors_or_values():
    assert "because standard errors are missing" in comparison(1.0, 2.0, errors=[math.nan, math.nan]).verdict
    assert "no model can be called the flattest" in comparison(1.0, math.nan).verdict


def test_two_standard_errors_are_those_of_the_difference():
    found = comparison(1.0, 1.27)
    assert not found.difference(BEST, "b").is_clear
    assert comparison(1.0, 1.29).difference(BEST, "b").is_clear
    both = torch.full((2, 2), 0.01, dtype=torch.float64)
    paired = replace(found, covariances=dict.fromkeys(NUMBERS, both), is_paired=True)
    assert paired.difference(BEST, "b").is_clear
    assert paired.difference(BEST, "b").error == pytest.approx(0, abs=1e-9)


def test_ratios_to_first_order():
    found = comparison(2.0, 3.0, errors=[0.2, 0.3]).difference(BEST, "b")
    assert found.ratio == 1.5
    assert found.ratio_error == pytest.approx(math.hypot(0.3 / 2, 0.2 * 3 / 4), rel=1e-12)
    assert math.isnan(comparison(-1.0, 3.0).difference(BEST, "b").ratio)


def test_marks_in_the_table():
    found = comparison(1.0, 1.1, 5.0)
    (_, normalised, *_) = [list(column.cells) for column in found.table().columns]
    assert normalised == ["1.00 ± 0.10", "1.10 ± 0.10 ≈", "5.00 ± 0.10"]
    unknown = comparison(1.0, 2.0, errors=[math.nan, math.nan])
    assert list(unknown.table().columns[1].cells) == ["1", "2 ?"]
    assert "?: error not known" in str(unknown.table().caption)
    assert "assume different samples" in str(found.table().caption)


def test_the_caption_explains_only_marks_that_are_shown():
    found = comparison(1.0, 5.0)
    assert "≈: no clear difference from a, at most two standard errors." in str(found.table().caption)
    others = dict.fromkeys((*MEASURES, "accuracy"), math.nan)
    rows = {name: replace(row, **others | {BEST: getattr(row, BEST)}) for name, row in found.models.items()}
    caption = str(replace(found, models=rows).table().caption)
    assert "≈" not in caption
    assert "?" not in caption


@pytest.mark.parametrize("number", [4, 6])
def test_too_few_models_for_an_interval_are_said_to_be(number):
    undefined = RankCorrelation(BEST, math.nan, math.nan, math.nan, {}, math.nan, is_baseline=False, num_models=number)
    caption = str(replace(comparison(1.0, 2.0), correlations=(undefined,)).tables()[-1].caption)
    assert ("With fewer than five models" in caption) == (number < 5)


@pytest.mark.parametrize(("data", "heading"), [("val", "val loss"), ("train", "loss"), ("", "loss")])
def test_the_loss_says_of_which_data_it_is(data, heading):
    found = comparison(1.0, 2.0)
    rows = {name: replace(row, data=data, train_loss=0.5) for name, row in found.models.items()}
    headings = [str(column.header) for column in replace(found, models=rows).table().columns]
    assert headings.count(heading) == headings.count("train loss") == 1


def test_names_are_printed_as_they_are():
    found = comparison(1.0, 2.0)
    rows = {"[bold]a[/x]": found.models["a"], "[b]": found.models["b"]}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(replace(found, models=rows, outcome_name="[gap]"))
    text = console.export_text()
    assert "times [bold]a[/x]" in text
    assert "[gap]" in text


def test_a_comparison_without_relative_flatness_has_what_there_is():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    batch = torch.randn(64, 4), torch.arange(64) % 3
    found = lf.compare({1: net, 2: net}, [batch], layers="0", measures=["hessian_trace"], outcome={1: 0.1, 2: 0.2})
    assert list(found.models) == ["1", "2"]
    assert "no model can be called the flattest" in found.verdict
    assert "not_normalised" in {caution.kind for caution in found.cautions}
    assert "Hessian trace" in str(found)
    assert {one.measure for one in found.correlations} >= {"hessian_trace", "weight_norm", "margin", "feature_spread"}
    assert "relative_flatness" not in {one.measure for one in found.correlations}


def test_a_row_for_every_model_in_a_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = comparison(1.0, 2.0).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["model"]) == ["a", "b"]
    assert list(frame[f"{BEST}_ratio"]) == [1.0, 2.0]
    assert frame[f"{BEST}_error"][1] == 0.1
    assert not frame["loss_is_clear"].any()


def test_tables_in_a_narrow_terminal_keep_every_number():
    text = str(comparison(1.0, 2.0))
    assert max(map(len, text.splitlines())) <= 110
    assert "2.00 ± 0.10" in text


def test_correlations_have_what_is_free_beside_them():
    reports = [measured(seed) for seed in range(6)]
    outcome = [report.relative_flatness for report in reports]
    found = lf.compare(reports, outcome=outcome, outcome_name="gap", train_losses=[report.loss for report in reports])
    known = {one.measure: one for one in found.correlations}
    assert known["relative_flatness"].tau == 1
    assert {"train_loss", "weight_norm"} <= known.keys() & BASELINES.keys()
    assert known["train_loss"].is_baseline
    assert not known["relative_flatness"].is_baseline
    assert math.isnan(known["train_loss"].given["train_loss"])
    text = str(found)
    assert f"{len(known)} numbers tried on 6 models" in " ".join(text.split())
    assert "Kendall's τ with gap" in text
    assert "Kendall" in found._repr_html_()


def measured(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    return lf.measure_flatness(net, [(torch.randn(64, 4), torch.arange(64) % 3)], layers="0")
