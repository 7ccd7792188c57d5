"""Sentences and tables of the study's page that must not flatter: what they say follows from small tables."""

from dataclasses import replace

import numpy as np
import pytest

from studies import curves
from studies.analysis import MAIN, MAIN_TARGETS, SCOPES, Sample, by_noise, known_before
from studies.families import cifar
from studies.findings import coins, in_short
from studies.measures import COLUMNS
from studies.stars import arm_rows, star_table
from studies.statistics import constant_rule, environments
from studies.tables import write_rows
from studies.verdicts import OURS


def a_sample(noise, rate, gap, measure):
    rows = [
        {"label_noise": str(n), "learning_rate": str(r), "batch_size": "10", "weight_decay": "0", "train_size": "9"}
        for n, r in zip(noise, rate, strict=True)
    ]
    targets = {"loss gap": np.array(gap, float)}
    return Sample("loss 0.05", rows, ["measure"], np.array([measure], float), targets, {}, left_out=0)


def test_settings_are_compared_within_noise_levels_too():
    """The gap follows label noise over all networks, and the learning rate among those of one noise level."""
    one = a_sample([0, 0, 0.2, 0.2], [0.1, 0.2, 0.1, 0.2], [1, 2, 11, 12], [4, 3, 2, 1])
    found = {row["setting"]: row for row in known_before(one, "loss gap")}
    assert set(found) == {"label_noise", "learning_rate", "rate_over_batch"}  # the others have one value
    assert found["learning_rate"]["tau_within"] == pytest.approx(1)
    assert found["label_noise"]["tau"] == pytest.approx(4 / np.sqrt(6 * 4))
    assert np.isnan(found["label_noise"]["tau_within"])


def test_tau_by_noise_level_needs_ten_networks():
    gap = np.arange(22.0)
    noise, measure = [0.0] * 10 + [0.1] * 9 + [0.2] * 3, np.where(gap < 10, gap, -gap)
    (row,) = by_noise(a_sample(noise, [0.1] * 22, gap, measure), "loss gap")
    assert (row["label_noise"], row["n"], row["tau"]) == (0.0, 10, pytest.approx(1))


def test_a_worst_environment_of_few_pairs_is_not_clearly_better_than_a_coin():
    pairs = [(i, i + 1, "a step") for i in range(0, 40, 2)]
    y = np.arange(40.0)
    x = np.where(np.arange(40) < 14, -y, y)  # 7 of 20 pairs in the wrong order
    found = environments(x, y, pairs, noise=0.0)
    assert (found.worst, found.worst_pairs) == (0.35, 20)
    falls = np.where(np.arange(40) % 2 * (np.arange(40) < 6), -y, y)  # the outcome falls in 3 of 20 pairs
    assert constant_rule(falls, pairs, noise=0.0) == pytest.approx(0.15)
    rows = [{"worst_sign_error": 0.35, "worst_p": 0.13}, {"worst_sign_error": 0.6, "worst_p": 0.9}]
    assert "1 of 2 numbers are no better than a coin. The other 1 have fewer than half" in coins(rows)
    assert "none of them clearly" in coins(rows)
    assert "1 of them clearly" in coins([rows[1], rows[0] | {"worst_p": 0.02}])


def test_a_star_names_the_arms_that_are_missing(tmp_path):
    arms = ("centre", "width 8", "optimizer sam")
    family = replace(cifar(), configurations=tuple(c for c in cifar().configurations if c.arm in arms))
    losses, measures = [], []
    for one in family.configurations:
        if one.arm == "width 8":
            continue
        key, is_sam = {"name": one.name, "snapshot": "epoch 60"}, one.arm != "centre"
        gap = 2.0 - is_sam
        targets = {"test_loss": gap + 0.1, "test_error": 0.5, "scaled_loss": 1.0}
        halves = {f"{name}{half}": value for name, value in targets.items() for half in ("_a", "_b")}
        losses.append(key | {"epoch": 60, "train_loss": 0.1 + is_sam, "train_error": 0.0} | targets | halves)
        measures.append(dict.fromkeys(COLUMNS, 2.0 ** (3 * is_sam)) | key)
    write_rows(tmp_path / "cifar-losses.csv", losses)
    write_rows(tmp_path / "cifar-measures.csv", measures)
    (row,) = arm_rows(tmp_path, family, "epoch 60")
    assert (row["arm"], row["pairs"], row["ratios"]) == ("optimizer sam", 3, pytest.approx([8, 8, 8]))
    assert (row["loss gap"], row["loss"], row["centre_loss"]) == pytest.approx((-2, 1.1, 0.1))
    assert "Missing, since no network of theirs is counted at epoch 60: width 8." in star_table(
        tmp_path, family, "epoch 60"
    )


def test_seeds_are_drawn_within_each_setting():
    settings = ["a", "b", "a", "b", "b"]
    drawn = curves.drawn_seeds(settings, seed=0)
    assert drawn.shape[1] == 5
    assert {tuple(sorted(settings[index] for index in row)) for row in drawn[:50]} == {("a", "a", "b", "b", "b")}


@pytest.mark.parametrize(
    ("tau", "difference", "p", "says"),
    [
        (0.5, 0.1, 0.001, "goes with the loss gap, clearly more than the best baseline (ASAM sharpness)"),
        (0.5, 0.1, 0.5, "does not clearly go with the loss gap"),
        (-0.5, -0.7, 0.001, "goes the wrong way with the loss gap"),
    ],
)
def test_the_short_answer_is_what_the_p_values_say(tau, difference, p, says):
    key = {"snapshot": MAIN, "scope": SCOPES[1], "p": p, "p_holm": p}
    taus = [
        key | {"target": target, "measure": name, "tau": value}
        for target in MAIN_TARGETS
        for name, value in ((OURS, tau), ("asam", 0.4))
    ]
    differences = [
        key | {"target": target, "measure": OURS, "reference": "asam", "difference": difference}
        for target in MAIN_TARGETS
    ]
    found = {"taus": taus, "differences": differences, "verdicts": [{}]}
    said = in_short({"the digits": found, "CIFAR-10": {}})
    assert f"On the digits relative flatness {says}" in said
    assert "CIFAR-10" not in said
    assert in_short({"CIFAR-10": {}}) == ""
