"""Validation with its forward passes observed is the same validation, whatever the network does in them."""

import gc
import warnings
import weakref

import lightning as L
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.callbacks.data.sources import ValidationBatches
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same, module_state
from tests.callbacks.lightning_modules import dataset, loaders, quiet_trainer
from tests.callbacks.live_runs import OBSERVES, Module, assert_as_without, make, validated
from tests.callbacks.training_runs import (
    HAS_WEIGHT_AVERAGING,
    assert_identical,
    averaged_weights,
    end_of_training,
    seed_everything,
)
from tests.guarding import guards


@guards("layers.live:is_observed", returns=False)
def test_two_callbacks(tmp_path, told):
    expected = validated(tmp_path, make("TwoInTurn"))
    reports = {}
    for is_live in (False, True):
        pair = [
            lf.FlatnessCallback([f"net.{name}"], prefix=f"flatness_{name}", live=is_live) for name in ("conv", "side")
        ]
        assert_same(validated(tmp_path, make("TwoInTurn"), *pair), expected)
        reports[is_live] = [callback.report.hessian_trace for callback in pair]
    assert_close(reports[True], reports[False], rtol=1e-9, atol=0)
    assert [OBSERVES in line for line in told] == [True, False]
    assert "another callback observes" in told[1]


class Clones(Module):
    """More than its network."""

    def forward(self, x):
        return self.net(x).clone()


@pytest.mark.parametrize("module", [Module, Clones])
def test_two_callbacks_one_within_the_other(tmp_path, told, module):
    expected = validated(tmp_path, make("Plain", module))
    pair = [lf.FlatnessCallback(), lf.FlatnessCallback(prefix="flatness_net", model="net")]
    assert_same(validated(tmp_path, make("Plain", module), *pair), expected)
    assert_close(pair[0].report.hessian_trace, pair[1].report.hessian_trace, rtol=1e-9, atol=0)
    assert "another callback observes" in told[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda norm: norm.compile(backend="eager"), "'net.norm' is compiled"),
        (lambda norm: norm.register_full_backward_hook(lambda *arguments: None), "'net.norm' has backward hooks"),
    ],
    ids=["compiled", "backward hooks"],
)
def test_parts_that_are_not_to_be_observed(tmp_path, told, change, says):
    def make_one():
        module = Module(networks.Plain())
        change(module.net.norm)
        return module

    assert_as_without(tmp_path, make_one, told, says)


@pytest.mark.slow
def test_compiled_by_lightning(tmp_path, told):
    module = torch.compile(Module(networks.Plain()), backend="eager")
    callback = lf.FlatnessCallback()
    with pytest.warns(UserWarning, match="torch.compile runs the code that calls it.*batch_fn="):
        quiet_trainer(tmp_path, callback).validate(module, loaders(dtype=torch.float64)[1], verbose=False)
    assert callback.report.num_samples == 22
    assert told == []


@guards("callbacks/running.py", "if num_rows(listener.call, targets) < 2:", "if False:")
def test_batches_of_one_sample(tmp_path, told):
    callback = lf.FlatnessCallback()
    batches = [[4], [0, 1], [5], [2, 3]]
    loader = DataLoader(dataset(6, dtype=torch.float64), batch_sampler=batches)
    quiet_trainer(tmp_path, callback).validate(Module(networks.Plain()), loader, verbose=False)
    assert [OBSERVES in line for line in told] == [True]
    assert callback.report.num_samples == 6


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("is_live", [True, False])
def test_training_is_bit_identical(tmp_path, told, is_live, averaged):
    if averaged and not HAS_WEIGHT_AVERAGING:
        pytest.skip("this Lightning has no WeightAveraging")
    ends, reports = [], []
    for callbacks in ([], [lf.FlatnessCallback(live=is_live, summary=False)], [lf.FlatnessCallback(live=False)]):
        seed_everything()
        module = Module(networks.Dropouts())
        trainer = quiet_trainer(tmp_path, *callbacks, *([averaged_weights()] if averaged else []), max_epochs=3)
        trainer.fit(module, *loaders(dtype=torch.float64))
        ends.append((end_of_training(trainer, module), module.noted))
        reports += [[record["relative_flatness"] for record in callback.history] for callback in callbacks]
    assert_identical(ends[1][0], ends[0][0])
    assert_same(ends[1][1], ends[0][1])
    assert_close(*reports, rtol=1e-9, atol=0)
    assert len(told) == int(is_live)
    assert not is_live or OBSERVES in told[0]


@guards("callbacks/running.py", "if reason != self._told:", "if True:")
def test_told_once_in_every_run(tmp_path, told):
    callback = lf.FlatnessCallback(summary=False)
    module = Module(networks.Plain())
    quiet_trainer(tmp_path, callback, max_epochs=3).fit(module, *loaders(dtype=torch.float64))
    assert len(told) == 1
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(module, *loaders(dtype=torch.float64))
    assert len(told) == 2


def test_test_steps(tmp_path, told):
    callback = lf.FlatnessCallback()
    quiet_trainer(tmp_path, callback).test(Module(networks.Plain()), loaders(dtype=torch.float64)[1], verbose=False)
    assert OBSERVES in told[0]
    assert callback.report.num_samples == 22


ROWS = []  # of every call


class Counted(networks.Plain):
    def forward(self, x):
        ROWS.append(len(x))
        return super().forward(x)


def rows_of(folder, *callbacks):
    ROWS.clear()
    quiet_trainer(folder, *callbacks).validate(
        Module(Counted()), loaders(val_samples=40, dtype=torch.float64)[1], verbose=False
    )
    return sorted(ROWS)


def test_which_forward_passes_are_made(tmp_path, monkeypatch, told):
    """Beside the user's: in the trial on a few samples three to certify, two to compare; then one on the first batch,
    which no step was observed on. Where nothing is observed, three on the first batch, which certify, and one on every
    other.
    """
    monkeypatch.setattr("lightning_flatness.layers.trial.TRIAL", 3)
    users = rows_of(tmp_path)
    assert users == [8] * 5
    assert rows_of(tmp_path, lf.FlatnessCallback()) == [3] * 5 + [8] + users
    own = rows_of(tmp_path, lf.FlatnessCallback(live=False))
    assert own == [8] * (2 * 5 + 2)


@guards("layers.live:Listener.release", returns=None)
def test_nothing_is_alive_after_a_batch(tmp_path, told):
    """Neither nodes of the graph nor features, with collections of garbage switched off."""
    alive, counts = [], []

    class Watched(networks.Plain):
        def tail(self, z, upstream):
            z = super().tail(z, upstream)
            if z.requires_grad and z.shape[0] == 8:
                alive.append((weakref.ref(z), weakref.ref(z.grad_fn.metadata.setdefault("token", Token()))))
            return z

        def before(self, x):
            counts.append(sum(one() is not None or token() is not None for one, token in alive[:-1]))
            return super().before(x)

    class Token:
        pass

    gc.collect()
    gc.disable()
    try:
        callback = lf.FlatnessCallback()
        module = Module(Watched())
        loader = loaders(val_samples=80, dtype=torch.float64)[1]
        quiet_trainer(tmp_path, callback).validate(module, loader, verbose=False)
    finally:
        gc.enable()
    assert OBSERVES in told[0]
    assert len(told) == 1
    assert len(alive) >= 10
    assert counts[-5:] == [0] * 5
    assert not any(one() is not None or token() is not None for one, token in alive)


@guards("layers.live:Listener.__exit__", returns=None, ids="every batch")
@pytest.mark.parametrize("of", ["every batch", "no batch"])
def test_nothing_stays_after_a_batch(tmp_path, told, monkeypatch, of):
    """Also where nothing of a batch is measured, as where a sampler has filled it with samples of others."""
    if of == "no batch":
        monkeypatch.setattr(ValidationBatches, "mask", lambda self, samples, _: torch.zeros(len(samples[1])) > 0)
    module = Module(networks.Plain())
    before = module_state(module)

    class Looks(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            found.append(is_heard(pl_module))

        def on_validation_batch_end(self, *arguments):
            found.append(is_heard(arguments[1]))

    found = []
    callback = lf.FlatnessCallback(on_error="warn")
    loader = loaders(dtype=torch.float64)[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*No sample was measured")
        quiet_trainer(tmp_path, callback, Looks()).validate(module, loader, verbose=False)
    assert len(told) == 1
    assert "observes" in told[0]
    assert found == [False] * 4
    assert module_state(module)["hooks"] == before["hooks"]


def is_heard(module):
    return any("_Forward" in repr(vars(part).get("forward")) for part in module.modules())


@guards("callbacks/running.py", "if not reason and alive() is not None:", "if False:")
def test_features_that_are_kept_later_are_told(tmp_path, told):
    """A network that begins to keep them when the trial is over: then it is no longer observed."""

    class Late(networks.Plain):
        def tail(self, z, upstream):
            z = super().tail(z, upstream)
            if self.keeps:
                networks.KEPT[:] = [z]
            return z

    class Keeps(Module):
        def step(self, x):
            self.net.keeps = True
            try:
                return self(x)
            finally:
                self.net.keeps = False

    def make_one():
        module = Keeps(Late())
        module.net.keeps = False
        return module

    assert_as_without(tmp_path, make_one, told, "keeps tensors")


def test_own_passes_see_what_changed_since_the_trial(tmp_path, told):
    """Buffers that change when a step begins, as DDP exchanges them; the last batch has one sample."""

    class Exchanges(Module):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.net.norm.running_mean.fill_(0.5)
            super().validation_step(batch, batch_idx)

    assert_as_without(tmp_path, make("Plain", Exchanges), told, OBSERVES, val_samples=17)
