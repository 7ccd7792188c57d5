"""Draw the figures of concepts/in-pictures.md, and print its numbers and those of concepts/invariance.md.

python docs/pictures.py: some minutes on one CPU core. The network learns 600 of scikit-learn's digits. All numbers and
losses are measured by the package on these, in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from lightning_flatness.plots.canvas import LEGEND_SIZE, SERIES, TITLE_SIZE, label_epochs, plain_frame

PICTURES = Path(__file__).parent / "images" / "concepts"
NUM_EPOCHS, NUM_STEPS, NUM_SIZES = 40, 40, 9
FEW = ("hessian_trace", "relative_flatness")
ALL = (*FEW, "neuronwise_flatness", "layerwise_flatness", "normalized_relative_flatness", "channelwise_flatness")
# Kinds of steps: from the kernel as a matrix (filters, features) to a random step.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": torch.randn_like,
    "mixing": lambda kernel: kernel @ torch.randn(kernel.shape[1], kernel.shape[1], dtype=kernel.dtype),
}


class Network(nn.Module):
    """Two convolutions, global average pooling, and a linear classifier."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.before, self.norm_before = nn.Conv2d(1, 16, 3), norm(16)
        self.layer, self.norm = nn.Conv2d(16, 32, 3), norm(32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        read = self.norm_before(self.before(images)).relu()
        return self.classifier(self.norm(self.layer(read)).relu().mean((2, 3)))


def load_data() -> tuple[Tensor, Tensor]:
    """Load 600 images and their labels."""
    digits = load_digits()
    return torch.tensor(digits.images[:600], dtype=torch.float32)[:, None] / 16 - 0.5, torch.tensor(digits.target[:600])


def trained(batch_norm: bool = False) -> list[Network]:
    """Train a network, and return it as it was before the first epoch and after each."""
    images, labels = load_data()
    torch.manual_seed(0)
    model = Network(batch_norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    kept = [deepcopy(model)]
    for _ in range(NUM_EPOCHS):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        kept.append(deepcopy(model))
    return [one.double().eval() for one in kept]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return what is measured: all images, as one batch."""
    images, labels = load_data()
    return [(images.double(), labels)]


def measured(model: Network, measures: tuple[str, ...] = FEW) -> lf.FlatnessReport:
    """Measure the second convolution."""
    report = lf.measure_flatness(model, batches(), layers="layer", measures=measures)
    assert report.exact
    return report


@torch.no_grad()
def own_filters_doubled(model: Network, filters: slice = slice(None)) -> Network:
    """Double filters and their biases, and halve the weights of the classifier that read them: the same function."""
    other = deepcopy(model)
    for tensor in (other.layer.weight, other.layer.bias):
        tensor[filters] *= 2
    other.classifier.weight[:, filters] /= 2
    return other


@torch.no_grad()
def layer_before_doubled(model: Network, channels: slice) -> Network:
    """Double filters of the first layer and their biases, and halve the weights that read them: the same function."""
    other = deepcopy(model)
    for tensor in (other.before.weight, other.before.bias):
        tensor[channels] *= 2
    other.layer.weight[:, channels] /= 2
    return other


@torch.no_grad()
def filters_before_norm_doubled(model: Network, convolution: str, norm: str, filters: slice) -> Network:
    """Double filters, and adapt the running statistics of their BatchNorm: the same function, but for its epsilon."""
    other = deepcopy(model)
    layer, statistics = getattr(other, convolution), getattr(other, norm)
    for tensor in (layer.weight, layer.bias, statistics.running_mean):
        tensor[filters] *= 2
    statistics.running_var[filters] *= 4
    return other


@torch.no_grad()
def weights_of_norm_doubled(model: Network, channels: slice) -> Network:
    """Double weights and biases of the first BatchNorm, and halve the weights that read them: the same function."""
    other = deepcopy(model)
    for tensor in (other.norm_before.weight, other.norm_before.bias):
        tensor[channels] *= 2
    other.layer.weight[:, channels] /= 2
    return other


def rises(model: Network, kind: str, span: float) -> tuple[Tensor, Tensor]:
    """Return sizes of steps, and how far the loss rises along random steps of this kind, a row for each."""
    torch.manual_seed(0)
    kernel = model.layer.weight.detach()
    curves = []
    for _ in range(NUM_STEPS):
        step = {"layer.weight": STEPS[kind](kernel.flatten(1)).view_as(kernel)}
        line = lf.loss_landscape(model, batches(), axes=[step], span=span, steps=NUM_SIZES, progress=False)
        curves.append(line.losses - line.origin_loss)
    return torch.linspace(-span, span, NUM_SIZES), torch.stack(curves)


def draw_valley(
    ax: Any, model: Network, kind: str, span: float, curvature: float, label: str, index: int, single: bool = False
) -> None:
    """Draw the loss along single steps (thin), its mean over steps and their opposites (dots), and the parabola."""
    sizes, curves = rises(model, kind, span)
    fine = torch.linspace(-span, span, 101)
    style = {"color": SERIES[index], "linestyle": ("-", "--")[index]}
    for curve in curves[:16] if single else ():
        ax.plot(sizes, curve, color=SERIES[index], linewidth=0.5, alpha=0.3)
    ax.plot(fine, curvature / 2 * fine**2, linewidth=1.8, label=label, **style)
    ax.plot(sizes, (curves + curves.flip(1)).mean(0) / 2, "os"[index], color=SERIES[index], markersize=(6, 3.5)[index])


def panels(number: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """Make a figure with panels side by side."""
    figure = Figure(figsize=(4.0 * number, height), layout="constrained", dpi=110)
    axes = list(figure.subplots(1, number, squeeze=False)[0])
    for ax in axes:
        plain_frame(ax, "both")
        ax.locator_params(axis="x", nbins=5)
    return figure, axes


def finish(figure: Figure, name: str, place: str) -> None:
    """Write legends and the file."""
    for ax in figure.axes:
        ax.legend(fontsize=LEGEND_SIZE, frameon=False, loc=place)
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.png", pil_kwargs={"optimize": True})


def draw_run(reports: list[lf.FlatnessReport]) -> None:
    """Draw loss and both numbers over the epochs."""
    figure, (left, right) = panels(2)
    epochs = range(len(reports))
    left.plot(epochs, [report.loss for report in reports], color=SERIES[0], label="training loss")
    for index, (measure, name) in enumerate(zip(FEW, ("Hessian trace", "relative flatness"), strict=True)):
        values = [getattr(report, measure) for report in reports]
        right.plot(epochs, values, color=SERIES[index], linestyle=("-", "--")[index], label=name)
    for ax in (left, right):
        ax.set_yscale("log")
        label_epochs(ax, epochs)
        ax.set_xlabel("epochs of training")
    finish(figure, "run", "lower center")


def draw_two_epochs(sharp: tuple[int, Network, float], last: tuple[int, Network, float]) -> None:
    """Draw the valleys of two epochs."""
    figure, (ax,) = panels(1, height=3.4)
    for index, (epoch, model, trace) in enumerate((sharp, last)):
        draw_valley(ax, model, "equal", 0.03, trace, f"after epoch {epoch}: trace {trace:.2f}", index, single=True)
    ax.set_xlabel("size $t$ of the step in every weight")
    ax.set_ylabel("rise of the loss")
    ax.set_ylim(-0.002, 0.009)
    finish(figure, "two-valleys", "upper center")


def draw_rescaled(models: tuple[Network, Network], reports: list[lf.FlatnessReport]) -> None:
    """Draw the valleys of one function with two sizes of filters, for steps of both kinds."""
    figure, axes = panels(2)
    titles = ("Equal steps in every weight", "Steps in proportion to the filters")
    numbers = zip(axes, STEPS, (0.04, 0.006), FEW, ("trace", "relative flatness"), titles, strict=True)
    for ax, kind, span, measure, word, title in numbers:
        for index, (model, report, name) in enumerate(zip(models, reports, ("as trained", "rescaled"), strict=True)):
            value = getattr(report, measure)
            draw_valley(ax, model, kind, span, value, f"{name}: {word} {value:.3g}", index)
        ax.set_xlabel("size $t$ of the step")
        ax.set_title(title, fontsize=TITLE_SIZE, loc="left")
        ax.set_ylim(0, 0.0014)
    axes[0].set_ylabel("mean rise of the loss")
    finish(figure, "rescaled", "upper center")


def say(*words: object) -> None:
    """Write a line."""
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")


def say_table(columns: dict[str, Network]) -> None:
    """Write the measures of networks that compute the same function, and how far their logits are apart."""
    (images, _), (first, *_) = *batches(), columns.values()
    say("|", " | ".join(["measure", *columns]), "|")
    layers = [measured(model, ALL).layers["layer"] for model in columns.values()]
    for measure in ALL:
        say("|", " | ".join([measure, *(f"{getattr(layer, measure):.5g}" for layer in layers)]), "|")
    with torch.no_grad():
        apart = [(model(images) - first(images)).abs().max().item() for model in columns.values()]
    say("logits apart:", *(f"{distance:.1e}" for distance in apart))


def main() -> None:
    """Train both networks, draw, and print."""
    models = trained()
    reports = [measured(model) for model in models]
    for epoch, report in enumerate(reports):
        numbers = (report.loss, report.accuracy, report.hessian_trace, report.relative_flatness)
        say(f"{epoch} epochs:", *(f"{number:.4g}" for number in numbers))
    draw_run(reports)
    sharpest = max(range(len(reports)), key=lambda epoch: reports[epoch].hessian_trace)
    two = [(epoch, models[epoch], reports[epoch].hessian_trace) for epoch in (sharpest, NUM_EPOCHS)]
    draw_two_epochs(*two)
    last = models[-1]
    doubled = own_filters_doubled(last)
    draw_rescaled((last, doubled), [reports[-1], measured(doubled)])

    half, channels = slice(16), slice(8)
    say_table(
        {
            "as trained": last,
            "own filters": own_filters_doubled(last, half),
            "layer before": layer_before_doubled(last, channels),
        }
    )
    with_norm = trained(batch_norm=True)[-1]
    say_table(
        {
            "as trained": with_norm,
            "own filters": filters_before_norm_doubled(with_norm, "layer", "norm", half),
            "filters before": filters_before_norm_doubled(with_norm, "before", "norm_before", channels),
            "norm before": weights_of_norm_doubled(with_norm, channels),
        }
    )


if __name__ == "__main__":
    main()
