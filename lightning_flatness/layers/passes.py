"""Forward passes of our own on parts of batches: recorded, certified, and handed to whoever measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, explained, is_out_of_memory
from lightning_flatness.functional import separating_masks
from lightning_flatness.layers.certificates.samples import certify_deterministic, certify_rows
from lightning_flatness.layers.certified import Certified, CertifiedPass, Context
from lightning_flatness.layers.certify import certify
from lightning_flatness.layers.gauss_newton import Advance, rows_at_a_time
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.parts import PartSize
from lightning_flatness.layers.recording import Pass, Recorder
from lightning_flatness.layers.selection import Selection, select
from lightning_flatness.model.copy import HALF, ModelCopy
from lightning_flatness.model.isolation import isolated
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.rows import num_rows, take, twice

Result = TypeVar("Result")


class OwnPasses:
    """Runs a copy of a model on batches, some samples at a time.

    Attributes:
        known: what is certified of the model so far.
        selection: the wanted layers and the classifier; None before the first pass.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.known = Certified()
        self.selection: Selection | None = None
        self._model = model
        self._options = options
        self._model_copy: ModelCopy | None = None
        self._size = PartSize()
        self._chance = torch.Generator().manual_seed(options.seed)

    def __call__(
        self,
        inputs: Any,
        targets: Tensor | None,
        work: Callable[[CertifiedPass, Certified, Advance], Result],
        advance: Advance | None = None,
    ) -> Iterator[Result]:
        """The results of some work on every part of a batch.

        Args:
            inputs: of the model.
            targets: of the loss.
            work: called under :func:`isolated` with a certified pass, what is known of the layers, and a function to
                call with its progress.
            advance: called with the part of the batch that is done.

        Raises:
            FlatnessError: the model cannot be measured, or memory runs out for half as many samples, too.
        """
        samples, start = num_rows(inputs, targets), 0
        first_batch = self.selection is None
        while start < samples:
            rows = self._size.next_rows(samples - start, begun=bool(self.known.layers))

            def tell(part: float, start: int = start, rows: int = rows) -> None:
                if advance is not None:
                    advance((start + part * rows) / samples)

            chunk = slice(start, start + rows)
            part = take(inputs, chunk, samples), take(targets, chunk, samples)
            if rows == 1:
                # Twice: the backward pass of torch's BatchNorm is wrong for one sample in some memory layouts.
                part = twice(part[0]), twice(part[1])
            results: list[Result] = []
            try:
                with isolated(self._model):
                    certified = self._certified(*part, rows, start, first_batch)
                    if certified is not None:
                        results.append(work(certified, self.known, tell))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    self._explain(error)
                    raise
                self._size = self._size.half_of(rows, self.known)
                continue
            finally:
                certified = None  # its graph must not outlive the part
            if results:
                start += rows
                yield from results

    def release(self) -> None:
        """Drop the copy of the model; the next pass makes another."""
        self._model_copy = None

    def context(self) -> Context:
        """What certificates need beside a pass."""
        assert self.selection is not None
        return Context(self.selection, self._options, lambda: ModelCopy(self._model, self._options.measuring_dtype))

    def _copy(self) -> ModelCopy:
        if self._model_copy is None:
            self._model_copy = ModelCopy(self._model, self._options.measuring_dtype)
        return self._model_copy

    def _certified(
        self, inputs: Any, targets: Tensor | None, rows: int, start: int, first_batch: bool
    ) -> CertifiedPass | None:
        """Run the model and certify; None if these samples turn out to be too many for one time."""
        first = not self.known.layers
        if self.selection is None:
            self.selection = select(self._model, lambda: self._copy()(inputs), self._options.layers)
            whole = self.selection.logits
            certify_rows(whole, rows)
            elements = max(1, self.selection.elements)
            self._size = self._size.at_most(rows_at_a_time(elements, whole.shape[1], whole.device))
            if rows > self._size.next_rows(rows, begun=False):
                return None
        elif first:
            # Random numbers begin anew, so that only a pass before this one shows whether there are some.
            certify_deterministic(self.selection.logits[:rows], logits_of(self._copy()(inputs))[:rows].detach())
        recorded = self._recorded(inputs)
        logits = recorded.logits
        loss = self._options.loss_function(logits.detach(), None if targets is None else targets.to(logits.device))
        if rows == 1:
            loss = loss.halved()
        certify_rows(logits, rows)
        whole = self.selection.logits
        if first_batch and start + rows <= len(whole):  # not all of it, if memory ran out
            certify_deterministic(whole[start : start + rows], logits[:rows].detach())
        if first:
            self.release()  # certifying makes a copy of its own
        masks = (
            self._masks(len(logits), first)
            if start == 0
            else torch.zeros(0, len(logits), dtype=torch.bool, device="cpu")
        )
        masks = masks.to(logits.device)
        certified, self.known = certify(recorded, loss, self.known, self.context(), masks)
        self.selection = self.selection.only(self.known.layers)
        return certified

    def _recorded(self, inputs: Any) -> Pass:
        assert self.selection is not None
        copy = self._copy()
        watched = {name: copy.copy_of(weight) for name, weight in self.selection.parameters.items()}
        with Recorder(self.selection.modules, self.selection.classifier, watched) as recorder:
            output = copy(inputs)
        return recorder.result(inputs, output)

    def _masks(self, samples: int, first: bool) -> Tensor:
        """All pairs of samples are told apart at first; later, half of them by chance."""
        if first:
            return separating_masks(samples)
        half = torch.rand(samples, generator=self._chance, device="cpu") < 0.5
        return torch.stack([half, ~half])

    def _explain(self, error: RuntimeError) -> None:
        """Raise an error with a remedy in place of torch's own, where there is one."""
        in_plain_words = explained(error)
        if in_plain_words is not None:
            raise in_plain_words from error
        if self._is_cast and "type" in str(error):
            raise BatchError(
                f"The model's forward fails in {self._options.measuring_dtype or torch.float32}, in which it is "
                f"measured ({error}). It seems to cast to a type of its own; cast to the type of a weight instead, "
                "e.g. x.to(self.conv.weight.dtype), or set dtype=."
            ) from error

    @property
    def _is_cast(self) -> bool:
        """Whether the model runs in another type than it has."""
        dtype = self._options.measuring_dtype
        types = {parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point()}
        return any(own in HALF or own != (dtype or own) for own in types)
