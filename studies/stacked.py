"""Train many networks of one architecture at once, with stacked parameters and stacked optimizer states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors, Tensors, Tensor, Tensor], Tensor]  # (parameters, buffers, inputs, targets) -> loss
MOMENTUM, RADIUS = 0.9, 0.05


class Stack:
    """``M`` networks of one architecture, whose parameters and buffers have a first dimension ``M``."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.params, self.buffers = stack_module_state(list(models))
        self.params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        self.buffers = {name: b.detach().clone() for name, b in self.buffers.items()}
        self.skeleton = copy.deepcopy(models[0]).to("meta")

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def losses(self, inputs: Tensor, targets: Tensor, keep_buffers: bool = False) -> Tensor:
        """Return the losses ``(M,)`` in training mode; every network has its own batch of ``B`` samples.

        The inputs are ``(M, B, ...)`` and the targets ``(M, B)``. With ``keep_buffers``, the running statistics of
        BatchNorm do not change.
        """
        self.skeleton.train()
        buffers = {name: b.clone() for name, b in self.buffers.items()} if keep_buffers else self.buffers

        def loss(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(self.skeleton, (params, buffers), (x,)), y)

        return self._of_each(loss, buffers, inputs, targets)

    def gradients(self, inputs: Tensor, targets: Tensor, keep_buffers: bool = False) -> Tensors:
        """Return the gradients of the losses, each with a first dimension ``M``."""
        total = self.losses(inputs, targets, keep_buffers).sum()  # no network's loss depends on another's weights
        return dict(zip(self.params, torch.autograd.grad(total, list(self.params.values())), strict=True))

    @torch.no_grad()
    def mean_losses(self, inputs: Tensor, targets: Tensor, chunk: int = 500) -> Tensor:
        """Return the mean losses ``(M,)`` in evaluation mode.

        All networks have the same inputs ``(N, ...)``, but every network has its own targets, ``(M, N)`` together.
        """
        self.skeleton.eval()

        def loss(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(self.skeleton, (params, buffers), (x,)), y, reduction="sum")

        parts = zip(inputs.split(chunk), targets.split(chunk, dim=1), strict=True)
        sums = [self._of_each(loss, self.buffers, x, y, shared=True) for x, y in parts]
        return torch.stack(sums).sum(0) / len(inputs)

    def _of_each(self, loss: Loss, buffers: Tensors, inputs: Tensor, targets: Tensor, shared: bool = False) -> Tensor:
        """Return ``loss`` of every network ``(M,)``; with ``shared``, all networks have the same inputs.

        A single network runs without ``vmap``, because that is faster.
        """
        if len(self) > 1:
            dims = (0, 0, None if shared else 0, 0)
            return vmap(loss, dims, randomness="different")(self.params, buffers, inputs, targets)
        params, buffers = ({name: t[0] for name, t in tensors.items()} for tensors in (self.params, buffers))
        images = inputs if shared else inputs[0]
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return loss(params, buffers, images, targets[0])[None]

    def state_of(self, index: int) -> Tensors:
        """Return a copy of the parameters and buffers of one network, on the CPU."""
        return {name: t[index].detach().cpu().clone() for name, t in (self.params | self.buffers).items()}


class Optimizer:
    """SGD with momentum, SAM or Adam for a stack of networks.

    The learning rates and weight decays are ``(M,)``, one for each network. The steps of SGD and Adam agree with
    ``torch.optim``.
    """

    def __init__(self, kind: str, stack: Stack, rates: Tensor, decays: Tensor) -> None:
        self.kind, self.rates, self.decays, self.steps = kind, rates, decays, 0
        count = {"sgd": 1, "sam": 1, "adam": 2}[kind]
        self.moments = [{name: torch.zeros_like(p) for name, p in stack.params.items()} for _ in range(count)]

    def step(self, stack: Stack, inputs: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        """Make one step; ``scale`` multiplies the learning rates."""
        gradients = stack.gradients(inputs, targets)
        if self.kind == "sam":
            gradients = self._at_the_worst_point(stack, gradients, inputs, targets)
        self.steps += 1
        with torch.no_grad():
            for name, p in stack.params.items():
                rate, decay = (shaped(values, p) for values in (scale * self.rates, self.decays))
                gradient = gradients[name] + decay * p
                if self.kind == "adam":
                    p.sub_(rate * self._adam(name, gradient))
                else:
                    p.sub_(rate * self.moments[0][name].mul_(MOMENTUM).add_(gradient))

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        first, second = (moments[name] for moments in self.moments)
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).add_(gradient.square(), alpha=0.001)
        root = (second / (1 - 0.999**self.steps)).sqrt().add_(1e-8)
        return first / (1 - 0.9**self.steps) / root

    def _at_the_worst_point(self, stack: Stack, gradients: Tensors, inputs: Tensor, targets: Tensor) -> Tensors:
        """Return the gradients of SAM (Foret et al. 2021), at the weights moved by ``RADIUS`` along the gradient."""
        squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
        factor = RADIUS / (squares.sqrt() + 1e-12)
        uphill = {name: shaped(factor, g) * g for name, g in gradients.items()}
        moved(stack.params, uphill, 1)
        found = stack.gradients(inputs, targets, keep_buffers=True)
        moved(stack.params, uphill, -1)
        return found


@torch.no_grad()
def moved(params: Tensors, by: Tensors, sign: int) -> None:
    for name, p in params.items():
        p.add_(by[name], alpha=sign)


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values ``(M,)`` so that they broadcast with a tensor ``(M, ...)``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
