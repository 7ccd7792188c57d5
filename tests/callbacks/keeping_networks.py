"""Networks that keep tensors of a forward pass, in every place where one can."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tests.callbacks.plain_network import KEPT, Plain


class KeepsAttribute(Plain):
    def tail(self, z, upstream):
        self.kept = F.silu(z)
        return self.kept


class KeepsInList(Plain):
    def __init__(self):
        super().__init__()
        self.kept = []

    def tail(self, z, upstream):
        self.kept.append(F.silu(z))
        return self.kept[-1]


class KeepsInDict(Plain):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def tail(self, z, upstream):
        self.kept["z"] = F.silu(z)
        return self.kept["z"]


class KeepsOutside(Plain):
    def tail(self, z, upstream):
        KEPT[:] = [F.silu(z)]
        return KEPT[0]


@dataclass
class Box:
    z: torch.Tensor | None = None


class KeepsInDataclass(Plain):
    def __init__(self):
        super().__init__()
        self.box = Box()

    def tail(self, z, upstream):
        self.box.z = F.silu(z)
        return self.box.z


class KeepsInHook(Plain):
    def __init__(self):
        super().__init__()
        self.norm.register_forward_hook(lambda module, arguments, output: KEPT.__setitem__(slice(None), [output]))


class WritesBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def tail(self, z, upstream):
        self.mean.mul_(0.9).add_(z.mean((0, 2, 3)))
        return F.silu(z)


class AssignsBuffer(WritesBuffer):
    def tail(self, z, upstream):
        self.mean = 0.9 * self.mean + z.mean((0, 2, 3))
        return F.silu(z)


class WritesAttribute(Plain):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(4, dtype=torch.float64)

    def tail(self, z, upstream):
        self.mean.add_(z.mean((0, 2, 3)))
        return F.silu(z)
