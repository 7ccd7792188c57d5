"""The mathematics of the package: functions that take tensors and return tensors, and need no network.

All docstrings use the letters of this table, unless they define a letter themselves. In shapes, ``s`` means ``S / G``.
As an index, ``s`` is the number of a filter.

| letter | meaning |
|---|---|
| ``N``, ``K`` | number of samples; number of classes |
| ``S``, ``G`` | number of the layer's filters (output channels); number of its groups |
| ``C`` | number of input channels of the layer |
| ``D`` | length of one filter: ``C / G`` times the number of kernel positions |
| ``P`` | number of output positions of the layer, e.g. ``H_out * W_out`` |
| ``phi[p]`` | the input patch at output position ``p``, length ``D`` |
| ``z[s, p]`` | the layer's output, ``<w_s, phi[p]> + b_s`` |
| ``f``, ``g`` | the logits; the input of the classifier |
| ``Λ`` | curvature: the ``K x K`` Hessian of one sample's loss with respect to its logits |
| ``T[s, s']`` | block trace: trace of the ``D x D`` block ``d²L / dw_s dw_s'`` of the Hessian |
"""

from lightning_flatness.functional.autograd_curvature import AutogradCurvature, Curvature
from lightning_flatness.functional.classifier import classifier_block_traces
from lightning_flatness.functional.closed_form import closed_form_block_traces, closed_form_residual
from lightning_flatness.functional.curvature import ClassCurvature, DenseCurvature
from lightning_flatness.functional.directions import (
    NORMALIZATIONS,
    Direction,
    PrincipalDirections,
    adam_step,
    direction_norm,
    inner_product,
    normalized,
    orthogonal_to,
    principal_directions,
    random_direction,
)
from lightning_flatness.functional.eigenpairs import Eigenpairs, top_eigenpairs
from lightning_flatness.functional.gauss_newton import gauss_newton_block_traces
from lightning_flatness.functional.lanczos import LargestEigenvalues, largest_eigenvalues
from lightning_flatness.functional.loss_argument import CustomLoss, find_loss, separating_masks
from lightning_flatness.functional.losses import CrossEntropy, Loss, LossDerivatives, NegativeLogLikelihood
from lightning_flatness.functional.losses_of_outputs import BinaryCrossEntropy, MeanSquaredError
from lightning_flatness.functional.measures import (
    filter_flatness,
    filter_traces,
    hessian_trace,
    layerwise_flatness,
    measures_of,
    neuronwise_flatness,
    relative_flatness,
    weight_gram,
    weight_norm,
)
from lightning_flatness.functional.patches import (
    ConvolutionGeometry,
    contraction_costs,
    patch_gram,
    patch_square_norms,
    patches,
)
from lightning_flatness.functional.penalty import flatness_penalty
from lightning_flatness.functional.spectrum import Criteria, Quadrature, lanczos_quadrature, spectrum_criteria

__all__ = [
    "NORMALIZATIONS", "AutogradCurvature", "BinaryCrossEntropy", "ClassCurvature", "ConvolutionGeometry", "Criteria",
    "CrossEntropy", "Curvature", "CustomLoss", "DenseCurvature", "Direction", "Eigenpairs", "LargestEigenvalues",
    "Loss", "LossDerivatives", "MeanSquaredError", "NegativeLogLikelihood", "PrincipalDirections", "Quadrature",
    "adam_step", "classifier_block_traces", "closed_form_block_traces", "closed_form_residual", "contraction_costs",
    "direction_norm", "filter_flatness", "filter_traces", "find_loss", "flatness_penalty", "gauss_newton_block_traces",
    "hessian_trace",
    "inner_product", "lanczos_quadrature", "largest_eigenvalues", "layerwise_flatness", "measures_of",
    "neuronwise_flatness", "normalized", "orthogonal_to", "patch_gram", "patch_square_norms", "patches",
    "principal_directions", "random_direction", "relative_flatness", "separating_masks", "spectrum_criteria",
    "top_eigenpairs", "weight_gram", "weight_norm",
]  # fmt: skip
