"""Baselines: numbers that measures of flatness are compared with.

Some baselines were proposed in papers, others are cheap, such as the norm of the weights. Margins and feature spreads
come from the package; all other baselines are computed here, in plain PyTorch. Like the package's measures, they are
computed for a network in evaluation mode on a batch of its training samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.functional import cross_entropy, one_hot

from lightning_flatness.functional.baselines import feature_spreads, margins

Tensors = dict[str, Tensor]
RADIUS, ADAPTIVE_RADIUS = 0.05, 0.5  # radii of SAM and ASAM, as in their papers
SIGMA, RELATIVE_SIGMA, DRAWS = 0.01, 0.05, 10  # for random perturbations
DAMPING = 0.01  # for the Takeuchi criterion, relative to the mean eigenvalue of the Hessian


def baselines(
    model: nn.Module, classifier: nn.Linear, initial: Tensors, inputs: Tensor, targets: Tensor, seed: int
) -> dict[str, float]:
    """Return all baselines of a network; ``initial`` holds the parameters that it had before training."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    heard: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda module, arguments: heard.append(arguments[0]))
    try:
        with torch.no_grad():
            logits = model(inputs)
    finally:
        handle.remove()
    features, weight = heard[0], classifier.weight.detach()
    margin = margins(logits, targets)
    return {
        "weight_norm": norm(params),
        "weight_norm.last": float(weight_of_last(model).norm()),
        "weight_norm.classifier": float(weight.norm()),
        "distance": norm({name: p - initial[name] for name, p in params.items()}),
        "margin": float(margin.mean()),
        "margin_tenth": float(torch.quantile(margin, 0.1)),
        "normalised_margin": float(torch.quantile(margin, 0.1)) / norm(params),
        "feature_spread": float(feature_spreads(features, weight).mean()),
        "fisher_rao": fisher_rao(model, params, inputs, targets),
        **takeuchi(features, logits, targets),
        **perturbed(model, params, inputs, targets, seed),
    }


def norm(tensors: Tensors) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors.values()) ** 0.5)


def weight_of_last(model: nn.Module) -> Tensor:
    """Return the kernel of the last convolution in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1].weight.detach()


def fisher_rao(model: nn.Module, params: Tensors, inputs: Tensor, targets: Tensor) -> float:
    """Return ``E (θ · ∇_θ loss)²``, the Fisher-Rao norm of Liang et al. 2019.

    ``θ`` are the parameters, and the mean is over samples, with the labels of the data.
    """

    def losses(p: Tensors) -> Tensor:
        return cross_entropy(functional_call(model, p, (inputs,)), targets, reduction="none")

    return float(jvp(losses, (params,), (params,))[1].double().square().mean())


def takeuchi(features: Tensor, logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return Takeuchi's criterion of the classifier, ``Tr(H⁻¹ C)``, and ``Tr(C) / Tr(H)`` (Thomas et al. 2020).

    ``H`` is the Hessian of the mean loss with respect to the classifier's weight and bias. ``C`` is the mean outer
    product of per-sample gradients. ``H`` is damped in the criterion because it is nearly singular.
    """
    ones = torch.ones_like(features[:, :1])
    g, p = torch.cat([features, ones], dim=1).double(), logits.double().softmax(1)
    r = p - one_hot(targets, p.shape[1])
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    count, size = len(g), g.shape[1] * p.shape[1]
    h = torch.einsum("nkl,ni,nj->kilj", curvature, g, g).reshape(size, size) / count
    gradients = (r[:, :, None] * g[:, None, :]).reshape(count, size)
    c = gradients.mT @ gradients / count
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(size, dtype=h.dtype, device=h.device)
    criterion = torch.linalg.solve(damped, c).diagonal().sum()
    return {"takeuchi": float(criterion), "takeuchi_ratio": float(c.diagonal().sum() / h.diagonal().sum())}


def perturbed(model: nn.Module, params: Tensors, inputs: Tensor, targets: Tensor, seed: int) -> dict[str, float]:
    """Return by how much the loss rises when the weights are perturbed: by SAM, by ASAM, and at random.

    For random perturbations, the result is the mean over ``DRAWS`` draws.
    """

    def loss(p: Tensors) -> Tensor:
        return cross_entropy(functional_call(model, p, (inputs,)), targets)

    def rise(at: Callable[[str, Tensor], Tensor]) -> float:
        with torch.no_grad():
            return float(loss({name: p + at(name, p) for name, p in params.items()})) - here

    with torch.no_grad():
        here = float(loss(params))
    slope = grad(loss)(params)
    length = norm(slope) + 1e-12
    scaled = {name: p.abs() * slope[name] for name, p in params.items()}
    adaptive = norm(scaled) + 1e-12
    generator = torch.Generator().manual_seed(seed)

    def noise(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)

    return {
        "sam": rise(lambda name, p: RADIUS / length * slope[name]),
        "asam": rise(lambda name, p: ADAPTIVE_RADIUS / adaptive * p.abs() * scaled[name]),
        "random": sum(rise(lambda name, p: SIGMA * noise(p)) for _ in range(DRAWS)) / DRAWS,
        "random_relative": sum(rise(lambda name, p: RELATIVE_SIGMA * p.abs() * noise(p)) for _ in range(DRAWS)) / DRAWS,
    }
