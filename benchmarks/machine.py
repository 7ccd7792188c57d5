"""Describe the machine, and measure how fast it multiplies and copies."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.timing import interleaved

PACKAGES = [
    "lightning-flatness",
    "torch",
    "torchvision",
    "lightning",
    "curvlinops-for-pytorch",
    "pyhessian",
    "backpack-for-pytorch",
    "numpy",
]


def described() -> dict[str, str]:
    """Return a description of the machine by keys: processor, threads, memory, versions of packages and so on."""
    return {
        "measured": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": f"{os.cpu_count()}, of which {len(os.sched_getaffinity(0))} may be used",
        "threads": f"{torch.get_num_threads()} of torch; {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{memory() / 2**30:.0f} GiB",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {installed(name)}" for name in PACKAGES),
        "load before": f"{os.getloadavg()[0]:.1f} processes",
    }


def processor() -> str:
    """Return the name of the CPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform


def has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16; without them, torch takes some twenty times as long."""
    information = Path("/proc/cpuinfo")
    words = set(information.read_text().split()) if information.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"}) or sys.platform == "darwin"


def memory() -> int:
    """Return the size of the memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def installed(name: str) -> str:
    """Return the version of a package, or ``"not installed"``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def limits(device: str = "cpu") -> dict[str, float]:
    """Measure the speed in float32: ``"flops"``, multiplications and additions per second, and ``"bytes"`` per second.

    The first is measured with a product of 2048x2048 matrices. The second is measured with a copy of 256 MB, which
    reads and writes 512 MB together.
    """
    a = torch.randn(2048, 2048, device=device)
    b, out = torch.randn_like(a), torch.empty_like(a)
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    tasks = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    times = interleaved(tasks, 7, device)
    best = {name: min(seconds) for name, seconds in times.wall.items()}
    return {"flops": 2 * 2048**3 / best["product"], "bytes": 2 * 4 * source.numel() / best["copy"]}
