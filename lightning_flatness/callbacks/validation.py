"""Measure flatness during one validation, on the validated batches or on data that are read separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_flatness.callbacks.data.sources import Asked, SeparateData, ValidationBatches
from lightning_flatness.callbacks.network import Network
from lightning_flatness.callbacks.running import NotCalledError, PassesOfRun, Running
from lightning_flatness.errors import BatchError, naming
from lightning_flatness.measure.measurement import Measurement
from lightning_flatness.measure.ranks import gather
from lightning_flatness.measure.samples import deviations_of
from lightning_flatness.model.call import Call
from lightning_flatness.results import FlatnessReport


class Validation:
    """The measurement during one validation, with one :class:`Running` for each source of samples.

    A source is a validation loader, the training data, or the user's own data. The measurement of a loader begins with
    the first step on this loader, because this step shows which network to measure.

    Normalised relative flatness needs the standard deviations ("spread") of the layers' input channels. A collective
    computes the spread from the first samples of all ranks. Until then, samples are held, which means that they wait in
    memory.
    """

    def __init__(
        self,
        sources: Sequence[ValidationBatches | SeparateData],
        passes: PassesOfRun,
        measurement_of: Callable[[Network], Measurement],
        waits: bool,
    ) -> None:
        self._waits = waits  # whether samples wait until all ranks know the spread of the input channels
        self._sources, self._passes, self._measurement_of = sources, passes, measurement_of
        self._running: dict[int, Running] = {}
        self._left_out: dict[int, str] = {}  # loaders that cannot be measured, and why
        self._absent: set[int] = set()  # loaders for whose spread this rank has given no samples

    def before_step(self, asked: Asked, network: Network, loader: int) -> None:
        """Start to record the network's call on a batch that is about to be validated."""
        self._of_step(loader, network).before_step(asked)

    def after_step(self, asked: Asked | None, call: Call | None, network: Network, batch_idx: int, loader: int) -> None:
        """Measure a validated batch, or the next part of the training data or of the user's own data.

        A loader other than the first is left out if its batches have no targets, or if its first step does not call the
        network. After the last batch of a loader, the samples that have waited in memory are measured at once, because
        another callback may swap the weights before the epoch ends.
        """
        running = self._of_step(loader, network)
        if loader in self._left_out:
            return
        with naming(str(loader), "Validation loader") if len(self._sources) > 1 else nullcontext():
            try:
                running.after_step(asked, call, batch_idx)
                if running.source.is_last(batch_idx):
                    running.measurement.take_spread()
                    running.measure_held()
            except BatchError as error:
                is_unused = isinstance(error, NotCalledError) and batch_idx == 0
                if loader == 0 or asked is None or (asked.targets is not None and not is_unused):
                    raise
                self._left_out[loader] = str(error)

    def end_step(self, network: Network, batch: Any, batch_idx: int, loader: int, failed: bool) -> None:
        """Remove hooks from the network. On a rank that has failed, also take part in the collective for the spread.

        A failed rank does so when the other ranks do. If it went on without, it would wait for the others in a
        collective of Lightning or of the user, while they wait for this rank.
        """
        source = self._sources[loader if len(self._sources) > 1 else 0]
        if failed and (source.is_last(batch_idx) or source.is_due(batch, batch_idx)):
            self._take_spread(loader, network)
        if isinstance(source, SeparateData):
            source.num_validated += 1
        self.release()

    def measure_rest(self, network: Network) -> None:
        """Measure the samples that remain in the sources when all batches have been validated."""
        for loader in range(len(self._sources)):
            self._of(loader, network).measure_rest()

    def settle(self, network: Network, failed: bool) -> None:
        """Measure the samples that still wait in memory, unless this rank has failed. All ranks must call this."""
        failures = [self._take_spread(loader, network) for loader in range(len(self._sources))]
        for failure in failures:
            if failure is not None:
                raise failure
        for loader in range(0 if failed else len(self._sources)):
            running = self._of(loader, network)
            try:
                if loader not in self._left_out:
                    running.measure_held()
            except BatchError as error:
                if loader == 0 or running.has_targets:
                    raise
                self._left_out[loader] = str(error)

    def _take_spread(self, loader: int, network: Network) -> Exception | None:
        """Compute the standard deviations of the layers' input channels for one loader. This is a collective.

        If this rank cannot measure the loader, it takes part in the collective without samples, and returns the error.
        Otherwise return None.
        """
        try:
            measurement = self._of(loader, network).measurement
        except Exception as error:
            if self._waits and loader not in self._absent:
                deviations_of([], sync=True)
            self._absent.add(loader)
            return error
        measurement.take_spread()
        return None

    def reports(self, network: Network) -> dict[int, FlatnessReport]:
        """Return a dict from the index of each measured loader to its report. All ranks must call this method.

        A loader other than the first is left out if no rank has a sample of it.
        """
        measurements = [self._of(loader, network).measurement for loader in range(len(self._sources))]
        left_out: dict[int, str] = {}
        if len(measurements) > 1:
            ranks = gather((self._left_out, [bool(one.layers) for one in measurements]), sync=True)
            has_samples = [any(of_loader) for of_loader in zip(*(has for _, has in ranks), strict=True)]
            empty = [loader for loader, has in enumerate(has_samples) if loader > 0 and not has]
            left_out = dict.fromkeys(empty, "No sample of it was measured. Is it empty?")
            for of_rank, _ in ranks:
                left_out |= of_rank
        for loader, reason in left_out.items():
            rank_zero_warn(f"FlatnessCallback leaves out validation loader {loader}: {reason}")
        return {loader: one.report() for loader, one in enumerate(measurements) if loader not in left_out}

    def release(self) -> None:
        """Remove hooks from the network, and drop the tensors of observed passes."""
        for running in self._running.values():
            running.release()

    def _of_step(self, loader: int, network: Network) -> Running:
        running = self._of(loader, network)
        # Until a step calls the network, model= may be a function that makes a new module at every call.
        if running.network.is_called and running.network.module is not network.module:
            raise BatchError(
                "Within this validation, another module has been put in the network's place, so the validation would "
                "be measured on two networks. Replace the network before the first batch, e.g. in "
                "on_validation_epoch_start."
            )
        return running

    def _of(self, loader: int, network: Network) -> Running:
        """Return the :class:`Running` of a loader, and begin its measurement at the first call."""
        loader = loader if len(self._sources) > 1 else 0
        if loader not in self._running:
            if loader > 0 and self._of(loader - 1, network).measurement.waits:
                # The collectives come in the order of the loaders, even on a rank that has no batch of one loader.
                self._of(loader - 1, network).measurement.take_spread()
            measurement = self._measurement_of(network)
            self._running[loader] = Running(measurement, network, self._sources[loader], self._passes)
        return self._running[loader]


def settle(running: Validation | None, network: Network, num_loaders: int, waits: bool, failed: bool) -> None:
    """Measure the samples that still wait in memory, unless this rank has failed. All ranks must call this function.

    ``waits`` says whether samples wait for the standard deviations of the layers' input channels. ``running`` is None
    on a rank that could not begin to measure. Such a rank takes part in the collectives without samples.
    """
    if running is not None:
        running.settle(network, failed)
    else:
        for _ in range(num_loaders if waits else 0):
            deviations_of([], sync=True)
