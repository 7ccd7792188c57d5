"""Run a copy of the model on parts of batches, record each forward pass, and hand it to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, explained, is_out_of_memory
from lightning_flatness.functional import separating_masks
from lightning_flatness.layers.certificates.samples import certify_rows
from lightning_flatness.layers.certified import Certified, CertifiedPass, Context
from lightning_flatness.layers.certify import certify
from lightning_flatness.layers.gauss_newton import Advance, rows_at_a_time
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.recording import Pass
from lightning_flatness.layers.selection import Selection, select
from lightning_flatness.model.answer import Answer, naming_buffers
from lightning_flatness.model.call import Call, as_call
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.generators import generators_kept
from lightning_flatness.model.isolation import isolated
from lightning_flatness.model.logits import certify_deterministic, finding_what_is_not_finite, logits_of
from lightning_flatness.model.rows import SampleTensors, num_rows, take

Result = TypeVar("Result")


@dataclass(frozen=True)
class PartSize:
    """The maximum number of samples in a part of a batch, ``most``; None means the whole batch."""

    most: int | None = None
    halved: bool = False  # whether the size was halved, because memory ran out

    def next_rows(self, left: int, begun: bool) -> int:
        """Return the number of samples in the next part, if ``left`` samples of the batch remain.

        The remaining parts get about equal sizes, of at most ``most`` samples. ``begun`` is False for the first part of
        the first batch. This part gets at most half of ``most``, because certifying it takes about fifteen backward
        passes. If memory ran out before and the size was halved, it gets up to ``most`` samples.
        """
        if self.most is None:
            return left
        most = self.most if begun or self.halved else -(-self.most // 2)
        return -(-left // -(-left // most))

    def half_of(self, rows: int, known: Certified) -> PartSize:
        """Return the size ``rows // 2``, after memory ran out for ``rows`` samples.

        Raises:
            BatchError: the size was halved before, or a single sample is too large.
        """
        if self.halved or rows == 1:
            largest = max(known.infos.values(), key=lambda info: info.memory, default=None)
            where = "" if largest is None else f" The largest layer is '{largest.name}'."
            raise BatchError(
                f"Out of memory while measuring {rows} samples at a time.{where} Measure fewer layers (layers=), set "
                "measures=('hessian_trace',), which keeps only diagonals, or give smaller batches."
            )
        return PartSize(rows // 2, halved=True)


@dataclass(frozen=True)
class Part:
    """Successive samples of a batch that are measured together."""

    inputs: Any
    targets: Tensor | None
    rows: int  # number of samples; a single one has two equal rows in `inputs` and `targets`
    start: int  # position of the first sample in the batch
    answer: Answer | None  # what the user's code got from the model in a call on the whole batch


class _TooManySamplesError(Exception):
    """Raised when a part of a batch turns out to have too many samples; the part is then cut again."""


class OwnPasses:
    """Runs a copy of a model on batches, some samples at a time, and stores the certificates of these batches."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.known = Certified()  # the certificates of the batches so far
        self._selection: Selection | None = None  # None before the first pass
        self._model = model
        self._options = options
        self._size = PartSize()
        self._tensors = SampleTensors()
        self._chance = torch.Generator().manual_seed(options.seed)

    def __call__(
        self,
        inputs: Any,
        targets: Tensor | None,
        work: Callable[[CertifiedPass, Certified, Advance], Result],
        advance: Advance | None = None,
        chosen: slice = slice(None),
    ) -> Iterator[Result]:
        """Certify a forward pass on each part of the samples ``chosen``, and yield the results of ``work``.

        ``work`` is called for each part, under :func:`isolated`. Its arguments are the certified pass, the certificates
        so far, and a function to call with the fraction of the part that is done. ``advance`` is called with the
        fraction of the batch that is done. If a part has too many samples, or memory runs out, the part is repeated
        with fewer samples.
        """
        first_batch = not self.known.layers

        def run(part: Part, tell: Advance) -> Result:
            return work(self._certified(part, first_batch), self.known, tell)

        return self._in_parts(inputs, targets, run, advance, chosen)

    def recorded(
        self,
        inputs: Any,
        targets: Tensor | None,
        work: Callable[[Pass, int], Result],
        chosen: slice,
        first_batch: bool,
    ) -> Iterator[Result]:
        """Like calling this object, but without certificates. ``work`` gets a recorded pass, and its number of samples.

        In the first batch, the logits are compared with those of a pass on the whole batch. Requires: a pass was
        certified, because this has selected the layers.
        """

        def run(part: Part, tell: Advance) -> Result:
            recorded = self._recorded(part.inputs)
            if first_batch:
                self._certify_same(part, recorded.logits)
            return work(recorded, part.rows)

        return self._in_parts(inputs, targets, run, None, chosen)

    def _in_parts(
        self,
        inputs: Any,
        targets: Tensor | None,
        run: Callable[[Part, Advance], Result],
        advance: Advance | None,
        chosen: slice,
    ) -> Iterator[Result]:
        """Call ``run`` with parts of a batch that fit in memory, and yield the results; see :meth:`__call__`."""
        samples = num_rows(inputs, targets)
        start, end, _ = chosen.indices(samples)
        self._tensors = self._tensors.narrowed(inputs, samples)
        while start < end:
            rows = self._size.next_rows(end - start, begun=bool(self.known.layers))

            def tell(part: float, start: int = start, rows: int = rows) -> None:
                if advance is not None:
                    advance((start + part * rows) / samples)

            chunk = slice(start, start + rows)
            taken = self._tensors.take(inputs, chunk), take(targets, chunk, samples)
            part = Part(*taken, rows, start, as_call(inputs).answer)
            try:
                held = generators_kept(self._options.held_by_loss)
                with isolated(self._model), self._finding(part.inputs), held:
                    if rows < samples or rows == 1:
                        self._tensors = self._tensors.certified(inputs, chunk, lambda part: logits_of(self._copy(part)))
                    if samples == 1:
                        self._tensors = self._tensors.certified_pair(inputs, lambda one: logits_of(self._copy(one)))
                    result = run(part, tell)
            except _TooManySamplesError:
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    in_plain_words = explained(error)
                    if in_plain_words is not None:
                        raise in_plain_words from error
                    raise
                self._size = self._size.half_of(rows, self.known)
                continue
            start += rows
            yield result

    def chosen(self, inputs: Any, targets: Tensor | None, mask: Tensor) -> tuple[Any, Tensor | None]:
        """Return the samples of a batch for which ``mask``, ``(N,)``, is True.

        Raises:
            BatchError: the logits of these samples change when the model runs without the rest of the batch.
        """
        self._tensors = self._tensors.narrowed(inputs, len(mask))
        with isolated(self._model), self._finding(inputs):
            self._tensors = self._tensors.certified(inputs, mask, lambda part: logits_of(self._copy(part)))
        chosen, targets = self._tensors.chosen(inputs, targets, mask)
        if isinstance(chosen, Call) and chosen.answer is not None:
            chosen = chosen._replace(answer=chosen.answer.chosen(mask))
        return chosen, targets

    def release(self) -> None:
        """Drop the copy of the model to free its memory; the next pass makes a new copy."""
        vars(self).pop("_copy", None)

    @property
    def context(self) -> Context:
        """The chosen layers, the options and a function that copies the model. Requires: a pass was made."""
        assert self._selection is not None
        return Context(self._selection, self._options, lambda: ModelCopy(self._model, self._options.measuring_dtype))

    @cached_property
    def _copy(self) -> ModelCopy:
        """The copy of the model that passes run on."""
        return ModelCopy(self._model, self._options.measuring_dtype)

    def _selected(self, part: Part) -> Selection:
        """Return the selected layers, which are chosen on the first part.

        Raises:
            _TooManySamplesError: the outputs of the selected layers are too large for this many samples.
        """
        if self._selection is None:
            self._selection = select(
                self._model, lambda: self._copy(part.inputs), self._options.layers, self._options.prefix
            )
            self.known = replace(self.known, left_out=self._selection.passed_over)
            whole = self._selection.logits
            certify_rows(whole, part.rows)
            self._selection = replace(self._selection, logits=whole[: part.rows])  # a pair is a single sample
            most = rows_at_a_time(max(1, self._selection.elements), whole.shape[1], whole.device)
            self._size = replace(self._size, most=min(most, self._size.most or most))
            if part.rows > self._size.next_rows(part.rows, begun=False):
                raise _TooManySamplesError
        return self._selection

    def _certified(self, part: Part, first_batch: bool) -> CertifiedPass:
        """Run the model on a part of a batch, and certify the forward pass."""
        first, is_new = not self.known.layers, self._selection is None
        selection, rows, start, targets = self._selected(part), part.rows, part.start, part.targets
        if first and not is_new:
            # `isolated` restores random states, so the first pass in each of its blocks draws the same random numbers.
            # After this additional pass, the recorded pass below draws other numbers, so that a random forward is
            # found.
            certify_deterministic(selection.logits[:rows], logits_of(self._copy(part.inputs))[:rows].detach())
        recorded = self._recorded(part.inputs)
        logits = recorded.logits
        loss = self._options.loss_function(logits.detach(), None if targets is None else targets.to(logits.device))
        if rows == 1:
            loss = loss.halved()
        certify_rows(logits, rows)
        if first_batch:
            self._certify_same(part, logits)
        if part.answer is not None:
            with naming_buffers(lambda: self._changing_buffers(part.inputs)):
                part.answer.certify_logits(logits[:rows].detach(), start, in_half=recorded.enables_autocast)
        if first:
            self.release()  # certificate 4 makes another copy; two would take too much memory
        no_masks = torch.zeros(0, len(logits), dtype=torch.bool, device="cpu")
        masks = self._masks(len(logits), first) if start == 0 else no_masks
        certified, self.known = certify(recorded, loss, self.known, self.context, masks.to(logits.device))
        modules = selection.modules  # `certify` may have left out some of these
        self._selection = replace(selection, modules={name: modules[name] for name in self.known.layers})
        return certified

    def _certify_same(self, part: Part, logits: Tensor) -> None:
        """Certify that the logits of a part are those that a pass on the whole of the first batch has given."""
        assert self._selection is not None
        whole, end = self._selection.logits, part.start + part.rows
        if end <= len(whole):  # `whole` has fewer samples than the batch if memory ran out
            certify_deterministic(whole[part.start : end], logits[: part.rows].detach())

    def _changing_buffers(self, inputs: Any) -> list[str]:
        """Return the names of the buffers that every call of the model changes, if the logits depend on them."""
        prefix = self._options.prefix
        return [f"{prefix}.{name}" if prefix else name for name in self._copy.changing_buffers(inputs)]

    def _recorded(self, inputs: Any) -> Pass:
        """Run the model's copy on the inputs, and record the pass."""
        with self.context.recorder(self._copy) as recorder:
            output = self._copy(inputs)
        recorded = recorder.result(inputs, output)
        return replace(recorded, enables_autocast=self._copy.enables_autocast)

    def _masks(self, samples: int, first: bool) -> Tensor:
        """Return the masks ``(M, N)`` with which certificate 5 tests whether samples influence each other.

        Masks separate two samples if each of the two is in a mask without the other one. The masks of the first part
        separate all pairs of samples. Later masks separate a pair with probability 1/2.
        """
        if first:
            return separating_masks(samples)
        half = torch.rand(samples, generator=self._chance, device="cpu") < 0.5
        return torch.stack([half, ~half])

    def _finding(self, inputs: Any) -> AbstractContextManager[None]:
        """Return a context manager in which errors name what is not finite in the model or in ``inputs``."""
        return finding_what_is_not_finite(self._model, inputs, self._options.prefix)
