"""What is measured can be given: a loader or batches of one's own, and a network within the module."""

import multiprocessing
import pickle
from collections import UserList, namedtuple
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_flatness as lf
from lightning_flatness.callbacks.data.sources import Wanted
from lightning_flatness.measure.batches import split_batch
from tests.callbacks.compare import assert_same, end_of
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.flatness_runs import fit
from tests.callbacks.lightning_modules import Classifier, WithoutValidation, dataset, loaders, quiet_trainer
from tests.callbacks.tensorboard_events import charts, events
from tests.guarding import guards

GIVEN = dataset(19, seed=5)


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(len(GIVEN)):
            torch.rand(1)
            yield GIVEN[index]


SOURCES = {
    "loader": lambda: DataLoader(GIVEN, 4, shuffle=True),
    "loader with a worker": lambda: DataLoader(GIVEN, 4, num_workers=1),
    "list of batches": lambda: [(x, y) for x, y in DataLoader(GIVEN, 4)],
    "stream": lambda: DataLoader(Stream(), 4),
}


@guards("callbacks/data/reading.py", "random_states_kept(model), gen", "gen", ids="stream")
@pytest.mark.parametrize("source", SOURCES)
def test_given_data_is_measured_without_a_trace(tmp_path, source):
    torch.manual_seed(0)
    bare = Classifier()
    end = end_of(fit(tmp_path, module=bare), bare)
    callback = lf.FlatnessCallback(data=SOURCES[source](), prefix="given", summary=False)
    torch.manual_seed(0)
    module = Classifier()
    trainer = fit(tmp_path, callback, module=module)
    assert_same(end_of(trainer, module), end)
    wanted = lf.measure_flatness(module.net, DataLoader(GIVEN, 4)).relative_flatness
    assert callback.report.num_samples == len(GIVEN)
    assert float(trainer.callback_metrics["given/relative_flatness"]) == pytest.approx(wanted, rel=1e-5)
    assert len(callback.history) == 2


def test_no_worker_runs_on_beside_training(tmp_path):
    """The callback looks at a first batch before training, and its worker has done its work then."""

    class Looking(Classifier):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 0:
                assert not multiprocessing.active_children()
            return super().training_step(batch, batch_idx)

    callback = lf.FlatnessCallback(data=DataLoader(GIVEN, 4, num_workers=1), summary=False)
    fit(tmp_path, callback, module=Looking())
    assert callback.report.num_samples == len(GIVEN)


class Countdown(IterableDataset):
    """A stream that goes on where it was left, as a reader of a file does."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < len(GIVEN):
            yield GIVEN[self.position]
            self.position += 1
        self.position = 0


def test_a_loader_with_persistent_workers_is_validated_and_given(tmp_path):
    val = DataLoader(Countdown(), 4, num_workers=1, persistent_workers=True)
    callbacks = [lf.FlatnessCallback(data=val, prefix="given", summary=False), lf.FlatnessCallback(summary=False)]
    fit(tmp_path, *callbacks, data=(loaders()[0], val), num_sanity_val_steps=2)
    given, validated = [callback.report for callback in callbacks]
    assert given.num_samples == validated.num_samples == len(GIVEN)
    assert given.relative_flatness == pytest.approx(validated.relative_flatness, rel=1e-5)


class Brighter(L.LightningDataModule):
    """Changes batches on their way to the device."""

    def train_dataloader(self):
        return DataLoader(GIVEN, 5)

    def val_dataloader(self):
        return DataLoader(GIVEN, 5)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


@pytest.mark.parametrize("data", ["val", "train", "given"])
def test_hooks_of_a_data_module(tmp_path, data):
    callback = lf.FlatnessCallback(data=DataLoader(GIVEN, 4) if data == "given" else data, summary=False)
    module = Classifier()
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(module, datamodule=Brighter())
    wanted = lf.measure_flatness(module.net, [(GIVEN.tensors[0] + 1, GIVEN.tensors[1])])
    assert callback.report.relative_flatness == pytest.approx(wanted.relative_flatness, rel=1e-5)


class Augmenting(Classifier):
    """Augments batches on their way to the device, in training alone, as Lightning's documentation shows it."""

    def __init__(self, asks):
        super().__init__()
        self.asks = asks

    def on_after_batch_transfer(self, batch, dataloader_idx):
        trains = self.trainer.training if self.asks == "trainer" else self.training
        return 3 * batch[0] if trains else batch[0], batch[1]


class AugmentingData(Brighter):
    """The same in a data module."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return 3 * batch[0] if self.trainer.training else batch[0], batch[1]


LOADERS = ("train_dataloaders", "val_dataloaders")


@guards("callbacks/data/reading.py", "trainer.validating = True", "pass", ids="trainer-val")
@guards("callbacks/data/reading.py", "module.training = False", "pass", ids="module-val")
@pytest.mark.parametrize("data", ["val", "train", "given"])
@pytest.mark.parametrize("asks", ["trainer", "module", "data"])
def test_what_augments_training_batches_does_not_augment_measured_ones(tmp_path, asks, data):
    module, loader = (Classifier() if asks == "data" else Augmenting(asks)), DataLoader(GIVEN, 4)
    own = [(x, y) for x, y in loader] if data == "given" else data
    flatness = lf.FlatnessCallback(data=own, summary=False)
    spectrum = KINDS["spectrum"](data=own)
    trainer = quiet_trainer(tmp_path, flatness, spectrum)
    trainer.fit(module, **({"datamodule": AugmentingData()} if asks == "data" else dict.fromkeys(LOADERS, loader)))
    wanted = lf.measure_flatness(module.net, loader)
    assert spectrum.result.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert flatness.report.loss == pytest.approx(wanted.loss, rel=1e-5)


@guards("callbacks/data/reading.py", "trainer.state.stage = stage", "pass")
@guards("callbacks/data/reading.py", "module.training = True", "pass")
def test_training_goes_on_as_training_after_a_hook_that_fails(tmp_path):
    stages = []

    class Failing(WithoutValidation):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if not self.trainer.training:
                raise RuntimeError("no batch")
            return batch

        def training_step(self, batch, batch_idx):
            stages.append((self.trainer.training, self.net.training))
            return super().training_step(batch, batch_idx)

    callback = lf.FlatnessCallback(data="train", summary=False, on_error="warn")
    with pytest.warns(UserWarning, match="no batch"):
        fit(tmp_path, callback, module=Failing(), data=loaders()[:1])
    assert stages == [(True, True)] * 8


@pytest.mark.parametrize("run", ["validate", "test"])
def test_given_data_is_measured_in_validation_and_tests_alone(tmp_path, run):
    callback = lf.FlatnessCallback(data=SOURCES["loader"]())
    getattr(quiet_trainer(tmp_path, callback), run)(Classifier(), loaders()[1], verbose=False)
    assert callback.report.num_samples == len(GIVEN)


def test_given_data_without_validation(tmp_path):
    callback = lf.FlatnessCallback(data=SOURCES["list of batches"]())
    fit(tmp_path, callback, module=WithoutValidation(), data=loaders()[:1])
    assert [record["epoch"] for record in callback.history] == [0, 1]


def test_a_part_of_given_data(tmp_path):
    callback = lf.FlatnessCallback(data=SOURCES["loader"](), max_samples=6)
    fit(tmp_path, callback)
    assert callback.report.num_samples == 6
    with pytest.raises(lf.FlatnessError, match=r"max_samples=... needs a DataLoader.*data= is a list"):
        fit(tmp_path, lf.FlatnessCallback(data=SOURCES["list of batches"](), max_samples=6))


def test_a_single_batch_in_place_of_a_list(tmp_path):
    inputs, targets = next(iter(DataLoader(GIVEN, 4)))
    callback = lf.FlatnessCallback(data=[inputs, targets], summary=False)
    fit(tmp_path, callback)
    assert callback.report.num_samples == 4
    for name in ("FlatnessCallback", "SpectrumCallback", "LandscapeCallback"):
        with pytest.raises(lf.FlatnessError, match=rf"{name}: data is a Tensor, .*\[\(inputs, targets\)\]"):
            getattr(lf, name)(data=inputs)


def test_bad_given_data_is_refused_before_training(tmp_path):
    module = Classifier()
    with pytest.raises(lf.BatchError, match="A batch is a str"):
        fit(tmp_path, lf.FlatnessCallback(data=["a", "b"]), module=module)
    assert module.training_steps == 0


def test_validation_and_training_data_are_in_one_layout(tmp_path):
    callbacks = [lf.FlatnessCallback(summary=False), lf.FlatnessCallback(data="train", prefix="train", summary=False)]
    fit(tmp_path, *callbacks, logger=TensorBoardLogger(tmp_path, name=""))
    keys = ["val_acc", "flatness/log10_relative_flatness", "train/log10_relative_flatness"]
    assert charts(events(tmp_path)) == {key: [f"^{key}$"] for key in keys}
    assert callbacks[0].report.num_samples == 22
    assert callbacks[1].report.num_samples == 32


def net_of(module):
    return module.net


@pytest.mark.parametrize("model", ["net", net_of], ids=["name", "function"])
def test_network_within_the_module(tmp_path, model):
    callback = lf.FlatnessCallback(model=model)
    fit(tmp_path, callback)
    assert list(callback.report.layers) == ["conv2"]
    pickle.dumps(callback)


def test_function_that_returns_no_network(tmp_path):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match="returned a float. The LightningModule has these submodules: 'net'"):
        fit(tmp_path, lf.FlatnessCallback(model=lambda module: module.lr), module=module)
    assert module.training_steps == 0


@dataclass
class Sample:
    image: Tensor
    label: Tensor
    index: int = 0


Named = namedtuple("Named", ["pixel_values", "labels", "weight"])
X, Y = torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        {"image": X, "label": Y},
        {"Image": X, "targets": Y, "path": ["a", "b", "c"], "index": torch.arange(3)},
        Sample(X, Y),
        Named(X, Y, torch.ones(3)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_which_the_parts_are_known(batch):
    inputs, targets = split_batch(batch)
    assert inputs is X
    assert targets is Y


@pytest.mark.parametrize(
    "batch",
    [
        {"image": X, "label": Y, "mask": X},
        {"image": X, "x": X, "label": Y},
        {"image": X, "label": Y, "targets": Y},
        {"image": X},
        {"image": X, "label": [0, 1, 2]},
        Named(X, None, None),
    ],
    ids=["mask", "two inputs", "two targets", "no targets", "targets in a list", "nothing named so"],
)
def test_batches_that_say_too_little_or_too_much(batch):
    with pytest.raises(lf.BatchError, match="expected.*batch_fn="):
        split_batch(batch)


class Samples(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        x, y = dataset(22, 1)[index]
        return {"image": x, "label": y, "name": str(index)}


@pytest.mark.parametrize("options", [{}, {"data": "train"}, {"max_samples": 9}], ids=str)
def test_batches_with_names_in_a_run(tmp_path, options):
    class OfNames(Classifier):
        def split(self, batch):
            return batch["image"], batch["label"]

    module, loader = OfNames(), DataLoader(Samples(), 8)
    callback = lf.FlatnessCallback(**options)
    fit(tmp_path, callback, module=module, data=(loader, loader))
    if "max_samples" not in options:
        wanted = lf.measure_flatness(module.net, loaders()[1])
        assert_close(callback.report.layers["net.conv2"].block_traces, wanted.layers["conv2"].block_traces)
    assert callback.report.num_samples == options.get("max_samples", 22)


def test_targets_of_batch_fn_in_a_list(tmp_path):
    with pytest.raises(lf.BatchError, match="batch_fn=... returned targets of type list"):
        Wanted("val", None, lambda batch: (batch[0], batch[1].tolist())).split((X, Y))


def test_batches_and_pairs_may_be_any_sequence():
    inputs, targets = Wanted("val", None, UserList).split((X, Y))
    assert (inputs is X, targets is Y) == (True, True)
    empty = UserList([X[:0], Y[:0]])
    assert Wanted("val", None, None).before_step(empty, torch.nn.Identity()).is_empty


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"pix": X, "kind": Y}, r"KeyError: 'x'. A batch is a dict with the entries 'pix', 'kind'"),
        ([X, Y], r"TypeError: .*. A batch is a list of length 2 \(Tensor\)"),
        (Named(X, None, None), r"TypeError: .*. A batch is a Named .*with the entries"),
    ],
    ids=["dict", "list", "named"],
)
def test_a_batch_fn_that_fails(batch, says):
    with pytest.raises(lf.BatchError, match=f"^batch_fn= fails with {says}") as caught:
        Wanted("val", None, lambda batch: (batch["x"], batch["y"])).split(batch)
    assert isinstance(caught.value.__cause__, (KeyError, TypeError))
