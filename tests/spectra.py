"""Slow, obvious oracles of spectra: dense matrices by autograd, and Ritz decompositions of dense matrices."""

import copy

import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from tests.networks import randomise_statistics


def flat_function(model, names=None):
    """The model as a function of a flat vector of some parameters, and that vector."""
    model = copy.deepcopy(model).eval()
    parameters = {k: p.detach() for k, p in model.named_parameters() if names is None or k in names}
    sizes = [p.numel() for p in parameters.values()]
    vector = torch.cat([p.flatten() for p in parameters.values()])

    def call(flat, x):
        pieces = flat.split(sizes)
        own = {k: piece.reshape(p.shape) for (k, p), piece in zip(parameters.items(), pieces, strict=True)}
        return functional_call(model, own, (x,))

    return call, vector


def dense_hessian(model, x, y, loss=cross_entropy, names=None):
    """The Hessian of the mean loss, row by row by double backward."""
    call, vector = flat_function(model, names)
    vector.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(call(vector, x), y), vector, create_graph=True)
    rows = [torch.autograd.grad(g, vector, retain_graph=True, allow_unused=True)[0] for g in gradient]
    return torch.stack([torch.zeros_like(vector) if row is None else row for row in rows]).detach()


def dense_gauss_newton(model, x, y, loss=cross_entropy, names=None):
    """``mean_n Jᵀ Λ J``, with dense Jacobians and the Hessian of every sample's loss."""
    call, vector = flat_function(model, names)
    total = torch.zeros(len(vector), len(vector), dtype=vector.dtype)
    for one, target in zip(x, y, strict=True):

        def logits(flat, one=one):
            return call(flat, one[None])[0]

        jacobian = jacrev(logits)(vector)

        def of_logits(f, target=target):
            return loss(f[None], target[None])

        curvature = torch.func.hessian(of_logits)(logits(vector))
        total += jacobian.T @ curvature @ jacobian
    return total / len(x)


def dense_ritz(matrix, probe, num_steps):
    """Ritz values and weights of a probe from the projection to an explicitly orthonormalised Krylov space."""
    columns = [probe / probe.norm()]
    for _ in range(num_steps - 1):
        image = matrix @ columns[-1]
        for _ in range(3):
            for column in columns:
                image = image - (column @ image) * column
        columns.append(image / image.norm())
    space = torch.stack(columns, 1)
    values, vectors = torch.linalg.eigh(space.T @ matrix @ space)
    return values, vectors[0] ** 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(spectrum, seed=0):
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    size = len(spectrum)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64))
    return rotation @ torch.diag(spectrum) @ rotation.T


def wasserstein(values, weights, others):
    """The 1-Wasserstein distance of a weighted spectrum from equally weighted eigenvalues."""
    weights = weights / weights.sum()
    points = torch.cat([values, others])
    masses = torch.cat([weights, torch.full_like(others, -1 / len(others))])
    points, order = points.sort()
    return float((masses[order].cumsum(0)[:-1].abs() * points.diff()).sum())


class ConvNet(nn.Module):
    """A small network with BatchNorm and a curved activation."""

    def __init__(self, width=6, classes=4, activation=nn.SiLU):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3)
        self.activation = activation()
        self.head = nn.Linear(2 * width, classes)
        randomise_statistics(self)

    def forward(self, x):
        x = self.activation(self.norm(self.conv1(x)))
        return self.head(self.activation(self.conv2(x)).mean((2, 3)))


def data(samples=10, size=6, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (samples,), generator=generator)


class Quadratic(nn.Module):
    """A model whose loss ``mse`` has the Hessian ``diag(spectrum)`` in its one parameter, signs included."""

    def __init__(self, spectrum):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(spectrum), dtype=torch.float64))
        self.register_buffer("spectrum", torch.as_tensor(spectrum, dtype=torch.float64))

    def forward(self, x):
        value = 0.5 * (self.spectrum * self.weight**2).sum()
        return value.expand(len(x), 1)


def own_value(logits, targets):
    """A loss of every sample that is what the model returns."""
    return logits[:, 0]


def convolutional(width=6):
    torch.manual_seed(0)
    return ConvNet(width).double(), *data(24)


def perceptron():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    return net.double(), *data(30)


def split(x, y, *sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def quick(net, batches, **options):
    return lf.hessian_spectrum(net, batches, **({"num_steps": 5, "num_probes": 2, "top_k": 1} | options))


NETS = {"convolutions and norm": convolutional, "perceptron": perceptron, "wide": lambda: convolutional(9)}
# Eigenvalues spread as those of a network.
SPREAD = torch.cat([torch.logspace(-8, 2, 150).double(), -torch.logspace(-6, 0, 50).double()])
