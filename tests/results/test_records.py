"""Records as data, as rows, in one line, and in a notebook."""

import copy
import json
import math
import re
import sys
import types
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import lightning_flatness as lf
from tests.guarding import guards
from tests.results.made import RESULTS, flatness, lambda_max, landscape, spectrum, trajectory

MAKE = pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)


def numbers_in(value):
    """Number of entries that are no mappings or lists, however deep."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if parts is None else sum(map(numbers_in, parts))


@guards(
    "results/records.py",
    "return None if isinstance(value, float) and not math.isfinite(value) else value",
    "return value",
)
@MAKE
@pytest.mark.parametrize("tensors", [False, True])
def test_any_record_is_json(make, tensors):
    result = make()
    found = result.to_dict(tensors)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["result"] == type(result).__name__
    assert tensors or numbers_in(found) < 400


@MAKE
def test_any_record_can_be_compared_and_be_in_a_set(make):
    result = make()
    copied = copy.deepcopy(result)
    assert (result == copied) in (True, False)
    assert len({result, result}) == 1
    assert result.to_dict() == copied.to_dict()


def test_results_with_tensors_are_equal_only_to_themselves():
    assert flatness() != flatness()
    assert lambda_max() != lambda_max()


def test_the_dict_of_a_report_has_the_label():
    report = flatness()
    found = report.to_dict()
    label = {"exact": False, "loss": 0.4321, "accuracy": 0.6, "curvature": None, "loss_name": "cross_entropy"}
    label |= {"data": "val", "precision": "float32", "precision_deviation": 0.0, "num_samples": 5, "num_groups": 32}
    assert {key: found[key] for key in label} == label
    assert found["left_out"] == dict(report.left_out)
    assert found["sampling_errors"] == {"loss": 0.0321, "hessian_trace": None}
    assert found["standard_errors"]["hessian_trace"] == 0
    assert list(found["layers"]) == list(report.layers)
    first = found["layers"]["0"]
    assert first["relative_flatness"] == report.layers["0"].relative_flatness
    assert (first["exact"], first["method"], first["label"]) == (False, "gauss_newton", "no: Gauss-Newton")
    assert first["reason"] == "the network is curved after it"
    assert first["sampling_errors"]["hessian_trace"] == 0.0123
    odd = found["layers"]["0.samples"]
    assert (odd["relative_flatness"], odd["hessian_trace"]) == (None, None)


def test_tensors_are_in_the_dict_if_asked_for():
    report = flatness()
    assert not {"block_traces", "filter_traces", "samples"} & report.to_dict()["layers"]["2"].keys()
    assert "samples" not in report.to_dict()
    found = report.to_dict(tensors=True)
    assert found["samples"]["prediction"] == [0, 1, 2, 3, 4]
    assert found["layers"]["2"]["block_traces"] == report.layers["2"].block_traces.tolist()
    result = spectrum()
    assert result.to_dict()["eigenvalues"] == result.eigenvalues.tolist()
    assert result.to_dict()["ritz_weights"] == result.ritz_weights.tolist()
    assert landscape().to_dict()["losses"][0][:2] == [None, None]
    assert len(landscape().to_dict()["coordinates"]) == 2


class Frame:
    """What pandas.DataFrame is given."""

    def __init__(self, rows):
        self.rows = rows


@pytest.fixture
def pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=Frame))


@pytest.mark.usefixtures("pandas")
def test_rows_of_reports():
    report = flatness()
    rows = report.to_pandas().rows
    assert [row["layer"] for row in rows] == list(report.layers)
    assert rows[0]["exact"] is False
    assert rows[0]["method"] == "gauss_newton"
    assert rows[1]["hessian_trace"] == report.layers["2"].hessian_trace
    assert rows[1]["hessian_trace_sampling_error"] == 0.0123
    assert rows[1]["hessian_trace_standard_error"] == 0
    assert (rows[1]["loss"], rows[1]["loss_name"], rows[1]["data"]) == (0.4321, "cross_entropy", "val")
    assert math.isnan(rows[-1]["relative_flatness"])
    assert all(isinstance(value, (str, int, float, type(None))) for row in rows for value in row.values())
    assert [row["layer"] for row in lambda_max().to_pandas().rows] == ["0", "2"]
    assert len(report.layers["2"].to_pandas().rows) == 1


@pytest.mark.usefixtures("pandas")
def test_rows_of_other_results():
    result = spectrum()
    (row,) = result.to_pandas().rows
    assert row["eigenvalue"] == float(result.eigenvalues[0])
    result = landscape()
    rows = result.to_pandas().rows
    assert len(rows) == result.losses.numel()
    point = rows[3 * 1 + 2]
    assert (point["coordinate_0"], point["coordinate_1"]) == (result.coordinates[0][1], result.coordinates[1][2])
    assert point["loss"] == float(result.losses[1, 2])
    assert [row["coordinate_1"] for row in trajectory().to_pandas().rows] == [1.0, 0.5, 0.0]


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(lf.FlatnessError, match="FlatnessReport.to_pandas needs pandas: pip install pandas"):
        flatness().to_pandas()


@MAKE
def test_any_record_is_one_line(make):
    result = make()
    assert repr(result).startswith(f"{type(result).__name__}(")
    assert "\n" not in repr(result)
    assert len(repr(result)) < 300
    assert "tensor(" not in repr(result)


def test_the_line_of_a_report():
    report = flatness()
    report = replace(report, layers={"2": report.layers["2"]})
    flat = report.relative_flatness
    assert repr(report) == (
        f"FlatnessReport(1 layer, 5 samples of validation data, exact, relative flatness {flat:.4g}, "
        f"Hessian trace {report.hessian_trace:.4g}, loss 0.43 ± 0.03)"
    )
    assert "not exact (0, 0.samples)" in repr(flatness())
    assert "not exact: the Gauss-Newton part of the Hessian, since the network is curved" in repr(
        flatness().layers["0"]
    )


class Checked(HTMLParser):
    """Collects cells, and fails at elements that are not closed or load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p", "br", "strong")
        assert {name for name, _ in attrs} <= {"style"}
        if tag != "br":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@MAKE
def test_any_record_is_shown_in_notebooks(make):
    text = make()._repr_html_()
    assert Checked(text).cells
    assert not re.search(r"color: (?!inherit)|#[0-9a-f]{3}|background: (?!none)", text), "colours are those of the page"


@guards("results.texts:_html", body="return str(content)")
def test_html_is_escaped():
    report = flatness()
    first = report.layers["0"]
    report = replace(
        report, layers={"<script>": replace(first, info=replace(first.info, name="<script>", reason="a < b"))}
    )
    text = report._repr_html_() + report.layers["<script>"]._repr_html_() + report.layers["<script>"].info._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "since a &lt; b" in text
    assert "&lt;b&gt;head&lt;/b&gt;" in text
    assert "runs [twice] &amp; more" in text


def test_text_in_a_notebook_is_no_output_of_its_own(monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=shown.append))
    assert "Flatness over 5 samples" in str(flatness())
    assert not shown


def test_numbers_of_points_are_in_the_singular():
    result = landscape()
    computed = torch.ones_like(result.computed)
    computed[0, :1] = False
    lines = str(replace(result, computed=computed)).splitlines()
    assert lines[-2:] == ["1 point not computed", "1 point not finite"]


def test_names_that_look_like_markup_are_printed():
    report = flatness()
    text = str(replace(report, layers={"[bold]": report.layers["2"]}))
    assert "[bold]" in text
    assert "runs [twice] & more" in " ".join(text.split())


def test_eigenvalues_are_a_mapping_with_a_table():
    found = lambda_max()
    assert dict(found) == found.layers
    assert len(found) == 2
    assert not found.exact
    assert found.num_samples == 5
    text = str(found)
    assert "no: Gauss-Newton" in text
    assert f"{found['2'].lambda_max:.4g}" in text
    assert torch.is_tensor(found["2"].filter_lambda_max)
