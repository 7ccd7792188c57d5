"""The Hessian, or the Gauss-Newton matrix, of the loss with respect to chosen parameters, as products with vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError, LayerSelectionError, is_out_of_memory
from lightning_flatness.functional import Loss
from lightning_flatness.model.copy import ModelCopy, measuring_device
from lightning_flatness.model.graph import differentiable_once
from lightning_flatness.model.isolation import isolated
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.names import lies_in, plain_name
from lightning_flatness.model.rows import num_rows, twice

Matrix = Literal["hessian", "gauss_newton"]
# What torch says where an operation has a first derivative and no second.
NO_SECOND_DERIVATIVE = ("derivative for", "once_differentiable", "double backward", "double-backward")


@dataclass
class LossSums:
    """Sums over the samples of some batches; means follow by division by ``normalizer``."""

    loss: float = 0.0
    normalizer: float = 0.0
    num_samples: int = 0
    product: Tensor | None = None  # (D,), float64


class LossCurvature:
    """Products of the matrix of the summed loss, over batches, with vectors of all chosen parameters.

    The model runs in evaluation mode on copies and is left as it was. A product takes, for every batch, one forward
    pass, one backward pass and one through both (the Gauss-Newton matrix one more), and its graph lives no longer than
    its batch.

    Args:
        model: any module that returns logits ``(N, K)``.
        loss: of :func:`~lightning_flatness.functional.find_loss`.
        params: which parameters, see :func:`choose_parameters`.
        matrix: ``"hessian"`` or ``"gauss_newton"``, that is ``Σ Jᵀ Λ J`` with ``Λ`` the loss's Hessian at the logits.
        dtype: to compute in; by default the model's own, at least float32.

    Raises:
        LayerSelectionError: no such parameter, all are frozen, or the model cannot be copied.

    Example:
        >>> from lightning_flatness.functional import MeanSquaredError
        >>> net = nn.Linear(1, 1, bias=False)
        >>> curvature = LossCurvature(net, MeanSquaredError())
        >>> curvature.sums([(torch.tensor([[3.0]]), torch.tensor([[1.0]]))], torch.ones(1)).product
        tensor([18.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        params: str | Sequence[str] | None = None,
        matrix: Matrix = "hessian",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._loss, self._matrix = model, loss, matrix
        chosen = choose_parameters(model, params)
        with torch.inference_mode(False):
            self._copy = ModelCopy(model, dtype)
            # They share memory with the copies.
            self._leaves = [self._copy.copy_of(parameter).detach().requires_grad_() for parameter in chosen.values()]
        self._certified = False
        self._replacements = dict(zip(chosen.values(), self._leaves, strict=True))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in chosen.items()}
        self.dtype = torch.float32
        for leaf in self._leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype)
        self.device = measuring_device(self._leaves[0].device)
        self.size = sum(leaf.numel() for leaf in self._leaves)
        self.weight_norm = float(torch.stack([leaf.detach().double().norm().cpu() for leaf in self._leaves]).norm())

    def sums(self, batches: Iterable[tuple[Any, Tensor | None]], vector: Tensor | None = None) -> LossSums:
        """The loss summed over batches and, with a vector ``(D,)``, the product; without one, the checked normalizer.

        Raises:
            BatchError: logits or targets that cannot be measured, a loss or product that is not finite, no memory.
            LayerSelectionError: the forward has no second derivative.
        """
        found = LossSums()
        if vector is not None:
            found.product = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for index, (inputs, targets) in enumerate(batches):
            samples = num_rows(inputs, targets)
            if not samples:
                continue
            if targets is None:
                raise BatchError(f"Batch {index} has no targets, and the Hessian of the loss needs them.")
            # One sample runs twice: the backward pass of torch's BatchNorm is wrong for it in some memory layouts.
            share = 0.5 if samples == 1 else 1.0
            if samples == 1:
                inputs, targets = twice(inputs), twice(targets)
            with _explained(index), isolated(self._model):
                self._add(found, inputs, targets, share, vector)
            if not abs(found.loss) < float("inf"):
                raise BatchError(f"The loss of batch {index} is not finite, so it has no Hessian.")
        if found.product is not None and not bool(found.product.isfinite().all()):
            raise BatchError(
                "A product with the Hessian is not finite: the second derivative does not exist there (a square root "
                "or norm at zero?) or overflows. dtype='float64' may help."
            )
        return found

    def _add(self, found: LossSums, inputs: Any, targets: Tensor, share: float, vector: Tensor | None) -> None:
        with torch.set_grad_enabled(vector is not None):
            logits = logits_of(self._copy(inputs, self._replacements))
        targets = targets.to(logits.device, copy=True)  # an ordinary tensor also under inference mode
        if vector is None or found.product is None:
            derivatives = self._loss(logits, targets)
            found.loss += share * float(self._loss.total(logits, targets))
            found.normalizer += share * derivatives.normalizer
            found.num_samples += round(share * derivatives.num_samples)
            return
        pieces = [
            piece.reshape(leaf.shape).to(leaf)
            for piece, leaf in zip(vector.split([leaf.numel() for leaf in self._leaves]), self._leaves, strict=True)
        ]
        of_batch = self._hessian if self._matrix == "hessian" else self._gauss_newton
        value, products = of_batch(logits, targets, pieces)
        found.loss += share * value
        start = 0
        for leaf, product in zip(self._leaves, products, strict=True):
            if product is not None:
                part = found.product[start : start + leaf.numel()]
                dense = product.to_dense() if product.is_sparse else product  # nn.Embedding(sparse=True)
                part.add_(dense.flatten().to(part.device), alpha=share)
            start += leaf.numel()

    def _certify(self, gradients: Sequence[Tensor | None]) -> None:
        """In the first product, refuse what autograd passes over in silence: no path leads on from such a node."""
        if not self._certified:
            there = [gradient for gradient in gradients if gradient is not None]
            if not there:
                names = list(self.shapes)
                raise LayerSelectionError(
                    f"The loss does not depend on {', '.join(names[:5])}{', ...' if names[5:] else ''}: not used in "
                    "the forward, behind detach() or no_grad(), or within reentrant gradient checkpointing. Choose "
                    "others with params=."
                )
            if differentiable_once(there):
                raise RuntimeError("a backward marked once_differentiable")
            self._certified = True

    def _hessian(
        self, logits: Tensor, targets: Tensor, vector: Sequence[Tensor]
    ) -> tuple[float, Sequence[Tensor | None]]:
        loss = self._loss.total(logits, targets)
        gradients = _gradients(loss, self._leaves, create_graph=True)
        self._certify(gradients)
        return float(loss.detach()), _pulled_back(gradients, vector, self._leaves)

    def _gauss_newton(
        self, logits: Tensor, targets: Tensor, vector: Sequence[Tensor]
    ) -> tuple[float, Sequence[Tensor | None]]:
        f = logits.detach().requires_grad_()
        loss = self._loss.total(f, targets)
        # J v from reverse mode alone, which every operation has: Jᵀu is linear in u, and its derivative there is J.
        u = torch.zeros_like(f, requires_grad=True)
        gradients = _gradients(logits, self._leaves, u, create_graph=True)
        self._certify(gradients)
        (forward,) = _pulled_back(gradients, vector, [u])
        if forward is None:
            return float(loss.detach()), [None] * len(self._leaves)
        (column,) = _pulled_back(_gradients(loss, [f], create_graph=True), [forward], [f])
        return float(loss.detach()), _gradients(logits, self._leaves, column)


def _gradients(
    output: Tensor, inputs: Sequence[Tensor], weight: Tensor | None = None, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad``, with None for all where there is nothing to differentiate."""
    if not output.requires_grad or (weight is None and output.ndim):
        return [None] * len(inputs)
    return torch.autograd.grad(output, inputs, weight, create_graph=create_graph, allow_unused=True)


def _pulled_back(
    outputs: Sequence[Tensor | None], weights: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients of several outputs at once, leaving out those that are constants."""
    pairs = [
        (output, weight)
        for output, weight in zip(outputs, weights, strict=True)
        if output is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    some, their = zip(*pairs, strict=True)
    return torch.autograd.grad(some, inputs, their, allow_unused=True)


@contextmanager
def _explained(index: int) -> Iterator[None]:
    """Errors of torch that have a reason and a remedy."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if is_out_of_memory(error):
            raise BatchError(f"Out of memory in batch {index}. Give smaller batches, or choose params=.") from error
        if any(text in str(error) for text in NO_SECOND_DERIVATIVE):
            raise LayerSelectionError(
                f"The model or the loss has an operation without a second derivative ({error}). Replace it for the "
                "measurement, or choose params= behind it, whose gradient does not pass it."
            ) from error
        if "use_reentrant" in str(error):
            raise LayerSelectionError(
                "The forward uses gradient checkpointing of the reentrant kind, which has no second derivative. Use "
                "checkpoint(..., use_reentrant=False), or checkpoint only `if self.training`."
            ) from error
        if "modified by an inplace operation" in str(error):
            raise LayerSelectionError(
                f"The forward changes a tensor in place that autograd needs ({error}). Use the out-of-place operation "
                "there, e.g. x = x + y for x += y."
            ) from error
        raise


def choose_parameters(model: nn.Module, params: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name, in the model's order; tied ones once.

    Args:
        model: any.
        params: names or glob patterns, or a list of them, of parameters or of modules (all parameters in them); None
            for all. Frozen parameters are left out.

    Raises:
        LayerSelectionError: a pattern matches nothing, or only what is frozen.
        FlatnessError: something else than names.

    Example:
        >>> list(choose_parameters(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), ["0", "*.bias"]))
        ['0.weight', '0.bias', '2.bias']
    """
    patterns = [params] if isinstance(params, str) else ["*"] if params is None else params
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise FlatnessError(
            f"params={params!r}: give None for all parameters, or names or glob patterns of parameters or modules."
        )
    named = [(plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    chosen: set[int] = set()
    for pattern in patterns:
        matched = [(name, p) for name, p in named if lies_in(pattern, name)]
        if not matched:
            raise LayerSelectionError(
                f"params={pattern!r} matches no parameter and no module that has some. There are: {_listed(named)}."
            )
        trainable = [p for _, p in matched if p.requires_grad and p.numel()]
        if not trainable:
            raise LayerSelectionError(
                f"All parameters that {'there are' if params is None else f'params={pattern!r} matches'} are frozen or "
                f"empty: {_listed(matched)}. Frozen parameters are left out; set requires_grad on those to measure."
            )
        chosen |= {id(p) for p in trainable}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in named:
        if id(parameter) in chosen:
            chosen.discard(id(parameter))
            found[name] = parameter
    others = [name for name, p in found.items() if not p.is_floating_point()]
    if others:
        raise LayerSelectionError(f"Parameters {', '.join(others)} are not real numbers; leave them out with params=.")
    return found


def _listed(named: Sequence[tuple[str, nn.Parameter]]) -> str:
    names = [name for name, _ in named]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"
