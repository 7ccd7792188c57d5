"""Forward passes on some samples at a time, observed and certified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, LayerSelectionError, is_out_of_memory
from lightning_flatness.functional import LossDerivatives, separating_masks
from lightning_flatness.layers.affine import Calls
from lightning_flatness.layers.closed_form import TailDerivatives
from lightning_flatness.layers.gauss_newton import rows_at_a_time
from lightning_flatness.layers.live import Listener
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.plan import Plan
from lightning_flatness.layers.recording import Observation
from lightning_flatness.layers.selection import Execution, trace_execution
from lightning_flatness.model.copy import HALF, ModelCopy
from lightning_flatness.model.isolation import isolated
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.rows import num_rows, take, twice

Result = TypeVar("Result")


@dataclass(frozen=True)
class ObservedPass:
    """One forward pass on some samples, certified; its graph lives as long as this does."""

    inputs: Any
    logits: Tensor  # (N, K), in the graph of the layers' outputs
    loss: LossDerivatives
    layers: dict[str, Calls]
    tails: dict[str, TailDerivatives]  # of the layers under the closed form
    share: float  # of every sum that counts: a half where a lone sample runs twice


class ForwardPasses:
    """Calls a model on batches, some samples at a time, and certifies on all of them how its layers are measured.

    Args:
        model: any module that returns logits ``(N, K)``.
        options: what is wanted.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.plan = Plan(model, options)
        self._options = options
        self._model = model
        self._kept: ModelCopy | None = None
        self._execution: Execution | None = None
        self._rows: int | None = None  # samples that are taken at a time, once that is known
        self._halved = False
        self._uses: list[tuple[str, str]] = []
        self._chance = torch.Generator().manual_seed(options.seed)

    def __call__(
        self,
        inputs: Any,
        targets: Tensor | None,
        work: Callable[[ObservedPass, Callable[[float], None]], Result],
        advance: Callable[[float], None] | None = None,
    ) -> Iterator[Result]:
        """The results of some work on every part of a batch.

        Args:
            inputs: of the model.
            targets: of the loss.
            work: is called under :func:`isolated` with an observed pass, and with a function to be told its progress.
            advance: is told which part of the batch is done.
        """
        samples, start = num_rows(inputs, targets), 0
        traced = self._execution is None  # now, so that every part can be compared with the whole
        while start < samples:
            rows = self._next_rows(samples - start)

            def tell(part: float, start: int = start, rows: int = rows) -> None:
                if advance is not None:
                    advance((start + part * rows) / samples)

            chunk = slice(start, start + rows)
            part = take(inputs, chunk, samples), take(targets, chunk, samples)
            if rows == 1:
                # Twice: the backward pass of torch's BatchNorm is wrong for one sample in some memory layouts.
                part = twice(part[0]), twice(part[1])
            try:
                with isolated(self._model):
                    observed = self._observe(*part, rows, start, traced)
                    found = [] if observed is None else [work(observed, tell)]
            except RuntimeError as error:
                if "modified by an inplace operation" in str(error):
                    raise LayerSelectionError(
                        "A tensor that a measured layer reads or returns is changed in place after it ran, which "
                        f"autograd cannot follow ({error}). Use the out-of-place operation there, e.g. x = x + y for "
                        "x += y."
                    ) from error
                if not is_out_of_memory(error) and "type" in str(error) and self._is_cast:
                    raise BatchError(
                        f"The model's forward fails in {self._options.measuring_dtype or torch.float32}, in which it "
                        f"is measured ({error}). It seems to cast to a type of its own; cast to the type of a weight "
                        "instead, e.g. x.to(self.conv.weight.dtype), or set dtype=."
                    ) from error
                if not is_out_of_memory(error):
                    raise
                found = None
            observed = None
            if found is None:
                self._halve(rows)
            elif found:
                start += rows
                yield from found

    def _next_rows(self, left: int) -> int:
        """How many samples to take of those that are left, so that parts have about the same size.

        The first part of all is half as large, since it takes some fifteen passes to certify.
        """
        if self._rows is None:
            return left
        most = self._rows if self.plan.begun or self._halved else -(-self._rows // 2)
        return -(-left // -(-left // most))

    @property
    def _is_cast(self) -> bool:
        """Whether the model runs in another type than it has."""
        dtype = self._options.measuring_dtype
        types = {parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point()}
        return any(own in HALF or own != (dtype or own) for own in types)

    def _halve(self, rows: int) -> None:
        if self._halved or rows == 1:
            largest = max(self.plan.layers.values(), key=lambda info: info.memory, default=None)
            where = "" if largest is None else f" The largest layer is '{largest.name}'."
            raise BatchError(
                f"Out of memory while measuring {rows} samples at a time.{where} Measure fewer layers (layers=), or "
                "measures=('hessian_trace',), which keeps diagonals only, or give smaller batches."
            )
        self._halved = True
        self._rows = rows // 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits; known when a pass has been made."""
        assert self._execution is not None
        return self._execution.logits.dtype

    def observation(self, copies: Mapping[nn.Parameter, Tensor] | None = None) -> Observation:
        """Of a forward pass that somebody else makes; ready when a pass of our own has been made.

        Args:
            copies: on which it runs in place of parameters.
        """
        copies = copies or {}
        watched = {name: copies.get(weight, weight) for name, weight in self.plan.parameters().items()}
        return Observation(self.plan.modules, self.plan.classifier[1], watched, live=True)

    def live(self, heard: Listener, targets: Tensor | None) -> ObservedPass:
        """What was observed in somebody else's forward pass, certified; call it under :func:`differentiable`.

        Raises:
            FlatnessError: it is not as in the passes of our own.
        """
        plan, seen = self.plan, heard.seen
        if seen is None or heard.reason or seen.failure is not None:
            raise BatchError(heard.reason or f"observing failed ({seen and seen.failure})")
        if [use for use in seen.uses if use[0] in plan.modules] != self._uses:
            raise LayerSelectionError("the forward does something else with a kernel than before")
        logits = logits_of(heard.output)
        if len(logits) < 2:
            raise BatchError("one sample is measured twice, side by side")
        targets = targets if targets is None else targets.to(logits.device)
        loss = self._options.loss_function(logits.detach(), targets)
        calls = plan.calls(seen, len(logits))
        tails = plan.tails_up_to_the_classifier(calls, seen, logits)
        return ObservedPass(heard.inputs, logits.detach(), loss, calls, tails, share=1.0)

    @property
    def _copy(self) -> ModelCopy:
        if self._kept is None:
            self._kept = ModelCopy(self._model, self._options.measuring_dtype)
        return self._kept

    def let_go(self) -> None:
        """Drop the copy of the weights; the next pass of our own makes another."""
        self._kept = None

    def _masks(self, samples: int, beginning: bool) -> Tensor:
        """All pairs are told apart at the beginning; later, half of them by chance."""
        if beginning:
            return separating_masks(samples)
        half = torch.rand(samples, generator=self._chance, device="cpu") < 0.5
        return torch.stack([half, ~half])

    def _observe(self, inputs: Any, targets: Tensor | None, rows: int, start: int, traced: bool) -> ObservedPass | None:
        """Run the model and certify; None if it turns out that these samples are too many for one time.

        Args:
            inputs: these samples.
            targets: of them.
            rows: how many they are.
            start: where they begin in the batch.
            traced: whether it is the batch on which it was traced what runs.
        """
        plan = self.plan
        if self._execution is None:
            self._execution = trace_execution(self._model, lambda: self._copy(inputs))
            _certify_rows(self._execution.logits, rows)
            plan.choose(self._execution)
            ran = [name for name in self._execution.order if name in plan.modules]
            elements = sum(prod(self._execution.output_shapes.get(name, ())[1:]) for name in ran)
            logits = self._execution.logits
            most = rows_at_a_time(max(1, elements), logits.shape[1], logits.device)
            self._rows = min(most, self._rows or most)
            if rows > self._next_rows(rows):
                return None
        elif not plan.begun:
            # Random numbers begin anew, so that only a pass before this one shows whether there are some.
            _certify_deterministic(self._execution.logits[:rows], logits_of(self._copy(inputs))[:rows].detach())
        watched = {name: self._copy.copy_of(weight) for name, weight in plan.parameters().items()}
        with Observation(plan.modules, plan.classifier[1], watched) as seen:
            logits = logits_of(self._copy(inputs))
        targets = targets if targets is None else targets.to(logits.device)
        loss = self._options.loss_function(logits.detach(), targets)
        calls = plan.calls(seen, len(logits))
        _certify_rows(logits, rows)
        if traced and start + rows <= len(self._execution.logits):  # not all of it, if memory ran out
            _certify_deterministic(self._execution.logits[start : start + rows], logits[:rows].detach())
        beginning = not plan.begun
        if beginning:
            self.let_go()  # certifying makes a copy of its own
            plan.begin(calls, logits, inputs, loss.curvature)
        uses = [use for use in seen.uses if use[0] in plan.modules]
        if not beginning and uses != self._uses:
            plan.certify_paths(calls, logits, inputs)  # the forward does something else with a kernel than before
        self._uses = uses
        masks = self._masks(len(logits), beginning) if start == 0 else torch.zeros(0, len(logits), dtype=torch.bool)
        tails = plan.certified_tails(calls, seen, logits, inputs, masks.to(logits.device), beginning)
        plan.begun = True
        return ObservedPass(inputs, logits, loss, calls, tails, share=0.5 if rows == 1 else 1.0)


def _certify_rows(logits: Tensor, rows: int) -> None:
    if len(logits) != max(rows, 2):
        raise BatchError(
            f"The model returns {len(logits)} rows of logits for {max(rows, 2)} samples, which were counted by the "
            "targets or, without any, by the longest of the inputs. Give targets, or keep tables that have no row "
            "for every sample out of the inputs."
        )


def _certify_deterministic(first: Tensor, second: Tensor) -> None:
    scale = first.abs().amax()
    if not float((first - second).abs().amax()) <= 1e3 * torch.finfo(first.dtype).eps * float(scale):
        raise LayerSelectionError(
            "Two forward passes on the same samples give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward? statistics of the batch?), so there is no one loss to take "
            "the Hessian of."
        )
