"""Draw the figures of gallery.md by the code below them: ``make gallery``, some minutes on two CPU cores."""

from __future__ import annotations

import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from examples.compare import SETTINGS, load_data, loss_of, network, trained  # noqa: E402
from examples.digits import DigitsClassifier  # noqa: E402

# A block of code, and the picture above it, if it draws one.
BLOCK = re.compile(r"(?:!\[[^]]*\]\(([^)]+)\)\n\n)?```python\n(.*?)```", flags=re.DOTALL)


class Classifier(DigitsClassifier):
    """The network of examples/compare.py, trained as in examples/digits.py."""

    def __init__(self) -> None:
        super().__init__()
        *features, _, _, self.classifier = network()
        self.features = torch.nn.Sequential(*features)


def names() -> dict[str, Any]:
    """Return what the page uses without defining it: data, a network to train, and ten that are trained."""
    train, test = load_data(600)
    models, gaps = {}, {}
    for batch_size, rate in SETTINGS:
        name = f"b{batch_size} lr{rate:g}"
        models[name] = trained(train, batch_size, rate, target=0.2, max_steps=1500)
        gaps[name] = loss_of(models[name], *test) - loss_of(models[name], *train)
        models[name].eval()
    L.seed_everything(0, verbose=False)
    quiet = {"max_epochs": 10, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    L.Trainer = partial(L.Trainer, default_root_dir=tempfile.mkdtemp(), **quiet)
    return {
        "model": Classifier(),
        "train_loader": DataLoader(TensorDataset(*train), batch_size=64, shuffle=True),
        "val_loader": DataLoader(TensorDataset(*test), batch_size=256),
        "batches": [train],
        "models": models,
        "gaps": gaps,
        "model_a": models["b16 lr0.01"],
        "model_b": models["b64 lr0.16"],
    }


def main() -> None:
    """Run the blocks of the page in their order, and write the figure of each that has a picture."""
    torch.manual_seed(0)
    known = names()
    for picture, code in BLOCK.findall((DOCS / "gallery.md").read_text()):
        exec(compile(code, "gallery.md", "exec"), known)
        if picture:
            known["figure"].savefig(DOCS / picture, dpi=110)


if __name__ == "__main__":
    main()
