"""Two callbacks of a Trainer cannot have one prefix: the error says how to tell them apart."""

import itertools

import pytest
import torch

import lightning_flatness as lf
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.guarding import guards

MAKE = {"flatness": lambda **options: lf.FlatnessCallback(**{"summary": False} | options), **KINDS}
OURS = MAKE | {"penalty": lf.FlatnessPenalty}


@guards("callbacks/base.py", "return key if self._is_checked else UncheckedKey(key)", "return key")
@pytest.mark.parametrize("kind", MAKE)
def test_two_of_a_kind_are_refused_by_the_trainer(tmp_path, kind):
    with pytest.raises(
        lf.FlatnessError, match=r"Two callbacks of the class \w+ have the same prefix='one'.*prefix='one_2'"
    ):
        quiet_trainer(tmp_path, MAKE[kind](prefix="one"), MAKE[kind](prefix="one"))


def test_one_callback_twice_is_refused(tmp_path):
    callback = MAKE["flatness"]()
    with pytest.raises(lf.FlatnessError, match="prefix='flatness'"):
        quiet_trainer(tmp_path, callback, callback)


@guards("callbacks.prefixes:check_prefix", returns=None)
@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(OURS, 2), ("penalty", "penalty")])
def test_two_kinds_are_refused_before_training(tmp_path, one, other):
    module = Classifier()
    trainer = quiet_trainer(tmp_path, OURS[one](prefix="same"), OURS[other](prefix="same"))
    who = "Two callbacks of the class FlatnessPenalty" if one == other else r"\w+ and \w+"
    with pytest.raises(lf.FlatnessError, match=f"^{who} have the same prefix='same', so both would log under the same"):
        trainer.fit(module, *loaders())
    assert module.training_steps == 0


def test_two_that_the_module_brings_are_refused(tmp_path):
    class WithCallbacks(Classifier):
        def configure_callbacks(self):
            return [MAKE["flatness"](), MAKE["flatness"](data="train")]

    with pytest.raises(lf.FlatnessError, match="prefix='flatness'"):
        quiet_trainer(tmp_path).fit(WithCallbacks(), *loaders())


def test_prefixes_of_their_own(tmp_path):
    callbacks = [MAKE["flatness"](), MAKE["flatness"](prefix="other"), KINDS["spectrum"](), KINDS["landscape"]()]
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=1)
    trainer.fit(Classifier(), *loaders())
    assert {callback.state_key for callback in callbacks} == {
        "FlatnessCallback[prefix=flatness]",
        "FlatnessCallback[prefix=other]",
        "SpectrumCallback[prefix=spectrum]",
        "LandscapeCallback[prefix=landscape]",
    }


def test_a_callback_serves_several_trainers(tmp_path):
    callback = MAKE["flatness"]()
    for _ in range(2):
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), *loaders())
    assert [record["epoch"] for record in callback.history] == [0]


@guards(
    "callbacks/base.py",
    "self._is_checked = True  # Lightning writes the state key to a checkpoint next, as a plain string",
    "pass",
)
def test_keys_in_checkpoints_are_plain(tmp_path):
    """Also in one that is written before a run."""
    callback = MAKE["flatness"]()
    trainer = quiet_trainer(tmp_path, callback)
    trainer.strategy.connect(Classifier())
    trainer.save_checkpoint(tmp_path / "before.ckpt", weights_only=False)
    kept = torch.load(tmp_path / "before.ckpt", weights_only=True)["callbacks"]
    assert [type(key) for key in kept] == [str]
    assert kept[lf.FlatnessCallback().state_key] == {"history": []}


@pytest.mark.parametrize("kind", ["spectrum", "landscape"])
@guards("callbacks/prefixes.py", "and not gives_way", "")
def test_a_callback_that_the_environment_asks_for_gives_way(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("LIGHTNING_FLATNESS", "1")
    own = KINDS[kind](prefix="flatness", every_n_epochs=1)
    trainer = quiet_trainer(tmp_path, own, max_epochs=1)
    trainer.fit(Classifier(), *loaders())
    assert trainer.callbacks == [own]
    assert len(own.history) == 1
