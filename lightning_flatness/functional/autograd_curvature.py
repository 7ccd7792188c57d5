"""The curvature ``Λ`` of a loss that the user has written; autograd computes products of ``Λ`` with vectors.

``Λ`` is the Hessian of a sample's loss with respect to its logits, as in ``curvature.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.functional.curvature import ClassCurvature, DenseCurvature, Projection

# How many random vectors are multiplied by ``Λ``, to show that ``Λ`` is diagonal or to estimate the norms of its rows.
NUM_PROBES = 4
# ``Λ`` counts as diagonal if the products ``Λ x`` and ``diag(Λ) x`` differ by at most this many machine epsilons,
# relative to the largest entry of the products.
ROUNDINGS = 100


@dataclass(frozen=True)
class AutogradCurvature:
    """The symmetric curvature ``Λ`` of any loss with many classes, by products ``Λ x`` that autograd computes.

    The Gauss-Newton method needs ``Λ`` as a sum of ``± b bᵀ`` over column vectors ``b``. Let ``e_k`` be the unit vector
    of class ``k``, ``x = √w_k e_k`` and ``y = Λ e_k / √w_k``. Every class gives two columns: ``b = (x + y) / 2`` with
    the sign +1, and ``b = (x - y) / 2`` with the sign -1. For any positive numbers ``w_k``, the matrices ``± b bᵀ`` of
    all classes sum to ``Λ``. Here ``w_k`` estimates the norm of row ``k`` of ``Λ``; see :attr:`weights`. Then ``x`` and
    ``y`` are about equally large, and little cancels between the two columns of a class.

    Args:
        function: maps logits and targets to the loss of every sample, ``(N,)``.
        logits: the logits ``(N, K)``, in a type that the function takes.
        targets: the targets of the ``N`` samples.
        factor: number that multiplies the loss, and so its curvature.

    Example:
        >>> curvature = AutogradCurvature(lambda f, y: f.logsumexp(1), torch.zeros(1, 4), torch.zeros(1))
        >>> curvature.apply(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double())
        tensor([[ 0.1875, -0.0625, -0.0625, -0.0625]], dtype=torch.float64)
    """

    function: Callable[[Tensor, Tensor], Tensor]
    logits: Tensor
    targets: Tensor
    factor: float = 1.0

    def __getitem__(self, samples: slice) -> AutogradCurvature:
        return replace(self, logits=self.logits[samples], targets=self.targets[samples])

    def scaled(self, factor: float) -> AutogradCurvature:
        """Return the curvature of the loss times a positive factor."""
        return replace(self, factor=factor * self.factor)

    @property
    def num_classes(self) -> int:
        """``K``, the number of classes."""
        return self.logits.shape[1]

    @property
    def num_columns(self) -> int:
        """The number of columns that :meth:`column` can return: two for every class."""
        return 2 * self.num_classes

    @property
    def signs(self) -> Tensor:
        """The sign of each column, ``(N, 2 K)``: +1 for the first column of every class, -1 for the second."""
        signs = torch.ones(len(self.logits), self.num_columns, dtype=torch.float64, device=self.logits.device)
        signs[:, 1::2] = -1
        return signs

    @cached_property
    def weights(self) -> Tensor:
        """The norms of the rows of ``Λ``, estimated from products with random vectors, float64 ``(N, K)``."""
        squares = [self.apply(probe).square() for probe in probes_like(self.logits)]
        return torch.stack(squares).mean(0).sqrt()

    @cached_property
    def _gradient(self) -> tuple[Tensor, Tensor]:
        """The logits as a leaf of the autograd graph, and the gradient of the loss with respect to this leaf."""
        with torch.enable_grad():
            leaf = self.logits.detach().clone().requires_grad_()
            losses = self.function(leaf, self.targets)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        return leaf, gradient

    def apply(self, x: Tensor) -> Tensor:
        """Compute ``Λ x``; ``x`` and the result are float64 ``(N, K)``."""
        leaf, gradient = self._gradient
        return self.factor * product(gradient, leaf, x)

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two columns ``(√w x ± Λ (x / √w)) / 2`` for vectors ``x``; ``x`` and both columns are ``(N, K)``.

        ``w`` are the :attr:`weights`. The first column has the sign +1, and the second -1. If ``x`` is the unit vector
        of a class, the columns are those of the class.
        """
        roots = self.weights.sqrt()
        image = self.apply(torch.where(roots > 0, x / roots, 0.0))
        return (roots * x + image) / 2, (roots * x - image) / 2

    def column(self, index: int) -> Tensor:
        """Return the first column of class ``index // 2``, or the second one if ``index`` is odd, as ``(N, K)``."""
        x = torch.zeros_like(self.weights)
        x[:, index // 2] = 1
        return self.pair(x)[index % 2]

    def centred(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` unchanged: for a general loss, subtracting the mean row could change ``VᵀΛV``."""
        return matrix

    def project(self, matrix: Tensor, scales: Tensor | None = None, tolerance: float = 0.0) -> Projection:
        """Return the factors ``V`` and ``ΛV`` of ``VᵀΛV``, where ``V`` is ``matrix``.

        ``scales`` and ``tolerance`` have no effect, because no classes are left out.
        """
        samples, (classes, filters) = len(self.logits), matrix.shape
        others = matrix.new_empty(samples, classes, filters)
        for index, image in enumerate(self._images(matrix)):
            others[:, :, index] = image
        return Projection(matrix.expand_as(others), [classes] * samples, others=others)

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Compute the diagonal of ``VᵀΛV`` for every sample, float64 ``(N, S)``; ``V`` is ``matrix``."""
        columns = matrix.double().unbind(1)
        sums = [image @ column for image, column in zip(self._images(matrix), columns, strict=True)]
        return torch.stack(sums, dim=1)

    def summed(self, scales: Tensor) -> Tensor:
        """Compute ``Σ_n scales[n] Λ_n``, float64 ``(K, K)``."""
        identity = torch.eye(self.num_classes, dtype=torch.float64, device=self.logits.device)
        return torch.stack([scales @ image for image in self._images(identity)])

    def traces(self) -> Tensor:
        """Return NaN for every sample, ``(N,)``, because the trace of ``Λ`` would take one product for every class."""
        return torch.full((len(self.logits),), torch.nan, dtype=torch.float64, device=self.logits.device)

    def _images(self, matrix: Tensor) -> Iterator[Tensor]:
        """For every column ``v`` of a matrix ``(K, S)``, yield ``Λ v``, float64 ``(N, K)``."""
        for column in matrix.double().unbind(1):
            yield self.apply(column.expand(len(self.logits), -1))


Curvature = ClassCurvature | DenseCurvature | AutogradCurvature
"""The curvature ``Λ`` of a loss, an object of one of three classes."""


def product(gradient: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """Compute the product of a loss's second derivative with ``x``, float64 ``(N, K)``.

    ``leaf`` ``(N, K)`` holds the logits. ``gradient`` is the gradient of the loss with respect to ``leaf``, with its
    autograd graph. The function differentiates ``gradient`` once more.
    """
    image = None
    if gradient.requires_grad:
        (image,) = torch.autograd.grad(gradient, leaf, x.to(gradient), retain_graph=True, allow_unused=True)
    if image is None:
        return torch.zeros_like(leaf, dtype=torch.float64)
    if not bool(image.isfinite().all()):
        raise BatchError(
            "The second derivative of the loss is not finite. A likely cause is a square root or logarithm at zero. "
            "Add an epsilon there."
        )
    return image.double()


def probes_like(logits: Tensor) -> list[Tensor]:
    """Draw ``NUM_PROBES`` standard normal float64 tensors in the shape of the logits; same numbers for same shapes."""
    generator = torch.Generator().manual_seed(logits.shape[1])
    shape = (NUM_PROBES, *logits.shape)
    return list(torch.randn(shape, generator=generator, device="cpu").to(logits.device).double())


def certified_diagonal(gradient: Tensor, leaf: Tensor) -> Tensor | None:
    """Return the diagonal of a loss's second derivative, float64 ``(N, K)``, or None if the derivative is not diagonal.

    If all entries off the diagonal are zero, the product with a vector of ones is the diagonal. Products with random
    vectors show whether the entries off the diagonal are zero. The arguments are as in :func:`product`.
    """
    diagonal = product(gradient, leaf, torch.ones_like(leaf))
    allowed = ROUNDINGS * torch.finfo(leaf.dtype).eps
    for probe in probes_like(leaf):
        actual, expected = product(gradient, leaf, probe), diagonal * probe
        scale = torch.maximum(actual.abs(), expected.abs()).amax(1, keepdim=True)
        if not bool(((actual - expected).abs() <= allowed * scale).all()):
            return None
    return diagonal
