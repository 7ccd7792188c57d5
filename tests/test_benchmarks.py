"""The table of the benchmarks: verdicts, exponents, what becomes of a row that fails. No times are tested."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import __main__ as command
from benchmarks import classifier, live_profile, machine, networks, page, setups
from benchmarks.growth import slope
from benchmarks.observed import observed
from benchmarks.rows import Row
from benchmarks.timing import Times, interleaved
from benchmarks.traces import exact_trace
from lightning_flatness.layers import observer
from lightning_flatness.testing import oracle_block_traces


@pytest.mark.parametrize(
    ("form", "goal", "ratio", "met", "shown"),
    [
        ("percent", 0.03, 1.02, True, "+2.0 %"),
        ("percent", 0.03, 1.04, False, "+4.0 %"),
        ("faster", 300, 299, False, "299x faster"),
        ("faster", 300, 301, True, "301x faster"),
        ("times", 1.5, 1.6, False, "1.6x"),
        ("exponent", 1.1, 1.0, True, "1.00"),
        ("times", None, 1.6, None, "1.6x"),
    ],
)
def test_verdict(form, goal, ratio, met, shown):
    row = Row("family", "what", "against", form, goal).measured(ratio)
    assert row.met is met
    assert row.cells()[2] == shown


def test_a_row_that_failed_has_its_reason_and_no_verdict():
    row = Row("family", "what", "against", "faster", 300).failed("ModuleNotFoundError: No module named 'peer'")
    assert row.met is None
    assert row.cells()[2:] == ("", ">= 300x faster", "", "ModuleNotFoundError: No module named 'peer'")


def test_slope_of_a_power():
    assert_close(slope([1, 2, 4, 8], [3.0 * n**1.5 for n in (1, 2, 4, 8)]), 1.5)


def test_interleaved_leaves_out_the_warm_up_and_runs_all_in_turn():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert "".join(order) == "baabba"
    assert {name: len(seconds) for name, seconds in times.wall.items()} == {"a": 2, "b": 2}


def test_interleaved_stops_when_its_budget_is_spent():
    assert len(interleaved({"a": lambda: None}, repeats=9, budget=0.0).wall["a"]) == 3


def test_a_family_that_crashes_leaves_its_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    found = command.measured("classes", quick=True)
    assert [row["ratio"] for row in found["rows"]] == [None] * 3
    assert {row["note"] for row in found["rows"]} == {"the process ended with exit code 1"}


def results_of(*rows: Row) -> dict:
    about = {"machine": {"processor": "x", "load before": "3 processes"}}
    return {row.family: about | {"rows": [row.as_dict()]} for row in rows}


def test_page_and_runs_have_every_row():
    measured = Row("classes", "this", "that", "times", 1.5).measured(1.25, "because", {"ours": [1.5, 2.5]}, True)
    profile = {"parts": [live_profile.Part(live_profile.BARE, 0.5, 1e9, 1e6).as_dict()]}
    profile["limits"] = {"flops": 1e10, "bytes": 1e10}
    results = results_of(measured) | {"live_profile": {"machine": {}, "profiles": {"net": profile}}}
    text, runs = page.text(results), page.runs(results)
    assert "| this | that, extrapolated | 1.25x | <= 1.5x | yes |" in text
    assert "| forward pass alone | 500.00 | 100.0 % | 1 | 1 | 100.00 | 5.0 |" in text
    assert "this; against: that; 1.25x\n  because\n  ours: 1.5 2.5" in runs
    assert "load before: 3 processes" in runs


def test_setups_are_a_table_of_quantities():
    rows = [
        Row("setups", "net, full: validation epoch", "without", "times", 1.1).measured(1.2),
        Row("setups", "net, full: peak memory", "without", "times", 1.1).measured(1.0),
        Row("setups", "net, half: validation epoch", "without", "times", 1.1).failed("no instructions"),
    ]
    table = page.pivoted(rows, "set-up")
    assert "| set-up | validation epoch | peak memory |" in table
    assert "| net, full | **1.2x** (<= 1.1x) | 1x (<= 1.1x) |" in table
    assert "| net, half |" not in table
    assert "(1) no instructions; nothing of: net, half\n" in table


def test_setups_measure_what_they_say(monkeypatch):
    """Every quantity of a small set-up has a ratio; one that this processor cannot measure has the reason."""
    small = setups.Setup("resnet20", batch=8, validated=2, trained=5)
    half = setups.Setup("resnet20", setups.HALF, validated=2)
    monkeypatch.setattr(setups, "SETUPS", (small, half))
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    ran = []

    def at_once(tasks, *_, **__):
        ran.append([task() for task in tasks.values()])
        return TIMES

    monkeypatch.setattr(setups, "interleaved", at_once)
    validation, training, no_instructions = setups.measure(quick=True)
    assert [row.ratio for row in (validation, training)] == [2.0, 2.0]
    assert len(ran) == 2, "a set-up that cannot be measured was run, or one that can was not"
    assert no_instructions.ratio is None
    assert "bfloat16" in no_instructions.note


TIMES = Times({"with": [2.0], "without": [1.0]}, {"with": [2.0], "without": [1.0]})


def test_page_is_the_one_of_the_results():
    """The page in the documentation was written from the results in the repository."""
    results = command.results(command.RESULTS)
    assert Path(command.ROOT, "docs", "benchmarks.md").read_text() == page.text(results)
    assert Path(command.ROOT, "docs", page.RUNS).read_text() == page.runs(results)


@pytest.mark.slow
def test_every_part_of_the_profile_is_timed(monkeypatch):
    """A function that was renamed would have no time of its own."""
    monkeypatch.setattr(networks, "small", lambda: networks.resnet20(10, 14), raising=False)
    parts = live_profile.measure("cpu", True, "small", samples=8)
    others = {live_profile.BARE, live_profile.OBSERVED, live_profile.WHOLE}
    assert {part.name for part in parts} == others | set(live_profile.PARTS)


def test_every_observed_pass_is_measured_when_it_ends(monkeypatch):
    """Samples that waited for others would cost nothing."""
    step = observed(networks.resnet20(10, 8), networks.images(8))
    contractions = []
    contraction = observer.closed_form_layer
    monkeypatch.setattr(observer, "closed_form_layer", lambda *args: contractions.append(1) or contraction(*args))
    step()
    step()
    assert len(contractions) == 2


@pytest.mark.parametrize("place", ["measure.measurement:Measurement.gone", "layers.certify:Gone.calls", "gone:calls"])
def test_a_part_of_the_profile_that_is_gone_is_an_error(monkeypatch, place):
    monkeypatch.setitem(live_profile.PARTS, "gone", f"lightning_flatness.{place}")
    with pytest.raises((AttributeError, ModuleNotFoundError), match="(?i)gone"), live_profile.timers("cpu"):
        pass


def test_exact_trace_is_that_of_the_hessian():
    torch.manual_seed(0)
    net = networks.resnet20(3, 8, 4).double()
    x, y = networks.images(3, 8, 3)
    oracle = oracle_block_traces(net, (x.double(), y), "5.branch.3")
    actual = exact_trace(net, net.get_parameter("5.branch.3.weight"), (x, y))
    assert_close(actual, float(oracle.diagonal(dim1=-2, dim2=-1).sum()), rtol=1e-9, atol=0)


def test_full_hessian_gives_the_same_relative_flatness():
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 4).double()
    batch = torch.randn(5, 6).double(), torch.arange(5) % 4
    expected = classifier.from_hessian(head, "weight", batch)
    assert_close(classifier.from_features(head, batch), expected, rtol=1e-9, atol=0)
    assert_close(classifier.certified(torch.nn.Sequential(head), batch), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", sorted(Path(command.ROOT, "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path):
    if path.stem == "coverage":
        pytest.importorskip("timm")
    importlib.import_module(f"benchmarks.{path.stem}")
