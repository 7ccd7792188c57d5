"""Draws of networks, batches, modules and options of the Trainer."""

import dataclasses
from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


def head(channels, classes):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.inner(x)


class Twice(nn.Module):
    """One convolution that runs two times."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(F.relu(self.conv(x))))


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


NETS = {
    "plain": lambda k: [conv(1, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), *head(5, k)],
    "batch norm": lambda k: [conv(1, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.BatchNorm2d(5), *head(5, k)],
    "group norm": lambda k: [conv(1, 4), nn.ReLU(), conv(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), *head(6, k)],
    "residual": lambda k: [conv(1, 4), nn.ReLU(), Residual(conv(4, 4), nn.ReLU(), conv(4, 4)), nn.ReLU(), *head(4, k)],
    "dropout": lambda k: [conv(1, 4), nn.Dropout(0.3), nn.ReLU(), conv(4, 5), nn.Dropout2d(0.3), *head(5, k)],
    "silu": lambda k: [conv(1, 4), nn.SiLU(), conv(4, 5), nn.SiLU(), *head(5, k)],
    "depthwise": lambda k: [conv(1, 4), nn.ReLU(), conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU(), *head(4, k)],
    "shared": lambda k: [conv(1, 4), nn.ReLU(), Twice(), *head(4, k)],
    "linear": lambda k: [nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, k)],
    "conv1d": lambda k: [nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                         nn.Linear(4, k)],
}  # fmt: skip
INEXACT = {"group norm", "silu", "linear", "shared"}  # may have layers whose number is not the Hessian's


class Net(nn.Module):
    def __init__(self, draw):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(*NETS[draw.net](draw.classes))
        self.output = draw.output
        if draw.frozen:
            next(self.body.parameters()).requires_grad_(False)

    def forward(self, image):
        logits = self.body(image)
        return logits if self.output == "tensor" else {"logits": logits, "size": len(image)}


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output["logits"]


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass
class AsDataclass:
    image: torch.Tensor
    label: torch.Tensor


AsNamedTuple = namedtuple("AsNamedTuple", ["image", "label"])


# name: how a batch is put together, and how it is taken apart
BATCHES = {
    "tuple": (lambda x, y: (x, y), lambda batch: (batch[0], batch[1])),
    "list": (lambda x, y: [x, y], lambda batch: (batch[0], batch[1])),
    "named tuple": (AsNamedTuple, lambda batch: (batch.image, batch.label)),
    "nested": (lambda x, y: ({"image": x}, y), lambda batch: (batch[0]["image"], batch[1])),
    "image, label": (lambda x, y: {"image": x, "label": y}, lambda batch: (batch["image"], batch["label"])),
    "odd keys": (lambda x, y: {"scan": x, "finding": y, "id": "a"}, lambda batch: (batch["scan"], batch["finding"])),
    "dataclass": (AsDataclass, lambda batch: (batch.image, batch.label)),
    "triple": (lambda x, y: (x, y, torch.arange(len(y))), lambda batch: (batch[0], batch[1])),
}
NEED_NO_FUNCTION = {"tuple", "list", "named tuple", "nested"}


class Images(Dataset):
    """Noise with a class-dependent mean."""

    def __init__(self, samples, classes, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(classes, (samples,), generator=generator)
        self.labels[:classes] = torch.arange(classes)
        means = torch.linspace(-1, 1, classes)[self.labels].reshape(-1, 1, 1, 1)
        self.images = torch.randn(samples, 1, 6, 6, generator=generator) + means

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class Collate:
    """Puts batches together; a class, so that workers can have it."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, samples):
        images, labels = zip(*samples, strict=True)
        return BATCHES[self.batch][0](torch.stack(images), torch.stack(labels))


def loaders(draw):
    """A shuffled training loader and one or two validation loaders."""
    options = {"batch_size": 6, "collate_fn": Collate(draw.batch), "num_workers": draw.workers}
    options["persistent_workers"] = draw.workers > 0
    train = DataLoader(Images(18, draw.classes, 0), shuffle=True, **options)
    val = [DataLoader(Images(size, draw.classes, size), **options) for size in (14, 7)[: draw.val_loaders]]
    return train, val[0] if draw.val_loaders == 1 else val


# ------------------------------------------------------------------------------------------------------------- modules


class Module(L.LightningModule):
    """Has a network ``net`` and a forward; the network can be compiled."""

    network = "net"

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        net = Net(draw)
        if draw.compiled == "wrapped":
            net = torch.compile(net, backend="eager")
        elif draw.compiled == "in place":
            net.compile(backend="eager")
        setattr(self, self.network, net)

    def forward(self, image):
        return getattr(self, self.network)(image)

    def loss(self, batch):
        image, label = BATCHES[self.draw.batch][1](batch)
        return F.cross_entropy(logits_of(getattr(self, self.network)(image)), label)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        image, label = BATCHES[self.draw.batch][1](batch)
        output = logits_of(getattr(self, self.network)(image))
        self.log("val_acc", (output.argmax(1) == label).double().mean(), batch_size=len(label))

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        if not self.draw.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        frequency = self.draw.check_val_every_n_epoch
        config = {"scheduler": scheduler, "monitor": "flatness/hessian_trace", "frequency": frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


class WithoutForward(Module):
    forward = L.LightningModule.forward


class Manual(Module):
    def __init__(self, draw):
        super().__init__(draw)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Gan(WithoutForward):
    """A generator, and a discriminator that is a classifier; an optimizer for each."""

    network = "discriminator"

    def __init__(self, draw):
        super().__init__(draw)
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.generator = nn.Sequential(nn.Linear(3, 36), nn.Tanh(), nn.Unflatten(1, (1, 6, 6)))

    def training_step(self, batch, batch_idx):
        of_generator, of_discriminator = self.optimizers()
        noise = torch.randn(4, 3, dtype=self.generator[0].weight.dtype)
        for optimizer, loss in (
            (of_generator, lambda: logits_of(self.discriminator(self.generator(noise))).logsumexp(1).mean()),
            (of_discriminator, lambda: self.loss(batch)),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam([p for p in self.discriminator.parameters() if p.requires_grad], lr=0.01),
        ]


MODULES = {"forward": Module, "without forward": WithoutForward, "manual": Manual, "gan": Gan}


# --------------------------------------------------------------------------------------------------------------- draws


def per_sample(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none") ** 2


LOSSES = {
    "default": {},
    "smoothing": {"label_smoothing": 0.1},
    "class weight": {"class_weight": [2.0, 0.5]},  # for two classes
    "ignored class": {"ignore_index": 0},
    "module": {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
    "function": {"loss": per_sample},
    "trace only": {"measures": ("hessian_trace",)},
    "residual": {"residual": "hutchinson", "num_probes": 3},
    "strict": {"strict": True},
}
LAYERS = {"last": "last", "all": "all", "classifier": "classifier", "glob": ["*body.*"]}


@dataclass(frozen=True, repr=False)
class Draw:
    """A module, its data, a Trainer and a callback; printed by hypothesis when a test fails."""

    net: str = "plain"
    classes: int = 3
    output: str = "tensor"
    frozen: bool = False
    compiled: str | None = None
    module: str = "forward"
    batch: str = "tuple"
    batch_fn: bool = False
    val_loaders: int = 1
    workers: int = 0
    plateau: bool = False
    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    val_check_interval: float = 1.0
    check_val_every_n_epoch: int = 1
    num_sanity_val_steps: int = 2
    limit_val_batches: int | None = None
    limit_train_batches: int | None = None
    logger: str | None = None
    stopping: str | None = None
    checkpoint: bool = False
    data: str = "val"
    layers: str = "last"
    loss: str = "default"
    max_samples: int | None = None
    every_n_epochs: int = 1
    second_callback: bool = False

    def __repr__(self):
        values = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        return f"Draw({', '.join(f'{name}={value!r}' for name, value, default in values if value != default)})"


def sensible(draw):
    """The nearest draw that Lightning itself does not refuse, and that is about one thing at a time."""
    changes = {}
    if draw.module in ("manual", "gan"):
        changes |= {"accumulate": 1, "clip": None, "plateau": False}
    if draw.limit_val_batches == 0:  # then nothing is logged that could be monitored, or at other times
        changes |= {"plateau": False, "stopping": None, "checkpoint": False, "val_check_interval": 1.0}
    if draw.val_check_interval != 1.0 or draw.every_n_epochs > 1:
        changes |= {"plateau": False}
    if draw.every_n_epochs > 1 and draw.stopping == "flatness":  # without the callback it would count stale values
        changes |= {"stopping": "early"}
    if draw.loss == "class weight":
        changes |= {"classes": 2}
    if draw.val_loaders == 2 and draw.stopping == "flatness" and draw.limit_val_batches != 0:
        changes |= {"stopping": "early"}  # val_acc is logged for each loader under a name of its own
    return dataclasses.replace(draw, **changes)


def choice(*values):
    return st.sampled_from(values)


DRAWS = st.builds(
    Draw,
    net=choice(*NETS),
    classes=st.integers(2, 5),
    output=choice("tensor", "tensor", "dict"),
    frozen=st.booleans(),
    compiled=choice(*[None] * 8, "wrapped", "in place"),
    module=choice(*MODULES),
    batch=choice(*BATCHES),
    batch_fn=choice(True, True, False),
    val_loaders=choice(1, 1, 2),
    plateau=st.booleans(),
    precision=choice("32-true", "64-true", "64-true", "bf16-mixed", "16-mixed"),
    accumulate=choice(1, 1, 2, 4),
    clip=choice(None, 0.1),
    val_check_interval=choice(1.0, 1.0, 0.34, 0.67),
    check_val_every_n_epoch=choice(1, 1, 2),
    num_sanity_val_steps=choice(0, 2),
    limit_val_batches=choice(None, None, 1, 2, 0),
    limit_train_batches=choice(None, None, 2),
    logger=choice(*[None] * 4, "csv", "csv", "tensorboard"),
    stopping=choice(None, "flatness", "early"),
    checkpoint=st.booleans(),
    data=choice("val", "train"),
    layers=choice(*LAYERS),
    loss=choice(*LOSSES, "default", "default"),
    max_samples=choice(None, None, 1, 5, 1000),
    every_n_epochs=choice(1, 1, 2),
    second_callback=choice(False, False, True),
).map(sensible)
