"""Block traces of layers under the Gauss-Newton method.

The columns of the factor ``B`` of the loss's curvature ``Λ`` are pulled back to all layers at once.
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

# How many elements, over all layers, are kept in memory at a time: on a CPU about a hundred megabytes.
ELEMENTS = {"cpu": 3 * 2**23}
ELEMENTS_DEFAULT = 2**29
# The memory of the graph of a forward pass, in columns. (The certificate's graph is freed before columns are taken.)
GRAPH = 4
# How many columns must fit into memory besides the graph: with more, fewer samples would be taken at a time.
COLUMNS = 6
# At most so many columns are taken at a time: more are no faster, and memory must not grow with the classes.
MOST_COLUMNS = {"cpu": 12}
MIN_PROBES = 16

Columns = list[list[Tensor]]  # some columns, each pulled back to all calls of all layers
Advance = Callable[[float], None]  # called with the fraction of the work that is done


def gauss_newton_layers(
    certified: CertifiedPass,
    known: Certified,
    weightings: Mapping[str, Weighting],
    options: Options,
    generator: torch.Generator,
    advance: Advance,
) -> dict[str, BlockTraces]:
    """Return block traces of the layers under Gauss-Newton, summed over the samples of a pass.

    One backward pass per column, down to activations only, serves all layers. Columns are taken in chunks, so that
    memory does not grow with the number of classes. Random probes are drawn from ``generator``.
    """
    curvature, tolerance = certified.loss.curvature, options.class_tolerance
    layers = _Layers(certified.others, certified.recorded.logits, weightings, options.diagonal)
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
    """Return whether classes of small weight in the curvature are sampled instead of taken one by one."""
    return tolerance > 0 and not isinstance(curvature, DenseCurvature) and curvature.num_classes >= MANY_CLASSES


def rows_at_a_time(elements: int, num_columns: int, device: torch.device) -> int:
    """Return how many samples fit in memory at a time, at least two: the graph, and what is pulled back from logits.

    ``elements`` are the entries of the measured layers' outputs for one sample.
    """
    kept = ELEMENTS.get(device.type, ELEMENTS_DEFAULT)
    return max(2, kept // (elements * (min(num_columns, COLUMNS) + GRAPH)))


@dataclass(frozen=True)
class _Layers:
    """The layers to which columns are pulled back, in one pass."""

    calls: Calls
    logits: Tensor  # (N, K), in the graph of the layers' outputs
    weightings: Mapping[str, Weighting]
    diagonal: bool  # only the diagonals of the block traces

    def pulled(self, cotangents: Iterator[Tensor]) -> Iterator[Columns]:
        """Yield chunks of the cotangents ``(N, K)``, each pulled back to all calls of all layers."""
        logits, nodes = self.logits, nodes_of(self.calls)
        kept = ELEMENTS.get(logits.device.type, ELEMENTS_DEFAULT)
        at_a_time = max(1, kept // max(1, sum(node.numel() for node in nodes)) - GRAPH)
        at_a_time = min(at_a_time, MOST_COLUMNS.get(logits.device.type, at_a_time))
        while columns := [pull_back(logits, nodes, u.to(logits.dtype)) for u in islice(cotangents, at_a_time)]:
            yield columns

    def factored(
        self, curvature: ClassCurvature | AutogradCurvature, vectors: Iterable[Tensor]
    ) -> Iterator[tuple[Columns, Tensor | None]]:
        """Yield chunks of the columns that a curvature gives for vectors ``(N, K)``, pulled back, and their signs."""
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
        """Yield block traces by layer, from the columns; the lists of columns are emptied, which keeps memory low."""
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
        """Add the block traces from these columns to the totals by layer."""
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
    """Return block traces: classes of large weight are taken one by one, the sum over the others is estimated.

    A probe pulls ``sum_k ±√w_k (e_k - π)`` over the other classes back (or the pair of columns of an
    :class:`AutogradCurvature` for these signs); random signs make the estimate unbiased. Probes
    are added until trace and relative flatness of every layer reach the tolerance. If that would take more probes than
    there are classes, these classes are taken one by one, too.
    """
    order = curvature.weights.argsort(1, descending=True)
    mass = curvature.weights.gather(1, order)
    leading = _num_leading(mass.sum(0), tolerance, len(mass))
    unit = torch.zeros_like(mass)
    totals: dict[str, BlockTraces] = {}

    def take_one_by_one(ranks: range) -> None:
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
    """Return how many classes to take one by one, so that their number plus that of the probes is smallest."""
    rest = (1 - mass.cumsum(0) / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)).clamp_min(0)
    # The relative variance of a probe is about 0.1 for one sample, times the square of the sampled share of the weight.
    num_probes = 0.1 / (samples * tolerance**2) * rest.square()
    return int((torch.arange(1, len(mass) + 1, device=mass.device) + num_probes).argmin()) + 1
