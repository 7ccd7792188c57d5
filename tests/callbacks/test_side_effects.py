"""Forwards that do more than compute: what they do while they are measured leaves no trace."""

import random

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.model.isolation import isolated
from tests.callbacks.compare import assert_same, end_of
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.lightning_modules import Classifier, Net, WithoutValidation, dataset, loaders, quiet_trainer
from tests.guarding import guards


def fit(folder, module, *callbacks, data=None, **options):
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=2, **options)
    trainer.fit(module, *(data or loaders()))
    return trainer


def assert_without_trace(folder, make, data, **options):
    torch.manual_seed(0)
    bare = make()
    end = end_of(trainer := fit(folder, bare, **options), bare)
    logged = dict(trainer.callback_metrics)
    torch.manual_seed(0)
    module, callback = make(), lf.FlatnessCallback(data=data, summary=False)
    trainer = fit(folder, module, callback, **options)
    assert_same(end_of(trainer, module), end)
    found = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("flatness/")}
    assert_same(found, logged)
    assert len(callback.history) == 2
    assert not {"log", "log_dict"} & vars(module).keys()
    return module


class Logging(Classifier):
    """Its forward logs, with options that Lightning allows in steps only."""

    def forward(self, x):
        logits = self.net(x)
        self.log("size", logits.abs().mean(), on_step=True, on_epoch=True)
        self.log_dict({"largest": logits.max()})
        return logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class LoggingInValidation(Logging):
    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).double().mean())


class LoggingWithoutValidation(Logging, WithoutValidation):
    pass


@guards("callbacks.logged:logging_muted", body="yield", ids="val-2")
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("data", ["val", "train"])
def test_forward_that_logs(tmp_path, data, sanity):
    assert_without_trace(tmp_path, LoggingInValidation, data, num_sanity_val_steps=sanity)


@guards("callbacks/logged.py", "attributes.update(before)", "pass")
def test_a_modules_own_way_to_log_is_put_back(tmp_path):
    module, logged = Classifier(), []
    module.log = lambda name, *args, **options: logged.append(name)
    fit(tmp_path, module, lf.FlatnessCallback(summary=False))
    assert "log" in vars(module)
    assert {"val_acc", "flatness/relative_flatness"} <= set(logged)


def test_forward_that_logs_without_validation(tmp_path):
    assert_without_trace(tmp_path, LoggingWithoutValidation, "train")


class Counting(Classifier):
    """Its forward updates a metric, appends to a list, counts, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.mean, self.all = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        self.sizes, self.calls, self.total = [], 0, torch.zeros(())

    def forward(self, x):
        logits = self.net(x)
        self.mean.update(logits.detach())
        self.all.update(logits.detach().flatten())
        self.sizes.append(len(x))
        self.calls += 1
        self.total += len(x)
        self.features = logits
        return logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def on_validation_epoch_end(self):
        self.log("mean", self.mean.compute())
        self.log("number", float(len(self.all.compute())))
        self.log("calls", float(self.calls + len(self.sizes) + self.total))


@guards("model/attributes.py", "_restore(collection, entries)", "pass", ids="val-2")
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("data", ["val", "train"])
def test_forward_that_counts(tmp_path, data, sanity):
    module = assert_without_trace(tmp_path, Counting, data, num_sanity_val_steps=sanity)
    assert module.calls == len(module.sizes) == 2 * (4 + 3) + min(sanity, 3)
    assert not module.features.requires_grad  # of the last validation step, not of a graph of ours


@guards("model/attributes.py", "del now[name]", "pass")
def test_attributes_are_put_back_when_the_forward_fails():
    class Failing(Net):
        def forward(self, x):
            self.new, self.seen = 1, [*self.seen, 2]
            raise RuntimeError("half-way")

    net = Failing()
    net.seen = seen = [1]
    with pytest.raises(RuntimeError, match="half-way"), isolated(net):
        net(dataset(2).tensors[0])
    assert not hasattr(net, "new")
    assert net.seen is seen
    assert seen == [1]


class Brightens:
    """Makes every batch brighter than the one before."""

    def __init__(self):
        super().__init__()
        self.number, self.seen, self.total = 0, [], torch.zeros(())

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.number, self.total = self.number + 1, self.total.add_(1)
        self.seen.append(self.number)
        return batch[0] * (1 + 0.01 * (self.number + len(self.seen) + float(self.total))), batch[1]


class BrightensWithBuffer(Classifier):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * (1 + 0.01 * float(self.total.add_(1))), batch[1]


class Brightening(Brightens, Classifier):
    pass


class BrighteningData(Brightens, L.LightningDataModule):
    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


# For each kind: the module, and the data of one run.
STATEFUL = {
    "module": (Brightening, loaders),
    "buffer": (BrightensWithBuffer, loaders),
    "data module": (Classifier, lambda: [BrighteningData()]),
}


@guards("callbacks/data/reading.py", "        attributes_kept(owners, most=MOST_KEPT),\n", "", ids="module-flatness")
@guards("callbacks.data.reading:_buffers_kept", body="yield", ids="buffer-flatness")
@pytest.mark.parametrize("callback", ["flatness", "spectrum"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_what_counts_batches_counts_those_of_the_run_alone(tmp_path, kind, callback):
    make, data = STATEFUL[kind]
    torch.manual_seed(0)
    bare = make()
    end = end_of(fit(tmp_path, bare, data=data()), bare)
    own = lf.FlatnessCallback(data="train") if callback == "flatness" else KINDS["spectrum"](every_n_epochs=1)
    torch.manual_seed(0)
    module = make()
    assert_same(end_of(fit(tmp_path, module, own, data=data()), module), end)
    assert own.history


class Drawing(Net):
    """Draws from generators of its own, in evaluation mode too, which does not change the logits there."""

    def __init__(self):
        super().__init__()
        self.generators = [np.random.default_rng(0), np.random.RandomState(0)]
        self.torch_generator, self.random = torch.Generator().manual_seed(0), {"python": random.Random(0)}

    def forward(self, x):
        first, second = self.generators
        drawn = first.random() + second.rand() + self.random["python"].random()
        drawn += float(torch.rand((), generator=self.torch_generator))
        return super().forward(x) * (1 + 0.1 * drawn * self.training)


@guards("model/isolation.py", "stack.enter_context(generators_kept(owner))", "pass", ids="val-2")
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("data", ["val", "train"])
def test_network_with_generators_of_its_own(tmp_path, data, sanity):
    assert_without_trace(tmp_path, lambda: Classifier(Drawing()), data, num_sanity_val_steps=sanity)


class Holding(Net):
    """Holds modules of Python, functions, and a generator that has no state."""

    def __init__(self):
        super().__init__()
        self.functional, self.system, self.relu = F, random.SystemRandom(), F.relu
        self.everything = {"torch": torch, "of torch": torch.ops, "self": self, "type": type(self)}


def test_network_that_holds_modules_of_python(tmp_path):
    assert_without_trace(tmp_path, lambda: Classifier(Holding()), "val")


@guards("callbacks/data/sampled.py", "if is_ordered else indices, loader)", "if False else indices, loader)")
@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"limit_train_batches": 2}], ids=str)
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_data_that_is_never_trained_on_is_not_measured(tmp_path, options, shuffle):
    train = DataLoader(dataset(40), 8, shuffle=shuffle)
    callback = lf.FlatnessCallback(data="train", summary=False)
    module = Classifier()
    fit(tmp_path, module, callback, data=(train, loaders()[1]), **options)
    all_in_time = shuffle and "limit_train_batches" in options
    samples = 40 if all_in_time else 16
    assert callback.report.num_samples == samples
    wanted = lf.measure_flatness(module.net, DataLoader(torch.utils.data.Subset(dataset(40), range(samples)), 8))
    assert callback.report.hessian_trace == pytest.approx(wanted.hessian_trace, rel=1e-5)


def test_an_error_while_measuring_says_so(tmp_path):
    def network(module):
        return [module.net][3]

    with pytest.raises(IndexError) as caught:
        fit(tmp_path, Classifier(), lf.FlatnessCallback(model=network))
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["This happened while FlatnessCallback was measuring."]


def test_a_copy_of_a_compiled_model_is_refused():
    net = Net()
    copied = Net()
    copied.forward = net.forward
    with pytest.raises(lf.LayerSelectionError, match="none of the model's convolutions.*'conv1'.*copy the model"):
        lf.measure_flatness(copied, loaders()[1])
