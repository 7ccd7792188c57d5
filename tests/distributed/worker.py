"""One rank: runs the scenarios named on the command line, and writes what each returned, or its traceback."""

import importlib
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tests.distributed.ranks import free_port
from tests.distributed.scenarios import SCENARIOS

KINDS = ("alone", "bit_identical", "epoch_end", "harness", "loss", "number", "penalty", "rank_error", "sharded")
MODULES = [f"{kind}_scenarios" for kind in KINDS]


def main(folder, names):
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        num_ranks,
        is_master=rank == 0,
        timeout=timedelta(seconds=120),
    )
    for index, name in enumerate(names):
        # A process group for every scenario: one that ends with an error on some rank does not disturb the next.
        if rank == 0:
            store.set(f"port {index}", str(free_port()))
        os.environ["MASTER_PORT"] = store.get(f"port {index}").decode()
        os.environ["WORLD_SIZE"] = str(num_ranks)  # Lightning deletes it
        torch.save(outcome(SCENARIOS[name]), folder / f"{index}.{rank}.pt")
        if distributed.is_initialized():
            distributed.destroy_process_group()
        if name != names[-1]:
            store.set(f"done {index} {rank}", "")
            store.wait([f"done {index} {other}" for other in range(num_ranks)])


def outcome(scenario):
    try:
        return {"returned": scenario()}
    except BaseException:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(f"tests.distributed.{module}")
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]), sys.argv[2:])
