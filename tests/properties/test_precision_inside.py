"""Precision that the model itself chooses: autocast in its forward, and the wrapper of Fabric."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.testing import oracle_block_traces
from tests.guarding import guards


def plain():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


class Autocast(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)


def by_fabric(net):
    return Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(net)


X, Y = torch.randn(6, 2, 7, 7, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
MEASURE = {
    "flatness": lambda net, **o: next(iter(lf.measure_flatness(net, [(X, Y)], **o).layers.values())).block_traces,
    "lambda_max": lambda net, **o: next(iter(lf.measure_lambda_max(net, [(X, Y)], **o).values())).filter_lambda_max,
    "spectrum": lambda net, **o: lf.hessian_spectrum(net, [(X, Y)], top_k=2, num_steps=4, **o).eigenvalues,
    "landscape": lambda net, **o: lf.loss_landscape(net, [(X, Y)], steps=3, **o).losses,
}


@guards(
    "functional.autocast:WithoutAutocast.__torch_function__",
    body="return func(*args, **(kwargs or {}))",
    ids="None-flatness-Autocast",
)
@guards("model.isolation:without_wrapper", body="return model", ids="None-spectrum-by_fabric")
@pytest.mark.parametrize("wrapped", [Autocast, by_fabric], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", MEASURE)
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_all_measure_the_network_in_full_precision(dtype, what, wrapped):
    net = plain()
    assert_close(MEASURE[what](wrapped(net), dtype=dtype), MEASURE[what](net, dtype=dtype), rtol=0, atol=0)
    assert not torch.is_autocast_enabled("cpu")


def test_names_of_a_network_from_fabric_are_its_own():
    fabric = by_fabric(plain())
    assert list(lf.measure_flatness(fabric, [(X, Y)], layers="all").layers) == ["0", "4"]
    assert list(lf.hessian_spectrum(fabric, [(X, Y)], params="0.*", top_k=1, num_steps=2).parameters) == [
        "0.weight",
        "0.bias",
    ]


def test_directions_between_networks_from_fabric():
    net = plain()
    fabric, other = by_fabric(net), plain()
    with torch.no_grad():
        other[0].weight += 1
    expected = lf.direction_between(net, other)
    for one, two in (
        (fabric, other.state_dict()),
        (fabric, other),
        (net, by_fabric(other)),
        (fabric, by_fabric(other)),
    ):
        assert_close(lf.direction_between(one, two), expected, rtol=0, atol=0)
    assert_close(lf.pca_directions(fabric, [other], number=1).explained, torch.ones(1).double())


def test_a_part_that_fabric_has_wrapped_is_refused_with_a_remedy():
    with pytest.raises(lf.FlatnessError, match=r"'0' is wrapped by Fabric.setup.*`.module`"):
        lf.measure_flatness(nn.Sequential(by_fabric(plain())), [(X, Y)])


class Halved(torch.autograd.Function):
    """A ReLU that halves its argument; its backward pass runs as its forward did, with autocast or without."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu() / 2

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return (flat @ torch.eye(flat.shape[1]).to(flat) / 2).view_as(gradient) * (x > 0)


class Custom(nn.Module):
    def forward(self, x):
        return Halved.apply(x)


@guards("layers/certify.py", "calls.items() if self.recorded.enables_autocast else ()", "()")
@pytest.mark.parametrize("method", ["closed_form", "gauss_newton"])
def test_a_custom_function_under_autocast_may_round_and_is_not_called_exact(method):
    net = plain()
    net[1] = Custom()
    if method == "gauss_newton":
        net.append(Custom())
    plainly = lf.measure_flatness(net, [(X, Y)], layers="all").layers
    rounded = lf.measure_flatness(Autocast(net), [(X, Y)], layers="all").layers
    assert (plainly["0"].exact, plainly["0"].info.method) == (True, method)
    assert not rounded["net.0"].exact
    assert "enables autocast itself" in rounded["net.0"].info.reason
    assert_close(rounded["net.0"].hessian_trace, oracle(net, "0"), rtol=1e-2, atol=0)
    # No custom function comes after the classifier.
    if method == "closed_form":
        assert rounded["net.4"].exact
        assert_close(rounded["net.4"].hessian_trace, oracle(net, "4"), rtol=1e-5, atol=0)


def oracle(net, layer):
    """The trace of the float64 Hessian."""
    return oracle_block_traces(net.double(), (X.double(), Y), layer).trace().item()
