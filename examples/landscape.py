"""Train a small CNN on handwritten digits; measure the spectrum of its Hessian and the loss around its weights.

    python examples/landscape.py [--max-epochs 12] [--steps 25] [--out runs/landscape]

It takes one or two minutes on two CPU cores, and nothing is downloaded. Afterwards:

    tensorboard --logdir runs/landscape
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from digits import DigitsClassifier, load_data
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.plots import (
    plot_contour,
    plot_density,
    plot_eigenvalues,
    plot_kept_and_recomputed,
    plot_line,
    plot_surface,
)


class WithAdam(DigitsClassifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=21, help="points along every axis")
    parser.add_argument("--samples", type=int, default=128, help="of the training data")
    parser.add_argument("--out", type=Path, default=Path("runs/landscape"))
    options = parser.parse_args()

    L.seed_everything(0)
    train, val = load_data()
    spectrum = lf.SpectrumCallback(max_samples=options.samples, every_n_epochs=3, top_k=3, num_steps=30, num_probes=3)
    around = {"max_samples": options.samples, "steps": options.steps}
    random = lf.LandscapeCallback(**around, batch_norm="both")
    trajectory = lf.LandscapeCallback(**around, axes="trajectory", batch_norm="recomputed", prefix="trajectory")
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[spectrum, random, trajectory],
        logger=TensorBoardLogger(options.out, name=None, default_hp_metric=False),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
    )
    model = WithAdam()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256))

    # After training, in plain PyTorch: the loss along an eigenvector, and along Adam's moments.
    batches = [next(iter(DataLoader(train, options.samples)))]
    line = lf.loss_landscape(model, batches, axes=["hessian"], steps=41)
    adam = lf.loss_landscape(
        model, batches, axes="adam", normalize="filter", steps=options.steps, optimizer=trainer.optimizers[0]
    )

    kept, recomputed = random.results["kept"], random.results["recomputed"]
    plane = trajectory.results["recomputed"]
    both = Figure(figsize=(9.2, 4.0), layout="constrained")
    plot_surface(kept, log=True, data="train", ax=both.add_subplot(1, 2, 1, projection="3d"))
    plot_contour(plane, trajectory=trajectory.trajectory, data="train", ax=both.add_subplot(1, 2, 2))
    figures = {
        "landscape": (both, None),
        "density": plot_density(spectrum.result, data="train"),
        "eigenvalues": plot_eigenvalues(spectrum.history, data="train"),
        "surface": plot_surface(kept, log=True, data="train"),
        "batch_norm": plot_kept_and_recomputed(kept, recomputed, data="train"),
        "adam": plot_contour(adam, data="train"),
        "hessian": plot_line(line, data="train"),
    }
    for name, (figure, _) in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=150)
    console = Console()
    console.print(spectrum.result.table())
    console.print(str(kept))
    console.print(f"Pictures and files: {options.out}\nMore: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    main()
