"""Distort images: move, rotate, rescale, blur and dim them, add noise.

Images are normalised, so black pixels are not zero. ``black``, ``(1, C, 1, 1)``, holds their value in every channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

Distortion = Callable[[Tensor, Tensor], Tensor]  # of images (N, C, H, W) and black


def moved(images: Tensor, black: Tensor, down: int, right: int = 0) -> Tensor:
    """Move the content of images; the border that becomes free is black."""
    height, width = images.shape[2:]
    reach = max(down, right)
    return padded(images, black, reach)[:, :, reach - down :, reach - right :][:, :, :height, :width]


def rotated(images: Tensor, black: Tensor, degrees: float) -> Tensor:
    """Rotate images about their centre."""
    angle = torch.tensor(math.radians(degrees))
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return warped(images, turn, black)


def small(images: Tensor, black: Tensor, factor: float) -> Tensor:
    """Scale images down by ``factor``, in the middle of a black canvas of the old size."""
    return warped(images, factor * torch.eye(2), black)


def coarse(images: Tensor, black: Tensor, factor: int) -> Tensor:
    """Reduce the resolution by ``factor``, and enlarge the images again: every pixel becomes a square."""
    return interpolate(avg_pool2d(images, factor), scale_factor=factor, mode="nearest")


def blurred(images: Tensor, black: Tensor) -> Tensor:
    """Replace every pixel by the mean of the 3 x 3 pixels around it."""
    return avg_pool2d(padded(images, black, 1), 3, 1)


def noisy(images: Tensor, black: Tensor, strength: float, seed: int = 0) -> Tensor:
    """Add normal noise; its standard deviation is ``strength`` times that of all pixels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return images + strength * images.std() * noise.to(images.device)


def dimmed(images: Tensor, black: Tensor, share: float) -> Tensor:
    """Keep a share of the brightness; the rest is black."""
    return black + share * (images - black)


def faded(images: Tensor, black: Tensor, share: float) -> Tensor:
    """Keep a share of the contrast: every pixel moves towards the mean colour of its image."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + share * (images - mean)


DIGITS: dict[str, Distortion] = {
    "moved": partial(moved, down=1),
    "rotated": partial(rotated, degrees=20),
    "small": partial(small, factor=1.3),
    "blurred": blurred,
    "noisy": partial(noisy, strength=0.625),
    "faint": partial(dimmed, share=0.6),
}
# Strengths are those for the digits; images are moved by an eighth of their height, as the digits are. Photos have no
# black background, so they are made faint by less contrast instead of less brightness.
CIFAR: dict[str, Distortion] = DIGITS | {
    "moved": partial(moved, down=4),
    "faint": partial(faded, share=0.6),
    "coarse": partial(coarse, factor=2),
}


def padded(images: Tensor, black: Tensor, width: int) -> Tensor:
    """Return images with a black frame of this width."""
    count, channels, rows, columns = images.shape
    frame = black.expand(count, channels, rows + 2 * width, columns + 2 * width).clone()
    frame[:, :, width : width + rows, width : width + columns] = images
    return frame


def warped(images: Tensor, matrix: Tensor, outside: Tensor) -> Tensor:
    """Transform the coordinates of images by a matrix ``(2, 2)``; pixels outside an image are set to ``outside``."""
    size = images.shape[-1]
    line = (torch.arange(size) * 2 + 1) / size - 1
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1) @ matrix.T
    grid = points.to(images).expand(len(images), *points.shape)
    return grid_sample(images - outside, grid, align_corners=False) + outside
