"""Networks whose forward passes can or cannot be observed: one for each way in which gradients in it would show."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.callbacks.keeping_networks import *  # noqa: F403
from tests.callbacks.lightning_modules import CLASSES
from tests.callbacks.plain_network import KEPT, Plain, batch  # noqa: F401


class Gate(Plain):
    def tail(self, z, upstream):
        return z * torch.sigmoid(upstream)


class Mask(Plain):
    def tail(self, z, upstream):
        return F.silu(z) * (upstream > 0).to(z)


class Residual(Plain):
    def tail(self, z, upstream):
        return F.relu(z + upstream)


class InPlaceActivation(Plain):
    def tail(self, z, upstream):
        return F.relu_(self.norm(z))


class InPlaceResidual(Plain):
    def tail(self, z, upstream):
        z += upstream
        return F.relu(z)


class InPlaceUpstream(Plain):
    """Writes to a tensor of before the layer, that the layer does not read."""

    def forward(self, x):
        upstream = self.before(x)
        shortcut = upstream.clone()
        shortcut += self.conv(upstream)
        return self.head(F.relu(shortcut))


class Out(Plain):
    def tail(self, z, upstream):
        return torch.sigmoid(z, out=torch.empty_like(z))


class Numpy(Plain):
    def tail(self, z, upstream):
        self.largest = float(z.numpy().max())
        return F.silu(z)


class NumpyUpstream(Plain):
    def tail(self, z, upstream):
        return F.silu(z) * float(upstream.numpy().max())


class LooksAtKernels(Plain):
    """At what a kernel is, as an average of weights may, and at no value of it."""

    def before(self, x):
        kernel = self.conv.weight
        if type(kernel) not in (nn.Parameter, torch.Tensor):
            raise TypeError(type(kernel))
        nn.Parameter(kernel)
        x = x.type_as(kernel).to(kernel) + kernel.new_zeros(1) + torch.zeros_like(kernel).sum()
        return super().before(x)


class FreezesKernels(Plain):
    def before(self, x):
        self.conv.requires_grad_(False)
        self.conv.weight.requires_grad = False
        return super().before(x)


class CopiesKernels(Plain):
    """In which a parameter goes another way than a tensor."""

    def before(self, x):
        copy.deepcopy(self.conv)
        return super().before(x)


class NumpyAside(Plain):
    """A look at the features that autograd refuses, though not where the network is measured on copies."""

    def tail(self, z, upstream):
        if z.is_inference():
            self.largest = float(z.numpy().max())
        elif torch.is_inference(upstream):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return F.silu(z)


class Swish(nn.Module):
    def forward(self, z):
        return z * torch.sigmoid(z)


class ScriptedTail(Plain):
    def __init__(self):
        super().__init__()
        self.activation = torch.jit.script(Swish())

    def tail(self, z, upstream):
        return self.activation(z)


class Checkpointed(Plain):
    def tail(self, z, upstream):
        return checkpoint(F.silu, z, use_reentrant=False)


class NoGradTail(Plain):
    def tail(self, z, upstream):
        with torch.no_grad():
            return F.silu(z)


class NoGradLayer(Plain):
    def forward(self, x):
        with torch.no_grad():
            z = self.conv(self.before(x))
        return self.head(F.silu(z))


class InferenceLayer(Plain):
    """In a Trainer that is not in inference mode, this enters and leaves it around the layer."""

    def forward(self, x):
        with torch.inference_mode():
            z = self.conv(self.before(x))
        return self.head(F.silu(z.clone()))


class NoGradUpstream(Plain):
    def before(self, x):
        with torch.no_grad():
            return torch.tanh(self.stem(x))


class Embeddings(Plain):
    def forward(self, x):
        upstream = self.before(x)
        embedding = self.tail(self.conv(upstream), upstream).mean((2, 3))
        return {"logits": self.fc(embedding), "embedding": embedding}


class Branches(Plain):
    """Takes another way for some batches."""

    def tail(self, z, upstream):
        return F.silu(z) if float(z.detach().mean()) > 0 else F.relu(z)


class AsksForGradients(Plain):
    def tail(self, z, upstream):
        return F.silu(z) if torch.is_grad_enabled() else F.silu(z) + 1e-14


class CallsTwice(Plain):
    def forward(self, x):
        return 0.5 * (super().forward(x) + super().forward(x.flip(3)))


class WithoutClassifier(Plain):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, CLASSES, 3, dtype=torch.float64)

    def tail(self, z, upstream):
        return F.silu(z)

    def head(self, z):
        return z.mean((2, 3))


class ConvolutionalClassifier(Plain):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc = nn.Conv2d(4, CLASSES, 1, dtype=torch.float64)

    def head(self, z):
        return self.fc(z.mean((2, 3), keepdim=True)).flatten(1)


class TwoLayers(Plain):
    """Two convolutions side by side, both under the closed form."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.side = nn.Conv2d(4, 4, 1, dtype=torch.float64)

    def forward(self, x):
        upstream = self.before(x)
        return self.head(F.silu(self.conv(upstream)) + F.relu(self.side(upstream)))


class Dropouts(Plain):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def tail(self, z, upstream):
        return self.dropout(F.silu(z))


class Bomb(Plain):
    """Raises an error where and when it is told to."""

    where = None
    error = ValueError
    num_raised = 0

    def forward(self, x):
        upstream = self.before(x)
        self.explode("before the layer")
        z = F.silu(self.conv(upstream))
        self.explode("in the tail")
        logits = self.head(z)
        self.explode("after the classifier")
        return logits

    def explode(self, where):
        if self.where == where:
            self.num_raised += 1
            raise self.error("bang")


class GateFromBefore(Plain):
    def before(self, x):
        return torch.sigmoid(super().before(x))

    def tail(self, z, upstream):
        return z * upstream


class EmbeddingsAfter(Plain):
    """Embeddings that are made when the classifier has run."""

    def forward(self, x):
        upstream = self.before(x)
        z = self.tail(self.conv(upstream), upstream)
        return {"logits": self.head(z), "embedding": z.mean((2, 3))}


class Moody(Plain):
    """Looks at its features with numpy when it is told to."""

    moody = False

    def tail(self, z, upstream):
        if self.moody:
            self.largest = float(z.numpy().max())
        return super().tail(z, upstream)


class TwoInTurn(Plain):
    """Two convolutions, one after the other, both under the closed form."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.side = nn.Conv2d(4, 4, 3, groups=4, dtype=torch.float64)

    def tail(self, z, upstream):
        return F.relu(self.side(F.relu(z)))


class KeepsEmbeddings(Plain):
    """A hook of the user's takes the classifier's input, which is in no graph any more."""

    def __init__(self):
        super().__init__()
        self.fc.register_forward_pre_hook(lambda module, arguments: KEPT.__setitem__(slice(None), [arguments[0]]))


class ChangesEmbeddings(Plain):
    """A hook of the user's changes the classifier's input."""

    def __init__(self):
        super().__init__()
        self.fc.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
