"""Time and memory of tasks, as ratios within one run.

Time: every repeat runs all tasks in turn, after one round of warm-up, on the same batch, threads and precision. The
medians count. Wall-clock time is what counts; the processor time of the same runs is kept beside it, since it suffers
less from what else a machine does. What is freed is kept for the next use (``KEEPS``): by default glibc gives memory
back and gets it anew in every forward pass, as the heap happens to lie, which takes up to a third of the pass.

Memory: a task runs in a process of its own, after a warm-up; its peak is that of resident memory above what was
resident before. The kernel keeps that peak (VmHWM of Linux, set back before the task): a sampling thread could miss it,
and ru_maxrss also has what importing needed. What is freed goes back to the system at once (``MALLOC``): else the peak
is that of what glibc keeps for later, which differs by a half from one run of the same task to the next. On a GPU it is
the peak of what torch allocates.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

MEMORY_REPEATS = 3
KEEPS = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
MALLOC = dict.fromkeys(KEEPS, str(2**17))  # as they are at the beginning; glibc raises them
Task = Callable[[], object]


class Times(NamedTuple):
    """Seconds of every run, by task."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median of the wall-clock times of a task."""
        return statistics.median(self.wall[name])

    def ratio(self, name: str, other: str) -> float:
        """Of the medians of two tasks."""
        return self.median(name) / self.median(other)

    def spread(self, name: str, other: str) -> str:
        """The ratios of single repeats, and that of processor time."""
        pairs = sorted(a / b for a, b in zip(self.wall[name], self.wall[other], strict=True))
        processor = statistics.median(self.processor[name]) / statistics.median(self.processor[other])
        return f"single repeats {pairs[0]:.3g} to {pairs[-1]:.3g}, processor time {processor:.3g}"


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(task: Task, device: str) -> tuple[float, float]:
    """Seconds of one run: wall clock, processor."""
    synchronize(device)
    start, processor = time.perf_counter(), time.process_time()
    task()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - processor


def interleaved(tasks: Mapping[str, Task], repeats: int, device: str = "cpu", budget: float = 120.0) -> Times:
    """Times of tasks that are run in turn; the order is turned round in every other repeat.

    After three repeats no other is begun when the budget, in seconds, is spent.
    """
    times = Times({name: [] for name in tasks}, {name: [] for name in tasks})
    start = time.perf_counter()
    for repeat in range(repeats + 1):
        names = list(tasks) if repeat % 2 else list(tasks)[::-1]
        for name in names:
            wall, processor = once(tasks[name], device)
            if repeat:  # the first is a warm-up
                times.wall[name].append(wall)
                times.processor[name].append(processor)
        if repeat >= 3 and time.perf_counter() - start > budget:
            break
    return times


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM``."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) * 1024


def peak(task: Task, device: str) -> int:
    """Bytes at the peak of a task above what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if malloc_trim is not None:
        malloc_trim(0)  # what the warm-up has freed is not held
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before = resident("VmRSS")
    task()
    return resident("VmHWM") - before


def apart(function: str, device: str, repeats: int = 0, **arguments: Any) -> dict[str, Any]:
    """Peak in bytes, and seconds, of a task in a process of its own.

    Args:
        function: ``"module:name"``; called with the arguments it returns a warm-up and the task.
        device: ``"cpu"`` or ``"cuda"``.
        repeats: times the task is timed, after its peak was measured.
        arguments: of the function; what JSON has.
    """
    command = [sys.executable, "-m", "benchmarks.timing", function, device, str(repeats), json.dumps(arguments)]
    environment = os.environ | MALLOC
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{function} in a process of its own: {error}")
    return json.loads(done.stdout.splitlines()[-1])


def peaks_apart(function: str, device: str, repeats: int = MEMORY_REPEATS, **arguments: Any) -> list[float]:
    """Peaks of so many processes, in bytes."""
    return [apart(function, device, **arguments)["peak"] for _ in range(repeats)]


def main() -> None:
    function, device, repeats, arguments = sys.argv[1:]
    warnings.filterwarnings("ignore")
    module, name = function.split(":")
    warm_up, task = getattr(importlib.import_module(module), name)(device=device, **json.loads(arguments))
    warm_up()
    found: dict[str, Any] = {"peak": peak(task, device)}
    found["seconds"] = [once(task, device)[0] for _ in range(int(repeats))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
