"""Modules that do more than set a flag when they go to evaluation mode."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from tests.guarding import guards


class Merging(nn.Module):
    """A convolution with a low-rank part, which it adds to its weight in evaluation mode."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3)
        self.low = nn.Parameter(0.3 * torch.randn(outputs, 1))
        self.rank = nn.Parameter(0.3 * torch.randn(1, inputs * 9))
        self.is_merged = False
        self.count = torch.zeros(1)

    def train(self, mode=True):
        super().train(mode)
        if mode is self.is_merged:
            product = (self.low @ self.rank).view_as(self.conv.weight)
            self.conv.weight.data += -product if mode else product
            self.low.requires_grad_(mode)
            self.count += 1
            self.is_merged = not mode
        return self

    def forward(self, x):
        return self.conv(x) if self.is_merged else self.conv(x) + self.extra(x)

    def extra(self, x):
        return nn.functional.conv2d(x, (self.low @ self.rank).view_as(self.conv.weight))


class Fused(nn.Module):
    """Two branches, which evaluation mode replaces by one convolution."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(inputs, outputs, 3), nn.Conv2d(inputs, outputs, 3)])

    def train(self, mode=True):
        if not mode and "whole" not in self._modules:
            self.whole = nn.Conv2d(*self.branches[0].weight.shape[1::-1], 3)
            for name, tensor in self.whole.named_parameters():
                tensor.data = sum(branch.get_parameter(name).detach() for branch in self.branches)
        elif mode:
            self._modules.pop("whole", None)
        return super().train(mode)

    def forward(self, x):
        return self.whole(x) if "whole" in self._modules else sum(branch(x) for branch in self.branches)


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), layer(4, 5), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    ).double()


X, Y = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


def state(net):
    tensors = {
        name: (id(tensor), tensor.data_ptr(), tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()
    }
    gradients = {name: (tensor.requires_grad, tensor.grad) for name, tensor in net.named_parameters()}
    modes = {name: (module.training, getattr(module, "is_merged", None)) for name, module in net.named_modules()}
    count = getattr(net[2], "count", 0)
    return tensors, gradients, modes, (id(count), float(count))


BATCHES = [(X[:3], Y[:3]), (X[3:], Y[3:])]
MEASURE = {
    "batches": lambda net: lf.measure_flatness(net, BATCHES, layers="all").relative_flatness,
    "flatness": lambda net: {
        name: found.relative_flatness for name, found in lf.measure_flatness(net, [(X, Y)], layers="all").layers.items()
    },
    "last": lambda net: {
        name: found.relative_flatness for name, found in lf.measure_flatness(net, [(X, Y)]).layers.items()
    },
    "together": lambda net: lf.compare({"a": net, "b": network(Merging)}, BATCHES).models["a"].relative_flatness,
    "lambda_max of batches": lambda net: lf.measure_lambda_max(net, BATCHES, layers="all")["6"].lambda_max,
    "lambda_max": lambda net: {
        name: found.lambda_max for name, found in lf.measure_lambda_max(net, [(X, Y)], layers="all").items()
    },
    "spectrum": lambda net: lf.hessian_spectrum(net, [(X, Y)], params="0", top_k=2, num_steps=4).eigenvalues,
    "landscape": lambda net: lf.loss_landscape(net, [(X, Y)], steps=3, frozen=["2"]).losses,
}


@guards("model.isolation:_switches_by_itself", returns=False, ids="Merging-last")
@guards("model.isolation:kept_switched", body="yield", ids="Fused-batches")
@guards("measure/lambda_max.py", "with kept_switched(model), ", "with ", ids="Fused-lambda_max of batches")
@guards("measure/side_by_side.py", "stack.enter_context(kept_switched(model))", "pass", ids="Fused-together")
@guards("model.isolation:_tensors_kept", body="yield", ids="Merging-spectrum")
@guards("model/attributes.py", "_restore(collection, entries)", "pass", ids="Fused-flatness")
@guards("model/isolation.py", "tensor.requires_grad_(requires_grad)", "pass", ids="Merging-landscape")
@pytest.mark.parametrize("what", MEASURE)
@pytest.mark.parametrize("layer", [Merging, Fused])
def test_the_mode_that_a_model_is_handed_over_in_changes_nothing(layer, what):
    validated = MEASURE[what](network(layer).eval())
    net = network(layer).train()
    before = state(net)
    trained = MEASURE[what](net)
    assert_close(state(net), before, rtol=0, atol=0)
    assert_close(trained, validated, rtol=1e-12, atol=1e-15)


@guards(
    "model/isolation.py", "with random_states_kept(model), torch.no_grad(), ", "with torch.no_grad(), ", ids="batches"
)
@pytest.mark.parametrize("what", sorted(MEASURE.keys() - {"together"}))
def test_a_module_that_is_made_for_evaluation_draws_no_random_numbers(what):
    net = network(Fused).train()
    before = torch.get_rng_state()
    MEASURE[what](net)
    assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_numbers_are_those_of_validation():
    net = network(Merging).train()
    report = lf.measure_flatness(net, [(X, Y)])
    assert list(report.layers) == ["2.conv"]
    assert report.exact
    expected = lf.measure_flatness(nn.Sequential(*net.eval()[:2], net[2].conv, *net[3:]), [(X, Y)])
    assert_close(report.hessian_trace, expected.hessian_trace, rtol=1e-12, atol=0)


def test_a_forward_that_raises_leaves_the_weights_to_the_bit():
    net = network(Merging).train()
    before = state(net)
    with pytest.raises(Exception, match="channels"):
        lf.measure_flatness(net, [(X[:, :1], Y)])
    assert_close(state(net), before, rtol=0, atol=0)


class AlwaysDrops(nn.Dropout):
    """Monte Carlo dropout: draws in evaluation mode, too."""

    def train(self, mode=True):
        return super().train(True)


class AlwaysOfBatch(nn.BatchNorm2d):
    """Takes the statistics of the batch in evaluation mode, too."""

    def train(self, mode=True):
        return super().train(True)


@guards("model/isolation.py", "elif model.training:", "else:")
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layer", [AlwaysDrops(), AlwaysOfBatch(4)], ids=["dropout", "batch statistics"])
def test_modules_that_stay_in_training_mode_are_measured_so(layer, mode):
    net = network(lambda *sizes: nn.Conv2d(*sizes, 3)).insert(2, layer).train(mode).double()
    with pytest.raises(lf.LayerSelectionError, match="Two forward passes|depend on other samples"):
        lf.measure_flatness(net, [(X, Y)], layers="0")


def test_submodules_that_the_user_put_into_training_mode_stay_there():
    net = network(lambda *sizes: nn.Conv2d(*sizes, 3)).insert(2, nn.Dropout()).eval()
    assert lf.measure_flatness(net, [(X, Y)]).exact
    net[2].train()
    with pytest.raises(lf.LayerSelectionError, match="Two forward passes"):
        lf.measure_flatness(net, [(X, Y)])
    assert lf.measure_flatness(net.train(), [(X, Y)]).exact
