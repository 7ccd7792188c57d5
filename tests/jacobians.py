"""Gauss-Newton block traces by brute force: the Jacobian of every sample's logits with respect to the kernel."""

import torch
from torch.func import functional_call, jacrev


def jacobian_block_traces(net, x, layer):
    weight = net.get_submodule(layer).weight.detach()
    total = 0
    for sample in x:
        logits = net(sample[None])[0].detach()
        jacobian = jacrev(lambda w, s=sample: functional_call(net, {f"{layer}.weight": w}, (s[None],))[0])(weight)
        pi = logits.softmax(0)
        curvature = torch.diag(pi) - torch.outer(pi, pi)
        total = total + torch.einsum("kl,ksd,ltd->st", curvature, jacobian.flatten(2), jacobian.flatten(2)) / len(x)
    return total
