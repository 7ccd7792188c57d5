"""Validation with its forward passes observed is the same validation, whatever the network does in them."""

import copy
import gc
import inspect
import io
import warnings
import weakref

import lightning as L
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.callbacks import running
from lightning_flatness.callbacks.data.sources import ValidationBatches
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same, global_modes, module_state, random_states
from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer
from tests.callbacks.training_runs import (
    HAS_WEIGHT_AVERAGING,
    assert_identical,
    averaged_weights,
    end_of_training,
    seed_everything,
)

OBSERVES = "observes the forward passes"
OWN = "in forward passes of its own"


class Module(Classifier):
    """Notes what its forward returns in validation, and in which modes it is left."""

    def __init__(self, net):
        super().__init__(net)
        self.noted = []

    def step(self, x):
        return self(x)

    def note(self, output):
        tensors = list(output.values()) if isinstance(output, dict) else [output]
        kinds = [(tensor.requires_grad, tensor.is_inference(), tensor.is_leaf) for tensor in tensors]
        self.noted.append([[tensor.detach().clone() for tensor in tensors], kinds, global_modes()])
        return tensors[0]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self.note(self.step(batch[0]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).double().mean(), batch_size=len(batch[1]))


@pytest.fixture
def told(monkeypatch):
    """What is said about forward passes."""
    lines = []
    monkeypatch.setattr(running, "rank_zero_info", lines.append)
    return lines


@pytest.fixture(autouse=True)
def nothing_is_kept():
    yield
    networks.KEPT.clear()


def validated(folder, make, *callbacks, trainer_options=None, val_samples=22):
    """A validation, and everything that it leaves behind."""
    seed_everything()
    module = make()
    loader = loaders(dtype=torch.float64, val_samples=val_samples)[1]
    trainer = quiet_trainer(folder, *callbacks, **(trainer_options or {}))
    trainer.validate(module, loader, verbose=False)
    logged = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("flatness")}
    return {"noted": module.noted, "logged": logged, "random": random_states(), "modes": global_modes()} | module_state(
        module
    )


def assert_as_without(folder, make, told, says, *, trainer_options=None, val_samples=22, **options):
    """The run is the same without the callback; its number that of passes of its own; what is used is said once."""
    run = {"trainer_options": trainer_options, "val_samples": val_samples}
    expected = validated(folder, make, **run)
    own = lf.FlatnessCallback(live=False, **options)
    validated(folder, make, own, **run)
    assert told == []
    callback = lf.FlatnessCallback(**options)
    assert_same(validated(folder, make, callback, **run), expected)
    for name, layer in own.report.layers.items():
        assert_close(callback.report.layers[name].block_traces, layer.block_traces, rtol=1e-9, atol=0)
        assert_close(
            callback.report.layers[name].relative_flatness, layer.relative_flatness, rtol=1e-9, atol=0, equal_nan=True
        )
    assert callback.report.num_samples == own.report.num_samples
    assert says in told[-1]
    assert len(told) <= 2
    return callback


# ---------------------------------------------------------------------------------------------------- what networks do

OBSERVED = [
    "Plain",
    "Gate",
    "Mask",
    "Residual",
    "InPlaceActivation",
    "InPlaceResidual",
    "NumpyUpstream",
    "Checkpointed",
    "Branches",
    "NoGradUpstream",
    "WithoutClassifier",
    "ConvolutionalClassifier",
    "Dropouts",
    "EmbeddingsAfter",
    "KeepsEmbeddings",
    "LooksAtKernels",
]

NOT_OBSERVED = {
    "GateFromBefore": "Inference tensors cannot be saved for backward",
    "InPlaceUpstream": "Inplace update to inference tensor",
    "NumpyAside": "Can't call numpy",
    "ScriptedTail": "module 'net.activation' is TorchScript",
    "KeepsAttribute": "keeps tensors",
    "KeepsInList": "keeps tensors",
    "KeepsInDict": "keeps tensors",
    "KeepsOutside": "keeps tensors",
    "KeepsInDataclass": "keeps tensors",
    "KeepsInHook": "keeps tensors",
    "WritesAttribute": "keeps tensors",
    "WritesBuffer": "writes features to a buffer",
    "AssignsBuffer": "writes features to a buffer",
    "Embeddings": "returns more than what its classifier makes",
    "AsksForGradients": "returns other values",
    "ChangesEmbeddings": "",
    "CallsTwice": "not measured by the closed form",
}

NOT_MEASURED = {
    "Out": "out=... arguments",
    "Numpy": "Can't call numpy",
    "NoGradTail": "do not depend on its output",
    "NoGradLayer": "runs under torch.no_grad",
}


def make(name, module_class=Module):
    return lambda: module_class(getattr(networks, name)())


def test_every_network_is_tried():
    classes = [value for value in vars(networks).values() if isinstance(value, type)]
    names = {found.__name__ for found in classes if issubclass(found, networks.Plain)}
    elsewhere = {"CopiesKernels", "InferenceLayer", "TwoLayers", "TwoInTurn", "Bomb", "Moody"}
    assert names == {*OBSERVED, *NOT_OBSERVED, *NOT_MEASURED} | elsewhere


@pytest.mark.parametrize("name", OBSERVED)
def test_network_that_can_be_observed(tmp_path, told, name):
    assert_as_without(tmp_path, make(name), told, OBSERVES)
    assert len(told) == 1


def test_network_that_copies_its_kernels(tmp_path, told):
    # The trial is made on tensors, which are copied by other functions than parameters.
    assert_as_without(tmp_path, make("CopiesKernels"), told, "does something else with a kernel")


@pytest.mark.parametrize("name", NOT_OBSERVED)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_network_that_cannot_be_observed(tmp_path, told, name):
    assert_as_without(tmp_path, make(name), told, OWN)
    assert len(told) == 1
    assert NOT_OBSERVED[name] in told[0]


@pytest.mark.parametrize("name", NOT_MEASURED)
def test_network_that_cannot_be_measured(tmp_path, told, name):
    expected = validated(tmp_path, make(name))
    callback = lf.FlatnessCallback(on_error="warn")
    with pytest.warns(UserWarning, match=NOT_MEASURED[name]):
        assert_same(validated(tmp_path, make(name), callback), expected)
    assert callback.report is None
    assert told == []


@pytest.mark.parametrize("name", ["Plain", "Residual", "GateFromBefore", "WithoutClassifier"])
def test_without_inference_mode(tmp_path, told, name):
    """A gate from before the layer is no inference tensor then."""
    assert_as_without(tmp_path, make(name), told, OBSERVES, trainer_options={"inference_mode": False})


def test_network_that_enters_and_leaves_inference_mode(tmp_path, told):
    options = {"inference_mode": False}
    expected = validated(tmp_path, make("InferenceLayer"), trainer_options=options)
    callback = lf.FlatnessCallback(on_error="warn")
    with pytest.warns(UserWarning, match="do not depend on its output"):
        assert_same(validated(tmp_path, make("InferenceLayer"), callback, trainer_options=options), expected)


@pytest.mark.parametrize(
    ("name", "inference_mode", "says"),
    [
        ("TwoInTurn", True, OBSERVES),
        ("TwoInTurn", False, OBSERVES),
        ("TwoLayers", False, OBSERVES),
        ("TwoLayers", True, OWN),
    ],
)
def test_two_layers_at_once(tmp_path, told, name, inference_mode, says):
    """Side by side, in inference mode, the second one would read what can be in no graph."""
    options = {"layers": ["net.conv", "net.side"], "trainer_options": {"inference_mode": inference_mode}}
    callback = assert_as_without(tmp_path, make(name), told, says, **options)
    assert {layer.info.method for layer in callback.report.layers.values()} == {"closed_form"}
    assert len(callback.report.layers) == 2


def test_diagonals(tmp_path, told):
    assert_as_without(tmp_path, make("Plain"), told, OBSERVES, measures=("hessian_trace",))


def test_subsets(tmp_path, told):
    assert_as_without(tmp_path, make("Plain"), told, "takes parts of batches", max_samples=10)
    assert len(told) == 1


def test_batches_that_are_reshaped(tmp_path, told):
    """The function may change the batch, so it is called when the step has had it, and once."""
    seen = []

    def reshape(batch):
        seen.append(len(batch))
        return batch.pop(0), batch.pop(0)

    assert_as_without(tmp_path, make("Plain"), told, "batch_fn=", batch_fn=reshape)
    assert seen == [2] * 6  # three batches of each measurement


def test_a_reason_of_one_measurement_is_not_one_of_the_next(tmp_path, told):
    class CallsAgainAtFirst(Module):
        def step(self, x):
            return self(x) if self.trainer.current_epoch or self.trainer.sanity_checking else self(x) + 0 * self(x)

    module, callback = CallsAgainAtFirst(networks.Plain()), lf.FlatnessCallback(summary=False)
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(module, *loaders(dtype=torch.float64))
    assert ["more than once" in line for line in told] == [False, True, False]
    assert OBSERVES in told[2]


def test_a_difference_would_be_seen(tmp_path, told):
    """The comparison fails for a validation that is another in its last bit, and for outputs that need gradients."""

    class Another(Module):
        def step(self, x):
            return self(x) * (1 + 2**-52)

    expected = validated(tmp_path, make("Plain"))
    with pytest.raises(AssertionError, match="noted, 0, 0"):
        assert_same(validated(tmp_path, make("Plain", Another)), expected)

    class WithGradients(Module):
        def step(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                return self(x.clone())

    with pytest.raises(AssertionError, match="noted, 0, 1"):
        assert_same(validated(tmp_path, make("Plain", WithGradients)), expected)


# -------------------------------------------------------------------------------------------- what validation steps do


class CallsNetwork(Module):
    def step(self, x):
        return self.net(x)


class CallsPart(CallsNetwork):
    """What its step calls is not all of the network."""

    def forward(self, x):
        return self.net(x).clone()


class CallsForward(Module):
    def step(self, x):
        return self.forward(x)


class ChangesInputs(Module):
    def step(self, x):
        return self(x + 0.0)


class CallsAgain(Module):
    def step(self, x):
        first = self(x)
        return (first + self(x)) / 2


class CallsOnOthersToo(Module):
    """Test-time augmentation."""

    def step(self, x):
        flipped = self(x.flip(3))
        return (self(x) + flipped) / 2


class Adversarial(Module):
    def step(self, x):
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).square().sum(), x)
        return self((x + 0.01 * gradient.sign()).detach())


class WithGradients(Module):
    def step(self, x):
        with torch.enable_grad():
            return self(x)


class Autocast(Module):
    def step(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self(x).double()


class HooksInStep(Module):
    """Takes features by a hook that is there in the step only."""

    def step(self, x):
        features = []
        handle = self.net.norm.register_forward_hook(lambda module, arguments, output: features.append(output))
        logits = self(x)
        handle.remove()
        self.noted.append(features[0].numpy().copy().sum())
        return logits


class TrainsDropout(Module):
    """Dropout stays on in validation, for the uncertainty."""

    def step(self, x):
        self.net.dropout.train()
        try:
            with torch.random.fork_rng():
                return self(x)
        finally:
            self.net.dropout.eval()


class AveragesWeights(Module):
    """Swaps weights for the time of the step, past autograd's counters."""

    name = "net.conv.weight"

    def step(self, x):
        weight = self.get_parameter(self.name).data
        before = weight.clone()
        weight.mul_(1.5)
        try:
            return self(x)
        finally:
            weight.copy_(before)


class AveragesClassifier(AveragesWeights):
    name = "net.fc.weight"


STEPS = {
    CallsForward: OBSERVES,
    CallsOnOthersToo: OBSERVES,
    CallsNetwork: OBSERVES,
    CallsPart: "does not call the network",
    ChangesInputs: "on other inputs",
    CallsAgain: "more than once",
    Adversarial: "on other inputs",
    Autocast: "runs under autocast",
    HooksInStep: "changes modes or hooks",
    AveragesWeights: "had another kernel",
    AveragesClassifier: "could not be used",
}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_validation_step(tmp_path, told, step):
    assert_as_without(tmp_path, make("Plain", step), told, STEPS[step])


class CopiesNetwork(Module):
    """Keeps copies of the network, and files of it, from within its step."""

    def __init__(self, net=None):
        super().__init__(net)
        self.kept = {}

    def step(self, x):
        self.kept |= {"copied before": copy.deepcopy(self.net), "saved before": saved(self.net)}
        logits = self(x)
        self.kept |= {"copied after": copy.deepcopy(self.net), "saved after": saved(self.net), "x": x, "y": logits}
        assert inspect.signature(self.net.forward) == inspect.signature(type(self.net).forward.__get__(self.net))
        return logits


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    return file.getvalue()


def test_copies_and_files_of_a_network_have_nothing_of_ours(tmp_path, told):
    assert_as_without(tmp_path, make("Plain", CopiesNetwork), told, OBSERVES)
    module = CopiesNetwork(networks.Plain())
    quiet_trainer(tmp_path, lf.FlatnessCallback()).validate(module, loaders(dtype=torch.float64)[1], verbose=False)
    x, y = module.kept["x"], module.kept["y"]
    for name in ("before", "after"):
        copied, file = module.kept[f"copied {name}"], module.kept[f"saved {name}"]
        assert b"lightning_flatness" not in file
        loaded = torch.load(io.BytesIO(file), weights_only=False)
        for network in (copied, loaded):
            assert network.forward == type(network).forward.__get__(network)
            with torch.no_grad():
                assert torch.equal(network(x), y)
        copied.fc = torch.nn.Identity()  # its own, not the network's
        with torch.no_grad():
            assert copied(x).shape != y.shape


def test_validation_step_with_gradients(tmp_path, told):
    options = {"inference_mode": False}
    assert_as_without(tmp_path, make("Plain", WithGradients), told, "records gradients", trainer_options=options)


def test_validation_step_with_dropout(tmp_path, told):
    assert_as_without(tmp_path, make("Dropouts", TrainsDropout), told, "changes modes or hooks")


def test_dropout_that_stays_in_training_mode(tmp_path, told):
    class Keeps(Module):
        def on_validation_model_eval(self):
            super().on_validation_model_eval()
            self.net.dropout.train()

    assert_as_without(tmp_path, make("Dropouts", Keeps), told, "'net.dropout' is in training mode")


def test_network_is_an_attribute(tmp_path, told):
    assert_as_without(tmp_path, make("Plain", CallsNetwork), told, OBSERVES, model="net")


# -------------------------------------------------------------------------------------------------------------- errors

WHERE = ["before the layer", "in the tail", "after the classifier"]


class Catches(Module):
    """The network raises an error in the second batch's step; the step goes on without it."""

    where, error = None, ValueError

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net.where, self.net.error = self.where if batch_idx == 1 else None, self.error
        try:
            super().validation_step(batch, batch_idx)
        except BaseException as error:
            assert str(error) == "bang"  # noqa: PT017
            fresh = torch.ones(2) * 2
            self.noted.append([global_modes(), fresh.is_inference(), fresh.requires_grad])
        finally:
            self.net.where = None


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", WHERE)
def test_error_that_is_caught(tmp_path, told, where, error):
    def make_one():
        module = Catches(networks.Bomb())
        module.where, module.error = where, error
        return module

    assert_as_without(tmp_path, make_one, told, "raised an error" if error is not RuntimeError else OWN)


class Throws(Catches):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net.where, self.net.error = self.where if batch_idx == 1 else None, self.error
        Module.validation_step(self, batch, batch_idx)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", WHERE)
def test_error_that_is_not_caught(tmp_path, told, where, error, inference_mode):
    module = Throws(networks.Bomb())
    module.where, module.error = where, error
    before = global_modes()
    hooks = module_state(module)["hooks"]
    trainer = quiet_trainer(tmp_path, lf.FlatnessCallback(), inference_mode=inference_mode)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error, match="bang|1"):
        trainer.validate(module, loaders(dtype=torch.float64)[1], verbose=False)
    assert global_modes() == before
    assert OBSERVES in told[0]
    assert module_state(module)["hooks"] == hooks
    assert "_Forward" not in repr(vars(module).get("forward"))
    assert not (torch.ones(1) * 2).is_inference()


class FailsUnderGradients(Module):
    """In one batch the network does what autograd does not allow."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net.moody = batch_idx == 1
        super().validation_step(batch, batch_idx)
        self.net.moody = False


def test_forward_that_fails_with_gradients_on_some_batches_only(tmp_path, told):
    assert_as_without(tmp_path, make("Moody", FailsUnderGradients), told, "Can't call numpy")
    assert OBSERVES in told[0]


# ---------------------------------------------------------------------------------------------------- around the steps


def test_two_callbacks(tmp_path, told):
    expected = validated(tmp_path, make("TwoInTurn"))
    reports = {}
    for is_live in (False, True):
        pair = [
            lf.FlatnessCallback([f"net.{name}"], prefix=f"flatness_{name}", live=is_live) for name in ("conv", "side")
        ]
        assert_same(validated(tmp_path, make("TwoInTurn"), *pair), expected)
        reports[is_live] = [callback.report.hessian_trace for callback in pair]
    assert_close(reports[True], reports[False], rtol=1e-9, atol=0)
    assert [OBSERVES in line for line in told] == [True, False]
    assert "another callback observes" in told[1]


class Clones(Module):
    """More than its network."""

    def forward(self, x):
        return self.net(x).clone()


@pytest.mark.parametrize("module", [Module, Clones])
def test_two_callbacks_one_within_the_other(tmp_path, told, module):
    expected = validated(tmp_path, make("Plain", module))
    pair = [lf.FlatnessCallback(), lf.FlatnessCallback(prefix="flatness_net", model="net")]
    assert_same(validated(tmp_path, make("Plain", module), *pair), expected)
    assert_close(pair[0].report.hessian_trace, pair[1].report.hessian_trace, rtol=1e-9, atol=0)
    assert "another callback observes" in told[-1]


@pytest.mark.parametrize(
    ("precision", "says"),
    [("bf16-mixed", "runs under autocast"), ("bf16-true", "weights in torch.bfloat16"), ("64-true", OBSERVES)],
)
def test_precision(tmp_path, told, precision, says):
    """Batches come as the network takes them."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    found, numbers = {}, {}
    for is_live in (None, False, True):
        callbacks = [] if is_live is None else [lf.FlatnessCallback(live=is_live)]
        seed_everything()
        module = Module(networks.Plain())
        loader = loaders(dtype=dtype)[1]
        quiet_trainer(tmp_path, *callbacks, precision=precision).validate(module, loader, verbose=False)
        found[is_live] = module.noted
        numbers[is_live] = [callback.report.hessian_trace for callback in callbacks]
    assert_same(found[True], found[None])
    assert_close(numbers[True], numbers[False], rtol=1e-9, atol=0)
    assert says in told[0]


def test_compiled_parts(tmp_path, told):
    def make_one():
        module = Module(networks.Plain())
        module.net.norm.compile(backend="eager")
        return module

    assert_as_without(tmp_path, make_one, told, "'net.norm' is compiled")


def test_compiled_by_lightning(tmp_path, told):
    def make_one():
        return torch.compile(Module(networks.Plain()), backend="eager")

    seed_everything()
    module = make_one()
    callback = lf.FlatnessCallback()
    quiet_trainer(tmp_path, callback).validate(module, loaders(dtype=torch.float64)[1], verbose=False)
    assert "is compiled" in told[0]


def test_backward_hooks(tmp_path, told):
    def make_one():
        module = Module(networks.Plain())
        module.net.norm.register_full_backward_hook(lambda *arguments: None)
        return module

    assert_as_without(tmp_path, make_one, told, "'net.norm' has backward hooks")


def test_one_sample_in_the_first_batch(tmp_path, told):
    callback = lf.FlatnessCallback()
    batches = [[4], [0, 1, 2, 3]]
    loader = DataLoader(dataset(5, dtype=torch.float64), batch_sampler=batches)
    quiet_trainer(tmp_path, callback).validate(Module(networks.Plain()), loader, verbose=False)
    assert OBSERVES in told[0]
    assert callback.report.num_samples == 5


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("is_live", [True, False])
def test_training_is_bit_identical(tmp_path, told, is_live, averaged):
    if averaged and not HAS_WEIGHT_AVERAGING:
        pytest.skip("this Lightning has no WeightAveraging")
    ends, reports = [], []
    for callbacks in ([], [lf.FlatnessCallback(live=is_live, summary=False)], [lf.FlatnessCallback(live=False)]):
        seed_everything()
        module = Module(networks.Dropouts())
        trainer = quiet_trainer(tmp_path, *callbacks, *([averaged_weights()] if averaged else []), max_epochs=3)
        trainer.fit(module, *loaders(dtype=torch.float64))
        ends.append((end_of_training(trainer, module), module.noted))
        reports += [[record["relative_flatness"] for record in callback.history] for callback in callbacks]
    assert_identical(ends[1][0], ends[0][0])
    assert_same(ends[1][1], ends[0][1])
    assert_close(*reports, rtol=1e-9, atol=0)
    assert len(told) == int(is_live)
    assert not is_live or OBSERVES in told[0]


def test_told_once_in_every_run(tmp_path, told):
    callback = lf.FlatnessCallback(summary=False)
    module = Module(networks.Plain())
    quiet_trainer(tmp_path, callback, max_epochs=3).fit(module, *loaders(dtype=torch.float64))
    assert len(told) == 1
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(module, *loaders(dtype=torch.float64))
    assert len(told) == 2


def test_test_steps(tmp_path, told):
    callback = lf.FlatnessCallback()
    quiet_trainer(tmp_path, callback).test(Module(networks.Plain()), loaders(dtype=torch.float64)[1], verbose=False)
    assert OBSERVES in told[0]
    assert callback.report.num_samples == 22


# -------------------------------------------------------------------------------------------------- what it really does


ROWS = []  # of every call


class Counted(networks.Plain):
    def forward(self, x):
        ROWS.append(len(x))
        return super().forward(x)


def rows_of(folder, *callbacks):
    ROWS.clear()
    quiet_trainer(folder, *callbacks).validate(
        Module(Counted()), loaders(val_samples=40, dtype=torch.float64)[1], verbose=False
    )
    return sorted(ROWS)


def test_which_forward_passes_are_made(tmp_path, monkeypatch, told):
    """Beside the user's only those of the trial, on a few samples: three to certify, two to compare."""
    monkeypatch.setattr("lightning_flatness.layers.trial.TRIAL", 3)
    users = rows_of(tmp_path)
    assert users == [8] * 5
    assert rows_of(tmp_path, lf.FlatnessCallback()) == [3] * 5 + users
    own = rows_of(tmp_path, lf.FlatnessCallback(live=False))
    assert own == [8] * (2 * 5 + 2)


def test_nothing_is_alive_after_a_batch(tmp_path, told):
    """Neither nodes of the graph nor features, with collections of garbage switched off."""
    alive, counts = [], []

    class Watched(networks.Plain):
        def tail(self, z, upstream):
            z = super().tail(z, upstream)
            if z.requires_grad and z.shape[0] == 8:
                alive.append((weakref.ref(z), weakref.ref(z.grad_fn.metadata.setdefault("token", Token()))))
            return z

        def before(self, x):
            counts.append(sum(one() is not None or token() is not None for one, token in alive[:-1]))
            return super().before(x)

    class Token:
        pass

    gc.collect()
    gc.disable()
    try:
        callback = lf.FlatnessCallback()
        module = Module(Watched())
        loader = loaders(val_samples=80, dtype=torch.float64)[1]
        quiet_trainer(tmp_path, callback).validate(module, loader, verbose=False)
    finally:
        gc.enable()
    assert OBSERVES in told[0]
    assert len(told) == 1
    assert len(alive) >= 10
    assert counts[-5:] == [0] * 5
    assert not any(one() is not None or token() is not None for one, token in alive)


@pytest.mark.parametrize("of", ["every batch", "no batch"])
def test_nothing_stays_after_a_batch(tmp_path, told, monkeypatch, of):
    """Also where nothing of a batch is measured, as where a sampler has filled it with samples of others."""
    if of == "no batch":
        monkeypatch.setattr(ValidationBatches, "after_step", lambda *_: iter(()))
    module = Module(networks.Plain())
    before = module_state(module)

    class Looks(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            found.append("_Forward" in repr(vars(pl_module).get("forward")))

        def on_validation_batch_end(self, *arguments):
            found.append("_Forward" in repr(vars(arguments[1]).get("forward")))

    found = []
    callback = lf.FlatnessCallback(on_error="warn")
    loader = loaders(dtype=torch.float64)[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*No sample was measured")
        quiet_trainer(tmp_path, callback, Looks()).validate(module, loader, verbose=False)
    assert len(told) == 1
    assert "observes" in told[0]
    assert found == [False] * 4
    assert module_state(module)["hooks"] == before["hooks"]


def test_features_that_are_kept_later_are_told(tmp_path, told):
    """A network that begins to keep them when the trial is over: then it is no longer observed."""

    class Late(networks.Plain):
        def tail(self, z, upstream):
            z = super().tail(z, upstream)
            if self.keeps:
                networks.KEPT[:] = [z]
            return z

    class Keeps(Module):
        def step(self, x):
            self.net.keeps = True
            try:
                return self(x)
            finally:
                self.net.keeps = False

    def make_one():
        module = Keeps(Late())
        module.net.keeps = False
        return module

    assert_as_without(tmp_path, make_one, told, "keeps tensors")


def test_own_passes_see_what_changed_since_the_trial(tmp_path, told):
    """Buffers that change when a step begins, as DDP exchanges them; the last batch has one sample."""

    class Exchanges(Module):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.net.norm.running_mean.fill_(0.5)
            super().validation_step(batch, batch_idx)

    assert_as_without(tmp_path, make("Plain", Exchanges), told, OBSERVES, val_samples=17)
