"""The functions of plain PyTorch on ranks of one process group: together where that is asked for, else alone."""

from functools import partial

import torch
from torch import distributed, nn

import lightning_flatness as lf
from tests.distributed.loss_scenarios import join
from tests.distributed.scenarios import SCENARIOS, rank

SPECTRUM = {"top_k": 1, "num_steps": 3, "num_probes": 1}
FUNCTIONS = {
    "flatness": lambda net, batches, **options: lf.measure_flatness(net, batches, **options).relative_flatness,
    "estimate": lambda net, batches, **options: (
        lf.measure_flatness(net, batches, layers="all", residual="hutchinson", **options).hessian_trace
    ),
    "eigenvalue": lambda net, batches, **options: eigenvalues(net, batches, **options),
    "spectrum": lambda net, batches, **options: lf.hessian_spectrum(net, batches, **SPECTRUM, **options).ritz_values,
    "landscape": lambda net, batches, **options: lf.loss_landscape(net, batches, steps=2, **options).losses,
}


def eigenvalues(net, batches, **options):
    (found,) = lf.measure_lambda_max(net, batches, tolerance=1e-9, **options).values()
    return [found.lambda_max, found.neuronwise_lambda_max, found.num_samples, found.info.exact]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double()


def batches(first=0, last=10):
    x = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [(x[first:last], (torch.arange(10) % 4)[first:last])] if last > first else []


def alone(kind):
    """Rank 1 measures, while rank 0 waits for it to be done."""
    join()
    found = FUNCTIONS[kind](network(), batches()) if rank() == 1 else None
    distributed.barrier()
    return found


def together(split):
    """The eigenvalues over the batches of both ranks."""
    join()
    return eigenvalues(network(), batches(0, split) if rank() == 0 else batches(split, 10), sync=True)


def fails_on_one():
    join()
    try:
        eigenvalues(network(), batches() if rank() == 0 else [(batches()[0][0] * torch.nan, None)], sync=True)
    except lf.FlatnessError as error:
        return str(error)


for kind in FUNCTIONS:
    SCENARIOS[f"alone, {kind}"] = partial(alone, kind)
for split in (3, 10):
    SCENARIOS[f"together, {split}"] = partial(together, split)
SCENARIOS["eigenvalue, one fails"] = fails_on_one
