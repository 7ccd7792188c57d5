"""The measures of the package and the baselines that the study compares, with their names on the page."""

from __future__ import annotations

FLATNESS = {
    "hessian_trace": "Hessian trace",
    "relative_flatness": "relative flatness",
    "normalized_relative_flatness": "normalised",
    "channelwise_flatness": "channel-wise",
    "neuronwise_flatness": "neuron-wise",
    "layerwise_flatness": "layer-wise",
}
PLACES = {"last": "last convolution", "classifier": "classifier", "first": "first layer", "all": "all layers"}

BASELINES = {
    "train_loss": "train loss",
    "train_error": "train error",
    "weight_norm": "weight norm, network",
    "weight_norm.last": "weight norm, last convolution",
    "weight_norm.classifier": "weight norm, classifier",
    "distance": "distance from initialisation",
    "margin": "−margin, mean",
    "margin_tenth": "−margin, tenth percentile",
    "normalised_margin": "−margin over weight norm",
    "feature_spread": "features × spread of weights",
    "fisher_rao": "Fisher–Rao norm",
    "takeuchi": "Takeuchi criterion, classifier",
    "takeuchi_ratio": "Takeuchi ratio, classifier",
    "sam": "SAM sharpness",
    "asam": "ASAM sharpness",
    "random": "random perturbation",
    "random_relative": "random perturbation, relative",
}
CHEAP = {
    f"{measure}.{place}": f"{label}, {PLACES[place]}" for place in PLACES for measure, label in FLATNESS.items()
} | {
    "per_loss.last": "relative flatness ÷ loss, last convolution",
    "per_curvature.last": "relative flatness ÷ curvature, last convolution",
}
COSTLY = {
    "lambda_max.last": "λ_max, last convolution",
    "lambda_max.classifier": "λ_max, classifier",
    "lambda_max.first": "λ_max, first layer",
    "layerwise_lambda_max.last": "λ_max layer-wise, last convolution",
    "neuronwise_lambda_max.last": "λ_max neuron-wise, last convolution",
    "trace.network": "Hessian trace, whole network",
    "lambda_max.network": "λ_max, whole network",
    "r_e": "r_e, whole network",
    "k_hn": "K_Hn, whole network",
    "c_t": "C_t, whole network",
}
PACKAGE = CHEAP | COSTLY
LABELS = BASELINES | PACKAGE
# For networks that generalise, the authors of these numbers expect large margins, a C_t near zero (it is negative), and
# small values of all other numbers. Margins and C_t are negated, so that a positive τ with a gap or an error always
# means that a number does what its authors expect.
NEGATED = {"margin", "margin_tenth", "normalised_margin", "c_t"}
COLUMNS = ["name", "snapshot", "exact", *(name for name in LABELS if not name.startswith("train_"))]
