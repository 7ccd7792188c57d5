"""The largest eigenvalues of the Hessians of layers, as frozen dataclasses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_flatness.results.records import Record, flat
from lightning_flatness.results.tables import LayerInfo, notes, sentence_of
from lightning_flatness.results.texts import as_text, measured, named, number_of

NUMBERS = ("lambda_max", "residual_norm", "layerwise_lambda_max", "neuronwise_lambda_max")  # columns of the table


@dataclass(frozen=True, repr=False, eq=False)
class LayerLambdaMax(Record):
    """Largest eigenvalues of the Hessian ``H`` of the mean loss with respect to one layer's kernel ``W``.

    ``W`` has the ``S`` filters ``w_s`` as rows. ``H_ss`` is the block of ``H`` for the weights of filter ``w_s``.
    ``λ_max`` of a matrix is its largest eigenvalue, and ``‖W‖`` is the Frobenius norm.

    Attributes:
        lambda_max: ``λ_max(H)``, in loss per squared weight.
        residual_norm: ``‖H v - λ v‖``, where ``λ`` is ``lambda_max`` and ``v`` the computed unit eigenvector. At least
            one eigenvalue of ``H`` is at most this far from ``λ``.
        num_products: number of Hessian-vector products in the computation of ``lambda_max``.
        layerwise_lambda_max: ``‖W‖² λ_max(H)`` (Petzka et al. 2019), in units of the loss.
        neuronwise_lambda_max: ``sum_s ‖w_s‖² λ_max(H_ss)`` (Petzka et al. 2019), in units of the loss; NaN if not
            measured.
        filter_lambda_max: ``λ_max(H_ss)``, float64 ``(S,)``, in loss per squared weight; None if not measured.
        num_samples: number of samples that were measured.
        info: description of how the layer was measured. If ``info.exact`` is False, ``H`` is the Gauss-Newton matrix
            instead of the Hessian.
        converged: whether every residual, also those of the filters, is at most ``tolerance`` times the absolute value
            of its eigenvalue; None if not known, as in files of earlier versions.

    Example:
        >>> import torch, lightning_flatness as lf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> layer = lf.measure_lambda_max(net, [torch.randn(6, 4)], layers="0")["0"]
        >>> layer.filter_lambda_max.shape, layer.num_samples, layer.exact
        (torch.Size([5]), 6, True)
    """

    lambda_max: float
    residual_norm: float
    num_products: int
    layerwise_lambda_max: float
    neuronwise_lambda_max: float
    filter_lambda_max: Tensor | None
    num_samples: int
    info: LayerInfo
    converged: bool | None = None

    @property
    def exact(self) -> bool:
        """Whether the eigenvalues are those of the Hessian itself, not of its Gauss-Newton part, and have converged."""
        return self.info.exact and self.converged is not False

    def table(self) -> Table:
        """Return a ``rich`` table of the layer's eigenvalues."""
        return LambdaMaxReport({self.info.name: self}).table()

    def _line(self) -> str:
        missing = " (not converged)" if self.converged is False else ""
        value = f"largest eigenvalue {self.lambda_max:.4g}{missing}, residual {self.residual_norm:.1g}"
        return f"{self.info.name}: {value}, {number_of(self.num_samples, 'sample')}, {sentence_of(self.info)}"


@dataclass(frozen=True, repr=False, eq=False)
class LambdaMaxReport(Record, Mapping[str, LayerLambdaMax]):
    """The largest eigenvalues of the measured layers, as a mapping from layer names; ``print`` shows a table.

    Attributes:
        layers: mapping from layer names to eigenvalues, in the order in which the layers run.
        loss_name: name of the loss, as in :class:`FlatnessReport`.

    Example:
        >>> import torch
        >>> from lightning_flatness import measure_lambda_max
        >>> found = measure_lambda_max(torch.nn.Linear(4, 3), [torch.randn(6, 4)], layers="all")
        >>> list(found), found.exact, found.num_samples, found[""].exact
        ([''], True, 6, True)
    """

    layers: Mapping[str, LayerLambdaMax]
    loss_name: str = ""

    @property
    def exact(self) -> bool:
        """Whether the eigenvalues of every layer have converged and are those of the Hessian itself."""
        return all(layer.exact for layer in self.layers.values())

    @property
    def num_samples(self) -> int:
        """Number of samples that were measured."""
        return max((layer.num_samples for layer in self.layers.values()), default=0)

    def __getitem__(self, name: str) -> LayerLambdaMax:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def table(self) -> Table:
        """Return a ``rich`` table with a row for every layer."""
        sentences = [f"Loss: {self.loss_name}."] * bool(self.loss_name)
        sentences += ["Residual: λ_max is at most that far from an eigenvalue."]
        if rough := [name for name, layer in self.layers.items() if layer.converged is False]:
            sentences += [f"Not converged ({named(rough)}): allow more products (max_products=)."]
        sentences += notes([layer.info for layer in self.layers.values()], {})
        table = Table(
            title=f"Largest eigenvalues over {number_of(self.num_samples, 'sample')}",
            caption=" ".join(sentences),
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        for heading in ("λ_max", "residual", "layer-wise", "neuron-wise"):
            table.add_column(heading, justify="right")
        table.add_column("exact")
        for name, layer in self.layers.items():
            numbers = [measured(getattr(layer, number)) for number in NUMBERS]
            label = layer.info.label if layer.exact == layer.info.exact else "no: not converged"
            table.add_row(Text(name), *numbers, label)
        return table

    def __str__(self) -> str:
        return as_text(self.table())

    def _line(self) -> str:
        largest = max((layer.lambda_max for layer in self.layers.values()), default=math.nan)
        exact = "exact" if self.exact else "not exact"
        samples = number_of(self.num_samples, "sample")
        return f"{number_of(len(self.layers), 'layer')}, {samples}, {exact}, largest eigenvalue {largest:.4g}"

    def _rows(self) -> list[dict[str, Any]]:
        rows = [{"layer": name, **flat(layer._values(tensors=False))} for name, layer in self.layers.items()]
        shared = {"loss_name": self.loss_name}
        return [{key: value for key, value in (row | shared).items() if key != "name"} for row in rows]
