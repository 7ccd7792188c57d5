"""The curvature ``Λ`` of a loss that the user has written: autograd computes its products with vectors.

``Λ`` is the second derivative of the loss with respect to the logits of a sample, as in ``curvature.py``.
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
# ``Λ`` counts as diagonal if products with ``Λ`` and with its diagonal differ by at most this, relative to the products
# and in units of the machine epsilon.
ROUNDINGS = 100


@dataclass(frozen=True)
class AutogradCurvature:
    r"""Any symmetric curvature ``Λ`` for losses with many classes; no matrix is computed, only products ``Λ x``.

    ``function`` maps logits and targets to the loss of every sample.

    The Gauss-Newton method needs ``Λ`` as a sum of columns times their transposes, each with a sign. Here every class
    ``k`` gives two columns. Let ``e_k`` be its unit vector, ``x = √w_k e_k`` and ``y = Λ e_k / √w_k``. For any positive
    ``w``, the sum of ``(x + y)(x + y)ᵀ / 4 - (x - y)(x - y)ᵀ / 4`` over all classes is ``Λ``. The property ``weights``
    is ``w``, an estimate of the norms of the rows of ``Λ``. It makes ``x`` and ``y`` about equally large, so that
    little cancels.

    Example:
        >>> curvature = AutogradCurvature(lambda f, y: f.logsumexp(1), torch.zeros(1, 4), torch.zeros(1))
        >>> curvature.apply(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double())
        tensor([[ 0.1875, -0.0625, -0.0625, -0.0625]], dtype=torch.float64)
    """

    function: Callable[[Tensor, Tensor], Tensor]
    logits: Tensor  # (N, K), in a type that the function takes
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
        """The signs of the columns, ``(N, 2 K)``: +1 for the first column of every class, -1 for the second."""
        signs = torch.ones(len(self.logits), self.num_columns, dtype=torch.float64, device=self.logits.device)
        signs[:, 1::2] = -1
        return signs

    @cached_property
    def weights(self) -> Tensor:
        """Estimates of the norm of every row of ``Λ``, from products with random vectors, float64 ``(N, K)``."""
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
        """Compute ``Λ x``; both are float64 ``(N, K)``."""
        leaf, gradient = self._gradient
        return self.factor * product(gradient, leaf, x)

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two columns ``(√w x ± Λ (x / √w)) / 2`` for vectors ``x``; all are ``(N, K)``.

        The first column counts with the sign +1, the second with -1.
        """
        roots = self.weights.sqrt()
        image = self.apply(torch.where(roots > 0, x / roots, 0.0))
        return (roots * x + image) / 2, (roots * x - image) / 2

    def column(self, index: int) -> Tensor:
        """Return a column of class ``index // 2``, ``(N, K)``: the first one if ``index`` is even, else the second."""
        x = torch.zeros_like(self.weights)
        x[:, index // 2] = 1
        return self.pair(x)[index % 2]

    def centred(self, matrix: Tensor) -> Tensor:
        """Return the matrix ``V`` unchanged; :meth:`ClassCurvature.centred` subtracts its mean row."""
        return matrix

    def project(self, matrix: Tensor, scales: Tensor | None = None, tolerance: float = 0.0) -> Projection:
        """Return ``V``, which is ``matrix``, and ``ΛV`` as the factors of ``VᵀΛV``.

        ``scales`` and ``tolerance`` have no effect.
        """
        samples, (classes, filters) = len(self.logits), matrix.shape
        others = matrix.new_empty(samples, classes, filters)
        for index, image in enumerate(self._images(matrix)):
            others[:, :, index] = image
        return Projection(matrix.expand_as(others), [classes] * samples, others=others)

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Compute the diagonal of ``VᵀΛV``, where ``V`` is ``matrix``: float64 ``(N, S)``."""
        columns = matrix.double().unbind(1)
        sums = [image @ column for image, column in zip(self._images(matrix), columns, strict=True)]
        return torch.stack(sums, dim=1)

    def summed(self, scales: Tensor) -> Tensor:
        r"""Compute ``\sum_n scales[n] Λ_n``, float64 ``(K, K)``."""
        identity = torch.eye(self.num_classes, dtype=torch.float64, device=self.logits.device)
        return torch.stack([scales @ image for image in self._images(identity)])

    def traces(self) -> Tensor:
        """Return NaN for every sample, ``(N,)``, because the trace of ``Λ`` would take one product per class."""
        return torch.full((len(self.logits),), torch.nan, dtype=torch.float64, device=self.logits.device)

    def _images(self, matrix: Tensor) -> Iterator[Tensor]:
        """Yield ``Λ v``, float64 ``(N, K)``, for every column ``v`` of a matrix ``(K, S)``."""
        for column in matrix.double().unbind(1):
            yield self.apply(column.expand(len(self.logits), -1))


Curvature = ClassCurvature | DenseCurvature | AutogradCurvature


def product(gradient: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """Multiply the second derivative of a loss with ``x``, in float64, by differentiating ``gradient`` at ``leaf``.

    ``leaf`` holds the logits. ``gradient`` is the loss's gradient with respect to ``leaf``, and still has its autograd
    graph.
    """
    image = None
    if gradient.requires_grad:
        (image,) = torch.autograd.grad(gradient, leaf, x.to(gradient), retain_graph=True, allow_unused=True)
    if image is None:
        return torch.zeros_like(leaf, dtype=torch.float64)
    if not bool(image.isfinite().all()):
        raise BatchError(
            "The second derivative of the loss is not finite (a root or logarithm at zero? Add an epsilon there)."
        )
    return image.double()


def probes_like(logits: Tensor) -> list[Tensor]:
    """Return ``NUM_PROBES`` standard normal vectors in the shape of the logits, float64; they are always the same."""
    generator = torch.Generator().manual_seed(logits.shape[1])
    shape = (NUM_PROBES, *logits.shape)
    return list(torch.randn(shape, generator=generator, device="cpu").to(logits.device).double())


def certified_diagonal(gradient: Tensor, leaf: Tensor) -> Tensor | None:
    """Return the diagonal of a loss's second derivative, float64 ``(N, K)``, or None if other entries are not zero.

    If all other entries are zero, the product with a vector of ones is the diagonal. Products with random vectors show
    whether these entries are zero for every sample. The arguments are as in :func:`product`.
    """
    diagonal = product(gradient, leaf, torch.ones_like(leaf))
    allowed = ROUNDINGS * torch.finfo(leaf.dtype).eps
    for probe in probes_like(leaf):
        actual, expected = product(gradient, leaf, probe), diagonal * probe
        scale = torch.maximum(actual.abs(), expected.abs()).amax(1, keepdim=True)
        if not bool(((actual - expected).abs() <= allowed * scale).all()):
            return None
    return diagonal
