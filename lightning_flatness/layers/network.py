"""Count the layers and the BatchNorms of a network, for comparisons of networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_flatness.layers.tracing import LAYERS

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def make_of(network: nn.Module) -> dict[str, Any]:
    """Count the convolutions and linear layers (``depth``), the BatchNorms, and the BatchNorms that were never updated.

    A BatchNorm counts as never updated (``fresh_batch_norms``) if its running mean is 0 and its running variance 1
    everywhere. The CPU waits for the device only once.

    Example:
        >>> make_of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        {'depth': 1, 'batch_norms': 1, 'fresh_batch_norms': 1}
    """
    modules = list(network.modules())
    norms = [module for module in modules if isinstance(module, BATCH_NORMS)]
    moved = [
        (norm.running_mean != 0).any() | (norm.running_var != 1).any()
        for norm in norms
        if norm.running_mean is not None and norm.running_var is not None
    ]
    return {
        "depth": sum(isinstance(module, LAYERS) for module in modules),
        "batch_norms": len(norms),
        "fresh_batch_norms": int((~torch.stack([one.to(moved[0].device) for one in moved])).sum()) if moved else 0,
    }
