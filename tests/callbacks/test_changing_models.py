"""Models that change while they train, runs that fail or are interrupted, and low precision."""

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelPruning
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_history, plot_layer_history
from tests.callbacks.compare import assert_same, end_of, global_modes, module_state, num_hooks, random_states, seed_all
from tests.callbacks.lightning_modules import (
    CLASSES,
    Classifier,
    Net,
    TwoLayerNet,
    WithoutForward,
    loaders,
    quiet_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:The number of training batches")


def flatness_callback(**options):
    return lf.FlatnessCallback(**({"summary": False} | options))


def fit(module, folder, *callbacks, data=None, **options):
    seed_all()
    trainer = quiet_trainer(folder, *callbacks, **({"max_epochs": 4} | options))
    trainer.fit(module, *(loaders() if data is None else data))
    return trainer


def measured(network, batches, layers="last"):
    return lf.measure_flatness(network, batches, layers=layers)


def assert_reports_equal(found, expected, prefix="net.", rtol=1e-5):
    assert list(found.layers) == [prefix + name for name in expected.layers]
    for name, layer in expected.layers.items():
        one = found.layers[prefix + name]
        scale = abs(layer.hessian_trace) + abs(layer.relative_flatness)
        for measure in ("hessian_trace", "relative_flatness", "weight_norm"):
            assert_close(getattr(one, measure), getattr(layer, measure), rtol=rtol, atol=rtol * scale)
        assert one.exact == layer.exact


# --------------------------------------------------------------------------------------------------- models that change


class Changing(Classifier):
    """Changes its network at the start of the second epoch."""

    def __init__(self, change, net=None):
        super().__init__(net)
        self.change = change

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                self.change(self.net)
            known = {id(p) for group in self.trainer.optimizers[0].param_groups for p in group["params"]}
            new = [parameter for parameter in self.parameters() if id(parameter) not in known]
            if new:
                self.trainer.optimizers[0].add_param_group({"params": new})


class LowRank(nn.Module):
    """A layer and a trained update of low rank beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Conv2d(layer.in_channels, 2, 3, padding=1, bias=False)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def wider(net):
    net.conv2, net.norm2, net.fc = nn.Conv2d(4, 7, 3, padding=1), nn.BatchNorm2d(7), nn.Linear(7, CLASSES)


def narrower(net):
    net.conv2, net.norm2, net.fc = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, CLASSES)


def frozen(net):
    net.conv2.requires_grad_(False)


def all_frozen_but_classifier(net):
    net.requires_grad_(False)
    net.fc.requires_grad_(True)


def pruned(net):
    prune.l1_unstructured(net.conv2, "weight", amount=0.3)


def pruned_for_good(net):
    prune.random_structured(net.conv2, "weight", amount=2, dim=0)
    prune.remove(net.conv2, "weight")


def weight_normed(net):
    parametrizations.weight_norm(net.conv2)


def weight_normed_the_old_way(net):
    nn.utils.weight_norm(net.conv2)


def doubled(net):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

        def right_inverse(self, weight):
            return weight / 2

    parametrize.register_parametrization(net.conv2, "weight", Double())


def last_layer_removed(net):
    net.conv2, net.fc = nn.Identity(), nn.Linear(4, CLASSES)
    net.norm2 = nn.BatchNorm2d(4)


def low_rank(net):
    net.conv2 = LowRank(net.conv2)


CHANGES = [
    wider,
    narrower,
    frozen,
    all_frozen_but_classifier,
    pruned,
    pruned_for_good,
    weight_normed,
    weight_normed_the_old_way,
    doubled,
    last_layer_removed,
    low_rank,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_model_that_changes(tmp_path, change):
    data = "train" if CHANGES.index(change) % 2 else "val"
    callback, module, batches = flatness_callback(data=data), Changing(change), loaders()
    end = end_of(fit(module, tmp_path, callback, data=batches), module)
    bare = Changing(change)
    assert_same(end, end_of(fit(bare, tmp_path), bare))
    assert_reports_equal(callback.report, measured(module.net, batches[0] if data == "train" else batches[1]))
    assert [record["epoch"] for record in callback.history] == [0, 1, 2, 3]
    assert num_hooks(module) == num_hooks(bare)


@pytest.mark.parametrize("change", [wider, pruned, last_layer_removed, low_rank], ids=lambda change: change.__name__)
def test_figures_of_a_model_that_changes(tmp_path, change):
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    callback, module, logger = flatness_callback(layers="all"), Changing(change), TensorBoardLogger(tmp_path, name="")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback draws no figures")
        fit(module, tmp_path, callback, logger=logger)
    assert_reports_equal(callback.report, measured(module.net, loaders()[1], layers="all"))
    tags = EventAccumulator(str(tmp_path / "version_0"), size_guidance={"images": 0}).Reload().Tags()["images"]
    assert {"flatness/history", "flatness/layers", "flatness/layer_history"} <= set(tags)

    figure, axes = plot_layer_history(callback.history)
    names = {key.removesuffix("/relative_flatness") for record in callback.history for key in record if "/rel" in key}
    assert {line.get_label() for line in axes.get_lines()} == names
    plot_history(callback.history)
    figure.canvas.draw()
    plt.close("all")


def test_figures_where_at_the_end_one_layer_is_left(tmp_path):
    def only_one(net):
        net.conv1, net.norm1 = nn.Identity(), nn.Identity()
        net.conv2, net.norm2 = nn.Identity(), nn.Identity()
        net.fc = nn.Linear(1, CLASSES)

    callback, module = flatness_callback(layers=["net.*"]), Changing(only_one)
    fit(module, tmp_path, callback, logger=TensorBoardLogger(tmp_path, name=""))
    assert list(callback.report.layers) == ["net.fc"]
    plot_layer_history(callback.history)
    plot_history(callback.history)


def test_what_is_logged_for_a_layer_that_is_gone_does_not_stay(tmp_path):
    callback, module = flatness_callback(layers="all"), Changing(last_layer_removed)
    trainer = fit(module, tmp_path, callback)
    assert "net.conv2/hessian_trace" in callback.history[1]
    assert "net.conv2/hessian_trace" not in callback.history[-1]
    assert_close(float(trainer.callback_metrics["flatness/hessian_trace"]), callback.history[-1]["hessian_trace"])


def test_named_layer_that_is_gone_is_an_error_that_names_it(tmp_path):
    module = Changing(last_layer_removed)
    with pytest.raises(lf.LayerSelectionError, match="net.conv2.*Did you mean|net.conv2.* is a Identity"):
        fit(module, tmp_path, flatness_callback(layers="net.conv2"))
    assert num_hooks(module) == 0


class Unfreezing(BaseFinetuning):
    """The convolutions are frozen for two epochs."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net.conv1, pl_module.net.conv2])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group([pl_module.net.conv1, pl_module.net.conv2], optimizer, lr=0.01)


class OfTrainable(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def pruning():
    options = {"pruning_fn": "l1_unstructured", "amount": 0.3, "parameter_names": ["weight"]}
    return ModelPruning(**options, use_global_unstructured=True)


@pytest.mark.parametrize("other", [Unfreezing, pruning], ids=["finetuning", "pruning"])
@pytest.mark.parametrize(("first", "layers"), [(True, "last"), (False, "all")], ids=["first", "last"])
def test_callbacks_that_change_the_model(tmp_path, other, layers, first):
    callback, module = flatness_callback(layers=layers), OfTrainable()
    batches = loaders()
    pair = [callback, other()] if first else [other(), callback]

    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}
            self.report = measured(pl_module.net, batches[1], layers)

    keep = Keep()
    end = end_of(fit(module, tmp_path, *pair, keep, data=batches), module)
    bare = OfTrainable()
    assert_same(end, end_of(fit(bare, tmp_path, other()), bare))
    assert_reports_equal(callback.report, keep.report)


@pytest.mark.parametrize("change", [weight_normed, weight_normed_the_old_way, pruned, doubled, low_rank])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_models_with_computed_weights_from_the_start(tmp_path, change, layers):
    def make():
        module = Classifier()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            change(module.net)
        return module

    callback, module, batches = flatness_callback(layers=layers), make(), loaders()
    end = end_of(fit(module, tmp_path, callback, data=batches), module)
    bare = make()
    assert_same(end, end_of(fit(bare, tmp_path), bare))
    assert_reports_equal(callback.report, measured(module.net, batches[1], layers))


def test_model_whose_dtype_changes(tmp_path):
    class Widened(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.net.double()
                for state in self.trainer.optimizers[0].state.values():
                    state["momentum_buffer"] = state["momentum_buffer"].double()

        def split(self, batch):
            return batch[0].to(self.net.fc.weight.dtype), batch[1]

    def in_double_when_the_model_is(batch):
        return batch[0].to(module.net.fc.weight.dtype), batch[1]

    module, batches = Widened(), loaders()
    callback = flatness_callback(batch_fn=in_double_when_the_model_is)
    end = end_of(fit(module, tmp_path, callback, data=batches), module)
    bare = Widened()
    assert_same(end, end_of(fit(bare, tmp_path), bare))
    assert_reports_equal(callback.report, measured(module.net, [(x.double(), y) for x, y in batches[1]]), rtol=1e-10)


# ----------------------------------------------------------------------------------------------- other kinds of modules


class Gan(L.LightningModule):
    """Two networks, an optimizer for each, no forward; the discriminator also tells classes apart."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = TwoLayerNet()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8)))

    def training_step(self, batch, batch_idx):
        of_generator, of_discriminator = self.optimizers()
        made = self.generator(torch.randn(len(batch[0]), 3))
        of_generator.zero_grad()
        self.manual_backward(self.discriminator(made).logsumexp(1).mean())
        of_generator.step()
        of_discriminator.zero_grad()
        self.manual_backward(F.cross_entropy(self.discriminator(batch[0]), batch[1]))
        of_discriminator.step()

    def validation_step(self, batch, batch_idx):
        self.discriminator(self.generator(torch.randn(2, 3)))
        self.log("val_acc", (self.discriminator(batch[0]).argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self):
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=0.01) for network in networks]


class TwoForwards(Classifier):
    """Looks at a batch in several ways, in both modes of gradients."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x) + self.net(x.flip(-1))
        with torch.enable_grad():
            self.net(x[:1])
        self.log("val_acc", (logits.argmax(1) == y).double().mean())


@pytest.mark.parametrize(
    ("make", "options", "network"),
    [
        (Gan, {"model": "discriminator", "layers": "all"}, "discriminator"),
        (TwoForwards, {}, "net"),
        (WithoutForward, {"model": "net"}, "net"),
    ],
    ids=["gan", "two forwards", "without forward"],
)
@pytest.mark.parametrize("data", ["val", "train"])
def test_other_kinds_of_modules(tmp_path, make, options, network, data):
    callback, module, batches = flatness_callback(data=data, **options), make(), loaders()
    end = end_of(fit(module, tmp_path, callback, data=batches), module)
    bare = make()
    assert_same(end, end_of(fit(bare, tmp_path), bare))
    expected = measured(getattr(module, network), batches[data == "val"], options.get("layers", "last"))
    assert_reports_equal(callback.report, expected, prefix="" if "model" in options else "net.")


# ---------------------------------------------------------------------------------------- runs that fail or are stopped


class UserError(Exception):
    """The user's own."""


FAILURES = {
    "error": UserError("the user's own"),
    "ctrl-c": KeyboardInterrupt(),
    "exit": SystemExit(3),
    "memory": torch.OutOfMemoryError("simulated: out of memory"),
}


class FailingInStep(Classifier):
    def __init__(self, failure, step):
        super().__init__()
        self.failure, self.step = failure, step

    def training_step(self, batch, batch_idx):
        if (self.step, self.current_epoch, batch_idx) == ("training_step", 1, 1):
            raise self.failure
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if (self.step, self.current_epoch, batch_idx) == ("validation_step", 1, 1) and not self.trainer.sanity_checking:
            raise self.failure
        super().validation_step(batch, batch_idx)


def end_of_failure(make, folder, *callbacks):
    """How a run that fails leaves model, process and random states; and the error."""
    module, error = make(), None
    before = global_modes()
    try:
        fit(module, folder, *callbacks, logger=False)
    except BaseException as raised:
        error = raised
    assert error is not None
    assert_same(global_modes(), before, "modes")
    return {**module_state(module), "random states": random_states(), "error": type(error).__name__}, error


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("step", ["validation_step", "training_step"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_steps(tmp_path, failure, step, data):
    def make():
        return FailingInStep(FAILURES[failure], step)

    callback = flatness_callback(data=data)
    end, error = end_of_failure(make, tmp_path, callback)
    bare, _ = end_of_failure(make, tmp_path)
    assert_same(end, bare)
    assert error is FAILURES[failure] or isinstance(error, SystemExit)
    assert [record["epoch"] for record in callback.history] == [0]
    assert callback._running is None
    fit(Classifier(), tmp_path, callback, max_epochs=2)
    assert len(callback.history) == 2


class FailingInMeasurement(Classifier):
    """Its forward, which only the callback calls, draws random numbers and fails in the second epoch."""

    def __init__(self, failure, times=10**9):
        super().__init__()
        self.failure, self.times, self.counter = failure, times, Counter()  # numbers are put back as they were

    def forward(self, x):
        torch.rand(3)
        if self._trainer is not None and self.current_epoch == 1 and len(x) > 1:
            self.counter["calls"] += 1
            if 1 < self.counter["calls"] <= 1 + self.times:
                raise self.failure
        return self.net(x)


class KeepStates(Callback):
    """Random states before the measurement that fails; goes before the callback."""

    def on_validation_batch_start(self, *_, **__):
        self.states = random_states()

    def on_validation_batch_end(self, *_, **__):
        self.states = random_states()


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_while_measuring(tmp_path, failure, data):
    module, callback, keep = FailingInMeasurement(FAILURES[failure]), flatness_callback(data=data), KeepStates()
    end, error = end_of_failure(lambda: module, tmp_path, keep, callback)
    if failure == "memory":
        assert isinstance(error, lf.BatchError)
        assert "Out of memory while measuring" in str(error)
        assert "smaller batches" in str(error)
    else:
        assert error is FAILURES[failure] or isinstance(error, SystemExit)
    assert_same(end["random states"], keep.states, "random states")
    assert end["hooks"] == 0
    assert not any(end["training flags"].values())  # as validation had set them
    assert all(end["requires_grad"].values())
    assert callback._running is None
    assert [record["epoch"] for record in callback.history] == [0]
    again = Classifier()
    again.net.load_state_dict({key.removeprefix("net."): value for key, value in end["weights"].items()})
    fit(again, tmp_path, callback, max_epochs=2)
    assert len(callback.history) == 2


@pytest.mark.parametrize("data", ["val", "train"])
def test_memory_that_runs_out_once(tmp_path, data):
    def make(times):
        return FailingInMeasurement(torch.OutOfMemoryError("simulated: out of memory"), times)

    module, callback, batches = make(1), flatness_callback(data=data), loaders()
    end = end_of(fit(module, tmp_path, callback, data=batches, max_epochs=2), module)
    assert module.counter["calls"] > 1
    bare = make(0)
    assert_same(end, end_of(fit(bare, tmp_path, max_epochs=2), bare))
    assert_reports_equal(callback.report, measured(module.net, batches[data == "val"]))


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_in_plain_measure_flatness(failure):
    class Failing(Net):
        calls = 0

        def forward(self, x):
            Failing.calls += 1
            torch.rand(3)
            logits = super().forward(x)
            if Failing.calls > 1:
                raise FAILURES[failure]
            return logits

    net = Failing().train()
    before = {**module_state(net), "modes": global_modes(), "random states": random_states()}
    with pytest.raises((type(FAILURES[failure]), lf.BatchError)):
        lf.measure_flatness(net, loaders()[1])
    after = {**module_state(net), "modes": global_modes()}
    del before["random states"]["torch"]  # the loader draws a seed
    assert_same(after, {key: before[key] for key in after})


def test_a_mode_left_behind_would_be_seen(tmp_path):
    class LeavesGradientsOff(Callback):
        def on_exception(self, *_):
            torch.set_grad_enabled(False)

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, True)
        with pytest.raises(AssertionError, match="modes, gradients"):
            end_of_failure(lambda: FailingInStep(UserError(), "training_step"), tmp_path, LeavesGradientsOff())


# ------------------------------------------------------------------------------------------------------------ precision


LOW = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.mark.parametrize(("data", "layers"), [("val", "all"), ("train", "last")])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer")
def test_mixed_precision(tmp_path, precision, data, layers):
    callback, module, batches = flatness_callback(data=data, layers=layers), Classifier(TwoLayerNet()), loaders()
    end = end_of(fit(module, tmp_path, callback, data=batches, precision=precision), module)
    bare = Classifier(TwoLayerNet())
    assert_same(end, end_of(fit(bare, tmp_path, precision=precision), bare))
    in_double = [(x.double(), y) for x, y in batches[data == "val"]]
    assert_reports_equal(callback.report, measured(module.net.double(), in_double, layers), rtol=0.02)


@pytest.mark.parametrize(("data", "layers"), [("val", "all"), ("train", "last")])
@pytest.mark.parametrize("precision", LOW)
def test_low_precision_is_measured_in_float32(tmp_path, precision, data, layers):
    callback, module, batches = flatness_callback(data=data, layers=layers), Classifier(TwoLayerNet()), loaders()
    end = end_of(fit(module, tmp_path, callback, data=batches, precision=precision), module)
    bare = Classifier(TwoLayerNet())
    assert_same(end, end_of(fit(bare, tmp_path, precision=precision), bare))
    assert {parameter.dtype for parameter in module.parameters()} == {LOW[precision]}
    as_given = [(x.to(LOW[precision]).float(), y) for x, y in batches[data == "val"]]
    assert_reports_equal(callback.report, measured(copy.deepcopy(module.net).float(), as_given, layers))


@pytest.mark.parametrize("dtype", LOW.values(), ids=str)
def test_plain_low_precision_is_measured_in_float32(dtype):
    net = TwoLayerNet().to(dtype)
    state = module_state(net)
    batches = [(x.to(dtype), y) for x, y in loaders()[1]]
    found = measured(net, batches, "all")
    assert_same(module_state(net), state)
    expected = measured(copy.deepcopy(net).float(), [(x.float(), y) for x, y in batches], "all")
    assert_reports_equal(found, expected, prefix="")


def test_reports_that_differ_would_be_seen():
    one = measured(Net(), loaders()[1])
    layer = one.layers["conv2"]
    other = dataclasses.replace(layer, hessian_trace=layer.hessian_trace * 1.001)
    with pytest.raises(AssertionError, match="not close"):
        assert_reports_equal(one, lf.FlatnessReport({"conv2": other}), prefix="")
