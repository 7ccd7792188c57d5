"""Try a package that is installed, not the folder that it came from: python tests/installed.py, from any folder.

It asks the command line for help, which imports no torch. It trains a network with the callback, checks the number, and
writes a page.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import lightning_flatness as lf


def main():
    assert Path(__file__).parents[1] not in Path(lf.__file__).parents, lf.__file__
    assert version("lightning-flatness") == lf.__version__
    assert "torch" not in sys.modules, "import lightning_flatness imports torch"
    assert Path(lf.__file__).with_name("py.typed").exists()
    command = shutil.which("lightning-flatness", path=sysconfig.get_path("scripts"))
    listing = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}  # what is imported, on standard error
    imported = subprocess.run([command, "--help"], check=True, env=listing, capture_output=True, text=True).stderr
    assert re.search(r"\| +lightning_flatness$", imported, re.MULTILINE), "nothing is listed"
    assert not re.search(r"\| +torch$", imported, re.MULTILINE), "lightning-flatness --help imports torch"

    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_flatness.testing import assert_matches_oracle

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            convolution = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            self.net = nn.Sequential(*convolution, nn.Linear(3, 3))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, data = Classifier(), TensorDataset(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    loader = DataLoader(data, batch_size=6)
    flatness = lf.FlatnessCallback(figures=False)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[flatness], default_root_dir=folder).fit(
            model, loader, loader
        )
        page = lf.save_html(Path(folder, "report.html"), flatness.report).read_text(encoding="utf-8")
    assert "net.0" in page
    assert flatness.report.exact
    assert_matches_oracle(model.net, data[:], layer="0")
    sys.stdout.write(f"Works: lightning-flatness {lf.__version__}\n")


if __name__ == "__main__":
    main()
