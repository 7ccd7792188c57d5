"""Which steps show the network: training's if there is no validation, and the first one that calls a network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_flatness as lf
from tests.callbacks.compare import assert_same, end_of
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.flatness_runs import assert_reports_equal, fit, flatness_callback, seeded_fit, warnings_of
from tests.callbacks.lightning_modules import Classifier, Net, WithoutForward, WithoutValidation, loaders
from tests.guarding import guards

TRAIN = (loaders()[0],)


UNSEEN = "the training step does not show clearly what to measure"


def prepared(batch):
    return (batch[0] - 0.3) / 0.5, batch[1]


class Prepares(WithoutValidation):
    """Prepares its batches in the training step."""

    def split(self, batch):
        return prepared(batch)


class PreparesLater(Prepares):
    """Its first step calls nothing."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx else None


def given(data):
    return list(loaders()[0]) if data == "given" else data


@guards("callbacks.base:MeasuringCallback.on_train_batch_start", returns=None)
@pytest.mark.parametrize("data", ["train", "given"])
@pytest.mark.parametrize("make", [Prepares, PreparesLater])
def test_training_steps_that_prepare_their_batches_are_warned_of(tmp_path, make, data):
    module, callback = make(), flatness_callback(data=given(data))
    with warnings_of(UNSEEN) as said:
        fit(tmp_path, callback, module=module, data=TRAIN)
    assert len(said) == 1
    assert "measures forward()" in said[0]
    assert "the training step gives other tensors to the network" in said[0]
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, TRAIN[0]))
    module, callback = make(), flatness_callback(data=given(data), batch_fn=prepared)
    fit(tmp_path, callback, module=module, data=TRAIN)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, map(prepared, TRAIN[0])))


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_that_prepare_batches_of_a_spectrum_or_landscape(tmp_path, kind):
    with pytest.warns(UserWarning, match="the training step gives other tensors to the network.*batch_fn="):
        fit(tmp_path, KINDS[kind](data="train"), module=Prepares(), data=TRAIN)


class PreparesForAnother(Prepares):
    """Without a forward(), so that only its steps show the network."""

    forward = WithoutForward.forward


class Teacher(WithoutValidation):
    """Its training step calls two networks on the same images."""

    def __init__(self):
        super().__init__()
        self.teacher = Net().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()


class TeacherWithoutForward(Teacher):
    forward = WithoutForward.forward


@guards("callbacks/shown.py", "network = network_without_step(pl_module, model)", "raise error", ids="forward")
@pytest.mark.parametrize(
    ("make", "model", "name"),
    [
        (Teacher, None, "forward()"),
        (Teacher, "net", None),
        (PreparesForAnother, None, "'net'"),
        (Prepares, "net", "model="),
    ],
    ids=["forward", "one of two", "shown", "named"],
)
def test_training_steps_that_do_not_show_the_network_change_nothing(tmp_path, make, model, name):
    module, callback = make(), flatness_callback(data="train", model=model, layers="net.fc" if model is None else "fc")
    with warnings_of(UNSEEN) as said:
        fit(tmp_path, callback, module=module, data=TRAIN)
    assert [name in message for message in said] == [True] * (name is not None)
    truth = lf.measure_flatness(module.net, TRAIN[0], layers="fc")
    assert_reports_equal(callback.report, truth, prefix="net." if model is None else "")


def test_two_networks_of_which_none_is_named_are_refused(tmp_path):
    with pytest.raises(lf.FlatnessError, match="several networks.*model='net'"):
        fit(tmp_path, flatness_callback(data="train"), module=TeacherWithoutForward(), data=TRAIN)


def test_training_batches_that_batch_fn_does_not_take_change_nothing(tmp_path):
    batches = [{"x": x, "y": y} for x, y in loaders()[0]]
    module, callback = WithoutValidation(), flatness_callback(data=batches, batch_fn=lambda one: (one["x"], one["y"]))
    with warnings_of(UNSEEN) as said:
        fit(tmp_path, callback, module=module, data=TRAIN)
    assert not said
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, [(one["x"], one["y"]) for one in batches]))


class Checkpointed(Net):
    """Its backward pass calls layers again."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(self.norm1, nn.ReLU(), self.conv2, self.norm2, nn.SiLU())

    def forward(self, x):
        x = self.conv1(x)  # only inputs with a gradient may be given to such a checkpoint
        features = checkpoint(self.body, x, use_reentrant=True) if self.training else self.body(x)
        return self.fc(self.dropout(features).mean((2, 3)))


class Mixed(WithoutValidation):
    """Optimises by hand, and calls the network on other images, too."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, (x, y) = self.optimizers(), batch
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y) + F.cross_entropy(self.net(x.flip(3)), y))
        optimizer.step()


class NeitherForwardNorValidation(WithoutValidation):
    forward = WithoutForward.forward


MODULES = {
    "plain": WithoutValidation,
    "without forward": NeitherForwardNorValidation,
    "checkpointed": lambda: WithoutValidation(Checkpointed()),
    "mixed": Mixed,
}


@guards("callbacks.base:MeasuringCallback.on_before_backward", returns=None, ids="checkpointed")
@guards(
    "callbacks/flatness.py", "or not trainer.enable_validation)\n        try", ")\n        try", ids="without forward"
)
@pytest.mark.parametrize("make", MODULES)
def test_training_that_shows_the_network_stays_as_it_is(tmp_path, make):
    callback, batches = flatness_callback(data="train"), loaders()[:1]
    module, bare = MODULES[make](), MODULES[make]()
    with warnings_of(UNSEEN) as said:
        end = end_of(seeded_fit(tmp_path, callback, module=module, data=batches), module)
    assert not said
    assert_same(end, end_of(seeded_fit(tmp_path, module=bare, data=loaders()[:1]), bare))
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, batches[0]))
    assert not any("forward" in vars(part) for part in module.modules())


class SkipsSanity(Classifier):
    def split(self, batch):
        return prepared(batch)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


@guards("callbacks/base.py", "asked.is_empty or trainer.sanity_checking or", "asked.is_empty or")
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_step_that_skips_the_sanity_check(tmp_path, sanity, recwarn):
    module, callback = SkipsSanity(), flatness_callback()
    fit(tmp_path, callback, module=module, num_sanity_val_steps=sanity)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, map(prepared, loaders()[1])))
    assert not [warning for warning in recwarn if "cannot see" in str(warning.message)]


class SkipsSome(Classifier):
    """Its validation step calls no network on the first batch, in the first epoch, or on the first loader."""

    def __init__(self, skipped, prepare=prepared):
        super().__init__()
        self.skipped, self.split = skipped, prepare

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        first = {"batch": batch_idx, "epoch": self.current_epoch, "loader": dataloader_idx}[self.skipped]
        if first:
            super().validation_step(batch, batch_idx)


UNKNOWN = "cannot see what the network is given"


@guards("callbacks/shown.py", "if within or", "if", ids="batch")
@pytest.mark.parametrize("skipped", ["batch", "epoch", "loader"])
def test_a_step_that_calls_the_network_only_later_is_refused(tmp_path, skipped):
    prepare = {"batch": lambda batch: batch, "epoch": prepared, "loader": lambda batch: (batch[0].mul_(2), batch[1])}
    (train, val), module = loaders(), SkipsSome(skipped, prepare[skipped])
    data = train, [val, val] if skipped == "loader" else val
    with (
        pytest.warns(UserWarning, match=UNKNOWN),
        pytest.raises(lf.FlatnessError, match=r"did not call it before.*batch_fn=.*\(None, None\)"),
    ):
        fit(tmp_path, flatness_callback(), module=module, data=data, num_sanity_val_steps=0, max_epochs=2)


@guards(
    "callbacks/base.py",
    "before = None if batch_idx == 0 and is_sought(self._network) else self._network",
    "before = self._network",
)
@guards("callbacks/base.py", " or (self._was_unseen and is_sought(self._network))", "")
@pytest.mark.parametrize("skipped", ["epoch", "loader"])
def test_a_later_step_shows_that_the_batches_own_inputs_are_right(tmp_path, skipped):
    (train, val), module, callback = loaders(), SkipsSome(skipped, lambda batch: batch), flatness_callback()
    data = train, [val, val] if skipped == "loader" else val
    with pytest.warns(UserWarning, match=UNKNOWN) as caught:
        fit(tmp_path, callback, module=module, data=data, num_sanity_val_steps=0, max_epochs=2 - (skipped == "loader"))
    assert sum(UNKNOWN in str(one.message) for one in caught) == 1
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, val))


def test_batch_fn_says_what_a_step_skips(tmp_path):
    first = next(iter(loaders()[1]))[1]
    callback = flatness_callback(batch_fn=lambda batch: (None, None if torch.equal(batch[1], first) else batch[1]))
    module = SkipsSome("batch")
    fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, [*map(prepared, loaders()[1])][1:]))


@pytest.mark.parametrize("make", [flatness_callback, KINDS["spectrum"]], ids=["flatness", "spectrum"])
def test_a_later_step_shows_that_other_data_are_not_prepared(tmp_path, make):
    with (
        pytest.warns(UserWarning, match=UNKNOWN),
        pytest.raises(lf.FlatnessError, match="gives other tensors to the network.*batch_fn="),
    ):
        fit(tmp_path, make(data="train"), module=SkipsSome("batch"), num_sanity_val_steps=0)


@guards("callbacks/validation.py", "if running.network.is_called and", "if network.is_called and")
def test_a_later_step_shows_the_network_of_other_data(tmp_path):
    train, val = loaders()
    module, callback = SkipsSome("batch", lambda batch: batch), flatness_callback(data="train")
    with pytest.warns(UserWarning, match=UNKNOWN) as caught:
        fit(tmp_path, callback, module=module, data=(train, val), num_sanity_val_steps=0)
    assert sum(UNKNOWN in str(one.message) for one in caught) == 1
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, train))
