"""Networks whose passes must not be observed, and the reason that is given."""

import torch
from torch import nn

from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.observer import FlatnessObserver
from lightning_flatness.layers.recording import Recorder
from lightning_flatness.layers.trial import why_compiled, why_not_observed
from lightning_flatness.model.precision import Precision
from tests.callbacks import live_networks as networks
from tests.guarding import guards


def test_reasons():
    def reason(change):
        model = networks.Plain().eval()
        change(model)
        return why_not_observed(model)

    assert reason(lambda model: None) == ""
    assert "training mode" in reason(lambda model: model.norm.train())
    assert reason(lambda model: model.bfloat16()) == ""
    assert "backward hooks" in reason(lambda model: model.fc.register_full_backward_hook(print))
    with torch.inference_mode():
        model = networks.Plain()
    assert "inference mode" in why_not_observed(model.eval())
    assert "torch.bfloat16 are measured in torch.float32" in why_not_observed(
        networks.Plain().bfloat16().eval(), torch.float32
    )
    autocast = Precision((("cpu", torch.bfloat16),), torch.float32)
    assert why_not_observed(networks.Plain().eval(), None, autocast) == ""
    assert "autocast, and dtype= asks for torch.float64" in why_not_observed(
        networks.Plain().eval(), torch.float64, autocast
    )
    assert "measured in torch.float64" in why_not_observed(networks.Plain().float().eval(), torch.float64)
    model = networks.Plain().eval()
    with Listener(model, lambda: Recorder({}, None, live=True)):
        assert "another callback" in why_not_observed(model)


def test_which_module_is_compiled():
    def compiled(change):
        model = networks.Plain().eval()
        change(model)
        assert why_not_observed(model) == ""  # passes of our own are
        return why_compiled(model)

    assert compiled(lambda model: None) == ""
    assert compiled(lambda model: setattr(model, "norm", torch.compile(model.norm))) == "module 'norm' is compiled"
    assert compiled(lambda model: model.fc.compile()) == "module 'fc' is compiled"
    assert "Plain" in compiled(lambda model: setattr(model, "_compiler_ctx", {"compiler": "dynamo"}))


@guards("layers/trial.py", "context.selection.modules[name] is model", "False")
def test_a_network_that_is_one_layer():
    observer = FlatnessObserver(nn.Linear(3, 4).eval(), layers="classifier")
    reason = observer.why_not_live(torch.randn(5, 3), torch.arange(5) % 4)
    assert reason == "layer '' is the whole network"
