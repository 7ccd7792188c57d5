"""Multiply vectors by the Hessian or Gauss-Newton matrix of the loss with respect to chosen parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, LayerSelectionError, explained, is_out_of_memory
from lightning_flatness.functional import Loss
from lightning_flatness.model.copy import ModelCopy, measuring_device
from lightning_flatness.model.graph import NoSecondDerivative, second_derivatives
from lightning_flatness.model.isolation import isolated
from lightning_flatness.model.logits import (
    certify_deterministic,
    finding_what_is_not_finite,
    logits_of,
    question_outputs,
)
from lightning_flatness.model.names import choose_parameters
from lightning_flatness.model.rows import SampleTensors, num_rows, take


@dataclass(frozen=True)
class LossSums:
    """Sums over samples, which :meth:`LossCurvature.sums` returns.

    To get means, divide ``loss`` and ``product`` by the ``normalizer`` of all samples, which is their number or the sum
    of their weights. If there is a ``product``, ``normalizer`` and ``num_samples`` are zero. To get these two numbers,
    call :meth:`LossCurvature.sums` without a vector.
    """

    loss: float = 0.0
    normalizer: float = 0.0
    num_samples: int = 0
    product: Tensor | None = None  # (D,), float64


class LossCurvature:
    """Multiplies vectors ``(D,)`` by the Hessian or Gauss-Newton matrix of the loss, summed over batches.

    ``D`` is the number of entries of all chosen parameters. The Gauss-Newton matrix is ``Σ Jᵀ Λ J`` over samples, where
    ``J`` is the Jacobian of the logits and ``Λ`` the loss's Hessian with respect to the logits. The model runs in
    evaluation mode on copies of its tensors and is left as it was. For every batch, a product takes one forward pass,
    one backward pass, and a second backward pass through the graph of both. With the Gauss-Newton matrix, it takes one
    more backward pass. The graph of a batch is freed before the next batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        params: str | Sequence[str] | None = None,
        matrix: Literal["hessian", "gauss_newton"] = "hessian",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._loss, self._matrix = model, loss, matrix
        chosen = choose_parameters(model, params)
        with torch.inference_mode(False):
            self._copy = ModelCopy(model, dtype)
            # The leaves share memory with the copies.
            self._leaves = [self._copy.copy_of(parameter).detach().requires_grad_() for parameter in chosen.values()]
        self._replacements = dict(zip(chosen.values(), self._leaves, strict=True))
        self._sizes = [leaf.numel() for leaf in self._leaves]
        self._tensors = SampleTensors()
        self._questioned = False  # whether question_outputs has seen the outputs of the first batch
        self._depends = False  # whether a product has shown that the loss depends on the parameters
        self.shapes = {name: tuple(parameter.shape) for name, parameter in chosen.items()}
        self.dtype = torch.float32
        for leaf in self._leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype)
        self.device = measuring_device(self._leaves[0].device)
        self.size = sum(self._sizes)
        self.weight_norm = float(torch.stack([leaf.detach().double().norm().cpu() for leaf in self._leaves]).norm())

    def sums(self, batches: Iterable[tuple[Any, Tensor | None]], vector: Tensor | None = None) -> LossSums:
        """Return the loss and the product of the matrix with ``vector`` ``(D,)``, both summed over batches.

        Without a vector, compute the normalizer and the number of samples instead of the product. Also check that the
        targets fit the loss, and that two forward passes give the same logits.
        """
        loss = normalizer = 0.0
        num_samples = 0
        product = None if vector is None else torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for index, (inputs, targets) in enumerate(batches):
            samples = num_rows(inputs, targets)
            if not samples:
                continue
            if targets is None:
                raise BatchError(
                    f"Batch {index} has no targets, and the Hessian of the loss needs them. "
                    "Give pairs (inputs, targets)."
                )
            share = 0.5 if samples == 1 else 1.0  # a single sample has two equal rows
            with _explained(index), isolated(self._model), finding_what_is_not_finite(self._model, inputs):
                self._tensors = self._tensors.narrowed(inputs, samples)
                if samples == 1:
                    one, targets = slice(0, 1), take(targets, slice(0, 1), 1)
                    self._tensors = self._tensors.certified(inputs, one, lambda part: logits_of(self._copy(part)))
                    self._tensors = self._tensors.certified_pair(inputs, lambda part: logits_of(self._copy(part)))
                    inputs = self._tensors.take(inputs, one)
                with torch.set_grad_enabled(vector is not None or not self._questioned):
                    logits = logits_of(self._copy(inputs, self._replacements))
                if not self._questioned:
                    question_outputs(logits, self._loss)
                    self._questioned, logits = True, logits.detach() if vector is None else logits
                targets = targets.to(logits.device, copy=True)  # inference tensors cannot be in a graph
                if vector is None or product is None:
                    # `isolated` restores random states, so that products would not show a random forward.
                    with torch.no_grad():
                        certify_deterministic(logits.detach(), logits_of(self._copy(inputs, self._replacements)))
                    derivatives = self._loss(logits, targets)
                    loss += share * float(self._loss.total(logits, targets))
                    normalizer += share * derivatives.normalizer
                    num_samples += round(share * derivatives.num_samples)
                else:
                    loss += share * self._add_product(product, logits, targets, vector, share)
            if not isfinite(loss):
                raise BatchError(
                    f"The loss of batch {index} is not finite, so it has no Hessian. Check loss= and the targets of "
                    "this batch."
                )
        if product is not None and not bool(product.isfinite().all()):
            raise BatchError(
                "A product with the Hessian is not finite: a first or second derivative overflows, or does not exist "
                "at these weights. For example, a square root or norm has none at zero, and acos has none at 1. Keep "
                "their arguments away from these points by an epsilon. If float32 overflows, set dtype='float64'."
            )
        return LossSums(loss, normalizer, num_samples, product)

    def _add_product(self, total: Tensor, logits: Tensor, targets: Tensor, vector: Tensor, share: float) -> float:
        """Add ``share`` times the product for one batch to ``total`` ``(D,)`` in place, and return the batch's loss.

        ``share`` is 0.5 for a batch of one sample, because this sample is then in the batch twice, and 1 otherwise.
        """
        parts = [
            part.reshape(leaf.shape).to(leaf)
            for part, leaf in zip(vector.split(self._sizes), self._leaves, strict=True)
        ]
        product = self._hessian_product if self._matrix == "hessian" else self._gauss_newton_product
        loss, products = product(logits, targets, parts)
        for sums, gradient in zip(total.split(self._sizes), products, strict=True):
            if gradient is not None:
                dense = gradient.to_dense() if gradient.is_sparse else gradient  # nn.Embedding(sparse=True)
                sums.add_(dense.flatten().to(sums.device), alpha=share)
        return float(loss.detach())

    def _hessian_product(
        self, logits: Tensor, targets: Tensor, vector: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        loss = self._loss.total(logits, targets)
        gradients = self._certified(_gradients(loss, self._leaves, create_graph=True))
        return loss, _second(gradients, vector, self._leaves)

    def _gauss_newton_product(
        self, logits: Tensor, targets: Tensor, vector: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        f = logits.detach().requires_grad_()
        loss = self._loss.total(f, targets)
        # J v by reverse mode only, which every operation supports: Jᵀu is linear in u, so differentiating it gives J v.
        u = torch.zeros_like(f, requires_grad=True)
        gradients = self._certified(_gradients(logits, self._leaves, u, create_graph=True))
        (forward,) = _second(gradients, vector, [u])
        if forward is None:
            return loss, [None] * len(self._leaves)
        (column,) = _second(_gradients(loss, [f], create_graph=True), [forward], [f])
        return loss, _gradients(logits, self._leaves, column)

    def _certified(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the gradients. Raise an error if all gradients of all batches so far are None.

        In this case, the loss does not depend on the chosen parameters.
        """
        self._depends = self._depends or any(gradient is not None for gradient in gradients)
        if not self._depends:
            names = list(self.shapes)
            raise LayerSelectionError(
                f"The loss does not depend on {', '.join(names[:5])}{', ...' if names[5:] else ''}. The forward does "
                "not use these parameters, or uses them under detach(), no_grad() or reentrant gradient "
                "checkpointing. Choose other parameters with params=."
            )
        return gradients


def _gradients(
    output: Tensor, inputs: Sequence[Tensor], weight: Tensor | None = None, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Call ``torch.autograd.grad``, but return None for every input if all gradients are zero.

    They are zero if ``output`` does not require gradients. They are also zero if ``weight`` is None and ``output`` is
    no scalar, because None then stands for a weight of zeros.
    """
    if not output.requires_grad or (weight is None and output.ndim):
        return [None] * len(inputs)
    return torch.autograd.grad(output, inputs, weight, create_graph=create_graph, allow_unused=True)


def _second(
    gradients: Sequence[Tensor | None], vector: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    second = second_derivatives(gradients, vector, inputs)
    if isinstance(second, NoSecondDerivative):
        raise LayerSelectionError(
            f"The model or the loss has an operation without a second derivative ({second.message}). Replace it for "
            "the measurement. Or choose with params= only layers after this operation, because their gradients do not "
            "pass through it."
        )
    return second


@contextmanager
def _explained(index: int) -> Iterator[None]:
    """Inside the block, replace known errors of torch by errors that name the reason and the remedy.

    ``index`` is the number of the batch that the block computes.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if is_out_of_memory(error):
            raise BatchError(
                f"Out of memory in batch {index}. Give smaller batches, or choose fewer parameters with params=."
            ) from error
        in_plain_words = explained(error)
        if in_plain_words is None:
            raise
        raise in_plain_words from error
