"""Loss landscapes against copies of the model whose weights are changed by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from tests.measure.landscapes import BATCHES, EXACT, Interrupting, X, Y, moved, net, own_loss, some_direction


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


def ignores(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def test_targets_that_ones_own_loss_ignores_are_unknown_as_in_the_report():
    model, batches = net(), [(X, torch.where(Y > 1, -100, Y))]
    line = lf.loss_landscape(model, batches, axes=["random"], loss=ignores, steps=2)
    report = lf.measure_flatness(model, batches, layers="classifier", loss=ignores)
    assert line.origin_loss == pytest.approx(report.loss)
    assert (line.accuracies, line.origin_accuracy, math.isnan(report.accuracy)) == (None, None, True)
    known = lf.loss_landscape(model, batches, axes=["random"], steps=2)
    assert known.origin_accuracy == lf.measure_flatness(model, batches, layers="classifier").accuracy


def test_targets_of_a_small_integer_type():
    """In uint8, 156 equals -100, which is ignored."""
    model, targets = net(head=nn.Linear(3, 300)), torch.arange(10) + 150
    expected = lf.loss_landscape(model, [(X, targets)], axes=["random"], steps=2)
    for loss in ("cross_entropy", ignores):
        line = lf.loss_landscape(model, [(X, targets.to(torch.uint8))], axes=["random"], loss=loss, steps=2)
        assert_close(line.losses, expected.losses, **EXACT)
        assert_close(line.accuracies, expected.accuracies, **EXACT)


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
    loaded = lf.LandscapeResult.load(plane.save(tmp_path / "plane.npz"))
    for name, value in vars(plane).items():
        if name in ("coordinates", "losses", "accuracies", "computed"):
            assert_close(getattr(loaded, name), value, rtol=0, atol=0)
        else:
            assert getattr(loaded, name) == value, name
    assert "3 x 3 points along random direction 1 and random direction 2, 10 samples" in str(loaded)
    with pytest.raises(lf.FlatnessError, match=".npz"):
        plane.save(tmp_path / "plane.pt")


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
        ({"axes": {"8.bias": torch.ones(3)}, "frozen": ["8"]}, "'direction 1' is zero: each of its tensors is frozen"),
        ({"frozen": ["*"]}, "freezes all parameters"),
        ({"frozen": ["nothing"]}, "frozen='nothing' matches no parameter or buffer and no module"),
        ({"frozen": [3]}, "frozen=3"),
        ({"axes": "adam"}, "optimizer is a NoneType"),
        (
            {"axes": "adam", "optimizer": torch.optim.Adam(net().parameters())},
            "does not have the parameters of this model",
        ),
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
        (iter(BATCHES), r"or list\(batches\)"),
        ((batch for batch in BATCHES), "batches is a generator"),
        ((X, X), "2 tensors"),
        ([], "data set empty"),
        ([X], "no targets"),
        ([(X, Y[:3])], "10 samples"),
        ([(X, Y + 5)], "classes"),
    ],
)
def test_batches_that_cannot_be(batches, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.loss_landscape(net(), batches, steps=2)


class Always(nn.Dropout):
    """Drops in evaluation mode, too."""

    def forward(self, x):
        return nn.functional.dropout(x, self.p)


def test_models_that_cannot_be():
    with pytest.raises(lf.LayerSelectionError, match="Two forward passes on the same samples give different logits"):
        lf.loss_landscape(nn.Sequential(Always(), net()), BATCHES, steps=2)
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


def test_memory_that_runs_out_in_the_first_pass():
    model = net()
    model[2].forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("too much"))
    with pytest.raises(lf.BatchError, match="Out of memory in batch 0. Give smaller batches"):
        lf.loss_landscape(model, BATCHES, steps=2)
