"""Forward passes that can be recorded, and those that are refused with a remedy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.layers.recording import Recorder
from lightning_flatness.testing import oracle_block_traces
from tests.eventful_networks import Net, UserError, arrange
from tests.guarding import guards
from tests.layers.linear_net import LABELS, VECTORS, linear_net
from tests.layers.pooled_net import Apply, PooledNet, X, Y, measure


@guards("model.logits:certify_deterministic", returns=None)
def test_noise_in_the_forward_is_refused():
    with pytest.raises(lf.LayerSelectionError, match="different logits in evaluation mode"):
        measure(PooledNet(tail=Apply(lambda x: F.dropout(x, 0.5))))


def test_forward_that_writes_to_a_weight_after_a_measured_layer():
    class Clip(nn.Conv2d):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    net = PooledNet(conv=nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), Clip(3, 6, 2)), tail=nn.ReLU())
    assert lf.measure_flatness(net.double(), [(X.double(), Y)], layers="all").exact


@guards("model/isolation.py", "if not isinstance(error, CheckpointError)", "if True")
def test_gradient_checkpointing_is_refused_with_a_remedy():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(PooledNet):
        def forward(self, x):
            return self.head(checkpoint(lambda x: self.tail(self.conv(x)), x, use_reentrant=False).mean((2, 3)))

    with pytest.raises(lf.LayerSelectionError, match="gradient checkpointing.*if self.training"):
        measure(Checkpointed())


def test_a_layer_inside_vmap_is_refused_with_a_remedy():
    net = linear_net(lambda net, x: torch.func.vmap(lambda row: net.c(row[None])[0])(net.a(x).relu()))
    with pytest.raises(lf.LayerSelectionError, match="inside a transform of torch.func.*on the whole batch"):
        lf.measure_flatness(net, [(VECTORS, LABELS)], layers="c")


def test_inputs_that_are_changed_in_place_afterwards():
    def forward(net, x):
        x = x[:, :5].clone()
        h = F.pad(x, (0, 1))
        z = net.a(h)
        h += 1
        return net.c((z + h[:, :5]).relu())

    net = linear_net(forward)
    try:
        layer = lf.measure_flatness(net, [(VECTORS, LABELS)], layers="a").layers["a"]
    except lf.LayerSelectionError:
        return
    assert_close(layer.block_traces[0], oracle_block_traces(net, (VECTORS, LABELS), "a"), rtol=1e-10, atol=1e-14)


@guards("layers/recording.py", "torch.set_grad_enabled(self._grad_mode)", "pass")
@pytest.mark.parametrize("fails", [False, True])
def test_observing_puts_the_grad_mode_back(fails, batch):
    net = Net()
    if fails:
        arrange(net, "tail_fails")
    with torch.no_grad():
        try:
            with Recorder({"conv": net.conv}, net.head):
                net(batch[0])
        except UserError:
            assert fails
        assert not torch.is_grad_enabled()
