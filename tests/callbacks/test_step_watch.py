"""Watching a step: it goes on, keeps nothing in memory, and shows the network."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.callbacks.network import Network
from lightning_flatness.callbacks.step_watch import StepWatch
from tests.callbacks.flatness_runs import assert_reports_equal, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, Net, loaders
from tests.callbacks.several_networks import (
    Averages,
    CallsItself,
    Compares,
    Crops,
    Distils,
    HeadInTheStep,
    LossOfFeatures,
    LossWithWeights,
    PartsInTheStep,
    PartsOfTheNetwork,
    Probes,
    Prototypes,
    StagesOfTheNetwork,
    TwoHeadsInTheStep,
    TwoNetworks,
    WeighsLosses,
)
from tests.guarding import guards


class Counts(nn.Linear):
    def forward(self, x, steps):
        return sum(super(Counts, self).forward(x) for _ in steps)


def with_another(other):
    module = Classifier()
    module.other = other
    return module


def test_arguments_of_other_modules_do_not_stop_the_step():
    module = with_another(Counts(3, 3))
    with StepWatch(module, Network(module.net)):
        assert module.other(module.net(torch.zeros(2, 1, 8, 8)), range(3)).shape == (2, 3)


@guards("callbacks/step_watch.py", "[] if self.several else [*self.within, heard]", "[*self.within, heard]", ids="None")
@pytest.mark.parametrize("name", [None, "net"])
def test_a_step_keeps_no_activations(name):
    module, outputs, alive = with_another(Net() if name else None), [], []
    watched = module.other if name else module.net
    for layer in (watched.conv1, watched.conv2):
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(weakref.ref(output)))
    watched.fc.register_forward_pre_hook(lambda *_: alive.extend(output() is not None for output in outputs))
    with torch.no_grad(), StepWatch(module, Network(module.net) if name else None):
        for network in dict.fromkeys([module.net, watched]):
            network(torch.zeros(2, 1, 8, 8))
    assert alive == [False, False]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Net(), Net()

    def forward(self, x):
        return [self.one(x), self.other(x)]


def test_a_network_without_logits_is_refused_although_its_parts_return_some():
    module, x = Classifier(Two()), torch.zeros(2, 1, 8, 8)
    with StepWatch(module, None) as watch:
        module.net(x)
    with pytest.raises(lf.BatchError, match="'net': The model returns a list"):
        watch.found(x)


WHOLE = (
    r"They are parts of 'net'. If 'net' returns the logits of the step, give model='net'[.].*a forward\(\).*parts[.]"
)
HEAD = r"gives the output of {} to '{}', which has weights of its own. Call one module.* a forward\(\) .*model={}[.]$"
REFUSED = {
    PartsInTheStep: r"calls 'body' and 'head'[.] Not all of these return logits.*Call one module in the step",
    PartsOfTheNetwork: r"calls 'net.body' and 'net.fc'[.] Not all of these return logits.* " + WHOLE,
    StagesOfTheNetwork: rf"gives the output of 'net.body.0' to 'net.body.1', which has .*{WHOLE}$",
    Averages: r"calls a Net that .* is no submodule of the LightningModule.* e.g. model=lambda module: module",
    Distils: r"calls several networks, 'net' and 'teacher'. Name the one to measure: model='teacher' or model='net'[.]",
    TwoNetworks: r"calls several networks, 'net' and 'teacher'. Name the one to measure: model='net' or model=",
    CallsItself: r"'net' and the LightningModule itself. Name .*: model='net' or model=lambda module: module[.]",
    HeadInTheStep: HEAD.format("'net'", "head", "'net'"),
    TwoHeadsInTheStep: r"gives the output of 'net' to 'head' and 'heads.0', which have weights of their own.*model=",
    LossWithWeights: HEAD.format("'net'", "head", "'net'"),
    LossOfFeatures: HEAD.format("the LightningModule itself", "loss", "lambda module: module"),
    Probes: r"calls 'net' and 'head' on different inputs.*forward\(\) .* 'head' is the logits, give model='head'[.]$",
    Compares: r"calls the LightningModule itself and 'texts' on different inputs.* give model='texts'[.]$",
    Crops: r"calls the LightningModule itself on 2 different inputs, none of which is the batch's own.*batch_fn=",
}


class Helped(Classifier):
    """Holds an object that has a weak reference to it."""

    def __init__(self):
        super().__init__()
        self.helper = SimpleNamespace(module=weakref.proxy(self))


def test_weak_references_are_no_modules_outside(tmp_path):
    callback = flatness_callback()
    fit(tmp_path, callback, module=Helped())
    assert list(callback.report.layers) == ["net.conv2"]


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


# Calls that leave open which of them to measure, and what the error says of them.
UNCLEAR = {
    "arguments": (
        lambda net, x: (net(x, scale=2.0), net(x, scale=3.0)),
        "'net' 2 times on the same tensors, but with other arguments",
    ),
    "equal": (lambda net, x: (net(x + 1), net(x + 1)), "'net' 2 times on equal tensors that are not the same object"),
    "parts": (lambda net, x: [net(part) for part in x.split(1)], "'net' on 4 different inputs, none of which is the"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_the_error_says_how_calls_differ(kind):
    (calls, says), x = UNCLEAR[kind], torch.rand(4, 2)
    module = Classifier(Scaled(2, 3))
    with StepWatch(module, None) as watch:
        calls(module.net, x)
    with pytest.raises(lf.FlatnessError, match=f"calls {says}.*batch_fn="):
        watch.found(x)


def test_an_example_of_batch_fn_is_given_only_for_inputs_that_are_known():
    module, x = Classifier(Scaled(2, 3)), torch.rand(4, 2)
    with StepWatch(module, None) as watch:
        for part in (x, x + 1, x + 2):
            module.net(part)
    with pytest.raises(lf.FlatnessError, match="on 3 different inputs. The batch does not show") as error:
        watch.found(None)
    assert "batch[1]" not in str(error.value)


@guards("callbacks.step_watch:StepWatch._refuse_several", returns=None, ids="TwoNetworks")
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_not_sure_is_refused_in_the_sanity_check(tmp_path, make):
    module = make()
    with pytest.raises(lf.FlatnessError, match=REFUSED[make]):
        fit(tmp_path, flatness_callback(), module=module, num_sanity_val_steps=1)
    assert module.training_steps == 0


def test_the_part_that_returns_the_logits_is_measured_on_its_own_inputs(tmp_path):
    callback, module = flatness_callback(model="head", layers="classifier"), Probes()
    fit(tmp_path, callback, module=module)
    features = [(module.net.eval()(x).detach().relu(), y) for x, y in loaders()[1]]
    wanted = lf.measure_flatness(module.head, features, layers="classifier")
    assert callback.report.hessian_trace == pytest.approx(wanted.hessian_trace, rel=1e-5)


@guards("callbacks.watched:weighs_losses", returns=False)
@pytest.mark.parametrize("name", [None, "net"])
def test_a_module_that_weighs_losses_is_no_network(tmp_path, name):
    callback, module = flatness_callback(model=name), WeighsLosses()
    fit(tmp_path, callback, module=module)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, loaders()[1]), prefix="" if name else "net.")


class Around(nn.Module):
    """A network around another, which returns what this one does."""

    def __init__(self, net):
        super().__init__()
        self.inner = net

    def forward(self, x):
        return self.inner(x)


def watched(other, step):
    module, x = Classifier(), torch.zeros(2, 1, 8, 8)
    module.others = [SimpleNamespace(module=other(module))]
    parts = [*module.modules(), *module.others[0].module.modules()]
    before = [vars(part).get("forward") for part in parts]
    with StepWatch(module, None) as watch:
        step(module, module.others[0].module, x)
    assert [vars(part).get("forward") for part in parts] == before
    return watch, x


@guards("callbacks/step_watch.py", "del self._calls[before:]", "pass", ids="head")
@pytest.mark.parametrize(
    "other",
    [
        lambda _: Net(),
        lambda _: Around(Net()),
        lambda _: torch.compile(Net(), backend="eager"),
        lambda module: nn.Sequential(module.net, nn.Linear(3, 3)),
    ],
    ids=["plain", "within", "compiled", "head"],
)
def test_a_network_that_is_no_submodule_is_refused(other):
    watch, x = watched(other, lambda module, other, x: other(x))
    assert not watch.is_empty
    with pytest.raises(lf.FlatnessError, match="model=lambda module"):
        watch.found(x)


@pytest.mark.parametrize(
    ("other", "step"),
    [
        (lambda _: Net(), lambda module, other, x: other(x) - module.net(x)),
        (lambda module: Around(module.net), lambda module, other, x: other(x)),
    ],
    ids=["teacher", "wrapper"],
)
def test_modules_beside_the_submodules_do_not_hide_the_network(other, step):
    watch, x = watched(other, step)
    assert watch.found(x).network.prefix == "net"


@pytest.mark.parametrize(
    ("other", "step"),
    [
        (lambda _: Prototypes(), lambda module, other, x: other(x.flatten(1)[:, :3], torch.zeros(2).long())),
        (lambda _: nn.Flatten(), lambda module, other, x: other(x)),
    ],
    ids=["loss", "no weights"],
)
def test_a_module_that_is_no_submodule_and_no_network(other, step):
    assert watched(other, step)[0].is_empty


@guards("callbacks.step_watch:StepWatch._warn_of_others", returns=None)
@pytest.mark.parametrize(
    ("make", "model", "other"),
    [
        (HeadInTheStep, "net", "head"),
        (Probes, "net", "head"),
        (Compares, "net", "texts"),
        (LossOfFeatures, lambda module: module, "loss"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_named_network_whose_output_is_an_embedding(tmp_path, make, model, other):
    callback, module = flatness_callback(model=model), make()
    with pytest.warns(UserWarning, match=f"calls '{other}', which has weights of its own, after .*model="):
        fit(tmp_path, callback, module=module)
    wanted = lf.measure_flatness(module.net, loaders()[1])
    assert_reports_equal(callback.report, wanted, prefix="" if model == "net" else "net.")
