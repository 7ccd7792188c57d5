"""The landscape of one network, of which every rank gives some batches."""

from datetime import timedelta

import torch
from torch import distributed

import lightning_flatness as lf
from tests.distributed.scenarios import rank, scenario
from tests.spectra import ConvNet, data

OPTIONS = {"axes": ["random", "hessian"], "steps": 3, "span": 0.5}


def network():
    torch.manual_seed(0)
    return ConvNet().double()


class FailingInTheEnd:
    """Batches of which every pass but the first fails, which is the one at the model's own weights."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > 1:
            raise RuntimeError("no more")
        return iter(self.batches)


def measured(batches, **options):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    result = lf.loss_landscape(network(), batches, **{**OPTIONS, **options})
    names = ("losses", "accuracies", "computed", "origin_loss", "num_samples", "axis_norms")
    return {name: getattr(result, name) for name in names}


@scenario
def landscape_of_uneven_ranks():
    x, y = data(10)
    return measured([(x[:3], y[:3]), (x[3:7], y[3:7])] if rank() == 0 else [(x[7:], y[7:])])


@scenario
def landscape_of_a_rank_without_batches():
    return measured([data(10)] if rank() == 0 else [])


@scenario
def landscape_where_one_rank_fails():
    x, y = data(10)
    try:
        return measured([(x, y)] if rank() == 0 else FailingInTheEnd([(x, y)]), axes="random")
    except lf.LandscapeError as error:
        return str(error), error.result.computed
