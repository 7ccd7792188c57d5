"""Random networks, batches and Trainers: the same training with the callback as without, and right numbers."""

import dataclasses
import json
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.compare import Recorder, StandIn, assert_same, end_of, num_hooks, seed_all
from tests.callbacks.lightning_modules import quiet_trainer
from tests.callbacks.random_draws import (
    BATCHES,
    DRAWS,
    INEXACT,
    LAYERS,
    LOSSES,
    MODULES,
    NEED_NO_FUNCTION,
    Draw,
    Module,
    loaders,
)
from tests.guarding import guards


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
        first = val[0] if draw.val_loaders == 2 else val
        found = list(first)[: draw.limit_val_batches]
    pairs = [BATCHES[draw.batch][1](batch) for batch in found]
    return [(x.double() if draw.precision == "64-true" else x, y) for x, y in pairs]


def num_samples(draw):
    if draw.data == "train":
        available = 18
    else:
        available = 14 if draw.limit_val_batches is None else min(14, 6 * draw.limit_val_batches)  # of the first loader
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
    rtol = {"64-true": 1e-10, "32-true": 1e-4}.get(draw.precision, 0.02)  # features of half precision where observed
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
        assert json.loads(json.dumps(record, allow_nan=False)) == record
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


@pytest.mark.slow
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


@guards("callbacks.logged:log_again", returns=None)
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
