"""A long run holds no more at its end than after fifty epochs."""

import gc
import mmap
import os
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, TwoLayerNet, loaders, quiet_trainer
from tests.callbacks.resources import BOUNDS, PROC, Watch, growth, resources


class Leaking(Callback):
    """Leaks a little of one kind in every epoch."""

    def __init__(self, kind):
        self.kind, self.kept = kind, []

    def on_validation_end(self, trainer, pl_module):
        if self.kind == "tensors":
            self.kept.append(torch.zeros(2))
        elif self.kind == "megabytes":
            pages = mmap.mmap(-1, 4_000_000)  # never what has been freed before
            pages.write(bytes(4_000_000))
            self.kept.append(pages)
        elif self.kind == "files":
            self.kept.append(open(os.devnull))  # noqa: SIM115
        elif self.kind == "objects":
            self.kept.append([[index] for index in range(300)])
        elif self.kind == "hooks":
            pl_module.net.register_forward_hook(lambda *_: None)
        elif self.kind == "figures":
            import matplotlib.pyplot as plt

            plt.figure()
        elif self.kind == "threads":
            done = threading.Event()
            self.kept.append(done)
            threading.Thread(target=done.wait, daemon=True).start()

    def let_go(self):
        for thing in self.kept:
            if self.kind == "files":
                thing.close()
            elif self.kind == "threads":
                thing.set()
        self.kept.clear()
        if self.kind == "figures":
            import matplotlib.pyplot as plt

            plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOUNDS)
def test_a_leak_would_be_seen(tmp_path, kind):
    if kind in ("megabytes", "files") and not PROC.exists():
        pytest.skip("there is no /proc")
    if kind == "figures":
        pytest.importorskip("matplotlib").use("agg")
    leak, watch = Leaking(kind), Watch(1, 9)
    trainer = quiet_trainer(tmp_path, leak, watch, max_epochs=10, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(Classifier(), *loaders())
    try:
        assert kind in growth(watch.found[1], watch.found[9])
    finally:
        leak.let_go()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["val", "train"])
def test_two_hundred_epochs(tmp_path, data):
    pytest.importorskip("matplotlib").use("agg")

    class WithTrainLoss(Classifier):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", F.cross_entropy(self.net(batch[0]), batch[1]))
            return super().training_step(batch, batch_idx)

    callback = lf.FlatnessCallback(layers="all", data=data, figures=True, summary=False)
    watch = Watch(50, 199)
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="flatness/relative_flatness", save_top_k=2)
    trainer = quiet_trainer(
        tmp_path, callback, watch, checkpoint, max_epochs=200, logger=TensorBoardLogger(tmp_path), limit_train_batches=2
    )
    module = WithTrainLoss(TwoLayerNet())
    trainer.fit(module, *loaders())
    assert len(callback.history) == 200
    assert not growth(watch.found[50], watch.found[199])

    after = resources(module)
    assert after["figures"] == 0
    assert after["hooks"] == 0
    from matplotlib.figure import Figure

    del trainer, checkpoint, watch
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Figure]
    assert callback._running is None
