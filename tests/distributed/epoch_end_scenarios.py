"""The spectrum and the landscape callback in training on several ranks."""

from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset
from tests.callbacks.training_runs import end_of_training, seed_everything
from tests.distributed.bit_identical_scenarios import augmented_data
from tests.distributed.scenarios import SCENARIOS, rank, scenario, trainer_on_ranks

SPECTRUM = {"top_k": 2, "num_steps": 4, "num_probes": 2}


def callbacks(**options):
    return [
        lf.SpectrumCallback(every_n_epochs=1, **SPECTRUM, **options),
        lf.LandscapeCallback(every_n_epochs=1, steps=3, **options),
    ]


def end(with_callbacks):
    seed_everything()
    both = callbacks(max_samples=13) if with_callbacks else []
    module = Classifier()
    trainer = trainer_on_ranks(*both)
    trainer.fit(module, *augmented_data())
    assert all(len(callback.history) == 2 for callback in both)
    return end_of_training(trainer, module)


for with_callbacks in (False, True):
    SCENARIOS[f"at epochs, {with_callbacks}"] = partial(end, with_callbacks)


@scenario
def numbers_at_epochs():
    """Of weights that training does not change, on samples that ranks cannot share evenly."""
    seed_everything()
    spectrum, landscape = callbacks(max_samples=13, dtype="float64", folder=str(Path.cwd() / f"of-{rank()}"))
    module = Classifier(lr=0.0)
    module.net.eval()
    module.train = lambda mode=True: module  # BatchNorm keeps its statistics, and nothing is dropped
    flatness = lf.FlatnessCallback(summary=False)
    trainer = trainer_on_ranks(spectrum, landscape, flatness, max_epochs=1, figures="auto")
    trainer.fit(module, DataLoader(dataset(32), 8, shuffle=True), DataLoader(dataset(22, seed=1), 8))
    trainer.strategy.barrier()  # until both have written
    written = sorted(path.suffix for path in Path.cwd().glob(f"of-{rank()}/*"))
    drawn = sorted(path.name for path in Path.cwd().glob("lightning_logs/*/flatness/*.png"))
    logged = float(trainer.callback_metrics["spectrum/trace"])
    losses = landscape.results["kept"].losses
    return {"history": spectrum.history, "losses": losses, "written": written, "drawn": drawn, "logged": logged}


class FailsOnOneRank(Classifier):
    """While it is measured, in epoch 1. Its steps call its own forward, so that it is the network."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).double().mean(), batch_size=len(y))

    def forward(self, x):
        measured = not self.training and not self.trainer.validating and not self.trainer.sanity_checking
        if measured and self.trainer.current_epoch == 1 and rank() == 1:
            raise RuntimeError("no memory")
        return self.net(x)


@scenario
def one_rank_fails_at_an_epoch():
    seed_everything()
    both = [*callbacks(max_samples=13, on_error="warn")]
    trainer = trainer_on_ranks(*both, max_epochs=3)
    trainer.fit(FailsOnOneRank(), DataLoader(dataset(32), 8), DataLoader(dataset(22, seed=1), 8))
    return [[record["epoch"] for record in callback.history] for callback in both], torch.tensor(trainer.global_step)
