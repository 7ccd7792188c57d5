"""Measure one snapshot of a network: losses and errors, the measures of the package, and the baselines."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from studies.baselines import baselines
from studies.data import Data, training_part
from studies.families import Configuration, Family
from studies.measures import COLUMNS, FLATNESS
from studies.networks import build
from studies.training import Snapshot

STEPS, PROBES = 20, 2  # Lanczos steps and random probes for the spectrum
COSTLY_FLATNESS = ("channelwise_flatness",)
CHUNK = 256


def network_of(configuration: Configuration, snapshot: Snapshot, data: Data) -> nn.Module:
    """Return a network with the weights of a snapshot, in evaluation mode."""
    model = build(configuration, data.images.shape[1])
    model.load_state_dict(snapshot.state)
    return model.to(data.images.device).eval()


def measured_rows(
    family: Family, configuration: Configuration, snapshot: Snapshot, data: Data
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two rows for a snapshot: losses and errors, and measures with baselines.

    The cells of the measures are empty if the training loss is not finite.
    """
    model = network_of(configuration, snapshot, data)
    key = {"name": snapshot.name, "snapshot": snapshot.snapshot}
    images, labels = training_part(data, configuration)
    outcomes = outcomes_of(model, images, labels, data.test_images, data.test_labels)
    counts = {"train_images": len(images), "test_images": len(data.test_images)}
    losses = key | {"epoch": float(snapshot.epoch)} | counts | outcomes
    inputs, targets = images[: family.measured_samples], labels[: family.measured_samples]
    empty = dict.fromkeys(COLUMNS, "")
    if not math.isfinite(outcomes["train_loss"]):
        return losses, empty | key
    initial = dict(build(configuration, data.images.shape[1]).to(inputs.device).named_parameters())
    found = flatness_of(model, inputs, targets, is_costly=snapshot.snapshot in family.costly)
    found |= baselines(model, model.classifier, initial, inputs, targets, configuration.seed)
    return losses, empty | key | found


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(CHUNK)]).double()


def outcomes_of(model: nn.Module, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> dict:
    """Return losses and errors on the training images, the test images, and each half of the test images.

    ``scaled_loss`` is the test loss after temperature scaling: the temperature is fitted on one half of the test images
    and the loss is computed on the other half.
    """
    train, test = logits_of(model, images), logits_of(model, test_images)
    parts = {"_a": slice(0, None, 2), "_b": slice(1, None, 2)}
    found = {"train_loss": float(cross_entropy(train, labels)), "train_error": error_of(train, labels)}
    found |= {"test_loss": float(cross_entropy(test, test_labels)), "test_error": error_of(test, test_labels)}
    for half, other in (("_a", "_b"), ("_b", "_a")):
        logits, targets = test[parts[half]], test_labels[parts[half]]
        found[f"test_loss{half}"] = float(cross_entropy(logits, targets))
        found[f"test_error{half}"] = error_of(logits, targets)
        temperature = temperature_of(test[parts[other]], test_labels[parts[other]])
        found[f"scaled_loss{half}"] = float(cross_entropy(logits / temperature, targets))
    counts = [len(test_labels[part]) for part in parts.values()]
    halves = [found[f"scaled_loss{half}"] for half in parts]
    found["scaled_loss"] = sum(n * loss for n, loss in zip(counts, halves, strict=True)) / sum(counts)
    return found


def error_of(logits: Tensor, targets: Tensor) -> float:
    return float((logits.argmax(1) != targets).double().mean())


def temperature_of(logits: Tensor, targets: Tensor) -> float:
    """Return the number by which the logits must be divided for the lowest loss (Guo et al. 2017)."""
    if not bool(logits.isfinite().all()):
        return math.nan

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(logits / math.exp(log_temperature), targets))

    return math.exp(float(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded", options={"xatol": 1e-3}).x))


def flatness_of(model: nn.Module, inputs: Tensor, targets: Tensor, is_costly: bool) -> dict[str, Any]:
    """Return the package's measures of a network on its training samples.

    Channel-wise flatness, eigenvalues and the whole network's spectrum are measured only if ``is_costly``.
    """
    batches = list(zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True))
    wanted = tuple(measure for measure in FLATNESS if is_costly or measure not in COSTLY_FLATNESS)
    report = lf.measure_flatness(model, batches, layers="all", measures=wanted, progress=False)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][-1]
    names = {"last": last, "classifier": "classifier", "first": next(iter(report.layers))}
    found: dict[str, Any] = {"exact": report.exact}
    for measure in FLATNESS:
        values = {name: float(getattr(layer, measure)) for name, layer in report.layers.items()}
        found |= {f"{measure}.{place}": values[name] for place, name in names.items()}
        found[f"{measure}.all"] = sum(values.values())
    found["per_loss.last"] = report.layers[last].relative_flatness / report.loss
    found["per_curvature.last"] = report.layers[last].relative_flatness / report.curvature
    if not is_costly:
        return found
    largest = lf.measure_lambda_max(model, batches, layers=list(names.values()))
    for place, name in names.items():
        found[f"lambda_max.{place}"] = largest[name].lambda_max
    for kind in ("layerwise", "neuronwise"):
        found[f"{kind}_lambda_max.last"] = getattr(largest[last], f"{kind}_lambda_max")
    return found | spectrum_of(model, batches)


def spectrum_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return trace, largest Ritz value (as largest eigenvalue) and criteria of the whole network's Hessian."""
    spectrum = lf.hessian_spectrum(model, batches, top_k=0, num_steps=STEPS, num_probes=PROBES, progress=False)
    return {
        "trace.network": spectrum.trace,
        "lambda_max.network": float(spectrum.ritz_values.max()),
        "r_e": spectrum.r_e,
        "k_hn": spectrum.k_hn,
        "c_t": spectrum.c_t,
    }
