"""Finding the network in a LightningModule."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_flatness as lf
from tests.callbacks.flatness_runs import (
    Recorder,
    assert_reports_equal,
    expected,
    fit,
    flatness_callback,
    run_without_a_trace,
)
from tests.callbacks.lightning_modules import Classifier, WithoutForward, WithoutValidation, dataset, loaders
from tests.callbacks.several_networks import Steps, TwoNetworks
from tests.guarding import guards


def test_network_of_a_module_without_forward(tmp_path):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(model="net")
    fit(tmp_path, callback, recorder, module=WithoutForward(), data=(train, val))
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], val), rel=1e-6)
    assert list(callback.report.layers) == ["conv2"]


def test_nested_network(tmp_path):
    class Deep(WithoutForward):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"student": self.net})

    callback = flatness_callback(model="parts.student")
    fit(tmp_path, callback, module=Deep())
    assert list(callback.report.layers) == ["conv2"]


@pytest.mark.parametrize("model", ["nett", "lr", "net.nothing"])
def test_model_that_is_not_there_is_refused_by_name(tmp_path, model):
    module = Classifier()
    with pytest.raises(
        lf.FlatnessError,
        match=f"model='{model}'.*Classifier has no such module. The LightningModule has these submodules: 'net'",
    ):
        fit(tmp_path, flatness_callback(model=model), module=module)
    assert module.training_steps == 0


def test_missing_forward_is_refused_by_name_if_no_step_shows_the_network(tmp_path):
    class Bare(WithoutForward, WithoutValidation):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(F.linear(batch[0][:, 0, 0, :5], self.net.fc.weight), batch[1])

    with pytest.raises(lf.FlatnessError, match=r"Bare has no forward\(\).*model=.*these submodules: 'net'"):
        fit(tmp_path, flatness_callback(data="train"), module=Bare(), data=loaders()[:1])


class Normalises(Steps):
    def logits(self, x):
        return self((x - 0.3) / 0.5)


class CallsTheNetwork(WithoutForward, Steps):
    def logits(self, x):
        return self.net(x)


class BorrowsForward(WithoutForward, Steps):
    def __init__(self):
        super().__init__()
        self.forward = self.net.forward


class TakesTheBatch(Steps):
    def forward(self, batch):
        return self.net(batch["picture"])

    def logits(self, x):
        return self({"picture": x, "scale": 2.0})


class TakesKeywords(Steps):
    def forward(self, **inputs):
        return {"logits": self.net(inputs["picture"]), "hidden": inputs["picture"]}

    def logits(self, x):
        return self(picture=x)["logits"]


class ReturnsMore(Steps):
    """Its forward returns no logits, but calls one network that does."""

    def forward(self, x):
        return {"predicted": self.net(x).softmax(1), "entropy": 1.0}

    def logits(self, x):
        return self(x)["predicted"]


class ChangesItsInputs(Steps):
    def forward(self, x):
        return self.net(x.mul_(0.5))

    def logits(self, x):
        return self(x)


class Augments(Steps):
    def logits(self, x):
        return self(x.flip(3)) + self(x) + self(x.flip(2))


NORMALISED = {"Normalises": lambda x: (x - 0.3) / 0.5, "ChangesItsInputs": lambda x: 0.5 * x}
WAYS = [
    Normalises,
    CallsTheNetwork,
    BorrowsForward,
    TakesTheBatch,
    TakesKeywords,
    ReturnsMore,
    ChangesItsInputs,
    Augments,
]


@guards("model.call:Call.copied", returns=None)
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
def test_what_the_step_gives_to_the_network_is_measured(tmp_path, make, sanity, live):
    data, callback = loaders(), flatness_callback(live=live)
    module = run_without_a_trace(tmp_path, make, callback, data=data, num_sanity_val_steps=sanity)
    prepare = NORMALISED.get(make.__name__, lambda x: x)
    wanted = lf.measure_flatness(module.net, [(prepare(x), y) for x, y in data[1]])
    assert_reports_equal(callback.report, wanted)


class Unbatched(Steps):
    """Its batches do not say what their inputs are."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        labels = batch.pop("label")
        super().validation_step((batch["one"] - batch["other"], labels), batch_idx)


class Pairs(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        x, y = dataset(22, 1)[index]
        return {"one": 2 * x, "other": x, "label": y}


@pytest.mark.parametrize("options", [{}, {"batch_fn": lambda batch: (None, batch["label"])}], ids=["alone", "targets"])
def test_a_step_that_takes_its_batch_apart(tmp_path, options):
    callback, module = flatness_callback(**options), Unbatched()
    fit(tmp_path, callback, module=module, data=(loaders()[0], DataLoader(Pairs(), 8)))
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[1]))


class CallsNothing(Steps):
    def logits(self, x):
        return torch.ones(len(x), 3)


@guards("callbacks/shown.py", "if differs and asked.is_given:", "if False:")
@pytest.mark.parametrize("data", ["val", "train"])
def test_inputs_of_batch_fn_that_the_step_does_not_give(tmp_path, data):
    callback, module = flatness_callback(data=data, batch_fn=lambda batch: (batch[0], batch[1])), Normalises()
    with pytest.warns(UserWarning, match="other inputs than the validation step") as caught:
        fit(tmp_path, callback, module=module)
    assert any("return (None, targets)" in str(one.message) for one in caught) == (data == "val")
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[data == "val"]))


def test_a_module_as_model_is_refused(tmp_path):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match="model= must not be a module. Give the name of an attribute"):
        fit(tmp_path, flatness_callback(model=module.net), module=module)


@pytest.mark.parametrize("data", ["val", "train"])
def test_a_step_that_calls_no_network(tmp_path, data):
    callback, module = flatness_callback(data=data), CallsNothing()
    with pytest.warns(UserWarning, match="cannot see what the network is given.*batch_fn="):
        fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[data == "val"]))


@pytest.mark.parametrize("name", ["net", "teacher"])
def test_the_name_decides(tmp_path, name):
    callback, module = flatness_callback(model=name), TwoNetworks()
    fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(getattr(module, name), loaders()[1]), prefix="")


class NormalisesInPlace(Steps):
    def logits(self, x):
        return self(x.sub_(0.3).div_(0.5))


@guards("model.call:same_tensors", returns=True, ids="Normalises-0-train")
@pytest.mark.parametrize("data", ["train", "given"])
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("make", [Normalises, NormalisesInPlace])
def test_data_that_no_step_prepares(tmp_path, make, data, sanity):
    """Validation shows that the network is given other tensors than the batch's."""
    source = loaders()[1] if data == "given" else "train"
    with pytest.raises(lf.FlatnessError, match="gives other tensors to the network.*batch_fn="):
        fit(tmp_path, flatness_callback(data=source), module=make(), num_sanity_val_steps=sanity)
    callback, module, (train, val) = flatness_callback(data=source, batch_fn=normalised), make(), loaders()
    fit(tmp_path, callback, module=module, data=(train, val), num_sanity_val_steps=sanity)
    batches = val if data == "given" else train
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, map(normalised, batches)))


def normalised(batch):
    return (batch[0] - 0.3) / 0.5, batch[1]


@pytest.mark.parametrize("data", ["train", "val"])
def test_data_that_no_step_prepares_for_the_spectrum(tmp_path, data):
    with pytest.raises(lf.FlatnessError, match="SpectrumCallback: .*gives other tensors.*batch_fn="):
        fit(tmp_path, lf.SpectrumCallback(data=data), module=Normalises(), num_sanity_val_steps=1)
