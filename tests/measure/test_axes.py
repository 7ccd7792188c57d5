"""Axes of landscapes: normalised, Adam's moments, eigenvectors, without what is frozen."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.functional import random_direction
from lightning_flatness.measure import landscape
from tests.measure.landscapes import BATCHES, EXACT, X, Y, moved, net, own_loss, some_direction, stepped


def random_axis(model, seed=0):
    return random_direction(dict(model.named_parameters()), torch.Generator().manual_seed(seed))


def by_hand(direction, weights, order=2, biases="zero"):
    """Filter normalisation, filter by filter, number by number."""
    scaled = {}
    for name, w in weights.items():
        d = direction[name].clone()
        if w.ndim <= 1:
            factor = (w.abs() ** order).sum() ** (1 / order) / (d.abs() ** order).sum() ** (1 / order)
            d = d * factor if biases == "scaled" else 0 * d
        else:
            for f in range(len(w)):
                ours = sum(abs(float(v)) ** order for v in d[f].flatten()) ** (1 / order)
                theirs = sum(abs(float(v)) ** order for v in w[f].flatten()) ** (1 / order)
                d[f] *= theirs / ours
        scaled[name] = d
    return scaled


@pytest.mark.parametrize("biases", ["zero", "scaled"])
@pytest.mark.parametrize("norm", [1, 2])
def test_filter_normalisation_by_hand(norm, biases):
    model = net()
    weights = {name: w.detach() for name, w in model.named_parameters()}
    direction = by_hand(random_axis(model, seed=5), weights, norm, biases)
    line = lf.loss_landscape(model, BATCHES, axes=["random"], steps=3, seed=5, norm=norm, biases=biases)
    expected = torch.stack([own_loss(moved(model, (alpha, direction))) for alpha in (-1, 0, 1)])
    assert_close(line.losses, expected, **EXACT)
    assert_close(line.axis_norms[0], math.sqrt(sum(float(d.square().sum()) for d in direction.values())), **EXACT)


@pytest.mark.parametrize("unit", ["none", "weight", "layer", "model"])
@pytest.mark.parametrize("norm", [1, 2])
def test_other_normalisations_by_hand(unit, norm):
    model = net()
    weights = {name: w.detach() for name, w in model.named_parameters()}
    given = some_direction(model, 3)
    expected = dict(given)
    if unit != "none":
        expected = {name: d * (weights[name].ndim > 1) for name, d in given.items()}
    matrices = [name for name in weights if weights[name].ndim > 1]
    if unit == "weight":
        expected = {name: d * weights[name] for name, d in expected.items()}
    if unit == "layer":
        for name in matrices:
            expected[name] = given[name] * weights[name].norm(norm) / given[name].norm(norm)
    if unit == "model":
        ours = torch.cat([given[name].flatten() for name in matrices]).norm(norm)
        theirs = torch.cat([weights[name].flatten() for name in matrices]).norm(norm)
        expected = {name: d * theirs / ours for name, d in expected.items()}
    line = lf.loss_landscape(model, BATCHES, axes=given, normalize=unit, norm=norm, steps=2)
    assert_close(line.losses, torch.stack([own_loss(moved(model, (a, expected))) for a in (-1, 1)]), **EXACT)


def test_adam_axes_are_the_moments_of_the_optimizer():
    model = net()
    optimizer = stepped(model)
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    first, second = ({name: s[key] for name, s in state.items()} for key in ("exp_avg", "exp_avg_sq"))
    plane = lf.loss_landscape(model, BATCHES, axes="adam", optimizer=optimizer, steps=3, span=2.0)
    assert plane.axes == ("exp_avg", "exp_avg_sq")
    for i, alpha in enumerate((-2, 0, 2)):
        for j, beta in enumerate((-2, 0, 2)):
            expected = own_loss(moved(model, (alpha, first), (beta, second)))
            assert_close(plane.losses[i, j], expected, **EXACT)
    line = lf.loss_landscape(model, BATCHES, axes=["adam"], optimizer=optimizer, steps=3, span=2.0)
    assert_close(line.losses, plane.losses[:, 1], **EXACT)


def test_adams_update():
    model = net()
    optimizer = stepped(model, torch.optim.AdamW, eps=1e-3)
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}

    def step(beta):
        return {name: s["exp_avg"] / ((beta * s["exp_avg_sq"]) ** 0.5 + 1e-3) for name, s in state.items()}

    options = {"axes": "adam", "update": "adam", "optimizer": optimizer}
    plane = lf.loss_landscape(model, BATCHES, span=((-0.1, 0.1), (0.5, 1.5)), steps=3, **options)
    for i, alpha in enumerate((-0.1, 0, 0.1)):
        for j, beta in enumerate((0.5, 1.0, 1.5)):
            assert_close(plane.losses[i, j], own_loss(moved(model, (alpha, step(beta)))), **EXACT)
    line = lf.loss_landscape(model, BATCHES, span=0.1, steps=3, **{**options, "axes": ["adam"]})
    assert_close(line.losses, plane.losses[:, 1], **EXACT)


def test_the_next_step_of_amsgrad_is_on_adams_line():
    """It divides by the largest second moment, which was that of the first, large loss."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True, betas=(0.0, 0.9))
    for factor in (100.0, *[1.0] * 300):
        optimizer.zero_grad()
        (factor * F.cross_entropy(model(X), Y)).backward()
        optimizer.step()
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(X), Y).backward()
    optimizer.step()
    after = copy.deepcopy(before)
    for own, moved_one in zip(after.parameters(), model.parameters(), strict=True):
        own.data = moved_one.data
    for own, old in zip(model.parameters(), before.parameters(), strict=True):
        own.data = old.data.clone()
    with torch.no_grad():
        expected = F.cross_entropy(after.eval()(X), Y) - own_loss(before)
    for name, buffer in model.named_buffers():
        buffer.copy_(before.get_buffer(name))
    options = {"axes": ["adam"], "update": "adam", "optimizer": optimizer, "steps": 3, "span": 1e-3}
    line = lf.loss_landscape(model, BATCHES, **options)
    assert_close(line.losses[0] - line.losses[1], expected, rtol=0.05, atol=0)


def test_several_optimizers_of_different_parameters():
    model = net()
    optimizers = [torch.optim.Adam(part.parameters()) for part in (model[:4], model[4:])]
    F.cross_entropy(model(X), Y).backward()
    moments = {}
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        (moments[name],) = (o.state[parameter]["exp_avg"] for o in optimizers if parameter in o.state)
    actual = lf.loss_landscape(model, BATCHES, axes=["adam"], optimizer=optimizers, steps=3)
    expected = lf.loss_landscape(model, BATCHES, axes=[moments], normalize="none", steps=3)
    assert_close(actual.losses, expected.losses, **EXACT)


def test_hessian_axes_are_eigenvectors_of_what_moves():
    model = net()
    line = lf.loss_landscape(model, BATCHES, axes=["hessian"], frozen=["0", "8.bias"], steps=3)
    names = [name for name, _ in model.named_parameters() if not name.startswith("0.") and name != "8.bias"]
    spectrum = lf.hessian_spectrum(model, BATCHES, params=names, top_k=1, num_steps=1, num_probes=1)
    assert_close(line.axis_norms[0], 1.0)
    expected = lf.loss_landscape(model, BATCHES, axes=[spectrum.eigenvector(0)], normalize="none", steps=3)
    assert_close(line.losses, expected.losses)


@pytest.mark.parametrize("update", ["add", "adam"])
@pytest.mark.parametrize("axes", ["adam", ["adam"]])
def test_moments_of_frozen_parameters_only_move_nothing(axes, update):
    model = net()
    optimizer = torch.optim.Adam(model[8].parameters())
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    with pytest.raises(lf.FlatnessError, match="The axis 'exp_avg' is zero: each of its tensors is frozen"):
        lf.loss_landscape(model, BATCHES, axes=axes, update=update, optimizer=optimizer, frozen=["8"], steps=3)


def test_hessian_axes_are_eigenvectors():
    model = net()
    spectrum = lf.hessian_spectrum(model, BATCHES, top_k=2, num_steps=1, num_probes=1)
    plane = lf.loss_landscape(model, BATCHES, axes="hessian", steps=3, span=0.5)
    first, second = spectrum.eigenvector(0), spectrum.eigenvector(1)
    assert_close(plane.losses[2, 0], own_loss(moved(model, (0.5, first), (-0.5, second))), rtol=1e-6, atol=1e-9)
    # The curvature along an eigenvector is its eigenvalue.
    line = lf.loss_landscape(model, BATCHES, axes=["hessian"], steps=3, span=1e-3)
    curvature = float(line.losses[0] - 2 * line.losses[1] + line.losses[2]) / 1e-6
    assert_close(curvature, float(spectrum.eigenvalues[0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_eigenvectors_that_have_not_converged(monkeypatch, rank):
    spectrum = replace(lf.hessian_spectrum(net(), BATCHES, num_steps=1, num_probes=1), converged=False)
    monkeypatch.setattr(landscape, "spectrum_of", lambda *_, **__: spectrum)
    monkeypatch.setattr(landscape, "own_rank", lambda sync: rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lf.loss_landscape(net(), BATCHES, axes=["hessian"], steps=3)
    unconverged = [warning for warning in caught if "have not converged" in str(warning.message)]
    assert [warning.filename for warning in unconverged] == ([__file__] if rank == 0 else [])


def test_frozen_patterns():
    model = net()
    line = lf.loss_landscape(
        model, BATCHES, axes=some_direction(model, 1), steps=2, frozen=["0", "5.*", "*.bias"], span=(0, 1)
    )
    expected = {name: d for name, d in some_direction(model, 1).items() if name in ("1.weight", "4.weight", "8.weight")}
    assert_close(line.losses[1], own_loss(moved(model, (1, expected))), **EXACT)
    assert line.axis_norms[0] == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in expected.values())))


def test_a_flat_direction():
    model = net()
    direction = some_direction(model, 1)
    flat = torch.cat([direction[name].flatten() for name, _ in model.named_parameters()])
    options = {"steps": 2, "span": (0, 1)}
    one, other = (lf.loss_landscape(model, BATCHES, axes=axes, **options) for axes in ([flat], [direction]))
    assert_close(one.losses, other.losses, rtol=0, atol=0)


def test_optimizers_without_moments():
    model = net()
    for optimizer in (torch.optim.Adam(model.parameters()), stepped(model, torch.optim.SGD)):
        with pytest.raises(lf.FlatnessError, match="keeps no exp_avg and exp_avg_sq"):
            lf.loss_landscape(model, BATCHES, axes="adam", optimizer=optimizer)


def test_second_moments_are_positive():
    model = net()
    options = {"axes": "adam", "update": "adam", "optimizer": stepped(model)}
    with pytest.raises(lf.FlatnessError, match="must be positive"):
        lf.loss_landscape(model, BATCHES, span=(-1, 1), **options)
    assert lf.loss_landscape(model, BATCHES, span=0.1, steps=3, **options).coordinates[1].tolist() == [0.1, 1.0, 1.9]
