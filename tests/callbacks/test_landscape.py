"""The landscape in a Trainer: its axes, its files, and what is left of it after an interrupt or an error."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.model.points import Points
from tests.callbacks.epoch_end_runs import epochs, fit
from tests.callbacks.lightning_modules import Classifier, dataset
from tests.guarding import guards


class WithAdam(Classifier):
    def __init__(self, kind=torch.optim.Adam):
        super().__init__()
        self.kind = kind

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    "axes", ["random", "hessian", ["random"], pytest.param(["hessian", "random"], marks=pytest.mark.slow)]
)
def test_losses_are_those_around_the_weights_that_are_left(tmp_path, axes):
    batch = dataset(8)[:]
    callback, module = lf.LandscapeCallback([batch], axes=axes, steps=3), Classifier()
    fit(tmp_path, callback, module=module)
    expected = lf.loss_landscape(module, [batch], axes=axes, steps=3)
    assert_close(callback.results["kept"].losses, expected.losses, rtol=0, atol=0)
    with torch.no_grad():
        own = nn.functional.cross_entropy(module.eval()(batch[0]), batch[1])
    assert_close(callback.history[-1]["loss"], float(own))


@pytest.mark.parametrize("update", ["add", "adam"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_adam_axes_are_the_moments_of_the_optimizer(tmp_path, kind, update):
    batch = dataset(8)[:]
    callback, module = lf.LandscapeCallback([batch], axes=["adam"], update=update, steps=3), WithAdam(kind)
    trainer = fit(tmp_path, callback, module=module)
    (optimizer,) = trainer.optimizers
    moments = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in module.named_parameters()}
    if update == "add":
        expected = lf.loss_landscape(module, [batch], axes=[moments], normalize="none", steps=3)
        assert_close(callback.results["kept"].losses, expected.losses)
        return
    after = Classifier()
    after.load_state_dict(module.state_dict())
    for name, parameter in after.named_parameters():
        state = optimizer.state[dict(module.named_parameters())[name]]
        parameter.data += state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(after.eval()(batch[0]), batch[1])
    assert_close(callback.results["kept"].losses[-1], expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_an_optimizer_without_moments_is_refused_before_the_first_epoch(tmp_path, kind):
    module = WithAdam(kind)
    with pytest.raises(lf.FlatnessError, match=f"LandscapeCallback: axes='adam'.*{kind.__name__} keeps none"):
        fit(tmp_path, lf.LandscapeCallback(axes="adam"), module=module)
    assert module.training_steps == 0


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    class Other(WithAdam):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.other(batch[0].mean()[None]).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.other.parameters())

    with pytest.raises(
        lf.FlatnessError, match="LandscapeCallback: axes='adam': no optimizer of the Trainer .Adam. has parameters"
    ):
        fit(tmp_path, lf.LandscapeCallback(axes="adam", model="net"), module=Other())


def test_of_several_optimizers_that_of_the_network_counts(tmp_path):
    class Two(WithAdam):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            _, optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.other.parameters(), lr=0.1), torch.optim.Adam(self.net.parameters())]

    callback = lf.LandscapeCallback(axes="adam", model="net", steps=2)
    fit(tmp_path, callback, module=Two())
    assert callback.results["kept"].axes == ("exp_avg", "exp_avg_sq")


def test_all_optimizers_with_moments_of_the_network_count(tmp_path):
    class Parts(WithAdam):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first, second, *others = self.net.parameters()
            kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
            groups = ([first], [second], others)
            return [kind(group, lr=0.01) for kind, group in zip(kinds, groups, strict=True)]

    batch, module = dataset(8)[:], Parts()
    callback = lf.LandscapeCallback([batch], axes=["adam"], steps=3)
    trainer = fit(tmp_path, callback, module=module)
    state = {key: value for optimizer in trainer.optimizers for key, value in optimizer.state.items()}
    moments = {name: state[p]["exp_avg"] for name, p in module.named_parameters() if "exp_avg" in state.get(p, {})}
    assert len(moments) == len(list(module.parameters())) - 1
    expected = lf.loss_landscape(module, [batch], axes=[moments], normalize="none", steps=3)
    assert_close(callback.results["kept"].losses, expected.losses)


def test_both_statistics(tmp_path):
    batch = dataset(8)[:]
    callback, module = lf.LandscapeCallback([batch], steps=3, batch_norm="both"), Classifier()
    fit(tmp_path, callback, module=module)
    for name in ("kept", "recomputed"):
        expected = lf.loss_landscape(module, [batch], steps=3, batch_norm=name)
        assert_close(callback.results[name].losses, expected.losses, rtol=0, atol=0)
    assert not torch.equal(*(result.losses for result in callback.results.values()))


@guards("callbacks/trajectory.py", ", copy=True", "")
def test_the_trajectory_is_that_of_the_weights(tmp_path):
    states = []

    class Kept(Classifier):
        def on_train_start(self):
            self.on_train_epoch_end()

        def on_train_epoch_end(self):
            states.append({key: value.clone() for key, value in self.state_dict().items()})

    callback, module = lf.LandscapeCallback(axes="trajectory", steps=4), Kept()
    fit(tmp_path, callback, module=module, logger=TensorBoardLogger(tmp_path, name=""))
    expected = lf.pca_directions(module, states)
    (path,) = (tmp_path / "version_0" / "landscape").glob("*-trajectory.npz")
    with np.load(path, allow_pickle=False) as file:
        coordinates = torch.from_numpy(file["coordinates"])
        assert_close(torch.from_numpy(file["explained"]), expected.explained)
    assert_close(coordinates, expected.coordinates)
    assert_close(lf.TrajectoryResult.load(path).coordinates, expected.coordinates)
    with pytest.raises(lf.FlatnessError, match="There is a TrajectoryResult in .*, not a LandscapeResult"):
        lf.LandscapeResult.load(path)
    result = callback.results["kept"]
    for axis, of_states in zip(result.coordinates, coordinates.T, strict=True):
        assert axis[0] < of_states.min() <= 0 <= of_states.max() < axis[-1]
    assert_close(coordinates[-1], torch.zeros(2, dtype=coordinates.dtype))
    assert result.axes[0] == f"principal direction 1 ({100 * float(expected.explained[0]):.0f} %)"
    seen = EventAccumulator(str(tmp_path / "version_0")).Reload().Tags()["images"]
    assert seen == ["landscape/contour", "landscape/surface"]


def test_a_trajectory_of_every_epoch_begins_when_it_spans_a_plane(tmp_path):
    callback = lf.LandscapeCallback(axes="trajectory", steps=2, every_n_epochs=1)
    fit(tmp_path, callback)
    assert epochs(callback) == [1, 2]
    assert not callback._trajectory._states  # let go of after the fit


def test_a_trajectory_of_one_epoch_is_warned_of(tmp_path):
    callback = lf.LandscapeCallback(axes="trajectory", steps=2)
    with pytest.warns(UserWarning, match="needs two epochs at least"):
        fit(tmp_path, callback, max_epochs=1)
    assert not callback.history


class Diverges(Classifier):
    """Its weights are NaN from the end of an epoch on."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_train_batch_end(self, *_):
        if self.current_epoch >= self.epoch:
            next(self.net.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize(("epoch", "drawn"), [(0, []), (2, [1])])
def test_a_trajectory_of_a_run_that_diverged_is_warned_of(tmp_path, epoch, drawn):
    callback = lf.LandscapeCallback(axes="trajectory", steps=2, every_n_epochs=1)
    with pytest.warns(
        UserWarning,
        match=f"the weights after {epoch + 1} epochs? of this fit are not finite: the training has diverged",
    ):
        fit(tmp_path, callback, module=Diverges(epoch))
    assert epochs(callback) == drawn


@pytest.fixture
def after_five_points(monkeypatch):
    """An error, or Ctrl-C, when the fifth point is computed."""

    def arrange(error):
        count = iter(range(100))
        at = Points.at

        def failing(self, coordinates):
            if next(count) == 5:
                raise error
            return at(self, coordinates)

        monkeypatch.setattr(Points, "at", failing)
        monkeypatch.setattr("lightning_flatness.measure.loss_sums.CHUNK", 1)
        monkeypatch.setattr(lf.LandscapeCallback, "_try", lambda *_: None)

    return arrange


@pytest.mark.usefixtures("sigint_kept")
def test_an_interrupt_at_the_end_keeps_what_was_computed(tmp_path, after_five_points):
    after_five_points(KeyboardInterrupt())
    callback = lf.LandscapeCallback(steps=3, batch_norm="both")
    fit(tmp_path, callback)
    assert not callback.history[-1]["complete"]
    (path,) = (tmp_path / "lightning_logs" / "version_0" / "landscape").iterdir()  # the second is not begun
    assert lf.LandscapeResult.load(path).computed.sum() == 5


@guards("callbacks/epoch_end.py", "if self._is_interrupted and not final:", "if False:")
@pytest.mark.usefixtures("sigint_kept")
def test_an_interrupt_in_training_ends_it_and_keeps_what_was_computed(tmp_path, after_five_points):
    after_five_points(KeyboardInterrupt())
    callback, module = lf.LandscapeCallback(steps=3, every_n_epochs=1), Classifier()
    with contextlib.suppress(SystemExit):  # of recent Lightning; older ones return
        fit(tmp_path, callback, module=module)
    assert module.training_steps == 4
    (path,) = (tmp_path / "lightning_logs" / "version_0" / "landscape").iterdir()
    assert lf.LandscapeResult.load(path).computed.sum() == 5


@guards("callbacks/epoch_end.py", "except LandscapeError:", "except ZeroDivisionError:")
def test_an_error_at_a_point_keeps_what_was_computed(tmp_path, after_five_points):
    after_five_points(RuntimeError("no memory"))
    with pytest.raises(lf.LandscapeError, match="no memory"):
        fit(tmp_path, lf.LandscapeCallback(steps=3))
    (path,) = (tmp_path / "lightning_logs" / "version_0" / "landscape").iterdir()
    assert lf.LandscapeResult.load(path).computed.sum() == 5


@pytest.mark.parametrize("axes", [["random"], "trajectory"], ids=str)
def test_after_errors_the_results_are_still_those_of_the_history(tmp_path, monkeypatch, axes):
    callback, module, at = (
        lf.LandscapeCallback(axes=axes, steps=2, every_n_epochs=1, on_error="warn"),
        Classifier(),
        Points.at,
    )

    def failing(self, coordinates):
        if module.current_epoch > 1:
            raise RuntimeError("no memory")
        return at(self, coordinates)

    monkeypatch.setattr(Points, "at", failing)
    with pytest.warns(UserWarning, match="no memory") as caught:
        fit(tmp_path, callback, module=module)
    assert not any("belong to the final weights" in str(one.message) for one in caught)
    assert epochs(callback)[-1] == 1
    assert callback.results["kept"].complete
    assert callback.results["kept"].origin_loss == callback.history[-1]["loss"]
    assert axes == ["random"] or len(callback.trajectory) == 1 + 2  # the initial weights, and those of two epochs


def test_points_without_a_finite_loss_are_drawn(tmp_path):
    callback = lf.LandscapeCallback(axes=["random", "random"], span=1e38, normalize="none", steps=3)
    with pytest.warns(UserWarning, match="no finite loss"):
        fit(tmp_path, callback, logger=TensorBoardLogger(tmp_path, name=""))
    assert "landscape/contour" in EventAccumulator(str(tmp_path / "version_0")).Reload().Tags()["images"]


def test_weights_that_are_not_finite_leave_a_record_of_json(tmp_path):
    module, callback = Classifier(), lf.LandscapeCallback([dataset(8)[:]], steps=2, figures=False)
    next(module.parameters()).data.fill_(math.nan)
    with pytest.warns(UserWarning, match="training has diverged"):
        fit(tmp_path, callback, module=module, max_epochs=1)
    assert json.loads(json.dumps(callback.history[-1], allow_nan=False))["accuracy"] is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"axes": "pca"}, "pca"),
        ({"axes": ["random"] * 3}, "length 3"),
        ({"axes": [{"weight": torch.ones(1)}]}, "takes strings only"),
        ({"axes": None}, "LandscapeCallback: axes=None: .*takes strings only"),
        ({"axes": "foo"}, "axes='foo' must be one of 'random', 'adam', 'hessian', .*or 'trajectory'"),
        ({"axes": ["trajectory"]}, "must be one of 'random', 'adam', 'hessian', .*or 'trajectory'"),
        ({"axes": ["random", "trajectory"]}, "or 'trajectory'"),
        ({"steps": 1}, "steps=1"),
        ({"span": -1.0}, "span=-1.0"),
        ({"normalize": "kernel"}, "normalize='kernel'"),
        ({"norm": 3}, "norm=3"),
        ({"update": "adam"}, "update='adam' takes axes='adam'"),
        ({"batch_norm": "all"}, "batch_norm='all'"),
        ({"cap": 0}, "LandscapeCallback: cap=0 must be a positive number"),
    ],
    ids=str,
)
def test_wrong_options(options, named):
    with pytest.raises(lf.FlatnessError, match=named):
        lf.LandscapeCallback(**options)


@pytest.mark.parametrize(("frozen", "named"), [("nothing", "matches no"), ("*", "freezes all")])
def test_wrong_names_are_refused_before_the_first_epoch(tmp_path, frozen, named):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match=named):
        fit(tmp_path, lf.LandscapeCallback(frozen=frozen), module=module)
    assert module.training_steps == 0


def test_class_weights(tmp_path):
    batch = dataset(8)[:]
    callback, module = lf.LandscapeCallback([batch], steps=2, class_weight=[1.0, 2.0, 0.0]), Classifier()
    fit(tmp_path, callback, module=module, max_epochs=1)
    with torch.no_grad():
        own = nn.functional.cross_entropy(module.eval()(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 0.0]))
    assert_close(callback.history[-1]["loss"], float(own))
