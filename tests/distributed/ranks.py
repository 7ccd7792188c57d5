"""Run named scenarios in several processes, which find each other as processes that ``torchrun`` has started do."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LAUNCHER_VARIABLES = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Outcome:
    """What a scenario returned on one rank, or its traceback."""

    returned: Any = None
    error: str | None = None


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**variables):
    """For a Python process that imports the package and the tests, with one thread."""
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables


def run_processes(commands, environments, folder, seconds):
    """Run all at once, and return their exit codes; fail, with the tails of stderr, when they take too long."""
    logs = [folder / f"stderr.{index}.txt" for index in range(len(commands))]
    processes = [
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log.open("w"))
        for command, env, log in zip(commands, environments, logs, strict=True)
    ]
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        tails = "\n\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
        pytest.fail(f"not done after {seconds} seconds: {commands[0]}\n{tails}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_on_ranks(*scenarios, folder, num_ranks=2, seconds=300):
    """Run scenarios, one after another, in ``num_ranks`` processes.

    Returns:
        For every scenario, by name, a list of the outcomes of the ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.distributed.worker", str(folder), *scenarios]
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [
        environment(LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0", **shared) for rank in range(num_ranks)
    ]
    codes = run_processes([command] * num_ranks, environments, folder, seconds)
    return {
        name: [outcome(folder, index, rank, code) for rank, code in enumerate(codes)]
        for index, name in enumerate(scenarios)
    }


def outcome(folder, index, rank, code):
    file = folder / f"{index}.{rank}.pt"
    if not file.exists():
        stderr = (folder / f"stderr.{rank}.txt").read_text()[-3000:]
        return Outcome(error=f"no outcome: the process ended with {code}\n{stderr}")
    return Outcome(**torch.load(file, weights_only=False))


def run_once_on_ranks(*scenarios, name, tmp_path_factory, **options):
    """The same for a fixture of a whole module: the processes of pytest-xdist share one run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    kept = folder / f"{name}.pt"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            torch.save(run_on_ranks(*scenarios, folder=folder / name, **options), kept)
    return torch.load(kept, weights_only=False)


def returned(outcomes):
    """What every rank returned; fail where one did not."""
    errors = [f"--- rank {rank}\n{outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
    return [outcome.returned for outcome in outcomes]
