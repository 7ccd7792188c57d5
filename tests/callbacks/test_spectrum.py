"""The spectrum in a Trainer: its numbers, its keys, its warnings."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.testing import assert_close

import lightning_flatness as lf
from lightning_flatness.callbacks import epoch_end
from lightning_flatness.plots import plot_eigenvalues
from tests.callbacks.epoch_end_runs import epochs, fit
from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer
from tests.callbacks.training_runs import HAS_WEIGHT_AVERAGING, averaged_weights
from tests.guarding import guards
from tests.spectra import dense_hessian

TINY = {"top_k": 2, "num_steps": 4, "num_probes": 2}
KEYS = {
    f"spectrum/{name}" for name in ("lambda_max", "trace", "trace_stderr", "r_e", "k_hn", "c_t", "exact", "seconds")
}


@pytest.mark.slow
def test_numbers_are_those_of_the_dense_hessian_of_the_weights_that_are_left(tmp_path):
    x, y = dataset(8, dtype=torch.float64)[:]
    callback = lf.SpectrumCallback(
        [(x[:5], y[:5]), (x[5:], y[5:])], top_k=2, num_steps=120, num_probes=3, dtype="float64"
    )
    module = Classifier()
    fit(tmp_path, callback, module=module)
    matrix = dense_hessian(module.net.double(), x, y)
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)
    assert_close(callback.result.eigenvalues, eigenvalues[:2], rtol=1e-7, atol=0)
    record = callback.history[-1]
    assert_close(record["lambda_max"], float(eigenvalues[0]), rtol=1e-7, atol=0)
    assert_close(record["c_t"], float(eigenvalues[-1] / eigenvalues[0]), rtol=1e-6, atol=0)
    assert abs(record["trace"] - float(matrix.trace())) < 5 * record["trace_stderr"] + 1e-12


@pytest.mark.slow
def test_every_epoch_has_its_own_weights(tmp_path):
    weights = []

    class Kept(Classifier):
        def on_train_epoch_end(self):
            weights.append({key: value.clone() for key, value in self.state_dict().items()})

    batch = dataset(8)[:]
    callback = lf.SpectrumCallback([batch], every_n_epochs=1, **TINY)
    fit(tmp_path, callback, module=Kept())
    for state, record in zip(weights, callback.history, strict=True):
        module = Classifier()
        module.load_state_dict(state)
        expected = lf.hessian_spectrum(module, [batch], **TINY)
        assert_close(record["eigenvalues"], expected.eigenvalues.tolist(), rtol=1e-5, atol=0)
        assert_close(record["trace"], expected.trace, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_monitors_see_the_keys_in_the_same_epoch(tmp_path):
    callback = lf.SpectrumCallback(every_n_epochs=1, **TINY)
    best = ModelCheckpoint(tmp_path, monitor="spectrum/lambda_max", mode="max", filename="best")
    early = EarlyStopping("spectrum/trace", patience=9, check_finite=True)
    trainer = fit(tmp_path, best, early, callback)
    assert {key for key in trainer.callback_metrics if key.startswith("spectrum/")} == KEYS
    assert float(best.best_model_score) == max(record["lambda_max"] for record in callback.history)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
def test_monitors_that_look_before_it_are_warned_of(tmp_path, options):
    def run(monitor, name):
        callback = lf.SpectrumCallback(every_n_epochs=1, **TINY)
        best = ModelCheckpoint(tmp_path / name, monitor=monitor, save_on_train_epoch_end=True)
        fit(tmp_path, best, callback, **options)
        return best, callback

    with pytest.warns(UserWarning, match="ModelCheckpoint: 'spectrum/...' is measured at the end of epochs"):
        best, callback = run("spectrum/lambda_max", "a")
    assert_close(float(best.best_model_score), min(record["lambda_max"] for record in callback.history))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is measured at the end of epochs")
        run("val_acc", "b")


@pytest.mark.slow
@guards("callbacks/epoch_end.py", "elif self.history and self.every_n_epochs is not None:", "elif False:")
def test_a_resumed_run_where_nothing_is_due_has_the_last_values(tmp_path):
    fit(tmp_path, lf.SpectrumCallback(every_n_epochs=3, **TINY), ModelCheckpoint(tmp_path, filename="e"), max_epochs=1)
    callback = lf.SpectrumCallback(every_n_epochs=3, **TINY)
    best = ModelCheckpoint(tmp_path / "b", monitor="spectrum/lambda_max")
    trainer = quiet_trainer(tmp_path, callback, best, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "e.ckpt")
    assert_close(float(trainer.callback_metrics["spectrum/trace"]), callback.history[0]["trace"])


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1])
def test_loggers_get_the_end_of_the_fit(tmp_path, every):
    callback = lf.SpectrumCallback(every_n_epochs=every, **TINY)
    fit(tmp_path, callback, logger=CSVLogger(tmp_path, name=""))
    lines = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row.get("spectrum/trace")]
    assert [int(row["step"]) for row in rows] == ([11] if every is None else [3, 7, 11])
    assert all(row.keys() >= KEYS for row in rows)
    assert_close(float(rows[-1]["spectrum/trace"]), callback.history[-1]["trace"], rtol=1e-5, atol=0)


def test_without_eigenvalues(tmp_path):
    callback = lf.SpectrumCallback(every_n_epochs=1, top_k=0, num_steps=4, num_probes=1)
    trainer = fit(tmp_path, callback)
    assert "spectrum/lambda_max" not in trainer.callback_metrics
    assert "trace" in callback.history[0]
    assert callback.history[0]["lambda_max"] is None


@pytest.mark.slow
def test_eigenvalues_alone(tmp_path):
    callback = lf.SpectrumCallback(every_n_epochs=1, top_k=2, num_probes=0)
    trainer = fit(tmp_path, callback)
    logged = {key for key in trainer.callback_metrics if key.startswith("spectrum/")}
    assert logged == {"spectrum/lambda_max", "spectrum/exact", "spectrum/seconds"}
    assert callback.history[0]["trace"] is callback.history[0]["lowest_ritz_value"] is None
    seconds = float(trainer.callback_metrics["spectrum/seconds"])
    assert_close(callback.history[-1]["seconds"], seconds, rtol=1e-5, atol=0)
    plot_eigenvalues(callback.history)
    assert list(callback._figures()) == ["eigenvalues"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SpectrumCallback", "LandscapeCallback"])
def test_what_it_will_take_is_said_once_a_run(tmp_path, name, monkeypatch):
    said = []
    monkeypatch.setattr(epoch_end, "rank_zero_info", said.append)
    options = TINY if name == "SpectrumCallback" else {"steps": 2}
    callback = getattr(lf, name)(every_n_epochs=1, **options)
    fit(tmp_path, callback, max_epochs=2)
    assert len(callback.history) == 2
    begin, after = said
    assert " takes " in begin
    assert " will take about " in after
    assert all(record["seconds"] > 0 for record in callback.history)


@pytest.mark.parametrize("wanted", [False, True])
def test_eigenvectors_in_files_are_asked_for(tmp_path, wanted):
    callback = lf.SpectrumCallback(eigenvectors=wanted, **TINY)
    fit(tmp_path, callback)
    (path,) = (tmp_path / "lightning_logs" / "version_0" / "spectrum").iterdir()
    found = lf.SpectrumResult.load(path)
    assert len(found.eigenvectors) == (2 if wanted else 0)
    assert len(callback.result.eigenvectors) == 2
    assert_close(found.eigenvalues, callback.result.eigenvalues, rtol=0, atol=0)


@pytest.mark.slow
def test_gradient_clipping_is_warned_of_once(tmp_path):
    with pytest.warns(UserWarning, match="gradients are clipped.*arXiv 2504.17618") as caught:
        fit(tmp_path, lf.SpectrumCallback(every_n_epochs=1, **TINY), gradient_clip_val=0.5)
    assert len([warning for warning in caught if "SpectrumCallback" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SpectrumCallback")
        fit(tmp_path, lf.SpectrumCallback(**TINY))


@pytest.mark.skipif(not HAS_WEIGHT_AVERAGING, reason="this Lightning has no WeightAveraging")
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging(tmp_path, first):
    trained = {}

    class Kept(Classifier):
        def on_train_epoch_end(self):
            trained.update({key: value.clone() for key, value in self.state_dict().items()})

    batch = dataset(8)[:]
    callback = lf.SpectrumCallback([batch], every_n_epochs=1, **TINY)
    module = Kept()
    fit(tmp_path, *([averaged_weights(), callback] if first else [callback, averaged_weights()]), module=module)
    other = Classifier()
    other.load_state_dict(trained)
    of_trained, of_left = (lf.hessian_spectrum(network, [batch], **TINY).trace for network in (other, module))
    assert abs(of_trained - of_left) > 1e-3
    assert epochs(callback) == [0, 1, 2, 2]
    assert_close(callback.history[2]["trace"], of_trained)
    assert_close(callback.history[-1]["trace"], of_left)
    assert len(list((tmp_path / "lightning_logs" / "version_0" / "spectrum").glob("*-averaged.npz"))) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [({"top_k": -1}, "top_k"), ({"num_steps": 0}, "num_steps"), ({"matrix": "fisher"}, "matrix")],
    ids=str,
)
def test_wrong_options(options, named):
    with pytest.raises(lf.FlatnessError, match=named):
        lf.SpectrumCallback(**options)


@guards("callbacks/epoch_end.py", "self._try(trainer, self._model_of(pl_module), batches)", "pass")
def test_unknown_parameters_are_refused_before_the_first_epoch(tmp_path):
    module = Classifier()
    with pytest.raises(lf.LayerSelectionError, match="conv9"):
        fit(tmp_path, lf.SpectrumCallback(params="net.conv9.*", **TINY), module=module)
    assert module.training_steps == 0


def test_a_history_is_drawn_like_results():
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    result = lf.hessian_spectrum(torch.nn.Linear(3, 2), [(x, y)], top_k=2)
    record = {"epoch": 4, "eigenvalues": result.eigenvalues.tolist()}
    record["lowest_ritz_value"] = float(result.ritz_values.min())
    lines = [
        [line.get_xydata().tolist() for line in plot_eigenvalues([entry])[1].get_lines()]
        for entry in (record, (4, result))
    ]
    assert lines[0] == lines[1]
