"""Directions between models and along a trajectory."""

import math

import pytest
import torch
from torch.testing import assert_close

import lightning_flatness as lf
from tests.measure.landscapes import BATCHES, EXACT, moved, net, own_loss, some_direction


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
    actual = lf.pca_directions(model, states)
    gram = [[sum(float((d[n] * e[n]).sum()) for n in d) for e in actual.directions] for d in actual.directions]
    assert_close(torch.tensor(gram), torch.eye(2), rtol=0, atol=1e-7)
    assert_close(actual.explained.sum(), torch.tensor(1.0).double(), **EXACT)
    for state, (alpha, beta) in zip(states, actual.coordinates.tolist(), strict=True):
        for name, w in moved(model, (alpha, actual.directions[0]), (beta, actual.directions[1])).named_parameters():
            assert_close(w.detach(), state[name], rtol=1e-9, atol=1e-9)
    assert lf.loss_landscape(model, BATCHES, axes=actual.directions, steps=2).complete


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_axes_of_a_trajectory_are_named_after_their_shares(share):
    model = net()
    states = [
        moved(model, (1, {"8.bias": v})) for v in (share**0.5 * torch.eye(3)[0], (1 - share) ** 0.5 * torch.eye(3)[1])
    ]
    actual = lf.pca_directions(model, states)
    expected = ("50 %", "50 %") if share == 0.5 else ("100 %", "< 1 %")
    names = tuple(f"principal direction {index} ({part})" for index, part in enumerate(expected, start=1))
    plane = lf.loss_landscape(model, BATCHES, axes=actual.directions, steps=2)
    assert plane.axes == names
    mixed = lf.loss_landscape(model, BATCHES, axes=[some_direction(model, 1), actual.directions[1]], steps=2)
    assert mixed.axes == ("direction 1", names[1])
    assert lf.loss_landscape(model, BATCHES, axes=actual.directions[0], steps=2).axes == names[:1]


def test_states_of_a_trajectory_may_come_from_a_generator():
    model = net()
    states = [net(seed).state_dict() for seed in (1, 2, 3)]
    actual, expected = lf.pca_directions(model, (state for state in states)), lf.pca_directions(model, states)
    assert_close(actual.coordinates, expected.coordinates, rtol=0, atol=0)


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
