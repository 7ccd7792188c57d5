"""The example of comparisons runs, smaller than by hand, and leaves what it says."""

import importlib.util
from pathlib import Path

import pytest

import lightning_flatness as lf

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_compare(tmp_path, capsys):
    pytest.importorskip("sklearn")
    small = ["--networks", "2", "--num-train", "64", "--target", "1.5", "--max-steps", "40"]
    found = example("compare").main([*small, "--out", str(tmp_path)])
    assert lf.Comparison.load(tmp_path / "comparison.npz").to_dict() == found.to_dict()
    assert found.is_paired
    assert found.exact
    assert [caution.kind for caution in found.cautions if caution.kind != "train_loss"] == ["few_models"]
    assert {"comparison.png", "gap.png"} < {path.name for path in tmp_path.iterdir()}
    assert "Kendall's τ with loss gap" in capsys.readouterr().out
