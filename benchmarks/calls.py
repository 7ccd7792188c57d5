"""How many operations the callback adds to a batch of validation that it observes.

    python -m benchmarks.calls

Counts do not depend on the machine or on what else runs there, as times do. Validations of 12 and of 6 batches, with
the callback and without; the difference of the differences, over 6, is what a batch costs when all has settled (on one
batch of 16 more of a certificate is done; none of these). Counted are

- operations, as a dispatch mode sees them: an operation made of others counts as one in inference mode, else as these;
- events of the profiler, with all that operations are made of. Each `_local_scalar_dense` or `equal` makes the host
  wait for a GPU; `is_nonzero` holds one of the former, which the dispatch mode does not see in inference mode;
- calls of torch's functions from Python.

That the callback observes also while it is counted is checked by what it says.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning_utilities.core import rank_zero
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_flatness as lf
from benchmarks.callback import Classifier, loader_of
from benchmarks.networks import resnet20

MORE, FEW = 12, 6
SYNCHRONISATIONS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
Counts = Counter[str]


class Dispatched(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Counts calls of torch's functions by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


class Profiled:
    """Counts what torch's profiler sees: also operations that are made of others, as `conv2d` and `is_nonzero` are."""

    def __init__(self) -> None:
        self.counts: Counts = Counter()

    def __enter__(self) -> Profiled:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self.counts = Counter(event.name for event in self._profile.events() if event.name.startswith("aten::"))


@contextmanager
def told() -> Iterator[list[str]]:
    """What is said on rank zero meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = rank_zero.log
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def validated(count: Callable[[], Any], batches: int, with_callback: bool) -> Counts:
    """Counts of a whole validation."""
    torch.manual_seed(0)
    module, loader = Classifier(resnet20()), loader_of(batches)
    trainer = L.Trainer(
        callbacks=[lf.FlatnessCallback(summary=False, live=True)] if with_callback else [],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with told() as texts, count() as counter:
        trainer.validate(module, loader, verbose=False)
    if with_callback and not any("observes the forward passes" in text for text in texts):
        raise RuntimeError(f"The callback does not observe under {count.__name__}: {texts}")
    return counter.counts


def of_a_batch(count: Callable[[], Any]) -> tuple[Counts, Counts]:
    """What the callback adds to a batch, and what a batch takes without it; by name."""
    counts = {}
    for with_callback in (True, False):
        more, few = (validated(count, batches, with_callback) for batches in (MORE, FEW))
        counts[with_callback] = {name: (more[name] - few[name]) / (MORE - FEW) for name in more | few}
    with_it, without = counts[True], counts[False]
    added = {name: with_it.get(name, 0) - without.get(name, 0) for name in with_it | without}
    return Counter({name: number for name, number in added.items() if number}), Counter(without)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{lf.__file__}: ResNet-20, float32, batches of 64 images, observed; for every batch")
    print("| counted | without the callback | it adds |\n|---|--:|--:|")
    details = []
    for what, count in {
        "operations dispatched": Dispatched,
        "operations in the profiler": Profiled,
        "calls of torch's functions": Called,
    }.items():
        added, without = of_a_batch(count)
        print(f"| {what} | {without.total():g} | {added.total():g} |")
        for name in SYNCHRONISATIONS if count is not Called else ():
            print(f"| of these {name} | {without[name]:g} | {added[name]:g} |")
        details.append(f"{what}: " + ", ".join(f"{name} {number:g}" for name, number in added.most_common(25)))
    print(*details, sep="\n")


if __name__ == "__main__":
    main()
