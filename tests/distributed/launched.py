"""A script whose processes Lightning starts: ``launched.py STRATEGY FILE`` writes what is logged, and the weights."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, TwoLayerNet, dataset, quiet_trainer


def main(strategy, file):
    module = Classifier(TwoLayerNet()).double()  # spawned processes give their weights back into this one
    trainer = quiet_trainer(
        Path(file).parent,
        lf.FlatnessCallback(summary=False),
        devices=2,
        strategy=strategy,
        precision="64-true",
        max_epochs=1,
    )
    trainer.fit(module, DataLoader(dataset(32), 4), DataLoader(dataset(11, 1), 4))
    if trainer.is_global_zero:
        logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("flatness/")}
        torch.save({"logged": logged, "weights": module.net.state_dict()}, file)
    if distributed.is_initialized():  # else gloo's threads may abort the process as it exits
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
