"""Lightning starts the processes itself."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.lightning_modules import TwoLayerNet, dataset
from tests.distributed.ranks import environment, run_processes

SCRIPT = Path(__file__).parent / "launched.py"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_logged_is_what_one_process_measures(strategy, tmp_path):
    file = tmp_path / "found.pt"
    codes = run_processes([[sys.executable, str(SCRIPT), strategy, str(file)]], [environment()], tmp_path, seconds=300)
    assert codes == [0], (tmp_path / "stderr.0.txt").read_text()[-3000:]
    found = torch.load(file)
    net = TwoLayerNet().double()
    net.load_state_dict(found["weights"])
    report = lf.measure_flatness(net, [(x.double(), y) for x, y in DataLoader(dataset(11, 1), 5)])
    for name in ("hessian_trace", "relative_flatness", "weight_norm"):
        wanted = torch.tensor(getattr(report, name), dtype=torch.float64)
        assert_close(found["logged"][f"flatness/{name}"], wanted, rtol=1e-12, atol=0.0)
