"""Points of landscapes that are missing: interrupted, failed, resumed, or not finite."""

import math
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards
from tests.measure.landscapes import BATCHES, EXACT, Interrupting, X, Y, moved, net, own_loss, stepped


@guards("measure.landscape:_negative_variance", returns="")
def test_points_that_are_not_finite_stay_as_they_are():
    model = net()
    direction = lf.direction_between(model, moved(model, (1, {"1.running_var": 10 * torch.ones(4).double()})))
    told = "2 of 5 points of the landscape have no finite loss.*'1.running_var' of BatchNorm.*batch_norm='recomputed'"
    with pytest.warns(UserWarning, match=told):
        line = lf.loss_landscape(model, BATCHES, axes=direction, span=(-1, 1), steps=5)
    assert line.complete
    assert line.finite.tolist() == [False, False, True, True, True]
    assert line.losses[0].isnan()
    assert line.accuracies[0].isnan()
    assert_close(line.losses[2], own_loss(model), **EXACT)


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


@pytest.mark.slow
def test_a_real_interrupt():
    class Interrupts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 20:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        part = lf.loss_landscape(Interrupts(3, 3), batches, steps=101, chunk=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < int(part.computed.sum()) < 20
    assert part.losses[part.computed].isfinite().all()


def test_a_point_that_fails_keeps_what_was_computed():
    model = net()
    with pytest.raises(lf.LandscapeError, match=r"after 2 of 9 points \(RuntimeError: no more\).*resume=") as caught:
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


@guards(
    "measure/landscape.py",
    'points.fingerprint(origin.batch_sizes if options.batch_norm == "recomputed" else None)',
    "points.fingerprint()",
)
def test_recomputed_statistics_are_resumed_on_the_same_batches():
    model, options = net(), {"steps": 3, "batch_norm": "recomputed"}
    part = lf.loss_landscape(model, Interrupting(4), chunk=1, **options)
    with pytest.raises(lf.FlatnessError, match="differs in .*batches"):
        lf.loss_landscape(model, [(X[:5], Y[:5]), (X[5:], Y[5:])], resume=part, **options)
    assert lf.loss_landscape(model, BATCHES, resume=part, **options).complete


@guards("measure.loss_sums:Origin.check", returns=None)
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
    with pytest.warns(UserWarning, match="9 of 9 points.* and so does the parameter '0.weight': training has diverged"):
        plane = lf.loss_landscape(model, BATCHES, steps=3)
    assert math.isnan(plane.origin_loss)
    assert math.isnan(plane.origin_accuracy)
    with pytest.warns(UserWarning, match="9 of 9 points"):
        lf.loss_landscape(model, BATCHES, steps=3, resume=replace(plane, computed=torch.zeros_like(plane.computed)))
