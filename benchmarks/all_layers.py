"""What measuring all layers costs: time and peak memory beside BackPACK, bare backward passes and a training step.

    python benchmarks/all_layers.py [--samples 64] [--repeats 3]

A ResNet-20 for CIFAR, all convolutions and the classifier, trace and relative flatness. Times: every repeat runs all
tasks in turn, on the same batch and threads; medians are shown, and all raw times after the table. Memory: every task
runs in a process of its own, after a warm-up on one image; what is shown is the peak of the resident memory above what
was resident before the task. The kernel keeps that peak (VmHWM, set back before the task), so nothing falls between two
samples of it. On a GPU it is the peak of the memory that torch has allocated.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASKS = {
    "flatness": "lightning_flatness, all layers",
    "backpack": "BackPACK, DiagGGNExact",
    "backward": "K backward passes to activations",
    "training": "training step",
}
GOALS = {"backpack": (">= 7", ""), "backward": ("", ""), "training": ("", "")}


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


def resnet(depth: int = 20, classes: int = 10, widths: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """The ResNet for CIFAR of He et al. 2016, with 1x1 convolutions as shortcuts where the shape changes."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inputs = widths[0]
    for width in widths:
        for _ in range((depth - 2) // 6):
            layers.append(Residual(inputs, width, stride=1 if inputs == width else 2))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()
