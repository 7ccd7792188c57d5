"""Which samples of validated batches are measured, and how a batch is split."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import lightning_flatness as lf
from lightning_flatness.callbacks.data.sources import Wanted
from lightning_flatness.callbacks.data.stratified import choose, labels_of
from lightning_flatness.measure.batches import split_batch
from lightning_flatness.model.call import as_call
from tests.callbacks.flatness_runs import MONITOR, Recorder, Stream, expected, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, Net, dataset, loaders, quiet_trainer
from tests.guarding import guards


def chosen_samples(max_samples, *datasets):
    whole = ConcatDataset(datasets)
    return DataLoader(Subset(whole, choose(len(whole), max_samples, labels_of(whole)).tolist()), batch_size=8)


def test_max_samples_measures_the_same_subset_in_every_epoch(tmp_path):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(max_samples=5)
    fit(tmp_path, callback, recorder, data=(train, val), max_epochs=3)
    for logged, net in zip(recorder.flatness(), recorder.nets, strict=True):
        assert logged == pytest.approx(expected(net, chosen_samples(5, val.dataset)), rel=1e-6)
    assert callback.report.num_samples == 5


@pytest.mark.parametrize("max_samples", [22, 1000])
def test_max_samples_of_all_samples_is_everything(tmp_path, max_samples):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, recorder, data=(train, val))
    assert callback.report.num_samples == 22
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], val), rel=1e-6)


@pytest.mark.parametrize("max_samples", [1, 4, 100])
@pytest.mark.parametrize("options", [{"limit_val_batches": 1}, {"fast_dev_run": True}], ids=str)
def test_max_samples_are_chosen_among_the_batches_that_are_run(tmp_path, options, max_samples):
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, **options)
    assert callback.report.num_samples == min(max_samples, 8)


def test_max_samples_of_a_stream_are_its_first(tmp_path):
    recorder, callback = Recorder(), flatness_callback(max_samples=5)
    fit(tmp_path, callback, recorder, data=(loaders()[0], DataLoader(Stream(), batch_size=8)))
    x, y = dataset(16)[:5]
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], [(x, y)]), rel=1e-6)


class Batches(Dataset):
    """Has batches of 8 ready, for a loader with batch_size=None."""

    def __init__(self, number=4):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return dataset(8 * self.number)[8 * index : 8 * index + 8]


@pytest.mark.parametrize("options", [{}, {"max_samples": 5}, {"data": "train"}], ids=str)
def test_loaders_of_ready_batches(tmp_path, options):
    recorder, loader = Recorder(), DataLoader(Batches(), batch_size=None)
    callback = flatness_callback(**options)
    fit(tmp_path, callback, recorder, data=(loader, loader))
    assert callback.report.num_samples == options.get("max_samples", 32)
    if "max_samples" not in options:
        wanted = expected(recorder.nets[-1], DataLoader(dataset(32), batch_size=8))
        assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


@guards("callbacks/data/stream.py", 'positions * self._ready_rows + torch.arange(rows, device="cpu")', "positions")
def test_of_ready_batches_the_first_128_samples_give_the_spread(tmp_path):
    recorder = Recorder()
    fit(tmp_path, flatness_callback(), recorder, data=(loaders()[0], DataLoader(Batches(20), batch_size=None)))
    measure = "normalized_relative_flatness"
    wanted = expected(recorder.nets[-1], DataLoader(dataset(160), batch_size=8), measure)
    assert recorder.flatness(f"flatness/{measure}")[-1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("max_samples", [None, 7])
@pytest.mark.parametrize("kind", [list, lambda parts: dict(enumerate(parts))], ids=["list", "dict"])
def test_several_validation_loaders_are_measured_apart(tmp_path, kind, max_samples):
    recorder, (train, val) = Recorder(), loaders()
    other = DataLoader(dataset(9, seed=5), batch_size=8)
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, recorder, data=(train, kind([val, other])))
    for index, loader in enumerate((val, other)):
        batches = loader if max_samples is None else chosen_samples(7, loader.dataset)
        key = f"{MONITOR}/dataloader_idx_{index}" if index else MONITOR
        assert callback.reports[index].num_samples == (max_samples or len(loader.dataset))
        assert recorder.flatness(key)[-1] == pytest.approx(expected(recorder.nets[-1], batches), rel=1e-6)


class DictData(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        x, y = dataset(20)[index]
        return {"face": x, "person": y, "id": str(index)}


class DictClassifier(Classifier):
    def split(self, batch):
        return batch["face"], batch["person"]


@pytest.mark.parametrize("options", [{}, {"data": "train"}, {"max_samples": 20}], ids=str)
def test_dict_batches(tmp_path, options):
    recorder, loader = Recorder(), DataLoader(DictData(), batch_size=8)
    callback = flatness_callback(batch_fn=lambda batch: (batch["face"], batch["person"]), **options)
    fit(tmp_path, callback, recorder, module=DictClassifier(), data=(loader, loader))
    wanted = expected(recorder.nets[-1], DataLoader(dataset(20), batch_size=8))
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("data", "sanity"), [("val", 2), ("train", 0), ("train", 2)])
def test_batches_of_another_structure_are_refused(tmp_path, data, sanity):
    """Of validated batches only the targets are needed, which the curvature of SiLU depends on."""
    module, loader = DictClassifier(), DataLoader(DictData(), batch_size=8)
    with pytest.raises(lf.BatchError, match="A batch is a dict.*batch_fn="):
        fit(tmp_path, flatness_callback(data=data), module=module, data=(loader, loader), num_sanity_val_steps=sanity)
    assert module.training_steps == 0


class Other(Dataset):
    """Has numbers beside the labels, which may be taken for labels."""

    def __init__(self, entries):
        self.entries = entries

    def __len__(self):
        return 22

    def __getitem__(self, index):
        x, y = dataset(22, 1)[index]
        return self.entries(x, y, torch.tensor(index % 3))


class FromBatch(Classifier):
    """Its step takes labels and inputs of the network from a batch by functions."""

    def __init__(self, labels, inputs):
        super().__init__()
        self.labels, self.inputs = labels, inputs

    def forward(self, x, *others):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        logits = self(*self.inputs(batch))
        self.log("val_acc", (logits.argmax(1) == self.labels(batch)).double().mean(), batch_size=len(logits))


def named(x, y, other):
    return {"image": x, "species": y, "domain_label": other}


# For each kind of batch: its entries, the labels and the inputs of the network in it.
DOUBTFUL = {
    "nested pair": (lambda x, y, other: ((x, y), other), lambda batch: batch[0][1], lambda batch: batch[0][:1]),
    "labels in a dict": (
        lambda x, y, other: ({"image": x, "label": y}, other),
        lambda batch: batch[0]["label"],
        lambda batch: [batch[0]["image"]],
    ),
    "longer name": (named, lambda batch: batch["species"], lambda batch: [batch["image"]]),
}


@guards("callbacks.data.sources:Asked.refuse_doubtful", returns=None)
@pytest.mark.parametrize("callback", [lf.FlatnessCallback, lf.SpectrumCallback])
@pytest.mark.parametrize("kind", DOUBTFUL)
def test_targets_that_may_be_others_are_refused(tmp_path, kind, callback):
    entries, labels, inputs = DOUBTFUL[kind]
    module, data = FromBatch(labels, inputs), (loaders()[0], DataLoader(Other(entries), 8))
    with pytest.raises(lf.BatchError, match=r"which tensor of the batch has the targets.*batch_fn=.*\(None, targets\)"):
        fit(tmp_path, callback(), module=module, data=data, num_sanity_val_steps=1)
    assert module.training_steps == 0
    callback = flatness_callback(batch_fn=lambda batch: (None, labels(batch)))
    fit(tmp_path, callback, module=module, data=data)
    wanted = expected(module.net, loaders()[1])
    assert callback.report.relative_flatness == pytest.approx(wanted, rel=1e-5)


SURE = {
    "two views": (lambda x, y, other: ((x, x + 1), y), lambda batch: batch[1], lambda batch: batch[0][:1]),
    "numbers for the network": (lambda x, y, other: ((x, other), y), lambda batch: batch[1], lambda batch: batch[0]),
    "prepared numbers": (
        lambda x, y, other: ((x, other), y),
        lambda batch: batch[1],
        lambda batch: [batch[0][0], batch[0][1] / 2],
    ),
    "named numbers": (
        lambda x, y, other: {"image": x, "length": other, "gt_label": y},
        lambda batch: batch["gt_label"],
        lambda batch: [batch["image"], batch["length"]],
    ),
}


@pytest.mark.parametrize("kind", SURE)
def test_targets_are_sure_if_the_network_gets_the_others(tmp_path, kind):
    entries, labels, inputs = SURE[kind]
    module, callback = FromBatch(labels, inputs), flatness_callback()
    fit(tmp_path, callback, module=module, data=(loaders()[0], DataLoader(Other(entries), 8)))
    assert callback.report.relative_flatness == pytest.approx(expected(module.net, loaders()[1]), rel=1e-5)


def test_a_longer_name_of_targets_counts_only_without_other_whole_numbers():
    x, y, other = torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([1, 1])
    assert split_batch({"image": x, "gt_label": y})[1] is y
    with pytest.raises(lf.BatchError, match="expected.*batch_fn="):
        split_batch(named(x, y, other))


# What the network gets of a batch (x, y), and whether its samples have another order.
ORDERS = {
    "reversed": (lambda x, y: x.flip(0), True),
    "sorted": (lambda x, y: x[y.argsort()], True),
    "two exchanged": (lambda x, y: x[[0, 1, 2, 4, 3, 5, 6, 7]], True),
    "with others": (lambda x, y: {"x": x.flip(0), "other": y}, True),
    "its own": (lambda x, y: x.clone(), False),
    "flipped": (lambda x, y: x.flip(3), False),
    "normalised": (lambda x, y: x - 0.5, False),
    "one for all": (lambda x, y: x[:1].expand(x.shape), False),
    "fewer": (lambda x, y: x[:4], False),
    "pairs": (lambda x, y: (x, x.flip(0)), False),
}


@guards("callbacks.data.sources:Asked._refuse_reordered", returns=None, ids="sorted")
@guards("callbacks/data/sources.py", " and not _is_any_among(others, called)", "", ids="pairs")
@guards("model/rows.py", "all(map(torch.equal, *distinct))", "True", ids="one for all")
@pytest.mark.parametrize("kind", ORDERS)
def test_samples_that_a_step_puts_in_another_order_are_refused(kind):
    given, is_refused = ORDERS[kind]
    batch = dataset(8)[:]
    asked = Wanted("val", None, None).before_step(batch, Net())
    refused = pytest.raises(lf.BatchError, match=r"in another order.*batch_fn=.*\(None, targets\)")
    with refused if is_refused else nullcontext():
        assert torch.equal(asked.samples(as_call(given(*batch)))[1], batch[1])


@guards("callbacks/data/sources.py", "if targets.ndim and len(other) == len(targets)", "")
def test_time_is_no_order_of_samples():
    x, y = torch.randn(5, 8, 3), torch.arange(8) % 3  # (time, samples, features)
    asked = Wanted("val", None, None).before_step((x, y), Net())
    assert torch.equal(asked.samples(as_call(x.flip(0)))[1], y)


def test_one_number_of_every_sample_may_be_inverted():
    x, y = dataset(8)[:]
    flag = torch.arange(8) % 2 == 0  # ~flag has the same rows in another order
    asked = Wanted("val", None, None).before_step({"image": x, "flag": flag, "label": y}, Net())
    assert torch.equal(asked.samples(as_call((x, ~flag)))[1], y)


@guards("callbacks/data/sources.py", " and not other.is_nested", "")
def test_nested_tensors_of_a_batch_have_no_order():
    x, y = dataset(8)[:]
    boxes = torch.nested.nested_tensor([torch.zeros(n, 4) for n in range(1, 9)])
    asked = Wanted("val", None, None).before_step({"image": x, "boxes": boxes, "label": y}, Net())
    assert torch.equal(asked.samples(as_call(x - 0.5))[1], y)


@guards("callbacks/data/sources.py", "not _is_among(one, [*others, targets])", "True")
def test_labels_are_no_reordered_numbers_of_the_batch():
    x, y = dataset(8)[:]
    batch = {"image": x, "label": y, "domain": y.flip(0)}
    asked = Wanted("val", None, None).before_step(batch, Net())
    assert torch.equal(asked.samples(as_call((x - 0.5, y)))[1], y)


def test_targets_of_batch_fn_may_have_the_order_of_the_step():
    x, y = dataset(8)[:]
    asked = Wanted("val", None, lambda batch: (None, batch[1].flip(0))).before_step((x, y), Net())
    assert torch.equal(asked.samples(as_call(x.flip(0)))[1], y.flip(0))


class Named(Dataset):
    """Training samples with names; those of validation have none."""

    def __init__(self):
        self.pairs = dataset(16)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pixels, species = self.pairs[index]
        return {"pixels": pixels, "species": species, "id": index}


class TrainsOnNamed(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["pixels"], batch["species"]), batch_idx)


@guards("callbacks/data/sources.py", "nullcontext() if is_measured else suppress(BatchError)", "nullcontext()", ids="2")
@pytest.mark.parametrize("sanity", [0, 2])
def test_batch_fn_need_not_fit_batches_that_are_not_measured(tmp_path, sanity):
    def split(batch):
        return batch["pixels"], batch["species"]

    options = {"batch_fn": split, "summary": False}
    callbacks = [
        lf.FlatnessCallback(data="train", **options),
        lf.SpectrumCallback(num_probes=0, top_k=1, max_products=3, batch_fn=split),
        lf.LandscapeCallback(steps=3, batch_fn=split),
    ]
    trainer = quiet_trainer(tmp_path, *callbacks, num_sanity_val_steps=sanity, max_epochs=1)
    trainer.fit(TrainsOnNamed(), DataLoader(Named(), 8), DataLoader(dataset(8, 1), 8))
    assert [len(callback.history) for callback in callbacks] == [1, 1, 1]
    with pytest.raises(lf.BatchError, match="batch_fn= fails"):
        fit(tmp_path, lf.FlatnessCallback(**options))


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("convert", [lambda y: y.tolist(), lambda y: y.numpy()], ids=["list", "ndarray"])
def test_targets_of_batch_fn_that_are_no_tensor_are_refused(tmp_path, convert, data):
    callback = flatness_callback(data=data, batch_fn=lambda batch: (batch[0], convert(batch[1])))
    with pytest.raises(lf.FlatnessError, match="targets of type (list|ndarray); they must be a tensor"):
        fit(tmp_path, callback)


def test_targets_that_are_not_classes_are_refused(tmp_path):
    callback = flatness_callback(batch_fn=lambda batch: (batch[0], batch[1].double()))
    with pytest.raises(lf.BatchError, match="class indices"):
        fit(tmp_path, callback)
