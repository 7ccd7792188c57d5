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

Another table has the operations of one observed batch of a ResNet-18 with the sizes of products that are used on a GPU.
Views are left out, because a GPU does nothing for them.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning_utilities.core import rank_zero
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_flatness as lf
from benchmarks.networks import images, resnet18, resnet20
from benchmarks.observed import forward, observed
from benchmarks.training import Classifier, loader_of, trainer_of

MORE, FEW = 12, 6
# The sizes that products have on a CPU. Without them, the sizes are those of other devices.
PRODUCTS, CLOSED_FORM = (f"lightning_flatness.functional.{name}" for name in ("products", "closed_form"))
SIZES = (
    (PRODUCTS, "PRODUCT_ELEMENTS"),
    (PRODUCTS, "MOST_STRIPS"),
    (CLOSED_FORM, "FACTOR_ELEMENTS"),
    (CLOSED_FORM, "MOST_SAMPLES"),
)
VIEWS = {
    f"aten::{name}"
    for name in (
        *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "squeeze"),
        *("t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "new_empty", "empty"),
        *("empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "unfold", "_local_scalar_dense"),
    )
}
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


def launched(samples: int) -> int:
    """Count the operations that an observed batch of a ResNet-18 would run on a GPU, without those of the network."""
    net, batch = resnet18(), images(samples)
    with ExitStack() as stack:
        for module, name in SIZES:
            stack.enter_context(patch.dict(vars(importlib.import_module(module))[name], clear=True))
        step, plain = observed(net, batch), Dispatched()
        with Dispatched() as counter:
            step()
        with plain:
            forward(net, batch[0])
    return sum(number - plain.counts[name] for name, number in counter.counts.items() if name not in VIEWS)


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
    print("| images in a batch | operations added on a GPU, without views |\n|--:|--:|")
    for samples in (64, 256):
        print(f"| {samples} | {launched(samples)} |")


if __name__ == "__main__":
    main()
