"""Listening to a network while its user calls it: which calls are heard, and what is put back."""

import contextlib

import pytest
import torch
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.recording import Recorder
from lightning_flatness.model.call import same_inputs
from tests.callbacks import live_networks as networks
from tests.callbacks.compare import global_modes
from tests.callbacks.live_networks import batch
from tests.guarding import guards


class TwoInputs(networks.Plain):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return super().forward(scale * x + shift)


def listener(model, inputs):
    return Listener(model.eval(), lambda: Recorder({"conv": model.conv}, model.fc, live=True), inputs)


def heard_call(model, inputs, call):
    with torch.inference_mode(), listener(model, inputs) as heard:
        call()
    assert "forward" not in vars(model)
    return heard


def test_arguments_of_every_kind():
    model, x, scale = TwoInputs(), batch()[0], torch.tensor(2.0)
    calls = {
        "tensor": (x, lambda: model(x), True),
        "positions": ((x, scale), lambda: model(x, scale), True),
        "list": ([x, scale], lambda: model(x, scale), True),
        "keywords": ({"x": x, "shift": scale}, lambda: model(x=x, shift=scale), True),
        "fewer": ((x, scale), lambda: model(x), False),
        "more": (x, lambda: model(x, shift=scale), False),
        "copy": (x, lambda: model(x.clone()), False),
        "other names": ({"x": x}, lambda: model(x, shift=scale), False),
        "forward itself": (x, lambda: model.forward(x), True),
        "none": (x, lambda: None, False),
    }
    for kind, (inputs, call, is_heard) in calls.items():
        heard = heard_call(model, inputs, call)
        assert (heard.reason == "") == heard.is_on_inputs == is_heard, kind
        if is_heard:
            assert len(heard.result().features) == 1, kind
        else:
            with pytest.raises(lf.BatchError):
                heard.result()
    assert not same_inputs({"x": x}, {"y": x})
    assert not same_inputs((x,), (x, x))


class Fails(networks.Plain):
    """Fails on negative images."""

    def forward(self, x):
        logits = super().forward(x)
        if x.max() < 0:
            raise ValueError("negative")
        return logits


def call_or_skip(model, x):
    """Call the network as a step that catches its errors does."""
    with contextlib.suppress(ValueError):
        model(x)


@pytest.mark.parametrize("observes", [True, False])
def test_a_call_that_fails_is_no_call(observes):
    model, x = Fails().eval(), batch()[0].abs()
    first, failing, last = x + 1, -x, x + 2
    recorder = (lambda: Recorder({"conv": model.conv}, model.fc, live=True)) if observes else None
    for wanted, calls, recorded, num_others in [
        (None, [failing], None, 0),
        (None, [failing, last], last, 0),
        (None, [first, failing], first, 0),
        (failing, [first, failing, last], first, 1),
    ]:
        with torch.inference_mode(), Listener(model, recorder, wanted, only=False) as heard:
            for one in calls:
                call_or_skip(model, one)
        assert (heard.call is None) == (recorded is None)
        assert recorded is None or torch.equal(heard.call.arguments[0], recorded)
        assert heard.num_others == num_others


class CallsItself(networks.Plain):
    depth = 0

    def forward(self, x):
        if self.depth:
            return super().forward(x)
        self.depth = 1
        try:
            return self(x)
        finally:
            self.depth = 0


def test_network_that_calls_itself_is_heard_once():
    model, x = CallsItself(), batch()[0]
    heard = heard_call(model, x, lambda: model(x))
    assert heard.reason == ""
    assert len(heard.result().features) == 1


def test_a_forward_of_the_instance_is_put_back():
    model, x = networks.Plain(), batch()[0]
    own = vars(model)["forward"] = lambda x: networks.Plain.forward(model, x)
    with torch.inference_mode(), listener(model, x) as heard:
        model(x)
        assert vars(model)["forward"] is not own
    assert vars(model)["forward"] is own
    assert heard.reason == ""
    with listener(model, x):
        later = vars(model)["forward"] = lambda x: x
    assert vars(model)["forward"] is later


@pytest.mark.parametrize("inference", [True, False])
def test_modes_are_put_back_whatever_the_forward_does_to_them(inference):
    class Careless(networks.Plain):
        def tail(self, z, upstream):
            torch.set_grad_enabled(True)
            networks.KEPT.append(torch.inference_mode(not inference))
            networks.KEPT[-1].__enter__()
            if self.fails:
                raise KeyboardInterrupt
            return super().tail(z, upstream)

    model, x = Careless().eval(), batch()[0]
    for model.fails in (False, True):
        with torch.inference_mode() if inference else torch.no_grad():
            modes = global_modes()
            try:
                with listener(model, x):
                    model(x)
            except KeyboardInterrupt:
                pass
            assert global_modes() == modes
            networks.KEPT.clear()  # it would leave the mode when it is collected
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@guards("layers/live.py", "with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():", "if True:")
def test_modes_are_put_back_where_a_layer_has_a_mode_of_its_own():
    """What it enters is left in the other order than what is entered for the graph."""
    model, x = networks.InferenceLayer().eval(), batch()[0]
    with torch.no_grad():
        expected, modes = model(x), global_modes()
        with listener(model, x) as heard:
            assert_close(model(x), expected, rtol=0, atol=0)
        assert heard.reason == ""
        assert global_modes() == modes


class CallsAnother(networks.Plain):
    """Calls a network that is not one of its modules."""

    def __init__(self, other):
        super().__init__()
        self.others = (other,)

    def forward(self, x):
        return super().forward(x) + self.others[0](x)


@guards("layers/live.py", "if Listener._observing:", "if False:")
def test_a_network_called_within_another_is_not_observed_too():
    inner, x = networks.Plain(), batch()[0]
    outer = CallsAnother(inner)
    with torch.inference_mode(), listener(outer, x) as around, listener(inner, x) as within:
        outer(x)
    assert around.reason == ""
    assert within.reason == "another callback observes the same forward pass"
