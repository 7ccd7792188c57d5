"""The part of the study on networks of real accuracy: what its section says follows from its tables."""

from dataclasses import replace
from math import exp, log

import pytest

from studies import accuracy, figures
from studies.families import accurate
from studies.page import not_run
from studies.tables import read_rows, write_rows

ERRORS = {"resnet": (0.4, 0.25, 0.2), "plain": (0.42, 0.3, 0.24)}
FLATNESS = {"resnet": (100.0, 50.0, 40.0), "plain": (10.0, 20.0, 80.0)}


@pytest.fixture
def family(tmp_path):
    """Two networks of each architecture; a fifth has only its first snapshot."""
    every = accurate()
    family = replace(every, configurations=every.configurations[:5])
    losses, measures = [], []
    for number, one in enumerate(family.configurations):
        for place, epoch in enumerate(family.epochs if number < 4 else family.epochs[:1]):
            key = {"name": one.name, "snapshot": f"epoch {epoch}"}
            error = ERRORS[one.arm][place] + 0.01 * (number > 1)
            losses.append(
                key | {"epoch": epoch, "train_images": 10_000, "test_images": 5000, "train_loss": 0.5}
                | {"test_loss": 0.5 + error, "test_error": error, "test_error_a": error, "test_error_b": error - 0.004}
            )  # fmt: skip
            value = FLATNESS[one.arm][place] * (4 if number > 1 else 1)
            measures.append(key | dict.fromkeys(accuracy.COMPARED, value))
    write_rows(tmp_path / "accurate-losses.csv", losses)
    write_rows(tmp_path / "accurate-measures.csv", measures)
    return family


def test_rows_are_means_over_networks_with_all_epochs(tmp_path, family):
    rows = accuracy.analyse(tmp_path, family)
    assert [(row["arm"], row["epoch"], row["networks"]) for row in rows[:4]] == [
        ("resnet", 10, 2), ("resnet", 20, 2), ("resnet", 30, 2), ("plain", 10, 2),
    ]  # fmt: skip
    last = rows[2]
    assert (last["test_error"], last["low"], last["high"]) == pytest.approx((0.205, 0.2, 0.21))
    assert last["loss_gap"] == pytest.approx(0.205)
    assert last["relative_flatness.last"] == pytest.approx(exp((log(40) + log(160)) / 2))
    assert len(read_rows(tmp_path / "accurate-summary.csv")) == 6


def test_the_section_says_what_the_tables_say(tmp_path, family):
    rows = accuracy.analyse(tmp_path, family)
    section = accuracy.section(tmp_path, family, rows)
    assert "4 networks of 32 to 128 channels" in section
    assert "2 of the architecture *resnet* and 2 of the architecture *plain*" in section
    assert "on 10,000 images" in section
    assert "the test error falls in 4 of 4 networks" in section
    assert "relative flatness, last convolution in 2," in section  # of the plain networks
    assert "*resnet* has a test error that is 4.0 points lower than that of *plain*" in section
    assert "relative flatness, last convolution 0.50" in section
    assert "have a standard deviation of 0.71 points. The choice of the test images alone makes 0.00" in section
    assert "cannot tell whether a measure orders seeds" not in section
    figures.save(figures.accuracies(accuracy.curves_of(tmp_path, family)), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()


def test_without_networks_there_is_no_section(tmp_path):
    assert accuracy.analyse(tmp_path, accurate()) == []
    assert "`accurate`: 0 of 10 networks have been run" in not_run(tmp_path)
