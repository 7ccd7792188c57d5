"""Random networks that end in an elementwise tail, pooling and a linear classifier; a plain one, and a loss."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Identity)
CURVED = (nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Softplus, nn.ELU, nn.Sigmoid)
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


@dataclass(frozen=True)
class Recipe:
    """What a random network is made of; printed by hypothesis when a test fails."""

    dimensions: int
    size: int
    in_channels: int
    filters: int
    groups: int
    kernel_size: int
    stride: int
    dilation: int
    padding: int | str
    padding_mode: str
    bias: bool
    activation: type = field(repr=True)
    inplace: bool
    norm: bool
    residual: bool
    concatenate: int  # channels put before the layer's own
    dropout: bool
    classes: int
    batch: int
    seed: int


class Network(nn.Module):
    def __init__(self, recipe: Recipe):
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        convolution, dims = CONVOLUTION[recipe.dimensions], recipe.dimensions
        self.stem = convolution(1, recipe.in_channels, 1)
        self.conv = convolution(
            recipe.in_channels,
            recipe.filters,
            recipe.kernel_size,
            stride=recipe.stride,
            padding=recipe.padding,
            dilation=recipe.dilation,
            groups=recipe.groups,
            bias=recipe.bias,
            padding_mode=recipe.padding_mode,
        )
        self.side = convolution(recipe.in_channels, recipe.concatenate, 1) if recipe.concatenate else None
        width = recipe.filters + recipe.concatenate
        self.norm = NORM[dims](width) if recipe.norm else nn.Identity()
        self.activation = recipe.activation(inplace=True) if recipe.inplace else recipe.activation()
        self.dropout = nn.Dropout() if recipe.dropout else nn.Identity()
        self.pool = POOL[dims](1)
        self.fc = nn.Linear(width, recipe.classes)
        randomise_statistics(self)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        out = self.conv(x)
        if self.recipe.residual:
            out = out + x.mean((1, *range(2, x.ndim)), keepdim=True)
        if self.side is not None:
            side = self.side(x).mean(tuple(range(2, x.ndim)), keepdim=True)
            out = torch.cat([side.expand(*side.shape[:2], *out.shape[2:]), out], dim=1)
        out = self.dropout(self.activation(self.norm(out)))
        return self.fc(self.pool(out).flatten(1))

    def batch(self):
        generator = torch.Generator().manual_seed(self.recipe.seed)
        shape = (self.recipe.batch, 1, *[self.recipe.size] * self.recipe.dimensions)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        y = torch.randint(self.recipe.classes, (self.recipe.batch,), generator=generator)
        return x, y


def two_convolutions(channels, sizes, classes, activation=nn.ReLU, groups=1):
    """Convolutions "0" and "2", the second with groups, global average pooling, and the classifier "6"; seed 0."""
    torch.manual_seed(0)
    first = nn.Conv2d(channels[0], channels[1], sizes[0])
    second = nn.Conv2d(channels[1], channels[2], sizes[1], groups=groups)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[2], classes)
    return nn.Sequential(first, activation(), second, activation(), *head)


def focal(logits, targets):
    """The focal loss of every sample, which is not convex."""
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return (1 - (-cross_entropy).exp()) ** 2 * cross_entropy


def randomise_statistics(model: nn.Module) -> nn.Module:
    """Give all BatchNorms the statistics and weights of a network that has seen data."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@st.composite
def recipes(draw, activations=PIECEWISE_LINEAR + CURVED, max_batch=7):
    dimensions = draw(st.sampled_from([1, 2, 2, 3]))
    padding_mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    stride = draw(st.integers(1, 2))
    kernel_size = draw(st.integers(1, 3 if dimensions < 3 else 2))
    groups = draw(st.sampled_from([1, 1, 2, 4]))  # 4: depthwise
    in_channels = 4 if groups > 1 else draw(st.integers(1, 3))
    activation = draw(st.sampled_from(activations))
    same = stride == 1 and draw(st.booleans())
    return Recipe(
        dimensions=dimensions,
        size={1: 7, 2: draw(st.integers(5, 6)), 3: 4}[dimensions],
        in_channels=in_channels,
        filters=4 if groups > 1 else draw(st.integers(1, 4)),
        groups=groups,
        kernel_size=kernel_size,
        stride=stride,
        dilation=draw(st.integers(1, 2 if dimensions < 3 else 1)),
        padding=draw(st.sampled_from(["same", "valid"])) if same else draw(st.integers(0, 2)),
        padding_mode=padding_mode,
        bias=draw(st.booleans()),
        activation=activation,
        inplace=activation in (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.SiLU, nn.ELU) and draw(st.booleans()),
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        concatenate=draw(st.sampled_from([0, 0, 1, 3])),
        dropout=draw(st.booleans()),
        classes=draw(st.integers(2, 12)),
        batch=draw(st.integers(1, max_batch)),
        seed=draw(st.integers(0, 2**16)),
    )
