"""The cases in Lightning's Trainer, in one process and in two processes."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning_utilities.core import rank_zero
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import lightning_flatness as lf
from benchmarks.numbers.cases import CURVED, Cases, landscape, spectrum
from benchmarks.numbers.networks import Blocks, Net, Network, images, made, vgg

RANKS = 2
TINY_SPECTRUM: dict[str, Any] = {"num_steps": 3, "num_probes": 2, "top_k": 1, "max_samples": 8}
TINY_LANDSCAPE: dict[str, Any] = {"steps": 3, "max_samples": 8}


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        right = self(batch[0]).argmax(1) == batch[1]
        self.log("val_acc", right.double().mean(), batch_size=len(right))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.05)


class Heard(logging.Handler):
    """A handler that collects log messages, in which the callback says whether it observes forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def data(*sizes: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Dataset:
    return ConcatDataset([TensorDataset(*batch) for batch in images(*sizes, seed=seed, dtype=dtype)])


def loader(size: int, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(data(size, dtype=options.pop("dtype", torch.float64)), batch_size, **options)


def run(
    *callbacks: Callable[[], L.Callback],
    network: Network = CURVED,
    how: str = "fit",
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    dtype: torch.dtype = torch.float64,
    validation: Callable[[], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a Trainer with callbacks; return what they measured and logged, and the norms of the final weights.

    ``how`` is ``"fit"``, ``"fit without validation"``, ``"validate"`` or ``"test"``.
    """
    heard, logger = Heard(), rank_zero.log
    logger.addHandler(heard)
    made_callbacks = [make() for make in callbacks]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    precision = "64-true" if dtype == torch.float64 else "32-true"
    settings = {"max_epochs": 2, "precision": precision, "devices": 1, "accelerator": "cpu", "logger": False}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Classifier(made(network, dtype), optimizer).train()
    val = [] if how == "fit without validation" else (validation or partial(loader, 10, dtype=dtype))()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(callbacks=made_callbacks, default_root_dir=folder, **settings | options)
            if how.startswith("fit"):
                trainer.fit(module, loader(11, shuffle=True, dtype=dtype), val or None)
            else:
                getattr(trainer, how)(module, val, verbose=False)
    finally:
        logger.removeHandler(heard)
    found: dict[str, Any] = {"logged": dict(trainer.callback_metrics), "epochs": trainer.current_epoch}
    found["weights"] = [parameter.detach().norm() for parameter in module.parameters()]
    found["label observed"] = [text for text in map(told, heard.texts) if text]
    found["text told"] = " ".join(text for text in heard.texts if "Flatness" in text)
    for index, callback in enumerate(made_callbacks):
        names = ("history", "report", "result", "results", "trajectory", "num_measurements")
        found |= {f"{index} {name}": getattr(callback, name, None) for name in names}
        if isinstance(callback, lf.FlatnessStopping):
            found |= {
                f"{index} {name}": getattr(callback, name) for name in ("stopped_epoch", "wait_count", "best_score")
            }
    return found


def told(text: str) -> str:
    return "yes" if "observes the forward passes" in text else "no" if "passes of its own" in text else ""


def flatness(**options: Any) -> Callable[[], L.Callback]:
    return partial(lf.FlatnessCallback, summary=False, figures=False, **options)


def spectra(**options: Any) -> Callable[[], L.Callback]:
    return partial(lf.SpectrumCallback, figures=False, **TINY_SPECTRUM | options)


def landscapes(**options: Any) -> Callable[[], L.Callback]:
    return partial(lf.LandscapeCallback, figures=False, **TINY_LANDSCAPE | options)


def stopping(**options: Any) -> Callable[[], L.Callback]:
    return partial(lf.FlatnessStopping, burn_in=1, patience=2, min_delta=0.9, **options)


FITS: dict[str, dict[str, Any]] = {
    "observed": {},
    "observed, a part of the module": {"model": "net"},
    "own passes": {"live": False},
    "all layers": {"layers": "all"},
    "layers by name": {"layers": ["net.stem", "net.c*"]},
    "diagonals": {"measures": ("hessian_trace",)},
    "training data": {"data": "train"},
    "part of the training data": {"data": "train", "max_samples": 7},
    "part of the validation data": {"max_samples": 7},
    "data of one's own": {"data": images(3, 5, seed=4)},
    "a loader of one's own": {"data": loader(9), "max_samples": 6},
    "every other epoch": {"every_n_epochs": 2},
    "label smoothing": {"label_smoothing": 0.1, "class_weight": [0.5, 1.0, 2.0, 0.1, 1.5]},
    "hutchinson": {"layers": "all", "residual": "hutchinson", "num_probes": 2},
    "strict": {"strict": True},
    "own batches": {"batch_fn": lambda batch: (batch[0] / 2, batch[1])},
}


def in_one_process() -> Cases:
    found: Cases = {f"fit, {name}": partial(run, flatness(**options)) for name, options in FITS.items()}
    for name, network in {"ResNet": partial(Blocks, add=True), "VGG": vgg, "groups": partial(Net, groups=2)}.items():
        found[f"fit, {name}"] = partial(run, flatness(), network=network)
    found["fit, float32"] = partial(run, flatness(), dtype=torch.float32)
    found["fit, float32, autocast"] = partial(run, flatness(), dtype=torch.float32, precision="bf16-mixed")
    found["fit, float32 measured in float64"] = partial(run, flatness(dtype="float64"), dtype=torch.float32)
    found["fit, without validation"] = partial(run, flatness(data="train"), how="fit without validation")
    found["validate"] = partial(run, flatness(), how="validate")
    found["test"] = partial(run, flatness(layers="all"), how="test")
    found["several loaders"] = partial(run, flatness(), validation=lambda: [loader(10), loader(5, 3)])
    two = flatness(prefix="one"), flatness(prefix="other", data="train", layers="all")
    found["fit, two callbacks"] = partial(run, *two, max_epochs=1)
    found["fit, stopping"] = partial(run, flatness(data="train"), stopping(), max_epochs=8)
    found["fit, stopping on two"] = partial(
        run, flatness(), stopping(monitor=["flatness/hessian_trace", "flatness/relative_flatness"]), max_epochs=8
    )
    found["fit, spectrum"] = partial(run, spectra(every_n_epochs=1))
    found["fit, spectrum of validation data"] = partial(run, spectra(data="val", params="net.conv*", top_k=2))
    for name, options in {
        "random": {"every_n_epochs": 1},
        "adam": {"axes": "adam"},
        "trajectory": {"axes": "trajectory", "batch_norm": "both"},
        "of data": {"data": images(3, 5, seed=4), "axes": ["hessian"], "max_samples": None},
    }.items():
        found[f"fit, landscape, {name}"] = partial(
            run, landscapes(**options), network=partial(Net, act="SiLU"), optimizer=torch.optim.Adam
        )
    return found


# ----------------------------------------------------------------------------------------------------- two processes


def own(batches: list[Any]) -> list[Any]:
    return batches[distributed.get_rank() :: RANKS]


def plain(measure: Callable[..., Any], **options: Any) -> Any:
    """Measure a network in plain PyTorch, where every rank has its own batches."""
    return measure(made(CURVED), own(images(4, 3, 2)), **options)


ON_RANKS: Cases = {
    "ranks, fit": partial(run, flatness(model="net"), strategy="ddp", devices=RANKS),
    "ranks, fit, all layers": partial(run, flatness(layers="all", data="train"), strategy="ddp", devices=RANKS),
    "ranks, fit, spectrum and landscape": partial(
        run, spectra(), landscapes(), strategy="ddp", devices=RANKS, max_epochs=1
    ),
    "ranks, flatness": partial(plain, lf.measure_flatness, layers="all"),
    "ranks, spectrum": partial(plain, spectrum),
    "ranks, landscape": partial(plain, landscape),
}


def on_this_rank(folder: Path, flat: Callable[[Any], dict[str, Any]]) -> int:
    """Run all cases for several ranks in this process, and write the results to ``{rank}.json`` in the folder.

    The first case is a Trainer with DDP, which opens the process group for the cases after it.
    """
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {name: flat(case()) for name, case in ON_RANKS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
    return 0


@cache
def of_all_ranks() -> dict[str, Any]:
    """Run the cases on two ranks, and return a list of results for every case, with an entry for every rank.

    The processes are started only in the first call.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = []
        for rank in range(RANKS):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with (folder / f"{rank}.txt").open("w") as log:
                command = [sys.executable, "-m", "benchmarks.numbers", "rank", name]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + 120
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError("\n".join((folder / f"{rank}.txt").read_text()[-2000:] for rank in range(RANKS)))
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {name: [found[name] for found in ranks] for name in ON_RANKS}


def in_two_processes(name: str) -> dict[str, Any]:
    return {
        key if rank == 0 else f"{key} on rank {rank}": value
        for rank, found in enumerate(of_all_ranks()[name])
        for key, value in found.items()
    }


def cases() -> Cases:
    """Return all cases with Trainers by name, and those on two ranks."""
    return {**in_one_process(), **{name: partial(in_two_processes, name) for name in ON_RANKS}}
