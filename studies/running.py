"""Train and measure a family of networks in several processes, and append a row to the tables for every snapshot.

A stack is a group of networks that are trained at once. Snapshots that are in the tables are not measured again, so
that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from studies.data import Data, cifar10, digits
from studies.families import FAMILIES, Configuration, Family, stacks
from studies.measuring import measured_rows
from studies.tables import Table
from studies.training import Run, Snapshot

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """The options of the command line: sources of data, folders for results, processes and limits."""

    arrays: Path | None = None
    root: Path = Path("data")
    download: bool = False
    results: Path = RESULTS
    work: Path = Path("runs/study")
    jobs: int = 1
    device: str = "cpu"
    keep_weights: bool = False
    minutes: float = math.inf
    skip: int = 0  # leave out this many stacks at the beginning, because another run may train them
    limit: int | None = None  # train at most this many stacks

    def saved(self, family: Family, number: int) -> Path:
        """Return the path of the file with the training state of one stack of networks, including the weights."""
        return self.work / family.name / f"stack-{number:03d}.pt"


def load(data: str, settings: Settings) -> Data:
    found = digits() if data == "digits" else cifar10(settings.arrays, settings.root, settings.download)
    return found.to(torch.device(settings.device))


class Worker:
    """The state and the tasks of a worker process; the process reads the data only once."""

    data: Data
    family: Family
    settings: Settings

    @classmethod
    def begin(cls, family: Family, settings: Settings) -> None:
        if settings.jobs > 1:
            torch.set_num_threads(1)
        cls.family, cls.settings, cls.data = family, settings, load(family.data, settings)

    @classmethod
    def train(cls, stack: tuple[Configuration, ...], saved: Path, deadline: float) -> list[Snapshot] | None:
        return Run(cls.family, stack, cls.data, cls.settings.device).train(saved, deadline)

    @classmethod
    def measure(cls, configuration: Configuration, snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Any]]:
        return measured_rows(cls.family, configuration, snapshot, cls.data)


class Later(Future[Any]):
    """A future whose task runs in this process when ``result()`` is called."""

    def __init__(self, task: Callable[[], Any]) -> None:
        super().__init__()
        self._task = task

    def result(self, timeout: float | None = None) -> Any:
        return self._task()


class Here(Executor):
    """An executor that runs tasks in this process one by one, because several processes do not share a GPU."""

    def submit(self, task: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        return Later(partial(task, *arguments, **options))


def finished(pending: Iterable[Future[Any]]) -> list[Future[Any]]:
    """Return futures whose ``result()`` can be called: the next task of this process, or else all finished tasks.

    If all tasks run in other processes, this function waits until at least one is finished.
    """
    here = [future for future in pending if isinstance(future, Later)]
    return here[:1] or list(wait(pending, return_when=FIRST_COMPLETED).done)


@contextmanager
def workers(initializer: Callable[..., None], arguments: tuple[Any, ...], jobs: int) -> Iterator[Executor]:
    """Yield an executor: a pool of processes with one thread each, or this process if ``jobs`` is 1."""
    if jobs == 1:
        initializer(*arguments)
        yield Here()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=initializer, initargs=arguments)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def bar(console: Console) -> Progress:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def measure_all(
    tasks: Sequence[tuple[Any, ...]],
    measure: Callable[..., dict[str, Any]],
    begin: Callable[..., None],
    settings: Settings,
    table: Table,
    console: Console,
    what: str,
) -> None:
    """Measure all tasks whose rows are not in the table, and append their rows to the table.

    The first entries of a task are the values of the columns ``table.keys`` in its row.
    """
    tasks = [task for task in tasks if tuple(map(str, task[: len(table.keys)])) not in table]
    try:
        with workers(begin, (settings,), settings.jobs) as pool, bar(console) as progress:
            shown = progress.add_task(what, total=len(tasks))
            pending = {pool.submit(measure, *task) for task in tasks}
            while pending:
                for future in finished(pending):
                    pending.remove(future)
                    table.append(future.result())
                    progress.advance(shown)
    except KeyboardInterrupt:
        stopped(console)


def stopped(console: Console) -> None:
    console.print("Interrupted. Nothing that was measured is lost: the same command goes on from here.")
    raise SystemExit(130) from None


class FamilyRun:
    """A run over the stacks of a family that are not finished.

    ``left`` maps the number of every stack in progress to how many of its snapshots are not measured yet, or to -1
    while the stack is being trained.
    """

    def __init__(self, family: Family, settings: Settings) -> None:
        self.family, self.settings = family, settings
        names = ("configurations", "losses", "measures")
        keys = (("name",), ("name", "snapshot"), ("name", "snapshot"))
        self.tables = {
            name: Table(settings.results / f"{family.name}-{name}.csv", *key)
            for name, key in zip(names, keys, strict=True)
        }
        every = list(enumerate(stacks(family, settings.device)))[settings.skip :][: settings.limit]
        self.todo = [(n, stack) for n, stack in every if not all(self._is_done(c) for c in stack)]
        self.deadline = time.time() + 60 * settings.minutes
        self.left: dict[int, int] = {}

    def _is_done(self, configuration: Configuration) -> bool:
        return (configuration.name,) in self.tables["configurations"]

    def run(self, console: Console) -> None:
        """Train and measure the stacks that are not finished."""
        networks = sum(len(stack) for _, stack in self.todo)
        with workers(Worker.begin, (self.family, self.settings), self.settings.jobs) as pool, bar(console) as progress:
            trained = progress.add_task("networks trained", total=networks)
            measured = progress.add_task("snapshots measured", total=0)
            waiting, pending = list(self.todo), {}
            while waiting or pending:
                while waiting and len(self.left) < self.settings.jobs and time.time() < self.deadline:
                    number, stack = waiting.pop(0)
                    self.left[number] = -1
                    future = pool.submit(Worker.train, stack, self._saved(number), self.deadline)
                    pending[future] = number, stack, None
                if not pending:
                    break  # out of time
                for future in finished(pending):
                    number, stack, snapshot = pending.pop(future)
                    if snapshot is None:
                        snapshots = future.result()
                        progress.advance(trained, len(stack) if snapshots is not None else 0)
                        todo = self._to_measure(snapshots or [])
                        self.left[number] = len(todo)
                        by_name = {configuration.name: configuration for configuration in stack}
                        for one in todo:
                            task = pool.submit(Worker.measure, by_name[one.name], one)
                            pending[task] = number, stack, one
                        progress.update(measured, total=(progress.tasks[measured].total or 0) + len(todo))
                        if snapshots is None:
                            del self.left[number]
                            continue
                    else:
                        losses, measures = future.result()
                        self.tables["measures"].append(measures)
                        self.tables["losses"].append(losses)
                        self.left[number] -= 1
                        progress.advance(measured)
                    if not self.left[number]:
                        self._finish(number, stack)

    def _to_measure(self, snapshots: list[Snapshot]) -> list[Snapshot]:
        """Return the snapshots that are not in the tables; the costly ones come first."""
        missing = [one for one in snapshots if (one.name, one.snapshot) not in self.tables["losses"]]
        return sorted(missing, key=lambda one: one.snapshot not in self.family.costly)

    def _finish(self, number: int, stack: tuple[Configuration, ...]) -> None:
        for configuration in stack:
            self.tables["configurations"].append(configuration.row())
        del self.left[number]
        if not self.settings.keep_weights:
            self._saved(number).unlink(missing_ok=True)

    def _saved(self, number: int) -> Path:
        return self.settings.saved(self.family, number)


def run_family(name: str, settings: Settings, console: Console) -> None:
    """Train and measure all networks of a family that are not in the tables."""
    family = FAMILIES[name]()
    run = FamilyRun(family, settings)
    done = sum(run._is_done(c) for c in family.configurations)
    console.print(f"{name}: {len(family.configurations)} networks, {done} done. Rows go to {settings.results}.")
    try:
        run.run(console)
    except KeyboardInterrupt:
        stopped(console)


def smaller(family: Family, number: int, epochs: int) -> Family:
    """Return a small family for trials: the first ``number`` configurations, trained for ``epochs`` epochs."""
    some = tuple(replace(c, epochs=epochs) for c in family.configurations[:number])
    return replace(family, configurations=some, epochs=(epochs,), costly=(f"epoch {epochs}",))
