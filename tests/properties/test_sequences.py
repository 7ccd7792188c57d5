"""Arguments that take a list take every sequence: configurations hand over lists of a type of their own."""

from collections import UserList

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf

NET = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
BATCH = torch.randn(5, 2, 6, 6).double(), torch.tensor([0, 1, 2, 0, 1])


ADAM = torch.optim.Adam(NET.parameters(), lr=0)
nn.functional.cross_entropy(NET(BATCH[0]), BATCH[1]).backward()
ADAM.step()


def flatness(of, **options):
    return torch.tensor(lf.measure_flatness(NET, [BATCH], **options).hessian_trace)


def landscape(of, **options):
    return lf.loss_landscape(NET, [BATCH], **{"steps": 3, **options}).losses


FEW = {"num_steps": 5, "num_probes": 2}

CALLS = {
    "layers": lambda of: flatness(of, layers=of(["0", "2"])),
    "measures": lambda of: flatness(of, measures=of(["hessian_trace", "layerwise_flatness"])),
    "class_weight": lambda of: flatness(of, class_weight=of([1.0, 0.5, 2.0])),
    "batches": lambda of: torch.tensor(lf.measure_flatness(NET, of([BATCH])).hessian_trace),
    "layers of lambda_max": lambda of: torch.tensor(
        lf.measure_lambda_max(NET, [BATCH], layers=of(["2"]))["2"].lambda_max
    ),
    "params": lambda of: lf.hessian_spectrum(NET, [BATCH], params=of(["0", "*.bias"]), top_k=2, **FEW).eigenvalues,
    "axes, steps, frozen": lambda of: landscape(of, axes=of(["random", "hessian"]), steps=of([3, 2]), frozen=of(["4"])),
    "span": lambda of: landscape(of, span=of([of([-1, 2]), of([0.0, 0.5])])),
    "optimizer": lambda of: landscape(of, axes="adam", optimizer=of([ADAM])),
}


@pytest.mark.parametrize("kind", [UserList, tuple])
@pytest.mark.parametrize("argument", CALLS)
def test_any_sequence_is_as_good_as_a_list(argument, kind):
    assert_close(CALLS[argument](kind), CALLS[argument](list), rtol=0, atol=0)


@pytest.mark.parametrize(
    "callback",
    [
        lambda of: lf.FlatnessCallback(of(["net.0"]), measures=of(["hessian_trace"]), class_weight=of([1.0, 2.0])),
        lambda of: lf.SpectrumCallback(params=of(["net.0"]), class_weight=of([1.0, 2.0])),
        lambda of: lf.LandscapeCallback(
            axes=of(["random", "hessian"]), steps=of([3, 3]), span=of([of([-1, 1]), of([0, 1])]), frozen=of(["net.0"])
        ),
        lambda of: lf.FlatnessStopping(monitor=of(["flatness/hessian_trace", "flatness/relative_flatness"])),
    ],
    ids=["flatness", "spectrum", "landscape", "stopping"],
)
def test_callbacks_take_any_sequence(callback):
    assert type(callback(UserList)) is type(callback(list))


@pytest.mark.parametrize("layers", [UserList([]), UserList(["0", 1]), {"0"}, b"0"], ids=str)
def test_what_is_no_list_of_names_is_refused(layers):
    with pytest.raises(lf.FlatnessError, match="names or glob patterns"):
        lf.measure_flatness(NET, [BATCH], layers=layers)
