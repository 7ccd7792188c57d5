"""Count the operations that the callback adds to an observed validation batch.

    python -m benchmarks.calls

Counts, unlike times, do not depend on the machine or on other processes. Validations of 12 and of 6 batches are run,
with the callback and without it. The difference between 12 and 6 batches, divided by 6, is the count of one batch. It
leaves out what happens only at the beginning, and the full certificate, which every sixteenth batch gets. Three kinds
of counts are made:

- Operations in a dispatch mode. In inference mode, a composite operation counts as one operation; otherwise the
  operations that it consists of count.
- Events of the profiler, which include all parts of composite operations. Each `_local_scalar_dense` or `equal` makes
  the host wait for a GPU. `is_nonzero` contains a `_local_scalar_dense`, which the dispatch mode does not see in
  inference mode.
- Calls of torch's functions from Python.

The counting checks, by the callback's log messages, that the callback still observes the forward passes.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core import rank_zero
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_flatness as lf
from benchmarks.networks import resnet20
from benchmarks.training import Classifier, loader_of, trainer_of

MORE, FEW = 12, 6
SYNCHRONISATIONS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
Counts = Counter[str]


class Dispatched(TorchDispatchMode):
    """A dispatch mode that counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """A function mode that counts calls of torch's functions by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


class Profiled:
    """A context manager that counts the events of torch's profiler, including composite operations and their parts."""

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
    """In a ``with`` block, collect the log messages of rank zero in the list that is yielded."""
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
    """Run a whole validation inside the counter ``count()``, and return the counts by name."""
    torch.manual_seed(0)
    module, loader = Classifier(resnet20()), loader_of(64 * batches, batch_size=64)
    trainer = trainer_of("cpu", [lf.FlatnessCallback(summary=False, live=True)] if with_callback else [])
    with told() as texts, count() as counter:
        trainer.validate(module, loader, verbose=False)
    if with_callback and not any("observes the forward passes" in text for text in texts):
        raise RuntimeError(f"The callback does not observe under {count.__name__}: {texts}")
    return counter.counts


def of_a_batch(count: Callable[[], Any]) -> tuple[Counts, Counts]:
    """Return two counts for one batch, by name: what the callback adds, and what a batch takes without it."""
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
