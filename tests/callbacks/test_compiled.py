"""Every form of torch.compile: the same numbers and names as uncompiled, and not one graph compiled on our account."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.measure.measurement import Measurement
from tests.callbacks.compare import assert_same, end_of
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.guarding import guards


class Counting:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def late(module, backend):
    """In configure_model, which runs after the setup of callbacks."""

    def configure_model():
        if not hasattr(module.net, "_orig_mod"):
            module.net = torch.compile(module.net, backend=backend)

    module.configure_model = configure_model


FORMS = {  # change the module, or return another
    "submodule": lambda module, backend: setattr(module, "net", torch.compile(module.net, backend=backend)),
    "submodule in place": lambda module, backend: module.net.compile(backend=backend),
    "layer": lambda module, backend: setattr(module.net, "conv2", torch.compile(module.net.conv2, backend=backend)),
    "layer in place": lambda module, backend: module.net.conv2.compile(backend=backend),
    "whole": lambda module, backend: torch.compile(module, backend=backend),
    "whole in place": lambda module, backend: module.compile(backend=backend),
    "late": late,
}


def run(folder, form, *callbacks, **options):
    """The end of a compiled run, and how many graphs were compiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    backend, module = Counting(), Classifier()
    trainer = quiet_trainer(folder, *callbacks, max_epochs=3, **options)
    changed = FORMS[form](module, backend)
    trainer.fit(module if changed is None else changed, *loaders())
    return end_of(trainer, module), backend.graphs, module


class LogsOneNumber(Callback):
    """What Lightning keeps of logged numbers is a part of the whole module's graphs, so any logging adds some."""

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.log("number", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "sanity", "guarded"),
    [
        *((form, 2, False) for form in FORMS),
        *[("submodule", 0, False), ("submodule", 2, True), ("submodule in place", 0, True)],
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.compile runs the code that calls it")
def test_compiled(tmp_path, form, sanity, guarded):
    """With hooks guarded, a hook that is left on a compiled module, if only for a time, costs a compilation."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
        bare, graphs, _ = run(tmp_path, form, LogsOneNumber(), num_sanity_val_steps=sanity)
        callback = lf.FlatnessCallback(layers="all", summary=False)
        end, graphs_with_callback, module = run(tmp_path, form, callback, num_sanity_val_steps=sanity)
    # The steps of a whole module do not go through its __call__, and older torch leaves modules of its own alone.
    assert graphs > 0 or form in ("whole in place", "layer in place")
    assert graphs_with_callback == graphs
    assert_same(end, bare)
    assert list(callback.report.layers) == ["net.conv1", "net.conv2", "net.fc"]
    assert all("_orig_mod" not in key for record in callback.history for key in record)
    plain = Classifier()
    plain.load_state_dict({key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()})
    wanted = lf.measure_flatness(plain, loaders()[1], layers="all")
    for name, layer in wanted.layers.items():
        assert_close(callback.report.layers[name].block_traces, layer.block_traces, rtol=1e-5, atol=1e-8)


class Hooked(Callback):
    """Puts a hook on the network for a forward pass of its own, which runs compiled."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        handle = pl_module.net.conv2.register_forward_hook(lambda *_: None)
        pl_module.net(batch[0])
        handle.remove()


@pytest.mark.slow
def test_a_compilation_on_our_account_would_be_seen(tmp_path):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        _, graphs, _ = run(tmp_path, "submodule")
        _, with_hook, _ = run(tmp_path, "submodule", Hooked())
    assert with_hook > graphs


@pytest.mark.parametrize(
    "layers",
    [
        "_orig_mod.conv2",
        "net.conv2",
        pytest.param("net._orig_mod.conv2", marks=pytest.mark.slow),
        pytest.param("net.c*2", marks=pytest.mark.slow),
    ],
)
def test_layers_may_be_named_with_or_without_what_compiling_adds(tmp_path, layers):
    model = "net" if layers.startswith("_orig_mod") else None
    callback = lf.FlatnessCallback(layers=layers, model=model, summary=False)
    run(tmp_path, "submodule", callback)
    assert [name.removeprefix("net.") for name in callback.report.layers] == ["conv2"]


def validated(folder, form, precision, *callbacks, **options):
    """Graphs that are compiled in a validation of two loaders. Other sizes of batches would be compiled anew."""
    torch.compiler.reset()
    backend, module = Counting(), Classifier()
    FORMS[form](module, backend)
    batches = loaders(val_samples=32)[1]
    quiet_trainer(folder, *callbacks, precision=precision, **options).validate(
        module, [batches, batches], verbose=False
    )
    return backend.graphs


@guards(
    "callbacks/running.py",
    "if reason and self.measurement.observer.repeats:",
    "if False:",
    ids="submodule in place-32-true",
)
@guards("layers/observer.py", "return outcome.compiled", 'return ""', ids="submodule in place-bf16-mixed")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("form", ["submodule", "submodule in place"])
def test_passes_of_our_own_run_as_those_of_compiled_networks(tmp_path, monkeypatch, told, form, precision):
    """In the precision of validation, without gradients, and with nothing compiled for them."""
    certified, update = [], Measurement.update

    def with_note(self, *batch, **options):
        certified.append(batch)
        update(self, *batch, **options)

    monkeypatch.setattr(Measurement, "update", with_note)
    callback, plain = lf.FlatnessCallback(), lf.FlatnessCallback()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        graphs = validated(tmp_path, form, precision)
        assert validated(tmp_path, form, precision, callback) == graphs > 0
    assert certified == []
    assert "is compiled" in " ".join(told)
    batches = loaders(val_samples=32)[1]
    quiet_trainer(tmp_path, plain, precision=precision).validate(Classifier(), batches, verbose=False)
    assert callback.report.precision == plain.report.precision
    assert callback.report.precision == ("float32" if precision == "32-true" else "bfloat16")
    block_traces, wanted = (one.report.layers["net.conv2"].block_traces for one in (callback, plain))
    assert_close(block_traces, wanted, rtol=1e-5, atol=1e-8)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **keywords):
        return self.module(*arguments, **keywords)


class CalledThroughWrapper(SingleDeviceStrategy):
    """Runs steps as DDP does: it calls the wrapped LightningModule, whose forward Lightning replaces by the step."""

    def __init__(self):
        super().__init__("cpu")

    def setup(self, trainer):
        super().setup(trainer)
        self.model = Wrapper(self.model)


@guards(
    "callbacks/step_watch.py",
    "is_step = module is self._pl_module and",
    "is_step = False and",
    ids="val-None",
)
@guards("callbacks/step_watch.py", "self._around = watched", "self._around or watched", ids="val-net")
@pytest.mark.parametrize("model", [None, pytest.param("net", marks=pytest.mark.slow)])
@pytest.mark.parametrize("data", ["val", pytest.param("train", marks=pytest.mark.slow)])
def test_a_compiled_step_is_not_taken_for_a_call_of_the_network(tmp_path, data, model):
    callback = lf.FlatnessCallback(data=data, model=model, layers="*conv2", summary=False)
    plain, unseen = Classifier(), "torch.compile runs the code that calls it"
    if data == "val":
        with pytest.warns(UserWarning, match=unseen):
            graphs = validated(tmp_path, "whole in place", "32-true", callback, strategy=CalledThroughWrapper())
        assert validated(tmp_path, "whole in place", "32-true", strategy=CalledThroughWrapper()) == graphs > 0
        measured = loaders(val_samples=32)[1]
    else:
        with pytest.warns(UserWarning, match=unseen):
            end, graphs, module = run(tmp_path, "whole in place", callback, strategy=CalledThroughWrapper())
        bare, graphs_without, _ = run(tmp_path, "whole in place", strategy=CalledThroughWrapper())
        assert_same(end, bare)
        assert graphs == graphs_without > 0
        plain.load_state_dict(module.state_dict())
        measured = loaders()[0]
    (layer,) = callback.report.layers.values()
    (wanted,) = lf.measure_flatness(plain, measured).layers.values()
    assert_close(layer.block_traces, wanted.block_traces, rtol=1e-5, atol=1e-8)


class CallsCompiledCode(Classifier):
    """Its steps call the network in a compiled function, or a compiled network that is no submodule."""

    def __init__(self, kind, backend):
        super().__init__()
        if kind == "function":
            self.call = torch.compile(lambda x: self.net(x), backend=backend)
        else:
            self.hidden = [torch.compile(self.net, backend=backend)]
            self.call = lambda x: self.hidden[0](x)

    def forward(self, x):
        return self.call(x)

    def validation_step(self, batch, batch_idx):
        self.call(batch[0])


@guards("model/call.py", "            count_traced()\n", "", ids=("train-list", "val-list"))
@pytest.mark.parametrize("kind", ["list", "function"])
@pytest.mark.parametrize("data", ["val", "train"])
def test_compiled_code_that_calls_the_network_is_watched_once(tmp_path, data, kind):
    graphs = {}
    for watched in (False, True):
        torch.compiler.reset()
        backend, callback = Counting(), lf.FlatnessCallback(data=data, layers="*conv2", summary=False)
        module = CallsCompiledCode(kind, backend)
        trainer = quiet_trainer(tmp_path, *([callback] if watched else []), max_epochs=3)
        with pytest.warns(UserWarning, match="torch.compile runs the code that calls it") if watched else nullcontext():
            trainer.fit(module, *loaders())
        graphs[watched] = backend.graphs
    assert 0 < graphs[True] <= graphs[False] + 2
    (layer,) = callback.report.layers.values()
    plain = Classifier()
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if key in plain.state_dict()})
    (wanted,) = lf.measure_flatness(plain, loaders()[data == "val"], layers="*conv2").layers.values()
    assert_close(layer.block_traces, wanted.block_traces, rtol=1e-5, atol=1e-8)
