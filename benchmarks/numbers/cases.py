"""The cases in plain PyTorch: measurements, the observer and the metric, formulas, spectra and landscapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from benchmarks.numbers.networks import (
    CLASSES,
    SIZE,
    Blocks,
    Net,
    Network,
    Odd,
    broken,
    drawn,
    effective_kernel,
    focal,
    images,
    made,
    many_classes,
    tokens,
    vgg,
)
from lightning_flatness import functional

Case = Callable[[], Any]
Cases = dict[str, Case]

CURVED = partial(Net, act="SiLU", norm=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "same": {"padding": "same", "kernel": 2},
    "1x1": {"kernel": 1},
    "no bias": {"bias": False},
    "residual": {"residual": True},
    "concatenated": {"concat": 2},
    "dropout": {"dropout": 0.5},
    "1x1 head": {"head": "conv"},
    "1x1 head before pooling": {"head": "conv, then pool"},
    "pooled logits": {"head": "pooled"},
}
NETWORKS: dict[str, Network] = {
    "VGG": vgg,
    "VGG, GELU": partial(vgg, "GELU"),
    "tokens": tokens,
    "tokens, GELU": partial(tokens, "GELU"),
    "tokens, LayerNorm": partial(tokens, norm=True),
    "DenseNet": Blocks,
    "DenseNet, SiLU": partial(Blocks, "SiLU"),
    "ResNet": partial(Blocks, add=True),
    "ResNet, SiLU": partial(Blocks, "SiLU", add=True),
    "runs twice": partial(Odd, "runs twice"),
    "gate": partial(Odd, "gate"),
    "squeeze-excitation": partial(Odd, "squeeze-excitation"),
    "attention": partial(Odd, "attention"),
    "effective kernel": effective_kernel,
}


def case(
    network: Network,
    batches: Callable[[], Iterable[Any]] | None = None,
    measure: Callable[..., Any] = lf.measure_flatness,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """Return a case that measures a network on batches, by default on one batch of five images."""
    return lambda: measure(made(network, dtype), images(dtype=dtype) if batches is None else batches(), **options)


def closed_form() -> Cases:
    found = {}
    for act in ("ReLU", "SiLU", "GELU", "Tanh"):
        for dims in SIZE:
            found[f"conv{dims}d, {act}"] = case(partial(Net, dims, act, norm=act != "Tanh"), partial(images, dims=dims))
    for act in ("ReLU", "SiLU"):
        for name, options in VARIANTS.items():
            found[f"{name}, {act}"] = case(partial(Net, act=act, norm=True, **options))
    for seed in range(48):
        options, sizes = drawn(seed)
        which: dict[str, Any] = {"layers": "last" if seed % 2 else "all"}
        if seed % 6 == 0:
            which |= {"residual": "hutchinson", "num_probes": 2}
        batches = partial(images, *sizes, dims=options["dims"], seed=seed)
        found[f"random network {seed}, {', '.join(map(str, which.values()))}"] = case(
            partial(Net, **options), batches, **which
        )
    return found


def all_layers() -> Cases:
    found = {f"{name}, last layer": case(NETWORKS[name]) for name in NETWORKS if "tokens" not in name}
    found |= {f"{name}, all layers": case(network, layers="all") for name, network in NETWORKS.items()}
    for name in ("VGG, GELU", "tokens, LayerNorm", "runs twice", "attention", "gate", "effective kernel"):
        options = {"layers": "all", "residual": "hutchinson", "num_probes": 3, "seed": 2}
        found[f"{name}, hutchinson"] = case(NETWORKS[name], **options)
    for layers in ("classifier", "s*", "*", ["stem", "head.2"], "conv"):
        found[f"layers {layers}"] = case(partial(Net, act="Tanh", norm=True), layers=layers)
    return found


def many() -> Cases:
    found = {}
    few = partial(images, 6, 3, classes=150)
    sampled: dict[str, Any] = {"layers": "all", "tolerance": 0.05}
    unsure = partial(many_classes, 0.02)
    for name, network in {
        "sure": partial(many_classes, 200.0),
        "sure, SiLU": partial(many_classes, 200.0, "SiLU"),
        "medium": partial(many_classes, 20.0),
        "unsure": unsure,
    }.items():
        found[f"many classes, {name}"] = case(network, few)
        found[f"many classes, {name}, sampled"] = case(network, few, **sampled)
        found[f"many classes, {name}, every one"] = case(network, few, layers="all", tolerance=0)
    found["many classes, another seed"] = case(unsure, few, **sampled, seed=3)
    found["many classes, diagonals"] = case(unsure, few, **sampled, measures=("hessian_trace",))
    found["many classes, strict"] = case(unsure, few, layers="all", strict=True)
    found["many classes, hutchinson"] = case(partial(many_classes, 0.02, "SiLU"), few, **sampled, residual="hutchinson")
    few32 = partial(images, 6, 3, classes=150, dtype=torch.float32)
    found["many classes, float32"] = case(partial(many_classes, 200.0), few32, dtype=torch.float32)
    return found


def losses() -> Cases:
    x, _ = images()[0]
    indices, weight = torch.tensor([0, 2, 4, 2, 1]), [0.5, 1.0, 2.0, 0.1, 1.5]
    soft, several = torch.softmax(x[:, 0, 0, :CLASSES], 1), (x[:, 1, 0, :CLASSES] > 0).double()
    table: dict[str, tuple[dict[str, Any], Tensor]] = {
        "label smoothing": ({"label_smoothing": 0.1}, indices),
        "class weights": ({"class_weight": weight}, indices),
        "ignored": ({"ignore_index": 2}, indices),
        "all of these": ({"ignore_index": 2, "label_smoothing": 0.2, "class_weight": weight}, indices),
        "soft targets": ({"label_smoothing": 0.1, "class_weight": weight}, soft),
        "binary": ({"loss": "binary_cross_entropy"}, several),
        "mse": ({"loss": "mse"}, soft),
        "own function": ({"loss": focal}, indices),
        "CrossEntropyLoss": ({"loss": nn.CrossEntropyLoss(torch.tensor(weight), label_smoothing=0.1)}, indices),
        "BCEWithLogitsLoss": ({"loss": nn.BCEWithLogitsLoss()}, several),
        "MSELoss": ({"loss": nn.MSELoss()}, soft),
    }
    found = {}
    for name, (options, targets) in table.items():
        batches = partial(list, [(x, targets)])
        found[f"loss, {name}"] = case(CURVED, batches, **options)
        found[f"loss, {name}, all layers"] = case(CURVED, batches, layers="all", **options)
        found[f"loss, {name}, spectrum"] = case(CURVED, batches, spectrum, **options)
        found[f"loss, {name}, landscape"] = case(CURVED, batches, landscape, axes=["random"], **options)
    return found


def options() -> Cases:
    x, y = images(6)[0]
    found = {}
    for measures in (["hessian_trace"], ["relative_flatness"], ["neuronwise_flatness", "layerwise_flatness"]):
        for layers in ("last", "all"):
            found[f"measures {measures}, {layers}"] = case(CURVED, measures=measures, layers=layers)
    for name, batches in {
        "unequal": images(7, 1, 4),
        "one sample": images(1),
        "inputs alone": [x],
        "a loader": DataLoader(TensorDataset(x, y), 4),
        "mappings": [{"image": x, "label": y}],
        "arguments": [((x,), y)],
        "keywords": [({"x": x}, y)],
    }.items():
        found[f"batches, {name}"] = case(partial(Net, norm=True), lambda given=batches: given, layers="*")
    for dtype in (torch.float32, torch.bfloat16):
        name, data = f"{dtype}".removeprefix("torch."), partial(images, dtype=dtype)
        found[f"float32 of {name}"] = case(CURVED, data, dtype=dtype)
        found[f"float32 of {name}, all layers"] = case(CURVED, data, dtype=dtype, layers="all")
        found[f"float64, weights of {torch.finfo(dtype).bits} bits"] = lambda dtype=dtype, data=data: (
            lf.measure_flatness(made(CURVED, dtype), data(), dtype="float64", layers="all")
        )
    found["float32 of float64"] = lambda: lf.measure_flatness(made(CURVED), images(), dtype="float32", layers="all")
    found["strict"] = case(CURVED, strict=True)
    found["training mode"] = lambda: lf.measure_flatness(made(partial(Net, norm=True, dropout=0.5)).train(), images())
    for name, (network, given) in {
        "not exact": (CURVED, {"layers": "all", "strict": True}),
        "no such layer": (CURVED, {"layers": "conv7"}),
        "random": (partial(Odd, "random"), {}),
        "mixing": (partial(Odd, "mixing"), {"layers": "conv"}),
        "weights": (CURVED, {"class_weight": [1.0]}),
        "NaN": (broken, {}),
    }.items():
        found[f"refused, {name}"] = case(network, **given)
    found["refused, no batches"] = case(CURVED, list)
    return found


@torch.no_grad()
def of_observer(model: nn.Module, batches: Iterable[Any], **given: Any) -> Any:
    """Return the results of ``FlatnessObserver`` and ``FlatnessMetric``, for own passes and for observed passes."""
    observer, metrics, observed = lf.FlatnessObserver(model, **given), {}, []
    for own in (True, False):
        for x, y in batches:
            if own or observer.why_not_live(x, y):
                found = observer(x, y)
            else:
                with observer.listen(x) as heard:
                    model(x)
                observed.append(not heard.reason)
                found = observer.observed(heard, y)
            for name, sums in found.items():
                info = observer.layers[name]
                new = lf.FlatnessMetric(info.num_filters, info.groups, diagonal="measures" in given)
                metrics.setdefault(f"{name}, {own}", new).update(*sums)
    found = {name: (metric.compute(), metric.means(), metric.standard_errors()) for name, metric in metrics.items()}
    return {"label observed": observed, **found}


def observers_and_metrics() -> Cases:
    data = partial(images, 5, 3)
    found = {
        f"observer, {name}": case(NETWORKS[name], data, of_observer) for name in ("ResNet", "DenseNet, SiLU", "gate")
    }
    found["observer, several layers"] = case(CURVED, data, of_observer, layers="*")
    found["observer, diagonals"] = case(CURVED, data, of_observer, measures=("hessian_trace",))
    unsure, few = partial(many_classes, 0.02), partial(images, 6, 3, classes=150)
    found["observer, many classes"] = case(unsure, few, of_observer, layers="*", tolerance=0.05)
    return found


def of_formulas(name: str) -> Any:
    """Return the result of functions of ``lightning_flatness.functional`` on random tensors."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, weight, logits = draw(3, 4, 6, 6), draw(6, 2, 3, 3), draw(3, CLASSES)
    targets = torch.tensor([0, 4, 2])
    geometry = functional.ConvolutionGeometry((3, 3), (1, 2), (1, 0), (1, 1), groups=2)
    z = torch.conv2d(x, weight, stride=(1, 2), padding=(1, 0), groups=2)
    loss = functional.CrossEntropy(label_smoothing=0.1)(logits, targets)
    if name == "classifier":
        features = draw(3, 7)
        traces = functional.classifier_block_traces(features, loss.curvature) / loss.normalizer
        return functional.measures_of(traces, functional.weight_gram(draw(CLASSES, 7)))
    if name == "closed form":
        slopes, head = (z > 0).double() / z[0, 0].numel(), draw(CLASSES, 6)
        arguments = x, geometry, slopes, head, loss.curvature
        traces = functional.closed_form_block_traces(*arguments)
        measures = functional.measures_of(traces, functional.weight_gram(weight, 2))
        return traces, measures, functional.closed_form_block_traces(*arguments, diagonal=True)
    if name == "Gauss-Newton":
        columns = [draw(*z.shape) for _ in range(CLASSES)]
        traces = functional.gauss_newton_block_traces([(x, geometry)], [columns])
        return traces, functional.gauss_newton_block_traces([(x, geometry)], [columns], diagonal=True)
    if name == "patches":
        return functional.patch_gram(x, geometry), functional.patch_square_norms(x, geometry)
    matrix = draw(12, 12)
    matrix = matrix + matrix.T
    if name == "eigenvalues":
        basis = torch.empty(12, 12, dtype=torch.float64)
        quadrature = functional.lanczos_quadrature(lambda v: matrix @ v, draw(12), basis[:5], generator)
        criteria = functional.spectrum_criteria(quadrature.values[None], quadrature.weights[None])
        largest = functional.largest_eigenvalues(lambda v: v @ matrix, draw(2, 12), 1e-12).values
        return (
            functional.top_eigenpairs(lambda v: matrix @ v, basis, 3, generator).values,
            quadrature[:3],
            criteria,
            largest,
        )
    assert name == "directions", name
    weights = {"w": weight, "b": draw(6)}
    direction = functional.random_direction(weights, generator)
    scaled = [functional.normalized(direction, weights, unit, 1, "scaled") for unit in functional.NORMALIZATIONS]
    return direction, scaled, functional.principal_directions([direction, weights])


def formulas() -> Cases:
    names = ("classifier", "closed form", "Gauss-Newton", "patches", "eigenvalues", "directions")
    return {f"formulas, {name}": partial(of_formulas, name) for name in names}


def spectrum(model: nn.Module, batches: Any, **given: Any) -> lf.SpectrumResult:
    few: dict[str, Any] = {"num_steps": 4, "num_probes": 2, "top_k": 2, "tolerance": 1e-10}
    return lf.hessian_spectrum(model, batches, **few | given)


def landscape(model: nn.Module, batches: Any, axes: Any = "random", **given: Any) -> lf.LandscapeResult:
    """Return a landscape with three points along every axis.

    For the axes ``"adam"``, ``"between"`` and ``"principal"``, the model is first trained by a few steps of Adam.
    """
    optimizer, states = torch.optim.Adam(model.parameters(), lr=0.01), []
    for x, y in batches * 3 if axes in ("adam", "between", "principal") else []:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    if axes == "between":
        axes = [lf.direction_between(model, states[0]), "random"]
    elif axes == "principal":
        axes = list(lf.pca_directions(model, states[:-1]).directions)
    elif axes == "adam":
        given["optimizer"] = optimizer
    return lf.loss_landscape(model, batches, axes=axes, **{"steps": 3, "span": 0.5, **given})


SPECTRA: dict[str, dict[str, Any]] = {
    "density alone": {"top_k": 0},
    "Gauss-Newton": {"matrix": "gauss_newton"},
    "of a layer": {"params": "conv.*", "num_probes": 1},
    "exponent": {"exponent": 1.0, "seed": 4},
}
PLANES: dict[str, dict[str, Any]] = {
    "random": {},
    "recomputed statistics": {"batch_norm": "recomputed"},
    "frozen": {"frozen": ("conv.*", "stem")},
    "by weight": {"normalize": "weight", "axes": ["random"]},
    "by layer": {"normalize": "layer", "axes": ["random"]},
    "by model": {"normalize": "model", "axes": ["random"]},
    "scaled biases": {"biases": "scaled", "norm": 1, "seed": 3},
    "hessian": {"axes": "hessian"},
    "adam": {"axes": "adam"},
    "updates of Adam": {"axes": "adam", "update": "adam"},
    "between": {"axes": "between"},
    "principal": {"axes": "principal"},
    "one by one": {"chunk": 1, "steps": [3, 2]},
    "own loss": {"loss": focal},
}


def of_the_whole_network() -> Cases:
    data = partial(images, 5, 3)
    found = {f"spectrum, {name}": case(CURVED, data, spectrum, **given) for name, given in SPECTRA.items()}
    found |= {f"landscape, {name}": case(CURVED, data, landscape, **given) for name, given in PLANES.items()}
    data32 = partial(images, 5, 3, dtype=torch.float32)
    found["landscape, float32"] = case(CURVED, data32, landscape, torch.float32)
    for name, given in {"last": {}, "all": {"layers": "all"}, "whole": {"by_filter": False}}.items():
        found[f"largest eigenvalues, {name}"] = case(CURVED, data, lf.measure_lambda_max, **given)
    return found


def cases() -> Cases:
    """Return all cases in plain PyTorch by name."""
    families = (closed_form, all_layers, many, losses, options, observers_and_metrics, formulas, of_the_whole_network)
    return {name: found for family in families for name, found in family().items()}
