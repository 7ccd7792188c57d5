"""Weights that another wrapper has given longer names are loaded, with a note."""

import pytest
import torch
from torch import nn

from lightning_flatness.cli.checkpoints import read_checkpoint
from lightning_flatness.cli.weights import load_weights
from lightning_flatness.errors import FlatnessError
from tests.cli import project

WRAPPED = {
    "DataParallel": (lambda name: f"module.{name}", ""),
    "compiled": (lambda name: f"_orig_mod.{name}", ""),
    "both": (lambda name: f"module._orig_mod.{name}", ""),
    "a compiled part": (lambda name: name.replace(".", "._orig_mod."), ""),
    "its own module": (lambda name: f"module.module.{name}", "module."),
}


def state_of(model, rename):
    """The state dict as a wrapper writes it, with the versions of modules."""
    state = model.state_dict()
    renamed = type(state)((rename(name), tensor) for name, tensor in state.items())
    renamed._metadata = {rename(f"{name}.")[:-1] if name else "": entry for name, entry in state._metadata.items()}
    return renamed


@pytest.mark.parametrize("name", WRAPPED)
def test_longer_names(tmp_path, name):
    rename, within = WRAPPED[name]
    trained, built = project.versioned(), project.versioned()
    torch.save(state_of(trained, rename), tmp_path / "model.pt")
    model = nn.ModuleDict({"module": built}) if within else built
    note = load_weights(model, read_checkpoint(tmp_path / "model.pt"))
    torch.testing.assert_close(built.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert f"'{rename('0.weight')}' is '{within}0.weight' in the {type(model).__name__}" in note


def test_a_model_that_is_compiled_itself(tmp_path):
    trained, built = project.layers(2), torch.compile(project.layers(2))
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    assert load_weights(built, read_checkpoint(tmp_path / "model.pt"))
    torch.testing.assert_close(built._orig_mod.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_names_that_do_not_all_fit_are_refused(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in project.layers(2).state_dict().items()}
    state["module.0.bias2"] = state.pop("module.0.bias")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(FlatnessError, match="does not fit the Sequential"):
        load_weights(project.layers(2), read_checkpoint(tmp_path / "model.pt"))


class OfText(nn.Module):
    """Was given the text of a class, since its argument has no annotation."""

    def __init__(self):
        super().__init__()
        self.net = "project.Net"


def test_a_text_in_place_of_a_module_is_told(tmp_path):
    torch.save({"net.weight": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(FlatnessError, match=r"Its 'net' is the text 'project\.Net'.*annotate .* net: nn\.Module\."):
        load_weights(OfText(), read_checkpoint(tmp_path / "model.pt"))
