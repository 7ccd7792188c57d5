"""Passes of the user that are observed: the same outputs, and the numbers of passes of our own."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

from lightning_flatness.errors import FlatnessError, LayerSelectionError
from lightning_flatness.layers.certify import certify_observed
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.layers.recording import Recorder
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import assert_same, global_modes, module_state
from tests.callbacks.live_networks import batch
from tests.device_waits import Looks
from tests.guarding import guards
from tests.networks import Network, recipes
from tests.torchvision_models import CURVED, PIECEWISE_LINEAR, random_model


def summed(statistics):
    return {name: (found.block_traces, found.weight_gram, found.num_samples) for name, found in statistics.items()}


def assert_observed_as_own(model, x, y, **options):
    """Outputs to the last bit, numbers to nine digits."""
    model.eval()
    own = summed(FlatnessObserver(model, **options)(x, y))
    before = module_state(model)
    with torch.inference_mode():
        expected = model(x)
        observer = FlatnessObserver(model, **options)
        reason = observer.why_not_live(x, y)
        if reason:
            return reason
        modes = global_modes()
        with observer.listen(x) as heard:
            output = model(x)
        assert global_modes() == modes
        assert heard.reason == ""
        found = summed(observer.observed(heard, y))
    assert output.is_inference()
    assert not output.requires_grad
    assert_close(output, expected, rtol=0, atol=0)
    for name, (traces, gram, samples) in own.items():
        assert_close(found[name][0], traces, rtol=0, atol=1e-9 * float(traces.abs().max()))
        assert_close(found[name][1], gram, rtol=1e-12, atol=0)
        assert found[name][2] == samples
    assert_same(module_state(model), before)
    return ""


def tried(model, x, y, **options):
    """An observer, and its trial was a success."""
    observer = FlatnessObserver(model, **options)
    with torch.inference_mode():
        assert observer.why_not_live(x, y) == ""
    return observer


def observed(observer, model, x, y):
    with torch.inference_mode(), observer.listen(x) as heard:
        model(x)
    return observer.observed(heard, y)


@guards("layers/certificates/layer.py", "same(call.kernel_sample, kernel.sample)", "True", ids="behind autograd's back")
@guards("layers/certificates/layer.py", "if not unchanged(kernel.parameter.detach()):", "if False:", ids="one entry")
@pytest.mark.parametrize("write", ["one entry", "the same", "behind autograd's back"])
def test_a_kernel_that_is_written_to_is_known(write):
    """No copy is kept of a kernel that is a parameter."""
    torch.manual_seed(0)
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(130, 3))
    model, (x, y) = nn.Sequential(nn.Conv2d(1, 130, 3), *head).double().eval(), batch()
    observer = tried(model, x, y)
    before, kernel = observed(observer, model, x, y), model[0].weight
    if write == "behind autograd's back":
        kernel.data.mul_(2)
    else:
        with torch.no_grad():
            kernel[1, 0, 0, 0] += write == "one entry"  # every other filter is in the sample
    if write == "the same":
        after = observed(observer, model, x, y)
        assert_close(after["0"].block_traces, before["0"].block_traces, rtol=0, atol=0)
        return
    with pytest.raises(LayerSelectionError, match="has changed since it was certified|has been changed in place since"):
        observed(observer, model, x, y)


class Switches(nn.Module):
    """Runs one of two convolutions and one of two heads."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 6, 3) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        which = int(x.mean() > 2)
        return self.heads[which](self.convs[which](x).relu().mean((2, 3)))


@pytest.mark.parametrize(("layers", "name"), [("last", "convs.0"), ("classifier", "heads.0")])
def test_a_layer_that_does_not_run_again_is_named(layers, name):
    model, (x, y) = Switches().double().eval(), batch()
    observer = tried(model, x, y, layers=layers)
    with pytest.raises(LayerSelectionError, match=f"'{name}' ran on the first batch but not on this one"):
        observed(observer, model, x + 5, y)


def test_a_layer_that_runs_only_later_is_left_out():
    class Late(Switches):
        def forward(self, x):
            extra = self.convs[1](x).relu().mean((2, 3)) if x.mean() > 2 else 0
            return self.heads[0](self.convs[0](x).relu().mean((2, 3)) + extra)

    model, (x, y) = Late().double().eval(), batch()
    observer = tried(model, x, y, layers="all")
    assert list(observed(observer, model, x + 5, y)) == ["convs.0", "heads.0"]
    assert list(observer.left_out) == ["convs.1"]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_a_device_is_waited_for_once_a_batch(activation, loss):
    head = (activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model, (x, y) = nn.Sequential(nn.Conv2d(1, 6, 3), *head).double().eval(), batch()
    y = y if loss == "cross_entropy" else torch.rand(4, 3).double()
    observer = tried(model, x, y, loss=loss)
    observed(observer, model, x, y)
    with torch.inference_mode(), observer.listen(x) as heard:
        model(x)
    with Looks() as looks:
        observer.observed(heard, y)
    assert looks.found == ["_local_scalar_dense"]


@guards(
    "layers/observer.py", "all_hold():\n                    return result", "True:\n                    return result"
)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda x, y: (x * torch.nan, y), "NaN|finite"),
        (lambda x, y: (x, y + 2), "The targets lie in"),
        (lambda x, y: (x, y - 1), "The targets lie in"),
    ],
    ids=["NaN", "too large", "negative"],
)
def test_what_does_not_hold_is_named(spoil, match):
    model, (x, y) = networks.Plain().double().eval(), batch(samples=30)
    observer = tried(model, x, y)
    with pytest.raises(FlatnessError, match=match):
        observed(observer, model, *spoil(x, y))
    ((_, found),) = observed(observer, model, x, y).items()
    ((_, expected),) = FlatnessObserver(model)(x, y).items()
    assert_close(
        found.block_traces, expected.block_traces, rtol=0, atol=1e-9 * float(expected.block_traces.abs().max())
    )


def test_a_classifier_that_takes_its_input_by_keyword():
    class Keyword(networks.Plain):
        def head(self, z):
            return self.fc(input=z.mean((2, 3)))

    assert assert_observed_as_own(Keyword(), *batch()) == ""


@guards("functional/losses.py", "return None if holds(kept.all()) else kept", "return None")
def test_ignored_targets_do_not_count_when_observed():
    model, (x, y) = networks.Plain().double().eval(), batch(samples=30)
    observer = tried(model, x, y)
    y[7:20] = -100
    for _ in range(2):
        ((_, found),) = observed(observer, model, x, y).items()
        ((_, expected),) = FlatnessObserver(model)(x, y).items()
        assert (found.num_samples, found.normalizer) == (17, 17.0)
        atol = 1e-9 * float(expected.block_traces.abs().max())
        assert_close(found.block_traces, expected.block_traces, rtol=0, atol=atol)


def test_random_networks():
    """What can be measured at all is observed with the same numbers, or refused for one of the known reasons."""
    reasons = []

    @settings(max_examples=60)
    @given(recipes())
    def every(recipe):
        model = Network(recipe).double()
        try:
            reason = assert_observed_as_own(model, *model.batch(), layers=["conv"])
        except FlatnessError:
            return  # no gradient at all, for instance
        reasons.append(reason)
        known = "one sample" if recipe.batch == 1 else "Inference tensors" if recipe.concatenate else "closed form"
        assert reason == "" or known in reason

    every()
    assert reasons.count("") >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", PIECEWISE_LINEAR + CURVED)
def test_torchvision(name):
    pytest.importorskip("torchvision")
    model, batch = random_model(name, samples=10)
    assert assert_observed_as_own(model, *batch) == ""


@guards("layers.trial:_relative", returns=0.0)
def test_other_numbers_would_be_seen(monkeypatch):
    model = networks.Plain()
    assert assert_observed_as_own(model, *batch()) == ""

    def larger(*arguments):
        certified, known = certify_observed(*arguments)
        tails = {name: replace(tail, slopes=(1 + 1e-6) * tail.slopes) for name, tail in certified.tails.items()}
        return replace(certified, tails=tails), known

    monkeypatch.setattr("lightning_flatness.layers.observer.certify_observed", larger)
    assert "numbers of layer 'conv' differ by" in assert_observed_as_own(model, *batch())
    monkeypatch.setattr("lightning_flatness.layers.trial.ROUNDINGS", 1e12)
    with pytest.raises(AssertionError, match="not close"):
        assert_observed_as_own(model, *batch())


@pytest.mark.parametrize(("factor", "is_observed"), [(1.05, True), (2.0, False)])
def test_reduced_float32_of_the_user_is_accepted_with_its_deviation(monkeypatch, factor, is_observed):
    def as_in_tf32(*arguments):
        certified, known = certify_observed(*arguments)
        tails = {name: replace(tail, slopes=factor * tail.slopes) for name, tail in certified.tails.items()}
        return replace(certified, tails=tails), known

    monkeypatch.setattr("lightning_flatness.layers.observer.certify_observed", as_in_tf32)
    model, (x, y) = networks.Plain().float().eval(), batch()
    observer = FlatnessObserver(model)
    with torch.inference_mode():
        assert "differ by" in observer.why_not_live(x.float(), y)
        monkeypatch.setattr("lightning_flatness.layers.trial.float32_is_reduced", lambda device: True)
        assert (observer.why_not_live(x.float(), y) == "") == is_observed
    if is_observed:
        assert 1e-5 < observer.layers["conv"].deviation < 0.02


def test_other_outputs_would_be_seen(monkeypatch):
    model = networks.Plain()
    hear = Listener._hear
    monkeypatch.setattr("lightning_flatness.layers.trial._why_different", lambda *outputs: "")
    monkeypatch.setattr(Listener, "_hear", lambda self, *call: hear(self, *call) * (1 + 2**-51))
    with pytest.raises(AssertionError, match="not equal|not close"):
        assert_observed_as_own(model, *batch())


@pytest.mark.parametrize("options", [{"measures": ("hessian_trace",)}, {"loss": "mse"}, {"label_smoothing": 0.1}])
def test_options(options):
    x, y = batch()
    if "loss" in options:
        y = nn.functional.one_hot(y, 3).double()
    assert assert_observed_as_own(networks.Plain(), x, y, **options) == ""


@guards("layers.recording:Recorder._quiet", body="return hook")
def test_errors_of_ours_do_not_reach_the_user(monkeypatch):
    model, (x, y) = networks.Plain().eval(), batch()
    observer = tried(model, x, y)
    with torch.inference_mode():
        expected = model(x)

        def broken(self):
            raise AttributeError("ours")

        monkeypatch.setattr(Recorder, "_record_gradients", broken)
        modes = global_modes()
        with observer.listen(x) as heard:
            assert_close(model(x), expected, rtol=0, atol=0)
        assert global_modes() == modes
        with pytest.raises(FlatnessError, match="observing failed"):
            observer.observed(heard, y)


def test_graph_is_seen_as_long_as_it_lives():
    model, (x, y) = networks.Plain().eval(), batch()
    observer = tried(model, x, y)
    with torch.inference_mode():
        with observer.listen(x) as heard:
            model(x)
        alive, kept = heard.graph(), heard.result().features[0]
        heard.release()
        gc.collect()
        assert alive() is not None
        del kept
        assert alive() is None
