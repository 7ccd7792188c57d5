"""A run under ``pytorch_lightning``; ``first`` says which import comes first, ``cli`` that a YAML file sets it up."""

import sys
from pathlib import Path

if sys.argv[1:2] == ["first"]:
    from lightning_flatness import FlatnessCallback  # noqa: F401
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        torch.manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(12, 1, 6, 6), torch.randint(3, (12,))), batch_size=4)

    val_dataloader = train_dataloader


class WithoutForward(Classifier):
    forward = pl.LightningModule.forward


def main(how, folder):
    if how == "cli":
        from pytorch_lightning.cli import LightningCLI

        cli = LightningCLI(Classifier, args=["fit", "--config", str(folder / "config.yaml")], save_config_callback=None)
        trainer, callbacks = cli.trainer, cli.trainer.callbacks
        import lightning_flatness as lf
    else:
        import lightning_flatness as lf

        callbacks = [
            lf.FlatnessCallback(),
            lf.FlatnessStopping(burn_in=0),
            lf.SpectrumCallback(every_n_epochs=1, top_k=1, num_steps=3, num_probes=1),
            lf.LandscapeCallback(steps=2),
            ModelCheckpoint(folder, monitor="flatness/relative_flatness", filename="best"),
            ModelCheckpoint(folder / "trace", monitor="spectrum/trace"),
            EarlyStopping("flatness/hessian_trace", patience=9),
        ]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
        )
        trainer.fit(Classifier())
        other = lf.FlatnessCallback()
        quiet = {"accelerator": "cpu", "logger": False, "default_root_dir": folder}
        pl.Trainer(max_epochs=1, callbacks=[other], **quiet).fit(WithoutForward())
        print("without forward:", *other.report.layers)

    (callback,) = [callback for callback in callbacks if isinstance(callback, lf.FlatnessCallback)]
    assert [record["epoch"] for record in callback.history] == [0, 1]
    assert float(trainer.callback_metrics["flatness/hessian_trace"]) == callback.report.hessian_trace
    print("root:", next(base for base in type(callback).__mro__ if base.__name__ == "Callback").__module__)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
