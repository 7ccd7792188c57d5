"""What the tests of the harness run."""

import time

import torch
from torch import distributed

from tests.distributed.scenarios import rank, scenario


@scenario
def sum_of_ranks():
    distributed.init_process_group("gloo")
    value = torch.tensor(rank() + 1)
    distributed.all_reduce(value)
    return rank(), value


@scenario
def fails_on_rank_1():
    distributed.init_process_group("gloo")
    if rank() == 1:
        raise ValueError("rank 1 has had enough")
    return "done"


@scenario
def never_ends():
    time.sleep(3600)
