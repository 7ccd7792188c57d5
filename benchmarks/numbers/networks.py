"""Small networks and data, made from fixed seeds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = {1: 9, 2: 7, 3: 5}  # length of each side of an image, by the number of dimensions
CHANNELS, CLASSES = 2, 5
Network = Callable[[], nn.Module]
Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """A small network: stem, the convolution that is measured, a tail that does not mix channels, pooling and head."""

    def __init__(
        self,
        dims: int = 2,
        act: str = "ReLU",
        head: str = "linear",
        classes: int = CLASSES,
        filters: int = 4,
        groups: int = 1,
        kernel: int = 3,
        norm: bool = False,
        dropout: float = 0.0,
        concat: int = 0,
        residual: bool = False,
        **options: Any,
    ):
        super().__init__()
        conv, inputs = getattr(nn, f"Conv{dims}d"), 4 if groups > 1 else 3
        filters = classes if head == "pooled" else filters
        self.residual, self.space = residual, tuple(range(2, dims + 2))
        self.stem = conv(CHANNELS, inputs, 2)
        self.side = conv(inputs, concat, 1) if concat else None
        self.conv = conv(inputs, filters, kernel, groups=groups, **options)
        width = filters + concat
        self.norm = getattr(nn, f"BatchNorm{dims}d")(width) if norm else nn.Identity()
        self.act, self.dropout = getattr(nn, act)(), nn.Dropout(dropout)
        pool = getattr(nn, f"AdaptiveAvgPool{dims}d")(1)
        self.head = nn.Sequential(
            *{
                "linear": [pool, nn.Flatten(), nn.Linear(width, classes)],
                "conv": [pool, conv(width, classes, 1), nn.Flatten()],
                "conv, then pool": [conv(width, classes, 1), pool, nn.Flatten()],
                "pooled": [pool, nn.Flatten()],
            }[head]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        side = None if self.side is None else self.side(x).mean(self.space, keepdim=True)
        z = self.conv(x)
        if self.residual:
            z = z + x.mean((1, *self.space), keepdim=True)
        if side is not None:
            z = torch.cat([side.expand(*side.shape[:2], *z.shape[2:]), z], 1)
        return self.head(self.dropout(self.act(self.norm(z))))


class Blocks(nn.Module):
    """A small DenseNet; with ``add``, a small ResNet."""

    def __init__(self, act: str = "ReLU", add: bool = False):
        super().__init__()
        widths = [4] * 4 if add else [4, 7, 10, 13]
        self.add, self.act = add, getattr(nn, act)()
        self.stem = nn.Conv2d(CHANNELS, 4, 3)
        self.convs = nn.ModuleList(nn.Conv2d(width, 4 if add else 3, 3, padding=1) for width in widths[:3])
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.fc = nn.Linear(widths[3], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            new = conv(self.act(norm(x)))
            x = x + new if self.add else torch.cat([x, new], 1)
        return self.fc(self.act(self.norms[3](x)).mean((2, 3)))


class Odd(Net):
    """A network with an unusual tail (``TAILS``) behind a grouped convolution."""

    def __init__(self, tail: str):
        super().__init__(filters=4, groups=2, padding=1)
        self.tail, self.qkv = tail, nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(TAILS[self.tail](self, x, self.conv(x)).relu())

    def attend(self, z: Tensor) -> Tensor:
        q, k, v = self.qkv(z.flatten(2).mT).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, z.shape[2:])


TAILS: dict[str, Callable[[Odd, Tensor, Tensor], Tensor]] = {
    "runs twice": lambda net, x, z: net.conv(z.relu()),
    "gate": lambda net, x, z: z * x.sigmoid(),
    "squeeze-excitation": lambda net, x, z: z * z.mean((2, 3), keepdim=True).sigmoid(),
    "attention": lambda net, x, z: net.attend(z),
    "random": lambda net, x, z: F.dropout(z, training=True),
    "mixing": lambda net, x, z: z - z.mean(0),
}


def vgg(act: str = "ReLU") -> nn.Module:
    features = [nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.BatchNorm2d(4), getattr(nn, act)(), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*features, nn.Conv2d(4, 5, 2), nn.ReLU(), *classifier)


def tokens(act: str = "ReLU", norm: bool = False) -> nn.Module:
    """Return a network of linear layers, whose tokens are the lines of an image."""
    layers = [nn.Linear(SIZE[2], 6), getattr(nn, act)(), nn.LayerNorm(6) if norm else nn.Identity()]
    pool = [nn.ReLU(), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten()]
    return nn.Sequential(nn.Flatten(1, 2), *layers, nn.Linear(6, 4), *pool, nn.Linear(4, CLASSES))


def many_classes(confidence: float, act: str = "ReLU", classes: int = 150) -> nn.Module:
    """Return a network with many classes, whose logits are scaled by ``confidence``.

    If the network is sure of its classes, the closed form leaves out classes. If it is unsure, Gauss-Newton samples
    classes.
    """
    model = Net(act=act, classes=classes, filters=6)
    model.head[2].weight.data.mul_(confidence)
    return model


def effective_kernel() -> nn.Module:
    model = Net(act="SiLU")
    nn.utils.parametrizations.weight_norm(model.conv)
    return model


def broken() -> nn.Module:
    model = Net()
    model.conv.bias.data[0] = torch.nan
    return model


def made(network: Network, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a network in evaluation mode, with random running statistics of BatchNorm as after training."""
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # initial weights in float64 differ little between processors
    model = network()
    torch.set_default_dtype(kept)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def images(
    *sizes: int, dims: int = 2, classes: int = CLASSES, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Batches:
    """Return random batches of the given sizes, or one batch of five images if no size is given."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes or (5,):
        x = torch.randn(size, CHANNELS, *[SIZE[dims]] * dims, generator=generator, dtype=torch.float64)
        found.append((x.to(dtype), torch.randint(classes, (size,), generator=generator)))
    return found


RANDOM = {
    "dims": [1, 2, 2, 3],
    "act": ["ReLU", "LeakyReLU", "SiLU", "GELU", "Tanh", "ELU", "Softplus", "Hardswish"],
    "groups": [1, 1, 2, 4],
    "kernel": [1, 2, 3],
    "stride": [1, 2],
    "padding": [0, 1, 2],
    "dilation": [1, 1, 2],
    "padding_mode": ["zeros", "reflect", "replicate", "circular"],
    "bias": [False, True],
    "norm": [False, True],
    "concat": [0, 2],
    "residual": [False, True],
    "sizes": [(5,), (4, 1, 3), (2, 2)],
}


def drawn(seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Draw options of a random :class:`Net`, and sizes of batches for it."""
    choice = random.Random(seed).choice
    found = {name: choice(values) for name, values in RANDOM.items()}
    found["dilation"] = found["dilation"] if found["dims"] < 3 else 1  # a dilated kernel may not fit into a 3d image
    return found, found.pop("sizes")


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the focal loss of every sample, as an example of a user's own loss."""
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (1 - (-loss).exp()) ** 2 * loss
