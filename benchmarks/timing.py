"""Measure time and memory of tasks, and compare tasks by ratios within one run.

Time: after a warm-up, every repeat runs all tasks in turn, with the same batch, threads and precision. Medians of
wall-clock time are compared. Processor time is recorded as well, because other processes on the machine affect it less.
The process keeps freed memory (``KEEPS``). By default, glibc may return freed memory to the system and request it again
in every forward pass, which takes up to a third of the pass. Whether glibc does so depends on the layout of the heap.

Memory: a task runs in a separate process, after a warm-up. The result is the peak of resident memory during the task,
minus the resident memory before the task. The Linux kernel records the peak (VmHWM, which is reset before the task). A
sampling thread could miss the peak, and ru_maxrss would include imports. Freed memory returns to the system at once
(``MALLOC``), because the memory that glibc keeps differs by half between runs of the same task. On a GPU, the result is
the peak of torch's allocations.
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
MALLOC = dict.fromkeys(KEEPS, str(2**17))  # glibc starts with these values; setting them keeps it from raising them
Task = Callable[[], object]


class Times(NamedTuple):
    """The seconds of every repeat, by task: wall-clock times and processor times."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median of the wall-clock times of a task."""
        return statistics.median(self.wall[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the median time of a task divided by that of another task."""
        return self.median(name) / self.median(other)

    def spread(self, name: str, other: str) -> str:
        """Return a text with the smallest and largest ratio of single repeats, and the ratio of processor times."""
        pairs = sorted(a / b for a, b in zip(self.wall[name], self.wall[other], strict=True))
        processor = statistics.median(self.processor[name]) / statistics.median(self.processor[other])
        return f"single repeats {pairs[0]:.3g} to {pairs[-1]:.3g}, processor time {processor:.3g}"


def synchronize(device: str) -> None:
    """Wait until the GPU has finished; do nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(task: Task, device: str = "cpu") -> tuple[float, float]:
    """Run a task once; return wall-clock and processor time, in seconds."""
    synchronize(device)
    start, processor = time.perf_counter(), time.process_time()
    task()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - processor


def interleaved(tasks: Mapping[str, Task], repeats: int, device: str = "cpu", budget: float = 120.0) -> Times:
    """Time several tasks in turn, after a warm-up of each; every other repeat runs them in reverse order.

    After at least three repeats, no further repeat starts if more than ``budget`` seconds have passed.
    """
    times = Times({name: [] for name in tasks}, {name: [] for name in tasks})
    start = time.perf_counter()
    for repeat in range(repeats + 1):
        names = list(tasks) if repeat % 2 else list(tasks)[::-1]
        for name in names:
            wall, processor = once(tasks[name], device)
            if repeat:  # repeat 0 is the warm-up
                times.wall[name].append(wall)
                times.processor[name].append(processor)
        if repeat >= 3 and time.perf_counter() - start > budget:
            break
    return times


def resident(key: str) -> int:
    """Return the resident memory of this process in bytes: now (``"VmRSS"``), or at its peak (``"VmHWM"``)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) * 1024


def peak(task: Task, device: str = "cpu") -> int:
    """Run a task; return the peak of memory during the task minus the memory before it, in bytes."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if malloc_trim is not None:
        malloc_trim(0)  # return the memory that the warm-up has freed to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = resident("VmRSS")
    task()
    return resident("VmHWM") - before


def apart(function: str, repeats: int = 0, **arguments: Any) -> dict[str, Any]:
    """Measure a task in a separate process; return its ``"peak"`` in bytes and the ``"seconds"`` of every repeat.

    Args:
        function: ``"module:name"`` of a function that returns two functions, a warm-up and the task.
        repeats: how often the task is timed after its peak was measured.
        arguments: arguments for the function, which must be serialisable as JSON.
    """
    command = [sys.executable, "-m", "benchmarks.timing", function, str(repeats), json.dumps(arguments)]
    environment = os.environ | MALLOC
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{function} in a separate process: {error}")
    return json.loads(done.stdout.splitlines()[-1])


def peaks_apart(function: str, repeats: int = MEMORY_REPEATS, **arguments: Any) -> list[float]:
    """Measure the peak of a task once in each of ``repeats`` processes; return the peaks in bytes."""
    return [apart(function, **arguments)["peak"] for _ in range(repeats)]


def main() -> None:
    function, repeats, arguments = sys.argv[1:]
    warnings.filterwarnings("ignore")
    module, name = function.split(":")
    warm_up, task = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    warm_up()
    result: dict[str, Any] = {"peak": peak(task)}
    result["seconds"] = [once(task)[0] for _ in range(int(repeats))]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
