"""Training with the penalty, by the callback and by hand, on every rank."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset
from tests.callbacks.penalised import ByHand, weights_of
from tests.distributed.scenarios import rank, scenario, trainer_on_ranks


class FailsOnOneRank(Classifier):
    """On rank 1 its loss is of another kind."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        return F.cross_entropy(logits / 2 if rank() == 1 else logits, y)


def trained(module, *callbacks, **options):
    torch.manual_seed(0)
    trainer = trainer_on_ranks(*callbacks, **options)
    trainer.fit(module, DataLoader(dataset(60), 8, shuffle=True), DataLoader(dataset(22, seed=1), 8))
    return weights_of(module), {key: float(value) for key, value in trainer.callback_metrics.items()}


@scenario
def penalty_by_hand():
    return trained(ByHand())[0]


@scenario
def penalty_by_callback():
    return trained(Classifier(), lf.FlatnessPenalty(0.3))


@scenario
def accumulated_penalty_by_hand():
    return trained(ByHand(), accumulate_grad_batches=2, precision="bf16-mixed")[0]


@scenario
def accumulated_penalty_by_callback():
    options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    return trained(Classifier(), lf.FlatnessPenalty(0.3), **options)


@scenario
def penalty_of_a_loss_that_does_not_fit_on_one_rank():
    trained(FailsOnOneRank(), lf.FlatnessPenalty(0.3))
