"""The spectrum of one network, of which every rank gives some batches."""

from datetime import timedelta

import torch
from torch import distributed

import lightning_flatness as lf
from tests.distributed.scenarios import rank, scenario
from tests.spectra import ConvNet, data

OPTIONS = {"top_k": 3, "num_steps": 12, "num_probes": 2}


def network():
    torch.manual_seed(0)
    return ConvNet().double()


def measured(batches):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    result = lf.hessian_spectrum(network(), batches, **OPTIONS)
    names = ("eigenvalues", "ritz_values", "ritz_weights", "trace", "k_hn", "num_samples", "loss")
    return {name: getattr(result, name) for name in names}


@scenario
def spectrum_of_uneven_ranks():
    x, y = data(10)
    return measured([(x[:3], y[:3]), (x[3:7], y[3:7])] if rank() == 0 else [(x[7:], y[7:])])


@scenario
def spectrum_of_a_rank_without_batches():
    return measured([data(10)] if rank() == 0 else [])


@scenario
def spectrum_where_one_rank_fails():
    x, y = data(10)
    try:
        return measured([(x, y)] if rank() == 0 else [(x * torch.nan, y)])
    except lf.FlatnessError as error:
        return str(error)
