"""Random networks, batches and Trainers: the same training with the callback as without, and right numbers."""

import dataclasses
import math
import re
import tempfile
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

import lightning_flatness as lf
from tests.callbacks.compare import Recorder, StandIn, assert_same, end_of, num_hooks, seed_all
from tests.callbacks.lightning_modules import quiet_trainer

# ------------------------------------------------------------------------------------------------------------ networks


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


# ---------------------------------------------------------------------------------------------------------------- runs


def flatness_callbacks(draw):
    common = {"summary": False, "model": None if draw.module in ("forward", "manual") else MODULES[draw.module].network}
    if draw.batch_fn:
        common["batch_fn"] = BATCHES[draw.batch][1]
    first = lf.FlatnessCallback(
        layers=LAYERS[draw.layers],
        data=draw.data,
        max_samples=draw.max_samples,
        every_n_epochs=draw.every_n_epochs,
        **LOSSES[draw.loss],
        **common,
    )
    return [first, lf.FlatnessCallback(layers="classifier", prefix="second", **common)][: 1 + draw.second_callback]


def other_callbacks(draw, folder):
    monitor = "flatness/hessian_trace"
    others = {
        None: [],
        "flatness": [lf.FlatnessStopping(monitor, burn_in=1, patience=1)],
        "early": [EarlyStopping(monitor, patience=1)],
    }[draw.stopping]
    if draw.checkpoint:
        others.append(ModelCheckpoint(folder / "best", monitor=monitor, auto_insert_metric_name=False))
    return others


def make_trainer(draw, folder, *callbacks, max_epochs=3):
    logger = {
        None: lambda: False,
        "csv": lambda: CSVLogger(folder),
        "tensorboard": lambda: TensorBoardLogger(folder),
    }[draw.logger]()
    options = {} if draw.module in ("manual", "gan") else {"accumulate_grad_batches": draw.accumulate}
    return quiet_trainer(
        folder,
        *callbacks,
        *other_callbacks(draw, folder),
        max_epochs=max_epochs,
        logger=logger,
        precision=draw.precision,
        gradient_clip_val=draw.clip,
        val_check_interval=draw.val_check_interval,
        check_val_every_n_epoch=draw.check_val_every_n_epoch,
        num_sanity_val_steps=draw.num_sanity_val_steps,
        limit_val_batches=draw.limit_val_batches,
        limit_train_batches=draw.limit_train_batches,
        **options,
    )


def fit(draw, folder, *callbacks, **options):
    seed_all()
    module, trainer = MODULES[draw.module](draw), make_trainer(draw, folder, *callbacks)
    trainer.fit(module, *loaders(draw), **options)
    return trainer, module


def required_refusal(draw):
    """Pattern of the message of a draw that must be refused; it names the culprit and a remedy."""
    if draw.net == "linear" and draw.layers == "last":
        return r"layers='last': no convolution .* classifier '.*body\.3'\. Name a layer with layers=; there are"
    return None


def possible_refusals(draw):
    """Patterns of messages that are right for some weights, or as long as the package cannot do better."""
    patterns = []
    if not draw.batch_fn and draw.batch not in NEED_NO_FUNCTION:
        patterns.append(r"A batch is a .*batch_fn=")
    if draw.loss == "strict" and draw.net in INEXACT:
        patterns.append(r"Layer '.*body.*strict=True")
    if draw.loss == "ignored class":
        patterns.append(r"No sample was measured.*ignored")
    return patterns


def measured_batches(draw):
    """The samples that the callback measures, where they are all of something."""
    train, val = loaders(dataclasses.replace(draw, workers=0))
    if draw.max_samples not in (None, 1000):
        return None
    if draw.data == "train":
        found = list(DataLoader(train.dataset, 6, collate_fn=train.collate_fn))
    else:
        val = val if draw.val_loaders == 2 else [val]
        found = [batch for loader in val for batch in list(loader)[: draw.limit_val_batches]]
    pairs = [BATCHES[draw.batch][1](batch) for batch in found]
    return [(x.double() if draw.precision == "64-true" else x, y) for x, y in pairs]


def num_samples(draw):
    if draw.data == "train":
        available = 18
    else:
        sizes = (14, 7)[: draw.val_loaders]
        available = sum(
            size if draw.limit_val_batches is None else min(size, 6 * draw.limit_val_batches) for size in sizes
        )
    return min(available, draw.max_samples or available)


def check_numbers(draw, callback, recorder):
    """The last logged values are those of ``measure_flatness`` on the weights of that moment."""
    assert callback.history
    if draw.loss != "ignored class":
        found, expected = callback.report.num_samples, num_samples(draw)
        assert found == expected, f"{found} samples measured in place of {expected}"
    batches = measured_batches(draw)
    if batches is None:
        return
    expected = lf.measure_flatness(recorder.measured, batches, layers=LAYERS[draw.layers], **LOSSES[draw.loss])
    rtol = 1e-10 if draw.precision == "64-true" else 1e-4
    logged = {key.removeprefix("flatness/"): float(value) for key, value in recorder.logged[-1].items()}
    measures = ["hessian_trace", "weight_norm"] + ["relative_flatness"] * (draw.loss != "trace only")
    scale = sum(abs(layer.hessian_trace) for layer in expected.layers.values())
    for measure in measures:
        value = getattr(expected, measure)
        assert_close(callback.history[-1][measure], value, rtol=rtol, atol=rtol * scale, msg=lambda m, k=measure: k + m)
        # Lightning keeps what is logged in float32.
        assert_close(logged[measure], value, rtol=max(rtol, 1e-6), atol=max(rtol, 1e-6) * scale)
    prefix = "" if draw.module in ("without forward", "gan") else "net."
    assert list(callback.report.layers) == [prefix + name for name in expected.layers]
    assert callback.report.exact == expected.exact


def check_history(callback):
    for record in callback.history:
        assert all(value is None or type(value) in (int, float) for value in record.values()), record
        assert all(value is None or not math.isinf(value) for value in record.values()), record
        assert type(record["epoch"]) is type(record["step"]) is int


def check_resume(draw, trainer, callbacks, folder):
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]
    for callback in callbacks:
        assert_same(state[callback.state_key]["history"], callback.history, "the history in the checkpoint")
    resumed = flatness_callbacks(draw)
    # Nothing is stopped, so that something is measured; what is monitored in between is another test's.
    draw = dataclasses.replace(draw, stopping=None, checkpoint=draw.checkpoint and draw.every_n_epochs == 1)
    following = make_trainer(draw, folder / "resumed", *resumed, max_epochs=trainer.current_epoch + 2)
    following.fit(MODULES[draw.module](draw), *loaders(draw), ckpt_path=path)
    for before, after in zip(callbacks, resumed, strict=True):
        assert_same(after.history[: len(before.history)], before.history, "the history after a resume")
        if before.history:
            assert len(after.history) > len(before.history)


def check(draw, folder):
    callbacks = flatness_callbacks(draw)
    recorder = Recorder(MODULES[draw.module].network, callbacks)
    refusal = required_refusal(draw)
    measures = draw.limit_val_batches != 0 or draw.data == "train"
    refused = None
    try:
        trainer, module = fit(draw, folder / "with", *callbacks, recorder)
    except lf.FlatnessError as error:
        refused = str(error)
    if refused is not None:
        patterns = possible_refusals(draw) + ([] if refusal is None else [refusal])
        assert any(re.search(pattern, refused) for pattern in patterns), f"wrongly refused: {refused}"
        return
    end = end_of(trainer, module)
    assert refusal is None or not measures, f"not refused: {refusal}"
    without, module_without = fit(draw, folder / "without", StandIn(recorder.logged))
    assert_same(end, end_of(without, module_without))
    assert num_hooks(module) == 0
    for callback in callbacks:
        check_history(callback)
    if measures:
        check_numbers(draw, callbacks[0], recorder)
    else:
        assert callbacks[0].history == []
    check_resume(draw, trainer, callbacks, folder)


def check_in_folder(draw):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FlatnessCallback measures at validation, and this fit runs none")
        check(draw, Path(folder))


def options(examples):
    """Failures are not shrunk, which would take minutes."""
    return settings(max_examples=examples, phases=[Phase.explicit, Phase.generate])


@example(Draw(compiled="wrapped", net="batch norm", layers="all", precision="64-true"))
@example(Draw(compiled="in place", net="dropout", module="gan", logger="tensorboard", second_callback=True))
@example(Draw(data="train", limit_val_batches=0, module="manual", batch="dataclass", batch_fn=True))
@example(Draw(stopping="flatness", checkpoint=True, plateau=True, precision="16-mixed", accumulate=4))
@options(5)
@given(DRAWS)
def test_random_trainers(draw):
    check_in_folder(draw)


@pytest.mark.slow
@options(50)
@given(DRAWS)
def test_many_random_trainers(draw):
    check_in_folder(draw)


@pytest.mark.parametrize("what", ["checkpoint", "early", "flatness"])
def test_resume_at_an_epoch_that_is_not_measured(tmp_path, what):
    # As without an interruption: monitors see the last value that was measured.
    draw = Draw(every_n_epochs=2, num_sanity_val_steps=0)
    draw = dataclasses.replace(draw, **({"checkpoint": True} if what == "checkpoint" else {"stopping": what}))
    trainer, _ = fit(dataclasses.replace(draw, stopping=None), tmp_path, *flatness_callbacks(draw))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    following = make_trainer(draw, tmp_path / "resumed", *flatness_callbacks(draw), max_epochs=5)
    following.fit(Module(draw), *loaders(draw), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["val", "train"])
def test_with_persistent_workers(data):
    check_in_folder(Draw(net="batch norm", workers=1, data=data, val_check_interval=0.67, batch="image, label",
                         batch_fn=True))  # fmt: skip
