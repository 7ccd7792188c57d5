"""A measurement in progress: every validation loader by itself, every step like the first."""

import functools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_flatness as lf
from tests.callbacks.flatness_runs import assert_reports_equal, fit, flatness_callback
from tests.callbacks.lightning_modules import CLASSES, Classifier, Net, WithoutForward, dataset, loaders, quiet_trainer
from tests.guarding import guards


class ForgetsTheNetwork(Classifier):
    """From the second batch on it calls the network on something else, or not at all."""

    otherwise = staticmethod(lambda module, x: torch.ones(len(x), 3))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            super().validation_step(batch, batch_idx)
        else:
            self.otherwise(self, batch[0])


@guards(
    "callbacks/running.py", "if call is not None and not listener.num_others:", "if call is not None:", ids="two calls"
)
@pytest.mark.parametrize(
    ("otherwise", "says"),
    [
        (lambda module, x: torch.ones(len(x), 3), "does not call the network in batch 1"),
        (lambda module, x: module(x.flip(2)) + module(x.flip(3)), "several different calls of the network in batch 1"),
    ],
    ids=["no call", "two calls"],
)
def test_later_steps_that_differ_are_refused(tmp_path, otherwise, says):
    module = ForgetsTheNetwork()
    module.otherwise = otherwise
    with pytest.raises(lf.BatchError, match=f"{says}, unlike in earlier batches.*batch_fn="):
        fit(tmp_path, flatness_callback(), module=module)


def test_a_later_step_that_puts_samples_in_another_order_is_refused(tmp_path):
    module = ForgetsTheNetwork()
    module.otherwise = lambda module, x: module(x.flip(0)).flip(0)
    with pytest.raises(lf.BatchError, match="samples in another order.*batch_fn="):
        fit(tmp_path, flatness_callback(), module=module)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("other", [lambda x: x[:2], lambda x: x.flip(3)], ids=["pictures", "flipped"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_later_step_also_calls_the_network_on_other_inputs(tmp_path, other, is_first, live):
    """As the first step may: to log pictures, before or after the call on the batch."""
    module, callback = ForgetsTheNetwork(), flatness_callback(live=live)
    module.otherwise = lambda module, x: [module(x) for x in ((other(x), x) if is_first else (x, other(x)))]
    fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[1]))


class Skips(Classifier):
    """Its step skips empty batches, and batches of a second loader."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if batch is not None and len(batch[1]) and dataloader_idx == 0:
            super().validation_step(batch, batch_idx)


class SomeBatches(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


NO_ROWS = [part[:0] for part in dataset(2).tensors]


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("options", [{}, {"batch_fn": lambda batch: (batch[0], batch[1])}], ids=["", "batch_fn"])
@pytest.mark.parametrize("empty", [None, NO_ROWS], ids=["None", "no rows"])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_empty_batches_that_a_step_skips_count_no_samples(tmp_path, position, empty, options, data):
    train, val = loaders()
    batches = list(val)
    batches.insert(position, empty)
    module, callback = Skips(), flatness_callback(data=data, **options)
    fit(tmp_path, callback, module=module, data=(train, DataLoader(SomeBatches(batches), batch_size=None)))
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, val if data == "val" else train))


def test_batches_that_batch_fn_calls_empty_count_no_samples(tmp_path):
    module, val = ForgetsTheNetwork(), loaders()[1]
    callback = flatness_callback(batch_fn=lambda batch: (None, batch[1] if torch.equal(batch[1], first) else None))
    first = next(iter(val))[1]
    fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, [next(iter(val))]))


def test_a_second_loader_that_the_step_does_not_use_is_left_out(tmp_path):
    train, first = loaders()
    callback, module = flatness_callback(), Skips()
    with pytest.warns(UserWarning, match="leaves out validation loader 1: .*does not call the network"):
        fit(tmp_path, callback, module=module, data=(train, [first, DataLoader(dataset(11, 7), 4)]))
    assert list(callback.reports) == [0]
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, first))


class ForgetsInTheSecondLoader(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 0 or batch_idx == 0:
            super().validation_step(batch, batch_idx)


def test_errors_name_the_loader(tmp_path):
    data = loaders()[0], [loaders()[1], DataLoader(dataset(11, 7), 4)]
    with pytest.raises(lf.BatchError, match="Validation loader '1': .* does not call the network in batch 1"):
        fit(tmp_path, flatness_callback(), module=ForgetsInTheSecondLoader(), data=data)


class CallsOnly(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net(batch[0])


class Unsuitable(IterableDataset):
    """Has fewer samples than wait for each other, and no length, so that they wait until the validation ends."""

    def __init__(self, change):
        self.change = change

    def __iter__(self):
        return (self.change(x, y) for x, y in dataset(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x, y: (x * torch.nan, y), "The logits contain NaN"), (lambda x, y: (x, y + 9), "[Tt]argets.*11")],
    ids=["NaN", "targets"],
)
@pytest.mark.parametrize("kind", [list, iter], ids=["list", "stream"])
def test_unsuitable_samples_of_a_second_loader_name_the_loader(tmp_path, change, message, kind):
    second = Unsuitable(change)
    data = loaders()[0], [loaders()[1], DataLoader(list(second) if kind is list else second, 8)]
    with pytest.raises(lf.BatchError, match=f"Validation loader '1': .*{message}"):
        fit(tmp_path, flatness_callback(), module=CallsOnly(), data=data, num_sanity_val_steps=0)


class Averaged(Classifier):
    """From the second epoch on, its step calls a network of averages."""

    def __init__(self):
        super().__init__()
        self.averages = Net().requires_grad_(False)

    def validation_step(self, batch, batch_idx):
        (self.averages if self.current_epoch else self.net)(batch[0])


@pytest.mark.parametrize("options", [{}, {"batch_fn": lambda batch: batch}], ids=["", "batch_fn"])
def test_a_step_that_calls_another_network_from_some_epoch_on(tmp_path, options):
    with pytest.raises(lf.BatchError, match="does not call the network in batch 0, .*model="):
        fit(tmp_path, flatness_callback(**options), module=Averaged())
    module, callback = Averaged(), flatness_callback(model="averages", batch_fn=lambda batch: batch)
    fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(module.averages, loaders()[1]), prefix="")


@guards("callbacks.data.sources:sources_of", body="return [ValidationBatches(trainer, wanted, [], [])]")
def test_every_validation_loader_is_measured_apart(tmp_path):
    train, first = loaders()
    second = DataLoader(dataset(11, 7), 4)
    callback, module = flatness_callback(), Classifier()
    trainer = fit(tmp_path, callback, module=module, data=(train, [first, second]))
    for index, loader in enumerate((first, second)):
        wanted = lf.measure_flatness(module.net, loader)
        assert_reports_equal(callback.reports[index], wanted)
        suffix = f"/dataloader_idx_{index}" if index else ""
        key = f"relative_flatness{suffix}"
        assert float(trainer.callback_metrics[f"flatness/{key}"]) == pytest.approx(wanted.relative_flatness, rel=1e-5)
        assert callback.history[-1][key] == pytest.approx(wanted.relative_flatness, rel=1e-5)
    assert callback.report is callback.reports[0]


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@guards("callbacks/flatness.py", 'self._data_name != "val" and not self._errors.pending:', "not self._errors.pending:")
def test_without_a_batch_no_network_is_needed(tmp_path):
    """As on a rank that validates nothing, in a module without forward."""
    with pytest.raises(lf.FlatnessError, match="No sample was measured"):
        fit(tmp_path, flatness_callback(), module=WithoutForward(), data=(loaders()[0], DataLoader(Nothing(), 4)))


class FailsInItsStep(Classifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        raise KeyboardInterrupt if self.interrupts else ZeroDivisionError


@guards("callbacks.base:MeasuringCallback._stop_watching", returns=None)
@pytest.mark.parametrize("interrupts", [True, False])
@pytest.mark.parametrize("callback", [lf.FlatnessCallback, lf.SpectrumCallback])
def test_a_step_that_fails_while_it_is_watched_leaves_nothing(tmp_path, callback, interrupts):
    module = FailsInItsStep()
    module.interrupts = interrupts
    with pytest.raises((SystemExit, ZeroDivisionError)):
        fit(tmp_path, callback(), module=module, num_sanity_val_steps=1)
    assert not any("forward" in vars(part) for part in module.modules())


class Unlabelled(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 0:
            super().validation_step(batch, batch_idx)
        else:
            self(batch[0])


def test_a_second_loader_without_labels_is_left_out(tmp_path):
    train, first = loaders()
    second = DataLoader(TensorDataset(dataset(11, 7).tensors[0]), 4)
    callback, module = flatness_callback(), Unlabelled()
    with pytest.warns(UserWarning, match="leaves out validation loader 1: .*targets"):
        fit(tmp_path, callback, module=module, data=(train, [first, second]))
    assert list(callback.reports) == [0]
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, first))


def test_a_second_loader_without_a_batch_is_left_out(tmp_path):
    train, first = loaders()
    second = DataLoader(dataset(8), 16, drop_last=True)
    callback, module = flatness_callback(), Unlabelled()
    with pytest.warns(UserWarning, match="leaves out validation loader 1: No sample of it was measured"):
        fit(tmp_path, callback, module=module, data=(train, [first, second]))
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, first))
    with pytest.raises(lf.BatchError, match="No sample was measured"):
        fit(tmp_path, flatness_callback(), data=(train, [second, first]), num_sanity_val_steps=0)


class Prompted(Classifier):
    """Its step gives the network a table that all samples share, which may have as many rows as there are samples."""

    def __init__(self, rows):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.register_buffer("table", torch.rand(rows, CLASSES))
        self.net = Shifted(self.net)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0], self.table), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0], self.table)


class Shifted(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, table):
        return self.net(x) + table.sum(0)


@guards("layers/passes.py", ".certified(inputs, mask, lambda part: logits_of(self._copy(part)))", "", ids="8")
@pytest.mark.parametrize("rows", [3, 8])
def test_a_table_that_all_samples_share_is_not_cut_by_max_samples(tmp_path, rows):
    module, callback = Prompted(rows), flatness_callback(max_samples=10)
    if rows == 8:
        with pytest.raises(lf.BatchError, match="only some rows of.*functools.partial.*batch_fn="):
            fit(tmp_path, callback, module=module)
        return
    fit(tmp_path, callback, module=module)
    bound = flatness_callback(max_samples=10)
    module.net.forward = functools.partial(module.net.forward, table=module.table)
    module.validation_step = lambda batch, batch_idx: module.net(batch[0])
    quiet_trainer(tmp_path, bound).validate(module, loaders()[1], verbose=False)
    assert_reports_equal(callback.report, bound.report, prefix="")
    assert bound.report.num_samples == 10
