"""Modules whose validation steps call several networks, parts of one, or one that is no submodule."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.callbacks.lightning_modules import Classifier, Net


class Steps(Classifier):
    """Its steps call the network in another way, which subclasses define."""

    def logits(self, x):
        return self(x)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_acc", (self.logits(x).argmax(1) == y).double().mean(), batch_size=len(y))


class TwoNetworks(Steps):
    def __init__(self):
        super().__init__()
        self.teacher = Net()

    def logits(self, x):
        return self.net(x) + self.teacher(x)


class CallsItself(Steps):
    """Calls its network, and itself for probabilities."""

    def forward(self, x):
        return self.net(x).softmax(1)

    def logits(self, x):
        return self.net(x) + self(x)


class Averages(Steps):
    """Keeps an average of the network in a list, and so out of its parameters."""

    def __init__(self):
        super().__init__()
        self.averages = [Net()]

    def logits(self, x):
        return self.averages[0](x)


class HeadInTheStep(Steps):
    """The network's output is an embedding."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def logits(self, x):
        return self.head(self.net(x))


class TwoHeadsInTheStep(HeadInTheStep):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3, 3)])

    def logits(self, x):
        embedded = self.net(x)
        return self.head(embedded) + self.heads[0](embedded)


class LossWithWeights(HeadInTheStep):
    def logits(self, x):
        embedded = self.net(x)
        self.head(embedded)
        return embedded


class Crops(Steps):
    def logits(self, x):
        return self(x[..., 1:]) + self(x[..., :-1])


class PartsInTheStep(HeadInTheStep):
    """Between its parts the step does something of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 3, 3)

    def logits(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Features(nn.Module):
    """A network in two parts, as those of timm."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class PartsOfTheNetwork(Steps):
    def __init__(self):
        super().__init__(Features())

    def logits(self, x):
        return self.net.fc(self.net.body(x).mean((2, 3)))


class StagesOfTheNetwork(Steps):
    """Gives the output of one part to the next."""

    def __init__(self):
        super().__init__(Features())
        self.net.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))

    def logits(self, x):
        first, second = self.net.body
        return self.net.fc(second(first(x)).mean((2, 3)))


class Distils(TwoNetworks):
    def __init__(self):
        super().__init__()
        self.net, self.teacher = self.teacher, self.net
        self.net.requires_grad_(False)


class Probes(HeadInTheStep):
    """The head is trained on features that are a new tensor."""

    def logits(self, x):
        return self.head(self.net(x).detach().relu())


class Compares(Steps):
    """Has no network that returns the logits."""

    def __init__(self):
        super().__init__()
        self.texts = nn.Embedding(3, 3)

    def logits(self, x):
        return self(x) @ self.texts(torch.arange(3)).T


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, features, y):
        return F.cross_entropy(features @ self.weight, y)


class LossOfFeatures(Steps):
    def __init__(self):
        super().__init__()
        self.loss = Prototypes()

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", self.loss(self(batch[0]), batch[1]))


class LossOfLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, loss):
        return loss * (-self.scale).exp() + self.scale


class WeighsLosses(Steps):
    """Its loss has a weight that is trained."""

    def __init__(self):
        super().__init__()
        self.weighs = LossOfLosses()

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", self.weighs(F.cross_entropy(self(batch[0]), batch[1])).squeeze())
