"""A project of a user's: networks and data, as a checkpoint or a command line names them."""

import enum
import warnings

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def layers(width):
    convolutions = nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.SiLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))


class Net(L.LightningModule):
    """Calls its network on the images of the batch as they are."""

    def __init__(self, width: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.net = layers(width)

    def prepared(self, images):
        return images

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(self.prepared(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(self.prepared(batch[0])).argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Preparing(Net):
    """Its validation step prepares the images."""

    def prepared(self, images):
        return 3 * images.flip(-1) - 1


class SkipsTheFirst(Preparing):
    """Its validation step skips the first batch."""

    def validation_step(self, batch, batch_idx):
        if batch_idx:
            super().validation_step(batch, batch_idx)


class PreparesByWidth(Net):
    """Its validation step prepares the images in another way for every width."""

    def prepared(self, images):
        return self.hparams.width * images


class Lenient(Net):
    """Has a parameter that older checkpoints lack."""

    def __init__(self, width: int = 2):
        super().__init__(width)
        self.strict_loading = False
        self.scale = nn.Parameter(torch.ones(1))


class NeedsItsRun(Net):
    """Its validation step needs a logger."""

    def validation_step(self, batch, batch_idx):
        self.logger.experiment.add_text("step", "here")
        return super().validation_step(batch, batch_idx)


class WithoutStep(Net):
    """A LightningModule that cannot be validated."""

    validation_step = L.LightningModule.validation_step


class NumberedNeedsItsRun(NeedsItsRun):
    """Its validation step needs to know the loader, too."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx)


class Plain(nn.Sequential):
    """A network of plain PyTorch."""

    def __init__(self, width: int = 2):
        super().__init__(*layers(width))


def plain(width: int = 2) -> nn.Module:
    return layers(width)


class Images(L.LightningDataModule):
    """Images of three classes, the same ones every time."""

    def __init__(self, size: int = 24, batch_size: int = 8):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        draw = torch.Generator().manual_seed(3)
        images, labels = (
            torch.randn(2 * self.hparams.size, 1, 7, 7, generator=draw),
            torch.arange(2 * self.hparams.size),
        )
        dataset = TensorDataset(images, labels % 3)
        self.train, self.val = torch.utils.data.random_split(dataset, [0.5, 0.5], torch.Generator().manual_seed(1))

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)


class OnlyTraining(Images):
    """Has no validation data."""

    def val_dataloader(self):
        return None


class OnlyValidation(Images):
    """Has no training data."""

    def train_dataloader(self):
        return None


class StreamedTraining(Images):
    """Its training data are a stream, of which no subset can be drawn."""

    def train_dataloader(self):
        return [next(iter(super().train_dataloader()))]


class DrawnSplit(Images):
    """Draws its split from the global generator."""

    def setup(self, stage):
        super().setup(stage)
        dataset = torch.utils.data.ConcatDataset([self.train, self.val])
        self.train, self.val = torch.utils.data.random_split(dataset, [0.5, 0.5])


class Normalised(Images):
    """Changes batches on their way to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images / 2, labels


class Species(Images):
    """Its batches have names that say nothing."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"pix": batch[0], "species": batch[1]}


class OfSpecies(Net):
    def validation_step(self, batch, batch_idx):
        self.net(batch["pix"])


class Three(Images):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"a": batch[0], "b": batch[0], "label": batch[1]}


def pairs():
    return ([(0, 1)], [(1, 0)])


class Numbered(Net):
    """Its validation step needs to know the loader."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.net((dataloader_idx + 1) * batch[0])


class TwoLoaders(Images):
    def val_dataloader(self):
        return [DataLoader(self.train, 8), DataLoader(self.val, 8)]


def focal(logits, labels):
    losses = cross_entropy(logits, labels, reduction="none")
    return losses * (1 - torch.exp(-losses)) ** 2


def quiet_trainer(**options):
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return L.Trainer(accelerator="cpu", max_epochs=2, **quiet, **options)


class Whole(Net):
    """Builds its network late, and has its own data."""

    def __init__(self, width: int = 2):
        super().__init__(width)
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = layers(self.hparams.width)

    def val_dataloader(self):
        return images().val_dataloader()

    def train_dataloader(self):
        return images().train_dataloader()


class OwnData(Net):
    """Sets up a drawn split of its own, and asks its Trainer for the number of processes."""

    def prepare_data(self):
        self.is_prepared = True

    def setup(self, stage):
        assert self.is_prepared
        assert not hasattr(self, "data"), "the data are set up once"
        self.data = DrawnSplit()
        self.data.setup(stage)

    def teardown(self, stage):
        del self.data

    def val_dataloader(self):
        return [self.data.val_dataloader()] * self.trainer.world_size

    def train_dataloader(self):
        return [self.data.train_dataloader()] * self.trainer.world_size


class Renamed(Net):
    """Reads checkpoints of a time when its network had another name."""

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("body.", "net."): value for name, value in state.items()}


class Versioned(nn.Linear):
    """Can only be loaded from a state dict that says its version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def versioned() -> nn.Module:
    return nn.Sequential(*list(layers(2))[:-1], Versioned(4, 3))


class Warns(Net):
    """Its validation step warns."""

    def validation_step(self, batch, batch_idx):
        warnings.warn("the images look odd", stacklevel=1)
        super().validation_step(batch, batch_idx)


def images():
    data = Images()
    data.setup("fit")
    return data


class Rest(Net):
    """Reads a hyper-parameter that its signature does not name."""

    def __init__(self, width: int = 2, **kwargs):
        super().__init__(width)
        self.save_hyperparameters()
        if self.hparams.get("act") == "silu":
            self.net[1] = nn.SiLU()


class GivenNet(Net):
    """Is given its network, as in the template of Hydra."""

    def __init__(self, net: nn.Module, criterion: nn.Module | None = None, kind: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.net[1] = kind()


class Activation(enum.Enum):
    silu = nn.SiLU


class OfText(Net):
    """Distinguishes text from what a config could mean by it."""

    def __init__(self, act: Activation | str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.net[1] = nn.ReLU() if act is None else nn.SiLU() if isinstance(act, str) else nn.Tanh()


class OfOptions(Net):
    """Takes its options as one argument, and has another argument of the name of an option."""

    def __init__(self, options: dict, width: int = 2):
        super().__init__(width)
        self.save_hyperparameters(options)


class Initialises(Whole):
    """Before a fit, ``setup`` sets the weights of its head, as it does for pretrained ones."""

    def setup(self, stage):
        if stage == "fit":
            nn.init.zeros_(self.net[-1].weight)
            self.train()
