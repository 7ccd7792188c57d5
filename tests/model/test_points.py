"""The model at other points: one by one or many at once, with statistics of its own."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards
from tests.measure.landscapes import BATCHES, EXACT, moved, net, own_loss, some_direction


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


@guards("model/points.py", "            norm.training, norm.momentum = training, momentum", "            pass")
@pytest.mark.parametrize("chunk", [1, 3])
def test_recomputed_statistics(chunk):
    model = net()
    direction = some_direction(model, 1)
    line = lf.loss_landscape(model, BATCHES, axes=direction, steps=5, batch_norm="recomputed", chunk=chunk)
    expected = [own_loss(recomputed(moved(model, (a, direction)))) for a in (-1, -0.5, 0, 0.5, 1)]
    assert_close(line.losses, torch.stack(expected), **EXACT)
    kept = lf.loss_landscape(model, BATCHES, axes=direction, steps=5)
    assert not torch.isclose(kept.losses, line.losses).any(), "the statistics matter in this network"


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


class NotForVmap(nn.Linear):
    def forward(self, x):
        actual = super().forward(x)
        return actual if actual.sum().item() else -actual


@pytest.mark.parametrize("batch_norm", ["kept", "recomputed"])
def test_chunks_are_single_points(batch_norm):
    options = {"steps": 5, "batch_norm": batch_norm}
    one, chunked = (lf.loss_landscape(net(), BATCHES, chunk=chunk, **options) for chunk in (1, 7))
    assert_close(one.losses, chunked.losses, **EXACT)
    assert_close(one.accuracies, chunked.accuracies, **EXACT)


@guards("model/points.py", "                self._vectorized = False\n", "                raise\n")
def test_where_vmap_fails_points_are_taken_one_by_one():
    plain, odd = net(head=nn.Linear(3, 3)), net(head=NotForVmap(3, 3))
    odd.load_state_dict(plain.state_dict())
    one, chunked = (lf.loss_landscape(model, BATCHES, steps=3, chunk=4) for model in (plain, odd))
    assert_close(one.losses, chunked.losses, **EXACT)


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
