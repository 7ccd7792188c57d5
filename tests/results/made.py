"""One record of every kind, with all that is hard to write: NaN, infinities, odd names, values of single samples."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.results import TrajectoryResult

BATCH = torch.linspace(-1, 1, 10).reshape(5, 2), torch.arange(5) % 3
IMAGES = torch.linspace(-1, 1, 5 * 36).reshape(5, 1, 6, 6), torch.arange(5) % 3


def spectrum():
    return lf.hessian_spectrum(nn.Linear(2, 3), [BATCH], num_steps=3, num_probes=1, top_k=1)


def landscape():
    result = lf.loss_landscape(nn.Linear(2, 3), [BATCH], steps=3, span=((-1, 1), (0, 1)))
    losses = result.losses.clone()
    losses[0, 0], losses[0, 1] = math.inf, math.nan
    return replace(result, losses=losses)


def network():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 4, 3, groups=2), nn.SiLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def flatness():
    """Three layers, the first of which is not exact; one is named so that arrays could be mixed up."""
    report = lf.measure_flatness(network(), [IMAGES], layers="all")
    errors = {"hessian_trace": 0.0123, "relative_flatness": 0.00042}
    samples = {"hessian_trace": torch.linspace(0, 1, 5).double(), "block_traces": torch.arange(5)}
    layers = {
        name: replace(layer, sampling_errors=errors, samples=samples, normalized_relative_flatness=0.125)
        for name, layer in report.layers.items()
    }
    layers["0.samples"] = replace(layers["0"], relative_flatness=math.nan, hessian_trace=-math.inf)
    return replace(
        report,
        layers=layers,
        left_out={"<b>head</b>": "Layer '<b>head</b>': it runs [twice] & more."},
        loss=0.4321,
        accuracy=0.6,
        curvature=math.nan,
        loss_name="cross_entropy",
        data="val",
        sampling_errors={"loss": 0.0321, "hessian_trace": math.nan},
        num_groups=32,
        samples={"loss": torch.linspace(0, 1, 5), "prediction": torch.arange(5)},
    )


def lambda_max():
    return lf.measure_lambda_max(network(), [IMAGES], layers=["0", "2"])


def trajectory():
    return TrajectoryResult(torch.tensor([[3.0, 1.0], [1.0, 0.5], [0.0, 0.0]]).double(), torch.tensor([0.8, 0.1]))


def comparison():
    nets = {name: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)) for name in ("<b>", "b")}
    return lf.compare(nets, [BATCH], layers=["0"])


RESULTS = {
    "comparison": comparison,
    "flatness": flatness,
    "layer": lambda: flatness().layers["2"],
    "info": lambda: flatness().layers["0"].info,
    "lambda_max": lambda_max,
    "lambda_max of a layer": lambda: lf.measure_lambda_max(network(), [IMAGES], by_filter=False)["2"],
    "spectrum": spectrum,
    "landscape": landscape,
    "trajectory": trajectory,
}


def assert_identical(actual, expected):
    """Both are the same to the bit, in values and types, however deep."""
    assert type(actual) is type(expected)
    if is_dataclass(expected):
        for field in fields(expected):
            assert_identical(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, Tensor):
        assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_identical(actual[key], value)
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    else:
        assert repr(actual) == repr(expected)  # NaN, too
