"""Training runs with and without the callback, compiled and not, in two precisions."""

import os
from functools import partial
from itertools import product

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset
from tests.callbacks.training_runs import (
    HAS_WEIGHT_AVERAGING,
    Augmented,
    DrawsOneNumber,
    WithFrozenNorm,
    WithoutDropout,
    averaged_weights,
    end_of_training,
    seed_everything,
)
from tests.distributed.scenarios import ONE_WORKER, SCENARIOS, trainer_on_ranks


class WithFrozenBackbone(Classifier):
    def __init__(self):
        super().__init__()
        self.net.conv1.requires_grad_(False)
        self.net.norm1.requires_grad_(False)


def plain_data():
    return DataLoader(dataset(64), 8, shuffle=True), DataLoader(dataset(22, seed=1), 8)


def augmented_data(**options):
    train = DataLoader(Augmented(dataset(64)), 8, shuffle=True, **options)
    return train, DataLoader(Augmented(dataset(22, seed=1)), 8)


# name: module, data, options of the Trainer; with two ranks, too, an epoch has four batches
RUNS = {
    "accumulation": (WithoutDropout, plain_data, {"accumulate_grad_batches": 4, "val_check_interval": 2}),
    "averaged weights": (WithoutDropout, plain_data, {}),
    "frozen backbone": (WithFrozenBackbone, plain_data, {}),
    "frozen BatchNorm": (WithFrozenNorm, plain_data, {}),
    "dropout": (Classifier, plain_data, {}),
    "augmentation": (Classifier, augmented_data, {}),
    "persistent workers": (
        Classifier,
        partial(augmented_data, persistent_workers=True, **ONE_WORKER),
        {"val_check_interval": 2},
    ),
    "no sanity check": (Classifier, augmented_data, {"num_sanity_val_steps": 0}),
}
if not HAS_WEIGHT_AVERAGING:
    del RUNS["averaged weights"]


FORMS = {
    "not compiled": lambda module, backend: None,
    "torch.compile(net)": lambda module, backend: setattr(module, "net", torch.compile(module.net, backend=backend)),
    "net.compile()": lambda module, backend: module.net.compile(backend=backend),
    "module.compile()": lambda module, backend: module.compile(backend=backend),
}
PRECISIONS = ("32-true", "bf16-mixed")
HALVES = ("bf16-true", "16-true")  # weights in half precision: one run, eager and compiled


class TouchesGradients(Callback):
    def on_validation_end(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


CALLBACKS = {
    "without": list,
    "val": lambda: [lf.FlatnessCallback(data="val", summary=False)],
    "train": lambda: [lf.FlatnessCallback(data="train", summary=False)],
    "val and train": lambda: [
        lf.FlatnessCallback(data=data, prefix=f"flatness/{data}", summary=False) for data in ("val", "train")
    ],
    "draws one number": lambda: [DrawsOneNumber(lambda: torch.rand(()))],
    "touches gradients": lambda: [TouchesGradients()],
}


def end_of(run, form, precision, with_, backend="eager"):
    torch.compiler.reset()  # networks share their code, which is compiled anew only some times
    seed_everything()
    module_class, data, options = RUNS[run]
    module = module_class()
    FORMS[form](module, backend)
    callbacks = CALLBACKS[with_]()
    averaging = [averaged_weights()] if run == "averaged weights" else []
    trainer = trainer_on_ranks(*callbacks, *averaging, precision=precision, **options)
    trainer.fit(module, *data())
    measured = [len(callback.history) for callback in callbacks if isinstance(callback, lf.FlatnessCallback)]
    assert all(measured), "nothing was measured"
    return end_of_training(trainer, module)


def name_of(run, form, precision, with_):
    return f"{run}, {form}, {precision}, {with_}"


ALL = [*product(RUNS, FORMS, PRECISIONS), *product(["dropout"], FORMS, HALVES)]
# To compile takes most of the time. By default, every run is compiled in one form and precision.
BY_TURNS = {(run, list(FORMS)[1 + index % 3], PRECISIONS[index % 2]) for index, run in enumerate(RUNS)}
BY_TURNS |= {("dropout", "net.compile()", half) for half in HALVES}
COMBINATIONS = [
    combination
    for combination in ALL
    if "ALL_COMBINATIONS" in os.environ or combination[1] == "not compiled" or combination in BY_TURNS
]


def callbacks_of(form):
    """Where to compile takes long, one run has both callbacks."""
    return ("val", "train") if form == "not compiled" or "ALL_COMBINATIONS" in os.environ else ("val and train",)


CONTROLS = [
    ("augmentation", "not compiled", "32-true", "draws one number"),
    ("accumulation", "not compiled", "32-true", "touches gradients"),
    ("augmentation", "net.compile()", "32-true", "draws one number"),
]
WITHOUT = [
    name_of(*combination, "without")
    for combination in dict.fromkeys([*COMBINATIONS, *(control[:3] for control in CONTROLS)])
]
WITH = [name_of(*combination, with_) for combination in COMBINATIONS for with_ in callbacks_of(combination[1])]
CONTROLLED = [name_of(*control) for control in CONTROLS]
INDUCTOR = [f"inductor, {with_}" for with_ in ("without", "val and train")]
for combination in ALL:
    for with_ in CALLBACKS:
        SCENARIOS[name_of(*combination, with_)] = partial(end_of, *combination, with_)
for with_ in CALLBACKS:
    SCENARIOS[f"inductor, {with_}"] = partial(
        end_of, "augmentation", "torch.compile(net)", "32-true", with_, backend="inductor"
    )
