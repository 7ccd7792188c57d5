"""The reference study: its training, its tables and its statistics. What it finds stands in docs/study.md."""

from dataclasses import replace
from itertools import product
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

from studies import curves, measures, statistics
from studies.analysis import sample
from studies.data import Data, cifar10, in_turns, training_part
from studies.families import CIFAR, DIGITS, Family, accurate, cifar, digits, stacks
from studies.markdown import interval
from studies.measuring import measured_rows, temperature_of
from studies.networks import build
from studies.running import RESULTS
from studies.stacked import Optimizer, Stack
from studies.tables import Table, read_rows
from studies.training import Run, Snapshot, seed_of


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % 10
    return Data(images[:30], labels[:30], images[30:], labels[30:])


def small_family(epochs=3, **changes):
    centre = replace(DIGITS, train_size=30, width=2, batch_size=10, epochs=epochs, **changes)
    settings = [(0.0, 0.05, 0.0, 0), (0.1, 0.1, 1e-2, 0), (0.0, 0.02, 1e-2, 1)]
    keys = ("label_noise", "learning_rate", "weight_decay", "seed")
    found = [replace(centre, name=str(n), **dict(zip(keys, values, strict=True))) for n, values in enumerate(settings)]
    costly = (f"epoch {epochs}",)
    return Family(
        name="small", data="digits", configurations=tuple(found), epochs=(1, epochs), losses=(2.6, 0.01), checks=3,
        stack=18, stack_on_cpu=18, factors=keys[:-1], measured_samples=30, costly=costly,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_networks_trained_at_once_are_those_trained_one_by_one(data, optimizer, count):
    family = small_family(optimizer=optimizer)
    run = Run(family, family.configurations[-count:], data)
    run.train()
    for index, configuration in enumerate(family.configurations[-count:]):
        alone = trained_alone(configuration, data)
        for name, tensor in alone.state_dict().items():
            assert torch.allclose(run.stack.state_of(index)[name].double(), tensor.double(), rtol=0, atol=1e-6), name


def trained_alone(configuration, data):
    """Train one network with torch's own optimizer, on the batches that the study gives it."""
    images, labels = training_part(data, configuration)
    model = build(configuration, 1).double().train()
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[configuration.optimizer]
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    decay = configuration.weight_decay
    optimizer = kind(model.parameters(), configuration.learning_rate, weight_decay=decay, **momentum)
    for epoch in range(configuration.epochs):
        generator = torch.Generator().manual_seed(seed_of(configuration.seed, epoch))
        for chosen in torch.randperm(len(images), generator=generator).split(configuration.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model


def test_sam_takes_the_gradient_a_radius_uphill():
    torch.manual_seed(0)
    model, images, labels = nn.Linear(3, 4).double(), torch.randn(5, 3).double(), torch.arange(5) % 4
    stack = Stack([model])
    rates = torch.tensor([0.1], dtype=torch.float64)
    Optimizer("sam", stack, rates, 0 * rates).step(stack, images[None], labels[None])

    weights = list(model.parameters())
    slopes = torch.autograd.grad(cross_entropy(model(images), labels), weights)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    uphill = [w.detach() + 0.05 * slope / length for w, slope in zip(weights, slopes, strict=True)]
    there = [w.requires_grad_() for w in uphill]
    loss = cross_entropy(images @ there[0].T + there[1], labels)
    expected = weights[0] - 0.1 * torch.autograd.grad(loss, there)[0]
    assert torch.allclose(stack.params["weight"][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{"dropout": 0.3}, {"augment": True}], ids=str)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(data, tmp_path, changes):
    family = small_family(**changes)
    whole = Run(family, family.configurations, data).train()
    saved = tmp_path / "stack.pt"
    assert Run(family, family.configurations, data).train(saved, deadline=0.0) is None  # after one epoch
    resumed = Run(family, family.configurations, data).train(saved)
    assert [(one.name, one.snapshot, one.epoch) for one in resumed] == [(s.name, s.snapshot, s.epoch) for s in whole]
    assert all(torch.equal(a.state[key], b.state[key]) for a, b in zip(whole, resumed, strict=True) for key in a.state)
    assert {one.snapshot for one in whole} == {"epoch 1", "epoch 3", "loss 2.6"}


def test_a_run_does_not_take_up_the_state_of_other_networks(data, tmp_path):
    family, other, saved = (
        small_family(),
        small_family(weight_decay=0.1, learning_rate=0.5, epochs=2),
        tmp_path / "stack.pt",
    )
    Run(other, other.configurations[:1], data).train(saved)
    found, expected = (Run(family, family.configurations[-1:], data).train(path) for path in (saved, None))
    assert [(one.name, one.snapshot, one.epoch) for one in found] == [(s.name, s.snapshot, s.epoch) for s in expected]


def test_a_table_keeps_its_rows_after_an_interrupt(tmp_path):
    path = tmp_path / "rows.csv"
    Table(path, "name").append({"name": "a", "value": 1.5, "other": float("nan")})
    with path.open("a") as file:
        file.write("b,2")  # cut off
    table = Table(path, "name")
    assert ("a",) in table
    assert ("b",) not in table
    table.append({"name": "a", "value": 3.0})
    table.append({"name": "c", "value": 1 / 3})
    assert read_rows(path) == [
        {"name": "a", "value": "1.5", "other": ""},
        {"name": "c", "value": "0.333333", "other": ""},
    ]
    with pytest.raises(ValueError, match="no column 'new'"):
        table.append({"name": "d", "new": 1})


@pytest.mark.filterwarnings("ignore")
def test_a_snapshot_has_every_measure_and_baseline(data):
    data = Data(*(t.float() if t.is_floating_point() else t for t in vars(data).values()))
    family = small_family(epochs=1)
    *_, snapshot = Run(family, family.configurations[:1], data).train()
    losses, found = measured_rows(family, family.configurations[0], snapshot, data)
    assert set(found) == set(measures.COLUMNS)
    assert all(np.isfinite(found[name]) for name in measures.LABELS if not name.startswith("train_"))
    assert found["exact"] is True
    assert losses["test_loss"] == pytest.approx((losses["test_loss_a"] + losses["test_loss_b"]) / 2)


def test_families_can_be_stacked_and_have_their_number_of_networks():
    assert len(digits().configurations) >= 200
    for family, device in product((digits(), cifar(), accurate(), curves.family()), ("cpu", "cuda")):
        grouped = stacks(family, device)
        assert sorted(c.name for stack in grouped for c in stack) == sorted(c.name for c in family.configurations)
        assert all(len({c.stack_key for c in stack}) == 1 for stack in grouped)
        configurations = {tuple(c.row().items())[2:-1] for c in family.configurations}
        assert len(configurations) * 3 <= len(family.configurations)  # at least three seeds of each


def test_wrong_labels_are_as_many_as_wanted_and_nested(data):
    noisy = [training_part(data, replace(CIFAR, train_size=30, label_noise=level))[1] for level in (0.0, 0.1, 0.2)]
    wrong = [labels != data.labels for labels in noisy]
    assert [int(one.sum()) for one in wrong] == [0, 3, 6]
    assert bool((wrong[2] | ~wrong[1]).all())


def test_images_are_taken_in_turns():
    labels = torch.tensor([1, 1, 0, 2, 0, 2])
    assert labels[in_turns(labels)].tolist() == [0, 1, 2, 0, 1, 2]


def test_both_halves_of_the_test_images_have_all_classes(tmp_path):
    """The reliability of a target, and the temperature of its loss, compare the images at even and at odd places."""
    labels = np.sort(np.arange(80) % 10)
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", np.zeros((80, 4, 4, 3), np.uint8))
        np.save(tmp_path / f"{part}_labels.npy", labels)
    found = cifar10(tmp_path).test_labels
    for half in (found[0::2], found[1::2]):
        assert half.bincount().tolist() == [4] * 10
    assert sorted(found[:60].tolist()) == sorted([*range(10)] * 6)


def test_the_temperature_has_the_lowest_loss():
    torch.manual_seed(0)
    logits = torch.randn(400, 5, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert temperature_of(3 * logits, labels) == pytest.approx(3 * temperature_of(logits, labels), rel=0.01)


@pytest.fixture
def numbers():
    generator = np.random.default_rng(0)
    measured = generator.integers(0, 8, size=(2, 12)).astype(float)  # with ties
    return measured, generator.normal(size=12), np.repeat(np.arange(4), 3)


def test_tau_with_weights_is_that_of_repeated_networks(numbers):
    measured, outcome, clusters = numbers
    weights = statistics.drawn_weights(clusters, seed=0, draws=3)
    found = statistics.weighted_taus(measured, outcome, weights)
    for row, counts in zip(found, weights.astype(int), strict=True):
        repeated = np.repeat(np.arange(12), counts)
        expected = [stats.kendalltau(values[repeated], outcome[repeated]).statistic for values in measured]
        assert row == pytest.approx(expected)
    assert (weights.reshape(3, 4, 3) == weights.reshape(3, 4, 3)[:, :, :1]).all()  # whole configurations
    assert (weights.sum(1) == 12).all()


def test_tau_within_groups_counts_pairs_of_one_group_alone(numbers):
    measured, outcome, clusters = numbers
    same = (clusters[:, None] == clusters[None, :]).astype(float)
    found = statistics.weighted_taus(measured[:1], outcome, np.ones((1, 12)), same)[0, 0]
    x, y = (np.subtract.outer(v, v)[same == 1] for v in (measured[0], outcome))
    assert found == pytest.approx(np.sum(np.sign(x) * np.sign(y)) / np.sqrt(np.sum(x != 0) * np.sum(y != 0)))


def test_the_jackknife_gives_the_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=(20, 1))
    left_out = (values.sum() - values) / 19
    found = statistics.estimate(values.mean(0), left_out, left_out)
    assert found.errors == pytest.approx(stats.sem(values))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_holm_multiplies_by_the_number_of_those_left():
    found = statistics.holm(np.array([0.01, np.nan, 0.04, 0.03]))
    assert found == pytest.approx([0.03, np.nan, 0.06, 0.06], nan_ok=True)


def test_sign_errors_are_worst_where_a_factor_turns_the_order():
    rows = [{"a": str(a), "b": str(b), "seed": str(s)} for a in (0, 1) for b in (0, 1) for s in (0, 1)]
    outcome = np.array([10 * int(row["a"]) + int(row["b"]) for row in rows], dtype=float)
    measure = np.array([10 * int(row["a"]) - int(row["b"]) for row in rows], dtype=float)
    pairs = statistics.pairs_of(rows, ("a", "b"))
    found = statistics.environments(measure, outcome, pairs, noise=0.0, fewest=4)
    assert (found.mean, found.worst, found.where, found.pairs) == (0.5, 1.0, "b 0 to 1", 8)
    assert statistics.environments(measure, outcome, pairs, noise=1.0, fewest=4).mean == 0.0  # b is within the noise
    assert statistics.matched(measure, pairs, "a 0 to 1") == (4, 4)


def test_reliability_is_that_of_noisy_halves():
    generator = np.random.default_rng(0)
    truth, noise = generator.normal(size=4000), generator.normal(size=(2, 4000))
    found = statistics.reliability(truth + noise[0] + 5, truth + noise[1])
    assert found.whole == pytest.approx(2 / 3, abs=0.03)  # variance 1 of the truth, 1/2 of the mean of the halves
    assert found.noise == pytest.approx(0.5**0.5, abs=0.02)


@pytest.mark.parametrize(("family", "fewest"), [(digits(), 100), (cifar(), 10)], ids=["digits", "cifar"])
def test_the_page_has_the_numbers_of_the_tables(family, fewest):
    (main,) = {row["snapshot"] for row in read_rows(RESULTS / f"{family.name}-differences.csv")}
    found = sample(RESULTS, family, main)
    table = {
        (row["target"], row["measure"]): row
        for row in read_rows(RESULTS / f"{family.name}-taus.csv")
        if (row["snapshot"], row["scope"]) == (main, "all networks")
    }
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    for target in ("loss gap", "test error"):
        row = table[target, "relative_flatness.last"]
        tau = stats.kendalltau(found.column("relative_flatness.last"), found.targets[target]).statistic
        assert float(row["tau"]) == pytest.approx(tau, abs=1e-5)
        assert int(row["n"]) == len(found) >= fewest
        assert f"{interval(row, 'tau')} with the {target}".replace("**", "") in page


def test_snapshots_go_to_other_processes_by_value():
    """A tensor in shared memory would keep a file open in each process for as long as it lives."""
    snapshot = Snapshot("a", "epoch 1", 1.0, {"weight": torch.randn(3, 2)})
    sent = ForkingPickler.loads(ForkingPickler.dumps(snapshot))
    assert not snapshot.state["weight"].is_shared()
    assert (sent.name, sent.snapshot, sent.epoch) == ("a", "epoch 1", 1.0)
    assert torch.equal(sent.state["weight"], snapshot.state["weight"])
