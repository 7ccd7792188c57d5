"""Compute the block traces of layers by the Gauss-Newton method.

The loss's second derivative at the logits is factored as ``Λ = B Bᵀ``. Each column of ``B`` is *pulled back*, i.e.
multiplied by the transposed Jacobian, from the logits to the outputs of all layers at once (``docs/theory.md``, "Any
layer: Gauss-Newton"). The *weight* of a class says how much the class adds to ``Λ``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lightning_flatness.functional import (
    AutogradCurvature,
    ClassCurvature,
    Curvature,
    DenseCurvature,
)
from lightning_flatness.functional.curvature import MANY_CLASSES
from lightning_flatness.functional.gauss_newton import gauss_newton_contraction
from lightning_flatness.functional.weighting import Weighting
from lightning_flatness.layers.certified import Calls, Certified, CertifiedPass
from lightning_flatness.layers.cotangents import nodes_of, pull_back
from lightning_flatness.layers.estimates import BlockTraces, Probes, random_signs
from lightning_flatness.layers.options import Options

# The number of tensor entries that are kept in memory at a time, for all layers together. On a CPU, this is about a
# hundred megabytes.
ELEMENTS = {"cpu": 3 * 2**23}
ELEMENTS_DEFAULT = 2**29
# A forward pass's autograd graph takes about the memory of this many pulled-back columns. (The certificate that the
# logits are affine takes more for its double backward pass, but frees this memory before columns are pulled back.)
GRAPH = 4
# The number of samples at a time is chosen so that this many columns fit into memory besides the graph.
COLUMNS = 6
# At most this many columns are pulled back at a time. More would not be faster, and memory must not grow with the
# number of classes.
MOST_COLUMNS = {"cpu": 12}
# Random probes are added in groups of this size.
MIN_PROBES = 16

Columns = list[list[Tensor]]  # for each column, the tensors pulled back to all calls of all layers
Advance = Callable[[float], None]  # called with the fraction of the work that is done


def gauss_newton_layers(
    certified: CertifiedPass,
    known: Certified,
    weightings: Mapping[str, Weighting],
    options: Options,
    generator: torch.Generator,
    advance: Advance,
) -> dict[str, BlockTraces]:
    """Return the block traces of each layer that needs backward passes, summed over the samples of a pass.

    Run one backward pass for each column of ``B``, which is defined above in this module, for all layers together. Do
    not compute gradients of weights. Take columns in chunks, so that memory does not grow with the number of classes.
    If there are many classes (:func:`is_sampled`), estimate the sum over those that add little by random probes, drawn
    from ``generator``.
    """
    curvature, tolerance = certified.loss.curvature, options.class_tolerance
    layers = _Layers(certified.need_backward, certified.recorded.logits, weightings, options.diagonal)
    if not isinstance(curvature, DenseCurvature) and is_sampled(curvature, tolerance):
        return _by_probes(layers, curvature, known, tolerance, generator, advance)
    totals: dict[str, BlockTraces] = {}
    done = 0
    for columns in layers.pulled(curvature.column(index) for index in range(curvature.num_columns)):
        before, done = done, done + len(columns)
        signs = None if curvature.signs is None else curvature.signs[:, before:done].to(layers.logits.dtype)
        layers.add(totals, columns, signs)
        advance(done / curvature.num_columns)
    return totals


def is_sampled(curvature: Curvature, tolerance: float) -> bool:
    """Return whether the sum over classes of small weight is estimated by random probes, not taken class by class."""
    return tolerance > 0 and not isinstance(curvature, DenseCurvature) and curvature.num_classes >= MANY_CLASSES


def rows_at_a_time(elements: int, num_columns: int, device: torch.device) -> int:
    """Return for how many samples the autograd graph and the pulled-back columns fit in memory, at least two.

    ``elements`` is the number of entries that the measured layers' outputs have for one sample.
    """
    kept = ELEMENTS.get(device.type, ELEMENTS_DEFAULT)
    return max(2, kept // (elements * (min(num_columns, COLUMNS) + GRAPH)))


@dataclass(frozen=True)
class _Layers:
    """The layers of one forward pass, with methods that pull columns back and compute block traces from them."""

    calls: Calls
    logits: Tensor  # (N, K), with their autograd graph
    weightings: Mapping[str, Weighting]
    diagonal: bool  # whether only the diagonals of the block traces are computed

    def pulled(self, cotangents: Iterator[Tensor]) -> Iterator[Columns]:
        """Pull cotangents ``(N, K)`` back to all calls of all layers, in chunks that fit in memory."""
        logits, nodes = self.logits, nodes_of(self.calls)
        kept = ELEMENTS.get(logits.device.type, ELEMENTS_DEFAULT)
        at_a_time = max(1, kept // max(1, sum(node.numel() for node in nodes)) - GRAPH)
        at_a_time = min(at_a_time, MOST_COLUMNS.get(logits.device.type, at_a_time))
        while columns := [pull_back(logits, nodes, u.to(logits.dtype)) for u in islice(cotangents, at_a_time)]:
            yield columns

    def factored(
        self, curvature: ClassCurvature | AutogradCurvature, vectors: Iterable[Tensor]
    ) -> Iterator[tuple[Columns, Tensor | None]]:
        """Turn each vector ``(N, K)`` into one or two columns, and yield the pulled-back columns in chunks.

        A vector has one coefficient for every class. A :class:`ClassCurvature` turns it into one column. An
        :class:`AutogradCurvature` turns it into two, and the block traces of the second are subtracted. So each chunk
        comes with the signs of its columns, None if all are positive.
        """
        if isinstance(curvature, ClassCurvature):
            for columns in self.pulled(curvature.factor(x) for x in vectors):
                yield columns, None
        else:
            done = 0
            for columns in self.pulled(column for x in vectors for column in curvature.pair(x)):
                before, done = done, done + len(columns)
                signs = [1.0 - 2 * (index % 2) for index in range(before, done)]
                yield columns, self.logits.new_tensor(signs).expand(len(self.logits), -1)

    def contracted(self, columns: Columns, signs: Tensor | None = None) -> Iterator[tuple[str, BlockTraces]]:
        """Yield the name and block traces of each layer, computed from pulled-back columns with their signs.

        To save memory, the lists in ``columns`` are emptied on the way.
        """
        for name, of_layer in self.calls.items():
            convolutions = [call.convolution for call in of_layer]
            cotangents = [
                [pulled.pop(0).movedim(convolution.channel_dimension, 1) for pulled in columns]
                for convolution in convolutions
            ]
            inputs = [(convolution.inputs, convolution.geometry) for convolution in convolutions]
            contraction = gauss_newton_contraction(inputs, cotangents, signs, self.weightings[name], self.diagonal)
            yield name, BlockTraces.of(contraction)

    def add(self, totals: dict[str, BlockTraces], columns: Columns, signs: Tensor | None = None) -> None:
        """Compute the block traces of each layer from pulled-back columns, and add them to ``totals``."""
        for name, part in self.contracted(columns, signs):
            totals[name] = totals[name].plus(part) if name in totals else part


def _by_probes(
    layers: _Layers,
    curvature: ClassCurvature | AutogradCurvature,
    known: Certified,
    tolerance: float,
    generator: torch.Generator,
    advance: Advance,
) -> dict[str, BlockTraces]:
    """Return the block traces of each layer, with an estimate of the sum over classes of small weight.

    Classes of large weight are taken one by one. For the other classes, a probe pulls back ``Σ_k ±√w_k (e_k - π)`` with
    random signs, so that the estimate is unbiased. Here ``w`` are the class weights and ``e_k`` the unit vectors. ``π``
    is :attr:`ClassCurvature.center`, or zero if this is None. An :class:`AutogradCurvature` makes two columns from the
    vector of signs, and both are pulled back. Probes are added until :meth:`Probes.precise` is True for every layer. If
    this takes as many backward passes as all classes would, the probes are dropped, and the remaining classes are taken
    one by one.
    """
    order = curvature.weights.argsort(1, descending=True)
    mass = curvature.weights.gather(1, order)
    leading = _num_leading(mass.sum(0), tolerance, len(mass))
    unit = torch.zeros_like(mass)
    totals: dict[str, BlockTraces] = {}

    def take_one_by_one(ranks: range) -> None:  # ranks of classes by falling weight
        units = (unit.scatter(1, order[:, rank : rank + 1], 1.0) for rank in ranks)
        for columns, column_signs in layers.factored(curvature, units):
            layers.add(totals, columns, column_signs)

    take_one_by_one(range(leading))
    probes = {name: Probes(known.layers[name].gram.whole()) for name in layers.calls}
    others = torch.ones_like(mass).scatter(1, order[:, :leading], 0.0)
    count, most = 0, min(curvature.num_columns, curvature.num_classes)
    while leading + count < most:
        for _ in range(MIN_PROBES):
            of_probe: dict[str, BlockTraces] = {}
            for columns, column_signs in layers.factored(curvature, [others * random_signs(others, generator)]):
                layers.add(of_probe, columns, column_signs)
            for name, part in of_probe.items():
                probes[name].add(part)
        count += MIN_PROBES
        advance(min((leading + count) / most, 1.0))
        if all(of_layer.precise(tolerance, totals[name]) for name, of_layer in probes.items()):
            advance(1.0)
            return {name: of_layer.estimate(totals[name]) for name, of_layer in probes.items()}
    take_one_by_one(range(leading, curvature.num_classes))
    return totals


def _num_leading(mass: Tensor, tolerance: float, samples: int) -> int:
    """Return how many classes to take one by one, to minimise this number plus the expected number of probes.

    ``mass``, ``(K,)``, has class weights, sorted in falling order for every sample and then summed over samples.
    """
    rest = (1 - mass.cumsum(0) / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)).clamp_min(0)
    # Probes estimate the share `rest` of the summed class weights. Relative to the whole sum over classes, the variance
    # of one probe is about 0.1 / samples * rest².
    num_probes = 0.1 / (samples * tolerance**2) * rest.square()
    return int((torch.arange(1, len(mass) + 1, device=mass.device) + num_probes).argmin()) + 1
