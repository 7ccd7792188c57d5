"""The landscape and the spectrum of one network, of which every rank gives some batches."""

from datetime import timedelta
from functools import partial

import torch
from torch import distributed

import lightning_flatness as lf
from tests.distributed.scenarios import SCENARIOS, rank
from tests.spectra import ConvNet, data

# By kind: what measures, with which options, and the numbers that are compared.
KINDS = {
    "landscape": (
        lf.loss_landscape,
        {"axes": ["random", "hessian"], "steps": 3, "span": 0.5},
        ("losses", "accuracies", "computed", "origin_loss", "num_samples", "axis_norms"),
    ),
    "spectrum": (
        lf.hessian_spectrum,
        {"top_k": 3, "num_steps": 12, "num_probes": 2},
        ("eigenvalues", "ritz_values", "ritz_weights", "trace", "k_hn", "num_samples", "loss"),
    ),
}


def measured(kind, batches, **options):
    torch.manual_seed(0)
    measure, usual, names = KINDS[kind]
    result = measure(ConvNet().double(), batches, **{**usual, "sync": True, **options})
    return {name: getattr(result, name) for name in names}


class FailingInTheEnd:
    """Batches of which every pass but the first fails, which is the one at the model's own weights."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > 1:
            raise RuntimeError("no more")
        return iter(self.batches)


def join():
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))


def uneven_ranks(kind):
    join()
    x, y = data(10)
    return measured(kind, [(x[:3], y[:3]), (x[3:7], y[3:7])] if rank() == 0 else [(x[7:], y[7:])])


def rank_without_batches(kind):
    join()
    return measured(kind, [data(10)] if rank() == 0 else [])


def one_rank_fails(kind):
    """The message and, of a landscape, which points are computed."""
    join()
    x, y = data(10)
    failing, options = [(x * torch.nan, y)], {}
    if kind == "landscape":
        failing, options = FailingInTheEnd([(x, y)]), {"axes": "random"}
    try:
        return measured(kind, [(x, y)] if rank() == 0 else failing, **options)
    except lf.LandscapeError as error:
        return str(error), error.result.computed
    except lf.FlatnessError as error:
        return str(error)


SHARED = (uneven_ranks, rank_without_batches)
for kind in KINDS:
    for scenario in (*SHARED, one_rank_fails):
        SCENARIOS[f"{scenario.__name__}, {kind}"] = partial(scenario, kind)
