"""Loss landscapes against copies of the model whose weights are changed by hand."""

import copy
import math
import signal
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from lightning_flatness.functional import random_direction
from lightning_flatness.measure import landscape
from lightning_flatness.model.named_tensors import NamedTensors
from lightning_flatness.model.parameters import choose_parameters
from tests.networks import randomise_statistics

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def net(seed=0, head=None):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head or nn.Linear(3, 3),
    ).double()
    randomise_statistics(model)
    return model


X, Y = torch.randn(10, 2, 5, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(10) % 3
BATCHES = [(X[:7], Y[:7]), (X[7:], Y[7:])]


def own_loss(model, loss=F.cross_entropy):
    with torch.no_grad():
        return loss(copy.deepcopy(model).eval()(X), Y)


def moved(model, *steps):
    """A copy with ``alpha * direction`` added to its tensors, for all ``(alpha, direction)``."""
    other = copy.deepcopy(model)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for alpha, direction in steps:
            for name, tensor in direction.items():
                tensors[name] += alpha * tensor
    return other


def some_direction(model, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * d for name, d in random_direction(dict(model.named_parameters()), generator).items()}


def random_axis(model, seed=0):
    return random_direction(dict(model.named_parameters()), torch.Generator().manual_seed(seed))


def by_hand(direction, weights, order=2, biases="zero"):
    """Filter normalisation, filter by filter, number by number."""
    found = {}
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
        found[name] = d
    return found


def stepped(model, optimizer=torch.optim.Adam, steps=3, **options):
    optimizer = optimizer(model.parameters(), lr=1e-2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return optimizer


def test_the_origin_is_the_model():
    model = net()
    plane = lf.loss_landscape(model, BATCHES, steps=3, progress=False)
    expected = own_loss(model)
    accuracy = (copy.deepcopy(model).eval()(X).argmax(1) == Y).double().mean()
    assert_close(plane.losses[1, 1], expected, **EXACT)
    assert_close(plane.origin_loss, float(expected), **EXACT)
    assert_close(plane.accuracies[1, 1], accuracy, **EXACT)
    assert plane.origin_accuracy == float(accuracy)
    assert plane.num_samples == 10
    assert plane.complete


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_a_plane_is_that_of_copies_with_changed_weights(chunk):
    model = net()
    one, other = some_direction(model, 1), some_direction(model, 2)
    plane = lf.loss_landscape(model, BATCHES, axes=[one, other], span=((-1, 2), (0, 0.5)), steps=(4, 2), chunk=chunk)
    for i, alpha in enumerate((-1.0, 0.0, 1.0, 2.0)):
        for j, beta in enumerate((0.0, 0.5)):
            changed = moved(model, (alpha, one), (beta, other))
            assert_close(plane.losses[i, j], own_loss(changed), **EXACT)
            correct = (changed.eval()(X).argmax(1) == Y).double().mean()
            assert_close(plane.accuracies[i, j], correct, **EXACT)


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
    found = lf.loss_landscape(model, BATCHES, axes=["adam"], optimizer=optimizers, steps=3)
    expected = lf.loss_landscape(model, BATCHES, axes=[moments], normalize="none", steps=3)
    assert_close(found.losses, expected.losses, **EXACT)


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
    with pytest.raises(lf.FlatnessError, match="The axis 'exp_avg' is zero: all that it moves is frozen"):
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
    monkeypatch.setattr(landscape, "own_rank", lambda: rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lf.loss_landscape(net(), BATCHES, axes=["hessian"], steps=3)
    found = [warning for warning in caught if "have not converged" in str(warning.message)]
    assert [warning.filename for warning in found] == ([__file__] if rank == 0 else [])


def test_a_plane_through_checkpoints_contains_them_with_their_statistics():
    model, b, c = net(0), net(1), net(2)
    axes = [lf.direction_between(model, b), lf.direction_between(model, c.state_dict())]
    with pytest.warns(UserWarning, match="1 of 4 points"):  # the fourth corner, with negative variances
        plane = lf.loss_landscape(model, BATCHES, axes=axes, span=(0, 1), steps=2)
    assert_close(plane.losses[0, 0], own_loss(model), **EXACT)
    assert_close(plane.losses[1, 0], own_loss(b), **EXACT)
    assert_close(plane.losses[0, 1], own_loss(c), **EXACT)


def test_the_plane_of_a_trajectory_contains_a_trajectory_that_is_plane():
    model = net()
    one, other = some_direction(model, 1), some_direction(model, 2)
    places = [(1.0, 0.2), (0.3, -0.4), (0.0, 0.0)]
    states = [moved(model, (a, one), (b, other)).state_dict() for a, b in places]
    found = lf.pca_directions(model, states)
    gram = [[sum(float((d[n] * e[n]).sum()) for n in d) for e in found.directions] for d in found.directions]
    assert_close(torch.tensor(gram), torch.eye(2), rtol=0, atol=1e-7)
    assert_close(found.explained.sum(), torch.tensor(1.0).double(), **EXACT)
    for state, (alpha, beta) in zip(states, found.coordinates.tolist(), strict=True):
        for name, w in moved(model, (alpha, found.directions[0]), (beta, found.directions[1])).named_parameters():
            assert_close(w.detach(), state[name], rtol=1e-9, atol=1e-9)
    assert lf.loss_landscape(model, BATCHES, axes=found.directions, steps=2).complete


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_axes_of_a_trajectory_are_named_after_their_shares(share):
    model = net()
    states = [
        moved(model, (1, {"8.bias": v})) for v in (share**0.5 * torch.eye(3)[0], (1 - share) ** 0.5 * torch.eye(3)[1])
    ]
    found = lf.pca_directions(model, states)
    expected = ("50 %", "50 %") if share == 0.5 else ("100 %", "< 1 %")
    names = tuple(f"principal direction {index} ({part})" for index, part in enumerate(expected, start=1))
    plane = lf.loss_landscape(model, BATCHES, axes=found.directions, steps=2)
    assert plane.axes == names
    mixed = lf.loss_landscape(model, BATCHES, axes=[some_direction(model, 1), found.directions[1]], steps=2)
    assert mixed.axes == ("direction 1", names[1])
    assert lf.loss_landscape(model, BATCHES, axes=found.directions[0], steps=2).axes == names[:1]


def test_states_of_a_trajectory_may_come_from_a_generator():
    model = net()
    states = [net(seed).state_dict() for seed in (1, 2, 3)]
    found, expected = lf.pca_directions(model, (state for state in states)), lf.pca_directions(model, states)
    assert_close(found.coordinates, expected.coordinates, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite(value):
    model, odd = net(), net(1)
    with torch.no_grad():
        odd[4].weight[0, 0, 0, 0] = value
    with pytest.raises(
        lf.FlatnessError, match="State 1 of the trajectory has numbers that are not finite, in '4.weight'"
    ):
        lf.pca_directions(model, [net(2), odd, net(3)])
    with pytest.raises(lf.FlatnessError, match="The model has numbers that are not finite, in '4.weight'"):
        lf.pca_directions(odd, [net(2), odd, net(3)])
    with pytest.raises(lf.FlatnessError, match="The other model has numbers that are not finite, in '4.weight'"):
        lf.direction_between(model, odd)
    with pytest.raises(lf.FlatnessError, match="The model has numbers that are not finite, in '4.weight'"):
        lf.direction_between(odd, model)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": np.int64(3)},
        {"steps": [np.int32(3), torch.tensor(3)]},
        {"steps": np.array([3, 3])},
        {"span": np.float32(1.0)},
        {"span": torch.tensor(1.0)},
        {"span": np.array([-1.0, 1.0])},
        {"span": torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])},
        {"span": (torch.tensor([-1.0, 1.0]), [np.float64(-1.0), 1])},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch(options):
    model = net()
    found = lf.loss_landscape(model, BATCHES, **{"steps": 3, **options})
    assert_close(found.losses, lf.loss_landscape(model, BATCHES, steps=3).losses, rtol=0, atol=0)


def recomputed(model):
    """What torch makes of reset statistics in training mode, with dropout off."""
    other = copy.deepcopy(model).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x, _ in BATCHES:
            other(x)
    return other


@pytest.mark.parametrize("chunk", [1, 3])
def test_recomputed_statistics(chunk):
    model = net()
    direction = some_direction(model, 1)
    line = lf.loss_landscape(model, BATCHES, axes=direction, steps=5, batch_norm="recomputed", chunk=chunk)
    expected = [own_loss(recomputed(moved(model, (a, direction)))) for a in (-1, -0.5, 0, 0.5, 1)]
    assert_close(line.losses, torch.stack(expected), **EXACT)
    kept = lf.loss_landscape(model, BATCHES, axes=direction, steps=5)
    assert not torch.isclose(kept.losses, line.losses).any(), "the statistics matter in this network"


def test_frozen_patterns():
    model = net()
    line = lf.loss_landscape(
        model, BATCHES, axes=some_direction(model, 1), steps=2, frozen=["0", "5.*", "*.bias"], span=(0, 1)
    )
    expected = {name: d for name, d in some_direction(model, 1).items() if name in ("1.weight", "4.weight", "8.weight")}
    assert_close(line.losses[1], own_loss(moved(model, (1, expected))), **EXACT)
    assert line.axis_norms[0] == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in expected.values())))


@pytest.mark.parametrize("patterns", ["_orig_mod.0", "0", "w[[]0]", "w[0]"])
def test_patterns_of_frozen_and_of_chosen_parameters_are_read_alike(patterns):
    model = nn.ParameterDict({"w[0]": torch.ones(2), "w": torch.ones(2)})
    if patterns.endswith("0"):
        model = torch.compile(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    assert NamedTensors(model).frozen([patterns]) == set(choose_parameters(model, patterns))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x.mean((2, 3)) @ torch.ones(2, 3, dtype=x.dtype)).tanh())


def test_tied_weights_move_together():
    model = Tied().double()
    direction = {"second.weight": torch.ones(3, 3)}
    line = lf.loss_landscape(model, BATCHES, axes=direction, span=(0, 1), steps=2)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.first.weight += 1
    assert changed.second.weight is changed.first.weight
    assert_close(line.losses[1], own_loss(changed), **EXACT)
    norm = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    assert_close(line.weight_norm, float(norm), **EXACT)
    state = lf.direction_between(model, changed.state_dict())
    assert_close(lf.loss_landscape(model, BATCHES, axes=state, span=(0, 1), steps=2).losses, line.losses, **EXACT)


def test_a_flat_direction():
    model = net()
    direction = some_direction(model, 1)
    flat = torch.cat([direction[name].flatten() for name, _ in model.named_parameters()])
    options = {"steps": 2, "span": (0, 1)}
    one, other = (lf.loss_landscape(model, BATCHES, axes=axes, **options) for axes in ([flat], [direction]))
    assert_close(one.losses, other.losses, rtol=0, atol=0)


def test_uneven_batches_count_every_sample_once():
    whole, parts = (lf.loss_landscape(net(), batches, steps=3) for batches in ([(X, Y)], BATCHES))
    assert_close(whole.losses, parts.losses, **EXACT)
    assert_close(whole.accuracies, parts.accuracies, **EXACT)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double(), ignore_index=1, label_smoothing=0.1),
        nn.CrossEntropyLoss(),
    ],
)
def test_losses_of_torch(loss):
    model = net()
    line = lf.loss_landscape(model, BATCHES, axes=["random"], loss=loss, steps=3)
    assert_close(line.losses[1], own_loss(model, loss), **EXACT)


def test_options_of_cross_entropy():
    weight = torch.tensor([1.0, 2.0, 0.5]).double()
    line = lf.loss_landscape(net(), BATCHES, axes=["random"], label_smoothing=0.1, class_weight=weight, steps=3)
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    assert_close(line.losses[1], own_loss(net(), criterion), **EXACT)


def test_a_loss_of_ones_own_and_regression_have_no_accuracy_or_their_own():
    model = net()
    line = lf.loss_landscape(
        model, BATCHES, axes=["random"], loss=lambda f, y: F.cross_entropy(f, y, reduction="none") ** 2, steps=3
    )
    expected = own_loss(model, lambda f, y: (F.cross_entropy(f, y, reduction="none") ** 2).mean())
    assert_close(line.losses[1], expected, **EXACT)
    assert line.accuracies is not None
    targets = [(x, torch.ones(len(x), 3).double()) for x, _ in BATCHES]
    assert lf.loss_landscape(model, targets, loss="mse", steps=2).accuracies is None


def test_points_that_are_not_finite_stay_as_they_are():
    model = net()
    direction = lf.direction_between(model, moved(model, (1, {"1.running_var": 10 * torch.ones(4).double()})))
    with pytest.warns(UserWarning, match="2 of 5 points of the landscape have no finite loss"):
        line = lf.loss_landscape(model, BATCHES, axes=direction, span=(-1, 1), steps=5)
    assert line.complete
    assert line.finite.tolist() == [False, False, True, True, True]
    assert line.losses[0].isnan()
    assert line.accuracies[0].isnan()
    assert_close(line.losses[2], own_loss(model), **EXACT)


class Interrupting:
    """Batches of which the n-th pass is interrupted, or fails."""

    def __init__(self, passes, error=KeyboardInterrupt):
        self.left, self.error = passes, error

    def __iter__(self):
        self.left -= 1
        if self.left < 0:
            raise self.error("no more")
        return iter(BATCHES)


@pytest.mark.parametrize("chunk", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, chunk):
    model = net()
    options = {"steps": 4, "chunk": chunk, "batch_norm": "kept"}
    whole = lf.loss_landscape(model, BATCHES, **options)
    part = lf.loss_landscape(model, Interrupting(1 + 3), **options)  # a pass at the origin, three of chunks
    assert int(part.computed.sum()) == 3 * chunk
    assert not part.complete
    assert part.computed[1:3, 1:3].any(), "the middle comes first"
    assert part.losses[~part.computed].isnan().all()
    assert_close(part.losses[part.computed], whole.losses[part.computed], rtol=0, atol=0)
    resumed = lf.loss_landscape(
        model, BATCHES, resume=lf.LandscapeResult.load(part.save(tmp_path / "a.npz")), **options
    )
    assert resumed.complete
    assert_close(resumed.losses, whole.losses, rtol=0, atol=0)
    assert_close(resumed.accuracies, whole.accuracies, rtol=0, atol=0)
    untouched = lf.loss_landscape(model, Interrupting(1), resume=whole, **options)
    assert_close(untouched.losses, whole.losses, rtol=0, atol=0)


def test_a_real_interrupt():
    class Interrupts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 20:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))]
    part = lf.loss_landscape(Interrupts(3, 3), batches, steps=101, chunk=1)
    assert 0 < int(part.computed.sum()) < 20
    assert part.losses[part.computed].isfinite().all()


def test_a_point_that_fails_keeps_what_was_computed():
    model = net()
    with pytest.raises(lf.LandscapeError, match="failed after 2 of 9 points.*no more.*resume=") as caught:
        lf.loss_landscape(model, Interrupting(3, RuntimeError), steps=3, chunk=1)
    resumed = lf.loss_landscape(model, BATCHES, steps=3, chunk=1, resume=caught.value.result)
    assert_close(resumed.losses, lf.loss_landscape(model, BATCHES, steps=3, chunk=1).losses, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed, weights, axes"),
        ({"steps": 4}, "coordinates"),
        ({"axes": ["random"]}, "axes"),
        ({"batch_norm": "recomputed"}, "batch_norm"),
        ({"frozen": ["0"]}, "frozen"),
    ],
)
def test_what_is_resumed_is_the_same(change, named):
    part = lf.loss_landscape(net(), Interrupting(2), steps=3, chunk=1)
    with pytest.raises(lf.FlatnessError, match=f"it differs in {named}"):
        lf.loss_landscape(net(), BATCHES, resume=part, **{"steps": 3, **change})
    with pytest.raises(lf.FlatnessError, match="differs in weights, axes"):
        lf.loss_landscape(net(1), BATCHES, resume=part, steps=3)
    with pytest.raises(lf.FlatnessError, match="differs in data"):
        lf.loss_landscape(net(), BATCHES[:1], resume=part, steps=3)


def test_a_landscape_of_another_epsilon_is_not_resumed():
    model = net()
    optimizer = stepped(model)
    options = {"axes": ["adam"], "update": "adam", "optimizer": optimizer, "steps": 3}
    part = lf.loss_landscape(model, Interrupting(2), chunk=1, **options)
    optimizer.param_groups[0]["eps"] = 1e-2
    with pytest.raises(lf.FlatnessError, match="differs in weights, axes"):
        lf.loss_landscape(model, BATCHES, resume=part, **options)


def test_recomputed_statistics_are_resumed_on_the_same_batches():
    model, options = net(), {"steps": 3, "batch_norm": "recomputed"}
    part = lf.loss_landscape(model, Interrupting(4), chunk=1, **options)
    with pytest.raises(lf.FlatnessError, match="differs in .*batches"):
        lf.loss_landscape(model, [(X[:5], Y[:5]), (X[5:], Y[5:])], resume=part, **options)
    assert lf.loss_landscape(model, BATCHES, resume=part, **options).complete


def test_a_loss_that_changes_between_passes_keeps_what_was_computed():
    passes = []

    class Augmented:
        def __iter__(self):
            passes.append(1)
            return iter([(X * len(passes), Y)])

    with pytest.raises(lf.LandscapeError, match="in one pass over the batches and .* in another"):
        lf.loss_landscape(net(), Augmented(), steps=3, chunk=1)


def test_weights_that_are_not_finite():
    model = net()
    model[0].weight.data[0] = math.nan
    with pytest.warns(UserWarning, match="9 of 9 points"):
        plane = lf.loss_landscape(model, BATCHES, steps=3)
    assert math.isnan(plane.origin_loss)
    assert math.isnan(plane.origin_accuracy)
    with pytest.warns(UserWarning, match="9 of 9 points"):
        lf.loss_landscape(model, BATCHES, steps=3, resume=replace(plane, computed=torch.zeros_like(plane.computed)))


class InADict(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"logits": self.inner(x)}


def test_logits_in_a_dict():
    model = net()
    expected = lf.loss_landscape(model, BATCHES, axes=["hessian"], steps=3)
    assert_close(lf.loss_landscape(InADict(model), BATCHES, axes=["hessian"], steps=3).losses, expected.losses)


class NotForVmap(nn.Linear):
    def forward(self, x):
        found = super().forward(x)
        return found if found.sum().item() else -found


@pytest.mark.parametrize("batch_norm", ["kept", "recomputed"])
def test_chunks_are_single_points(batch_norm):
    options = {"steps": 5, "batch_norm": batch_norm}
    one, chunked = (lf.loss_landscape(net(), BATCHES, chunk=chunk, **options) for chunk in (1, 7))
    assert_close(one.losses, chunked.losses, **EXACT)
    assert_close(one.accuracies, chunked.accuracies, **EXACT)


def test_where_vmap_fails_points_are_taken_one_by_one():
    plain, odd = net(head=nn.Linear(3, 3)), net(head=NotForVmap(3, 3))
    odd.load_state_dict(plain.state_dict())
    one, chunked = (lf.loss_landscape(model, BATCHES, steps=3, chunk=4) for model in (plain, odd))
    assert_close(one.losses, chunked.losses, **EXACT)


def snapshot(model):
    modules = list(model.modules())
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [p.grad.clone() for p in model.parameters()],
        "flags": [(module.training, getattr(module, "momentum", None)) for module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        "trainable": [p.requires_grad for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in modules],
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("batch_norm", ["kept", "recomputed"])
@pytest.mark.parametrize("passes", [99, 3])
def test_no_trace(batch_norm, passes):
    model = net()
    F.cross_entropy(model(X), Y).backward()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    before = snapshot(model)
    identities = [id(p) for p in model.parameters()]
    try:
        lf.loss_landscape(model, Interrupting(passes, RuntimeError), steps=3, batch_norm=batch_norm)
    except lf.LandscapeError:
        assert passes == 3
    after = snapshot(model)
    for key in ("tensors", "gradients", "random"):
        assert_close(after.pop(key), before.pop(key), rtol=0, atol=0)
    assert after == before
    assert identities == [id(p) for p in model.parameters()]


def test_shuffled_loaders_give_the_same_in_every_pass():
    loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    options = {"steps": 3, "batch_norm": "recomputed", "axes": ["random"], "chunk": 1}
    model = net()
    state = loader.generator.get_state()
    one = lf.loss_landscape(model, loader, **options)
    assert torch.equal(loader.generator.get_state(), state)
    other = lf.loss_landscape(model, loader, **{**options, "chunk": 3})
    assert_close(one.losses, other.losses, **EXACT)


def test_seeds():
    model = net()
    one, same, other = (lf.loss_landscape(model, BATCHES, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.losses, same.losses)
    assert not torch.isclose(one.losses, other.losses).any()
    assert abs(lf.loss_landscape(model, BATCHES, steps=2, normalize="none").cosine) < 1e-12


def test_precisions():
    single = copy.deepcopy(net()).float()
    batches = [(x.float(), y) for x, y in BATCHES]
    line = lf.loss_landscape(single, batches, axes=["random"], steps=3, dtype="float64")
    assert_close(line.losses[1], own_loss(copy.deepcopy(single).double()), **EXACT)
    half = lf.loss_landscape(copy.deepcopy(single).bfloat16(), batches, axes=["random"], steps=3)
    assert half.losses.isfinite().all()


def test_files(tmp_path):
    plane = lf.loss_landscape(net(), BATCHES, steps=3, frozen=["0"])
    found = lf.LandscapeResult.load(plane.save(tmp_path / "plane.npz"))
    for name, value in vars(plane).items():
        if name in ("coordinates", "losses", "accuracies", "computed"):
            assert_close(getattr(found, name), value, rtol=0, atol=0)
        else:
            assert getattr(found, name) == value, name
    assert "3 x 3 points along random direction 1 and random direction 2, 10 samples" in str(found)
    with pytest.raises(lf.FlatnessError, match=".npz"):
        plane.save(tmp_path / "plane.pt")


def optimizer_of(model, kind=torch.optim.Adam):
    return kind(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": "randm"}, "axes='randm' is not known"),
        ({"axes": ["random"] * 3}, "axes is a list of length 3"),
        ({"axes": [3]}, "is a int"),
        ({"axes": []}, "length 0"),
        ({"axes": {"nonsense": torch.ones(3)}}, "has an entry 'nonsense'"),
        ({"axes": {"8.bias": torch.ones(4)}}, "shape (4,).*'8.bias', whose shape is (3,)"),
        ({"axes": {"8.bias": torch.full((3,), math.nan)}}, "not finite"),
        ({"axes": {"8.bias": torch.zeros(3)}}, "zero everywhere"),
        ({"axes": torch.ones(5)}, "tensor of shape (5,); the model has"),
        ({"axes": {"8.bias": torch.ones(3)}, "frozen": ["8"]}, "'direction 1' is zero: all that it moves is frozen"),
        ({"frozen": ["*"]}, "freezes all parameters"),
        ({"frozen": ["nothing"]}, "frozen='nothing' fits nothing"),
        ({"frozen": [3]}, "frozen=3"),
        ({"axes": "adam"}, "optimizer is a NoneType"),
        ({"axes": "adam", "optimizer": optimizer_of(net())}, "does not have the parameters of this model"),
        ({"update": "adam"}, "update='adam' takes axes='adam'"),
        ({"normalize": "filters"}, "normalize='filters' is not known"),
        ({"norm": 3}, "norm=3 is not known"),
        ({"norm": True}, "norm=True is not known"),
        ({"biases": "none"}, "biases='none'"),
        ({"update": "adams"}, "update='adams'"),
        ({"batch_norm": "train"}, "batch_norm='train'"),
        ({"span": -1}, "span=-1 must be"),
        ({"span": (1, 0)}, "span=(1, 0) must be"),
        ({"span": "wide"}, "span='wide' must be"),
        ({"span": ((0, 1),)}, "span=((0, 1),) must be"),
        ({"steps": 1}, "steps=1 must be"),
        ({"steps": (3, 3, 3)}, "steps=(3, 3, 3) must be"),
        ({"steps": 2.5}, "steps=2.5 must be"),
        ({"steps": np.float64(3.0)}, "steps=3.0 must be"),
        ({"span": torch.ones(3)}, "span=[1.0, 1.0, 1.0] must be"),
        ({"seed": -1}, "seed=-1"),
        ({"chunk": 0}, "chunk=0"),
        ({"dtype": "int"}, "dtype='int'"),
        ({"dtype": ["float64"]}, "dtype=['float64']"),
        ({"loss": "hinge"}, "loss='hinge' is not known"),
        ({"resume": "file.npz"}, "resume is a str"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(lf.FlatnessError) as caught:
        lf.loss_landscape(net(), BATCHES, **{"steps": 2, **options})
    for part in message.split(".*"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter(BATCHES), "give a list"),
        ((batch for batch in BATCHES), "batches is a generator"),
        ((X, Y), "targets"),
        ([], "data set empty"),
        ([X], "no targets"),
        ([(X, Y[:3])], "10 logits"),
        ([(X, Y + 5)], "classes"),
    ],
)
def test_batches_that_cannot_be(batches, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.loss_landscape(net(), batches, steps=2)


def test_optimizers_without_moments():
    model = net()
    for optimizer in (optimizer_of(model), stepped(model, torch.optim.SGD)):
        with pytest.raises(lf.FlatnessError, match="keeps no exp_avg and exp_avg_sq"):
            lf.loss_landscape(model, BATCHES, axes="adam", optimizer=optimizer)


def test_second_moments_are_positive():
    model = net()
    options = {"axes": "adam", "update": "adam", "optimizer": stepped(model)}
    with pytest.raises(lf.FlatnessError, match="must be positive"):
        lf.loss_landscape(model, BATCHES, span=(-1, 1), **options)
    assert lf.loss_landscape(model, BATCHES, span=0.1, steps=3, **options).coordinates[1].tolist() == [0.1, 1.0, 1.9]


def test_models_that_cannot_be():
    with pytest.raises(lf.FlatnessError, match="give a torch.nn.Module"):
        lf.loss_landscape(lambda x: x, BATCHES)
    with pytest.raises(lf.FlatnessError, match="no parameters"):
        lf.loss_landscape(nn.Flatten(), BATCHES)
    with pytest.raises(lf.BatchError, match="shape .10, 2, 5, 5."):
        lf.loss_landscape(nn.Conv2d(2, 2, 1).double(), [(X, Y)], steps=2)
    with pytest.raises(lf.FlatnessError, match="is missing there"):
        lf.direction_between(net(), {})
    with pytest.raises(lf.FlatnessError, match="zero everywhere"):
        lf.direction_between(net(), net())
    with pytest.raises(lf.FlatnessError, match="do not span 2 directions"):
        lf.pca_directions(net(), [net(), net(1)])


def test_single_samples_have_no_variance():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    batches = [(torch.randn(1, 2), torch.tensor([0]))]
    with pytest.raises(lf.LandscapeError, match="give larger batches"):
        lf.loss_landscape(model, batches, steps=2, batch_norm="recomputed")


@pytest.mark.parametrize(("width", "taken_at_once"), [(2, True), (4000, False)])
def test_small_passes_are_taken_at_once(width, taken_at_once):
    class Layer(nn.Linear):
        sizes = ()

        def forward(self, x):
            Layer.sizes += (torch._C._functorch.is_batchedtensor(self.weight),)
            return super().forward(x)

    model = nn.Sequential(Layer(1000, width), nn.Linear(width, 3))
    lf.loss_landscape(model, [(torch.randn(8, 1000), torch.arange(8) % 3)], axes=["random"], steps=3)
    assert any(Layer.sizes) == taken_at_once
