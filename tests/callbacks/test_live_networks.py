"""Which networks can be observed in validation."""

import pytest
import torch

import lightning_flatness as lf
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same
from tests.callbacks.lightning_modules import loaders, quiet_trainer
from tests.callbacks.live_runs import OBSERVES, OWN, Module, assert_as_without, make, validated
from tests.guarding import guards

OBSERVED = [
    "Plain", "Gate", "Mask", "Residual", "InPlaceActivation", "InPlaceResidual", "NumpyUpstream", "Checkpointed",
    "Branches", "NoGradUpstream", "WithoutClassifier", "ConvolutionalClassifier", "Dropouts", "EmbeddingsAfter",
    "KeepsEmbeddings", "LooksAtKernels", "FreezesKernels",
]  # fmt: skip
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
    "AssignsBuffer": "buffers were made in inference mode",  # by the first step
    "Embeddings": "returns more than its classifier's output",
    "AsksForGradients": "returns other values",
    "ChangesEmbeddings": "",
    "CallsTwice": "is not measured by the closed form",
}
NOT_MEASURED = {
    "Out": "out=... arguments",
    "Numpy": "Can't call numpy",
    "NoGradTail": "do not depend on its output",
    "NoGradLayer": "runs under torch.no_grad",
}


def test_every_network_is_tried():
    classes = [value for value in vars(networks).values() if isinstance(value, type)]
    names = {found.__name__ for found in classes if issubclass(found, networks.Plain)}
    elsewhere = {"CopiesKernels", "InferenceLayer", "TwoLayers", "TwoInTurn", "Bomb", "Moody"}
    assert names == {*OBSERVED, *NOT_OBSERVED, *NOT_MEASURED} | elsewhere


@guards("layers/live.py", "self._recorded is None or self._recorded.has_classifier", "True", ids="WithoutClassifier")
@guards("layers/recording.py", "value.detach() if isinstance(value, Tensor) else value", "value", ids="KeepsEmbeddings")
@guards("layers/recording.py", "or func in FREEZING", "", ids="FreezesKernels")
@guards("layers/recording.py", "returned.clone() if returned.is_inference() else", "", ids="Plain")
@pytest.mark.parametrize("name", OBSERVED)
def test_network_that_can_be_observed(tmp_path, told, name):
    assert_as_without(tmp_path, make(name), told, OBSERVES)
    assert len(told) == 1


def test_network_that_copies_its_kernels(tmp_path, told):
    # The trial is made on tensors, which are copied by other functions than parameters.
    assert_as_without(tmp_path, make("CopiesKernels"), told, "a layer's weight is used outside the layer")


@guards("layers/trial.py", "if model_copy.keeps_graph:", "if False:", ids="WritesBuffer")
@guards("layers/trial.py", "KEEPS_TENSORS if alive() is not None else", "", ids="KeepsInList")
@guards("layers/trial.py", "if any(tensor.requires_grad for tensor in tensors):", "if False:", ids="Embeddings")
@guards("layers/trial.py", "not all(map(_identical, tensors, expected_tensors))", "False", ids="AsksForGradients")
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


@guards("callbacks/running.py", "and source.why_not_observed:", "and False:")
def test_subsets(tmp_path, told):
    assert_as_without(tmp_path, make("Plain"), told, "takes parts of batches", max_samples=10)
    assert len(told) == 1


def test_batches_that_are_reshaped(tmp_path, told):
    """The function may change the batch: it is given a copy, once."""
    seen = []

    def reshape(batch):
        seen.append(len(batch))
        return batch.pop(0), batch.pop(0)

    assert_as_without(tmp_path, make("Plain"), told, OBSERVES, batch_fn=reshape)
    assert seen == [2] * 6  # three batches of each measurement


def test_a_reason_of_one_measurement_is_not_one_of_the_next(tmp_path, told):
    class RecordsGradientsAtFirst(Module):
        def step(self, x):
            with torch.set_grad_enabled(self.trainer.current_epoch == 0 and not self.trainer.sanity_checking):
                return self(x)

    module, callback = RecordsGradientsAtFirst(networks.Plain()), lf.FlatnessCallback(summary=False)
    quiet_trainer(tmp_path, callback, max_epochs=2).fit(module, *loaders(dtype=torch.float64))
    assert ["records gradients" in line for line in told] == [False, True, False]
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
