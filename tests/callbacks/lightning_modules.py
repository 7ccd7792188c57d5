"""A tiny classifier, its data and a quiet Trainer."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3


class Net(nn.Module):
    """Two convolutions, BatchNorm, dropout, global average pooling, a linear classifier; always the same weights."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
            self.norm1 = nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
            self.norm2 = nn.BatchNorm2d(5)
            self.dropout = nn.Dropout(0.2)
            self.fc = nn.Linear(5, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.silu(self.norm2(self.conv2(x)))
        return self.fc(self.dropout(x).mean((2, 3)))


class TwoLayerNet(Net):
    """Two measurable layers: an ordinary convolution and a depthwise one."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.depthwise = nn.Conv2d(5, 5, 3, groups=5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(F.relu(self.depthwise(x)).mean((2, 3)))


class MixingNet(Net):
    """No closed form: GroupNorm mixes the channels."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.GroupNorm(1, 5)


class Classifier(L.LightningModule):
    def __init__(self, net=None, lr=0.02):
        super().__init__()
        self.net = Net() if net is None else net
        self.lr = lr
        self.training_steps = 0

    def forward(self, x):
        return self.net(x)

    def split(self, batch):
        return batch

    def training_step(self, batch, batch_idx):
        self.training_steps += 1
        x, y = self.split(batch)
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = self.split(batch)
        self.log("val_acc", (self.net(x).argmax(1) == y).double().mean(), batch_size=len(y))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.validation_step(batch, batch_idx, dataloader_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class WithoutForward(Classifier):
    forward = L.LightningModule.forward


class WithoutValidation(Classifier):
    validation_step = L.LightningModule.validation_step


class WithData(Classifier):
    """Has its loaders, and an argument for the command line."""

    def __init__(self, lr: float = 0.02):
        super().__init__(lr=lr)

    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


class Interrupted(Classifier):
    """Ctrl-C in the first step of an epoch."""

    def __init__(self, epoch=2):
        super().__init__()
        self.epoch = epoch

    def training_step(self, batch, batch_idx):
        if self.current_epoch == self.epoch:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


class FailingNet(nn.Module):
    """Validation succeeds; the callback's own forward, the only one with gradients in evaluation mode, fails."""

    def __init__(self, net, epochs, error):
        super().__init__()
        self.net, self.epochs, self.error, self.epoch = net, epochs, error, 0

    def forward(self, x):
        if torch.is_grad_enabled() and not self.training and self.epoch in self.epochs:
            raise self.error
        return self.net(x)


class FailingWhenMeasured(Classifier):
    """Its measurement fails in some epochs."""

    def __init__(self, epochs=(), error=None, lr=0.02):
        super().__init__(lr=lr)
        self.net = FailingNet(self.net, epochs, error or RuntimeError("something of the model's own"))

    def training_step(self, batch, batch_idx):
        self.net.epoch = self.current_epoch
        return super().training_step(batch, batch_idx)


class Scripted(L.LightningModule):
    """Logs given values, the same in whatever order or part the epochs are run; better ones in the sanity check."""

    def __init__(self, values):
        super().__init__()
        self.values = values
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].sum()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        for key, values in self.values.items():
            self.log(key, -1e9 if self.trainer.sanity_checking else values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def dataset(samples=32, seed=0, dtype=torch.float32):
    """Images with a class-dependent pattern under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    images = patterns[labels] + torch.randn(samples, 1, 8, 8, generator=generator)
    return TensorDataset(images.to(dtype), labels)


def loaders(train_samples=32, val_samples=22, dtype=torch.float32):
    """A shuffled training loader and a validation loader with a smaller last batch."""
    return (
        DataLoader(dataset(train_samples, 0, dtype), batch_size=8, shuffle=True),
        DataLoader(dataset(val_samples, 1, dtype), batch_size=8),
    )


def quiet_trainer(folder, *callbacks, figures=False, **options):
    """A Trainer that prints and writes little: without a logger nothing is drawn unless ``figures`` are wanted."""
    if not figures and not options.get("logger"):
        for callback in callbacks:
            if hasattr(callback, "figures"):
                callback.figures = False
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "log_every_n_steps": 1,
    }
    if not options.get("barebones"):
        defaults |= {"enable_progress_bar": False, "enable_model_summary": False}
    else:
        defaults = {"max_epochs": 2}
    defaults["devices"] = 1
    return L.Trainer(default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **(defaults | options))
