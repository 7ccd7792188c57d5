"""Models that change while they are trained."""

import contextlib
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelPruning
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.plots import plot_history, plot_layer_history
from tests.callbacks.compare import assert_same, end_of, num_hooks
from tests.callbacks.flatness_runs import assert_reports_equal, flatness_callback, run_without_a_trace, seeded_fit
from tests.callbacks.lightning_modules import CLASSES, Classifier, loaders

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:The number of training batches")


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
    wider, narrower, frozen, all_frozen_but_classifier, pruned, pruned_for_good, weight_normed,
    weight_normed_the_old_way, doubled, last_layer_removed, low_rank,
]  # fmt: skip


def told_of_other_layers(change):
    others = change in (last_layer_removed, low_rank)
    return pytest.warns(UserWarning, match="from epoch 2 on.*layers was") if others else contextlib.nullcontext()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_model_that_changes(tmp_path, change):
    data = "train" if CHANGES.index(change) % 2 else "val"
    callback, batches = flatness_callback(data=data), loaders()
    with told_of_other_layers(change):
        module = run_without_a_trace(tmp_path, lambda: Changing(change), callback, data=batches)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, batches[data == "val"]))
    assert [record["epoch"] for record in callback.history] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("change", [wider, pruned, last_layer_removed, low_rank], ids=lambda change: change.__name__)
def test_figures_of_a_model_that_changes(tmp_path, change):
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    callback, module, logger = flatness_callback(layers="all"), Changing(change), TensorBoardLogger(tmp_path, name="")
    with told_of_other_layers(change), warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback draws no figures")
        seeded_fit(tmp_path, callback, module=module, logger=logger)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[1], layers="all"))
    tags = EventAccumulator(str(tmp_path / "version_0"), size_guidance={"images": 0}).Reload().Tags()["images"]
    assert {"flatness/history", "flatness/layers", "flatness/layer_history"} <= set(tags)

    figure, axes = plot_layer_history(callback.history)
    names = {
        key.removesuffix("/relative_flatness")
        for record in callback.history
        for key in record
        if key.endswith("/relative_flatness")
    }
    assert {line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")} == names
    plot_history(callback.history)
    figure.canvas.draw()
    plt.close("all")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has changed from epoch")
def test_figures_where_at_the_end_one_layer_is_left(tmp_path):
    def only_one(net):
        net.conv1, net.norm1 = nn.Identity(), nn.Identity()
        net.conv2, net.norm2 = nn.Identity(), nn.Identity()
        net.fc = nn.Linear(1, CLASSES)

    callback, module = flatness_callback(layers=["net.*"]), Changing(only_one)
    seeded_fit(tmp_path, callback, module=module, logger=TensorBoardLogger(tmp_path, name=""))
    assert list(callback.report.layers) == ["net.fc"]
    plot_layer_history(callback.history)
    plot_history(callback.history)


@pytest.mark.filterwarnings("ignore:.*has changed from epoch")
def test_what_is_logged_for_a_layer_that_is_gone_does_not_stay(tmp_path):
    callback, module = flatness_callback(layers="all"), Changing(last_layer_removed)
    trainer = seeded_fit(tmp_path, callback, module=module)
    assert "net.conv2/hessian_trace" in callback.history[1]
    assert "net.conv2/hessian_trace" not in callback.history[-1]
    assert_close(float(trainer.callback_metrics["flatness/hessian_trace"]), callback.history[-1]["hessian_trace"])


def test_named_layer_that_is_gone_is_an_error_that_names_it(tmp_path):
    module = Changing(last_layer_removed)
    with pytest.raises(lf.LayerSelectionError, match="net.conv2.*Did you mean|net.conv2.* is a Identity"):
        seeded_fit(tmp_path, flatness_callback(layers="net.conv2"), module=module)
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
@pytest.mark.slow
def test_callbacks_that_change_the_model(tmp_path, other, layers, first):
    callback, module = flatness_callback(layers=layers), OfTrainable()
    batches = loaders()
    pair = [callback, other()] if first else [other(), callback]

    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}
            self.report = lf.measure_flatness(pl_module.net, batches[1], layers=layers)

    keep = Keep()
    end = end_of(seeded_fit(tmp_path, *pair, keep, module=module, data=batches), module)
    bare = OfTrainable()
    assert_same(end, end_of(seeded_fit(tmp_path, other(), module=bare), bare))
    assert_reports_equal(callback.report, keep.report)


@pytest.mark.parametrize("change", [weight_normed, weight_normed_the_old_way, pruned, doubled, low_rank])
@pytest.mark.parametrize("layers", ["last", pytest.param("all", marks=pytest.mark.slow)])
def test_models_with_computed_weights_from_the_start(tmp_path, change, layers):
    def make():
        module = Classifier()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            change(module.net)
        return module

    callback, batches = flatness_callback(layers=layers), loaders()
    module = run_without_a_trace(tmp_path, make, callback, data=batches)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, batches[1], layers=layers))


def test_model_whose_dtype_changes(tmp_path):
    class Widened(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.net.double()
                for state in self.trainer.optimizers[0].state.values():
                    state["momentum_buffer"] = state["momentum_buffer"].double()

        def split(self, batch):
            return batch[0].to(self.net.fc.weight.dtype), batch[1]

    module, bare, batches = Widened(), Widened(), loaders()
    callback = flatness_callback(batch_fn=module.split)
    end = end_of(seeded_fit(tmp_path, callback, module=module, data=batches), module)
    assert_same(end, end_of(seeded_fit(tmp_path, module=bare), bare))
    in_double = [(x.double(), y) for x, y in batches[1]]
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, in_double), rtol=1e-10)
